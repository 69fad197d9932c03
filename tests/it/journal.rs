//! The state directory from outside: `tallyd journal` beside a daemon, rejected deltas replayed, and
//! damage of which each piece is survived.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::finish;
use crate::support::load::Load;
use crate::support::redis::RedisServer;
use crate::support::resp::Value;

/// Runs `tallyd journal …`: its exit code, and what it wrote.
fn journal(args: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tallyd"));
    let (status, output) = finish(command.arg("journal").args(args), b"");
    (status.code(), output)
}

fn segment(state_dir: &Path, number: u64) -> PathBuf {
    state_dir.join(format!("segments/{number:016}.seg"))
}

fn change(path: &Path, change: impl FnOnce(&mut [u8])) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_rejected_delta_is_replayed_once_its_cause_is_mended() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    client.command(&["INCRBY", "likes:1", "5"]);
    client.command(&["INCRBY", "likes:2", "7"]);
    // After the daemon has looked: it would have refused the increment itself.
    redis.cli(&["SET", "likes:1", "many"]);
    daemon.flush();
    let dir = daemon.state_dir().to_str().unwrap();
    let socket = daemon.socket().to_str().unwrap();
    let (code, output) = journal(&["rejected", dir]);
    assert_eq!((code, output.lines().count()), (Some(0), 1), "{output}");
    assert!(output.contains("\t5\tlikes:1\t"), "{output}");

    redis.cli(&["SET", "likes:1", "100"]);
    let (code, output) = journal(&["replay", dir, "--socket", socket]);
    assert_eq!(
        (code, output.as_str()),
        (Some(0), "1 replayed, 0 refused\n")
    );
    daemon.flush();
    assert_eq!(
        (redis.counter("likes:1"), redis.counter("likes:2")),
        (105, 7)
    );
    let (code, output) = journal(&["replay", dir, "--socket", socket]);
    assert_eq!(
        (code, output.as_str()),
        (Some(0), "0 replayed, 0 refused\n")
    );
    assert_eq!(journal(&["rejected", dir]), (Some(0), String::new()));
}

/// Segments are sealed, shortened and removed all the time while they are looked at.
#[test]
fn verify_and_show_beside_a_busy_daemon_raise_no_false_alarm() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval("2ms")
        .set("flush.retain", "20ms")
        .start();
    let dir = daemon.state_dir().to_str().unwrap();
    let load = Load::start(daemon.socket(), "verify", 4, 50);
    for _ in 0..30 {
        let (code, output) = journal(&["verify", dir]);
        assert_eq!(code, Some(0), "{output}");
        let (code, output) = journal(&["show", dir]);
        assert_eq!(code, Some(0), "{output}");
    }
    load.stop();
}

/// The story: a segment between two others could not be read, and the token named its batch. The
/// next segment's batch, which was never sent, was taken for it, and its deltas were lost; where
/// there was no next segment, flushing stopped as if another daemon were at work.
/// Protection: the flush stage knows numbers of segments that were set aside.
#[test]
fn a_segment_that_was_set_aside_does_not_take_its_neighbours_with_it() {
    for pending in [true, false] {
        let redis = RedisServer::start(&[]);
        let mut daemon = Daemon::builder(redis.url())
            .flush_interval(NEVER)
            .set("flush.retain", NEVER)
            .start();
        let mut client = daemon.client();
        client.command(&["INCRBY", "a", "1"]);
        daemon.flush();
        for key in ["b", "c", "d"] {
            client.command(&["INCRBY", key, "2"]);
        }
        daemon.flush();
        if pending {
            client.command(&["INCRBY", "e", "3"]);
        }
        daemon.kill9();
        // The first record and the table of batches: which of the others was sent with which is lost.
        change(&segment(daemon.state_dir(), 2), |bytes| {
            bytes[4096] ^= 1;
            bytes[4096 + 3 * 32] ^= 1;
        });
        let dir = daemon.state_dir().to_owned();
        let dir = dir.to_str().unwrap();
        let (code, output) = journal(&["verify", dir]);
        assert_eq!(code, Some(74), "{output}");
        assert!(output.contains("0000000000000002.seg"), "{output}");

        daemon.restart();
        let mut client = daemon.client();
        client.command(&["INCRBY", "f", "4"]);
        daemon.flush();
        let values = ["a", "b", "c", "d"].map(|key| redis.counter(key));
        assert_eq!(values, [1, 2, 2, 2]);
        assert_eq!(redis.counter("f"), 4);
        if pending {
            assert_eq!(redis.counter("e"), 3);
        }
        let (code, output) = journal(&["verify", dir]);
        assert_eq!(code, Some(0), "{output}");
        assert!(output.contains("note: "), "{output}");
    }
}

/// The story: the newest segment alone tells how far batches are numbered. With its header gone
/// they began anew at 1, below the token.
/// Protection: lost numbers are not given again.
#[test]
fn a_daemon_that_lost_its_batch_numbers_goes_on() {
    let redis = RedisServer::start(&[]);
    let mut daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    for _ in 0..5 {
        client.command(&["INCR", "a"]);
        daemon.flush();
    }
    client.command(&["INCRBY", "b", "7"]);
    daemon.kill9();
    for number in 1..=5 {
        // Retained for long, or gone by now.
        let _ = fs::remove_file(segment(daemon.state_dir(), number));
    }
    change(&segment(daemon.state_dir(), 6), |bytes| {
        bytes[..4096].fill(0);
    });
    daemon.restart();
    let mut client = daemon.client();
    assert_eq!(client.command(&["GET", "b"]), Value::bulk("7"));
    client.command(&["INCR", "a"]);
    daemon.flush();
    assert_eq!((redis.counter("a"), redis.counter("b")), (6, 7));
    // And once more, with nothing left at all.
    daemon.kill9();
    fs::remove_dir_all(daemon.state_dir().join("segments")).unwrap();
    daemon.restart();
    let mut client = daemon.client();
    client.command(&["INCR", "a"]);
    daemon.flush();
    assert_eq!(redis.counter("a"), 7);
}
