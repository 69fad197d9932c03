//! What the scenarios stand on: real servers, the daemon as a process, a client that hides
//! nothing, a proxy that misbehaves on request.

pub mod daemon;
pub mod disk;
pub mod http;
pub mod load;
pub mod proxy;
pub mod redis;
pub mod resp;
pub mod sentinel;

use std::io::{Read, Seek, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Nothing that a test waits for takes longer than this, unless it is broken.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Waits until `condition` holds; panics with `what` when the limit passes first.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The seed of a random test: a new one each time, or `TALLYD_TEST_SEED` to repeat a failure.
pub fn seed() -> u64 {
    let seed = match std::env::var("TALLYD_TEST_SEED") {
        Ok(text) => text.parse().expect("TALLYD_TEST_SEED is a number"),
        Err(_) => fastrand::u64(..),
    };
    eprintln!("to repeat: TALLYD_TEST_SEED={seed}");
    seed
}

/// A TCP port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port on loopback");
    listener.local_addr().expect("it is bound").port()
}

/// Sends a signal to a child that has not been waited for.
pub fn signal(child: &Child, signal: Signal) {
    // A child that just exited is still ours: its number is not reused before it is waited for.
    kill_process(Pid::from_child(child), signal).expect("our own child");
}

/// Waits for a child to exit; kills it and panics when the limit passes.
#[track_caller]
pub fn wait_exit(child: &mut Child, limit: Duration, what: &str) -> ExitStatus {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("our own child") {
            return status;
        }
        if begin.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{what} did not exit within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a program to its end, within the limit, and gives it `input`: how it exited, and all that
/// it wrote.
#[track_caller]
pub fn finish(command: &mut Command, input: &[u8]) -> (ExitStatus, String) {
    // Files, not pipes: nothing to drain while waiting.
    let mut stdin = tempfile::tempfile().expect("a temporary file");
    stdin
        .write_all(input)
        .and_then(|()| stdin.rewind())
        .expect("room for the input");
    let mut output = tempfile::tempfile().expect("a temporary file");
    let same = |file: &std::fs::File| Stdio::from(file.try_clone().expect("a descriptor"));
    let mut child = command
        .stdin(stdin)
        .stdout(same(&output))
        .stderr(same(&output))
        .spawn()
        .unwrap_or_else(|error| {
            panic!("{command:?}: {error}; tests/run installs what the tests need")
        });
    let status = wait_exit(&mut child, LIMIT, &format!("{command:?}"));
    let mut bytes = Vec::new();
    output
        .rewind()
        .and_then(|()| output.read_to_end(&mut bytes))
        .expect("our own file");
    (status, String::from_utf8_lossy(&bytes).into_owned())
}
