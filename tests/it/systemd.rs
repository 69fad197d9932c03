//! systemd, as far as it can be played: its datagrams, its sockets, its analysis of the units. The
//! units on a real one are tests/package's.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
#[cfg(feature = "fail-points")]
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::daemon::{Daemon, NEVER, Settings};
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value};
use crate::support::{LIMIT, finish, signal, wait_exit, wait_until};

/// A service manager that only listens.
struct Manager {
    socket: UnixDatagram,
    dir: TempDir,
}

impl Manager {
    fn new() -> Self {
        let dir = TempDir::with_prefix("tallyd-manager-").unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        Self { socket, dir }
    }

    fn starts(&self, settings: Settings) -> Settings {
        settings.env("NOTIFY_SOCKET", self.dir.path().join("notify").display())
    }

    /// The next datagram's lines.
    #[track_caller]
    fn next(&self) -> Vec<String> {
        let mut buffer = vec![0; 8192];
        let length = loop {
            match self.socket.recv(&mut buffer) {
                // A process that was stopped for a moment comes back with this.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                received => break received.expect("something is told"),
            }
        };
        let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// All datagrams up to the first with a line that begins so.
    #[track_caller]
    fn until(&self, line: &str) -> Vec<Vec<String>> {
        let mut told = Vec::new();
        loop {
            told.push(self.next());
            let last = told.last().unwrap();
            if last.iter().any(|told| told.starts_with(line)) {
                return told;
            }
            assert!(told.len() < 10_000, "{line} is never told: {told:?}");
        }
    }
}

/// Whether any datagram has a line that begins so.
fn has(told: &[Vec<String>], line: &str) -> bool {
    told.iter().flatten().any(|told| told.starts_with(line))
}

#[test]
fn ready_is_told_when_clients_can_connect_and_what_was_pending_is_there() {
    let manager = Manager::new();
    let mut redis = RedisServer::start(&[]);
    let mut daemon = manager
        .starts(Daemon::builder(redis.url()).flush_interval(NEVER))
        .start();
    manager.until("READY=1");
    let mut client = daemon.client();
    let keys: i64 = 50_000;
    let increments: Vec<u8> = (0..keys)
        .flat_map(|key| crate::support::resp::encode(&["INCRBY", &format!("k{key}"), "7"]))
        .collect();
    let mut stream = client.stream().duplicate();
    let writing = std::thread::spawn(move || std::io::Write::write_all(&mut stream, &increments));
    for _ in 0..keys {
        assert_eq!(client.read().unwrap(), Value::Integer(7));
    }
    writing.join().unwrap().unwrap();
    redis.kill9();
    daemon.kill9();
    // What the first one told of its life before it was killed.
    manager.socket.set_nonblocking(true).unwrap();
    while manager.socket.recv(&mut [0; 8192]).is_ok() {}
    manager.socket.set_nonblocking(false).unwrap();

    let socket = daemon.socket().to_path_buf();
    let told = std::thread::spawn(move || {
        let told = manager.until("READY=1");
        // No second try: it must be so at this very moment.
        let value = Client::unix(&socket).map(|mut client| client.number(&["GET", "k49999"]));
        (told, value)
    });
    daemon.restart();
    let (told, value) = told.join().unwrap();
    assert_eq!(told[0], ["STATUS=recovering"]);
    assert_eq!(value.unwrap(), 7);
}

#[test]
fn a_reload_is_over_when_ready_is_told_again_also_with_a_wrong_file() {
    let manager = Manager::new();
    let config = manager.dir.path().join("tallyd.toml");
    std::fs::write(&config, "").unwrap();
    let mut daemon = manager
        .starts(Daemon::builder("embedded").config(&config))
        .start();
    manager.until("READY=1");
    for (text, said) in [
        ("[log]\nlevel = \"debug\"\n", "reloaded"),
        ("[log]\nlevel = 5\n", "not reloaded: log.level"),
    ] {
        std::fs::write(&config, text).unwrap();
        assert!(!daemon.log().contains(said));
        daemon.signal(Signal::HUP);
        let begun = manager.until("RELOADING=1").pop().unwrap();
        let time = begun[1].strip_prefix("MONOTONIC_USEC=").unwrap();
        assert!(time.parse::<u64>().unwrap() > 0, "{begun:?}");
        manager.until("READY=1");
        assert!(daemon.log().contains(said), "{}", daemon.log());
    }
    assert!(daemon.term().success());
    let rest = manager.until("STOPPING=1");
    assert!(!has(&rest, "READY=1"), "{rest:?}");
}

#[test]
fn a_stop_is_told_and_time_is_asked_for_while_the_last_flush_waits() {
    let manager = Manager::new();
    let mut redis = RedisServer::start(&[]);
    let settings = Daemon::builder(redis.url()).flush_interval(NEVER);
    let mut daemon = manager
        .starts(settings.set("shutdown.timeout", "10m"))
        .start();
    assert_eq!(daemon.client().number(&["INCRBY", "last", "3"]), 3);
    let told = manager.until("STATUS=1 key pending");
    assert!(!has(&told, "STOPPING=1"), "{told:?}");
    assert!(!has(&told, "EXTEND_TIMEOUT_USEC"), "{told:?}");
    redis.pause();
    daemon.signal(Signal::TERM);
    let stopping = manager.until("STOPPING=1").pop().unwrap();
    assert!(has(&[stopping], "EXTEND_TIMEOUT_USEC=10000000"));
    for _ in 0..3 {
        manager.until("EXTEND_TIMEOUT_USEC=10000000");
    }
    // Not while it stops: the service would count as ready again.
    daemon.signal(Signal::HUP);
    redis.resume();
    assert!(daemon.wait_exit().success());
    assert_eq!(redis.counter("last"), 3);
    manager.socket.set_nonblocking(true).unwrap();
    let mut buffer = [0; 8192];
    while let Ok(length) = manager.socket.recv(&mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..length]);
        assert!(
            !text.contains("READY=1") && !text.contains("RELOADING=1"),
            "{text}"
        );
    }
}

#[test]
fn the_status_tells_what_is_pending_and_how_the_store_is() {
    let manager = Manager::new();
    let mut redis = RedisServer::start(&[]);
    let daemon = manager
        .starts(Daemon::builder(redis.url()).flush_interval(NEVER))
        .start();
    daemon.client().command(&["INCR", "a"]);
    daemon.client().command(&["INCR", "b"]);
    daemon.flush();
    manager.until("STATUS=nothing pending; the store is up");
    redis.kill9();
    daemon.client().command(&["INCR", "b"]);
    daemon.signal(Signal::USR1);
    manager.until("STATUS=1 key pending; the store is away: ");
}

/// A store that does not answer is no reason to be started again: increments are still taken.
/// Seen to fail when the flush stage allowed a request to the store one second.
#[test]
fn the_watchdog_is_fed_while_the_store_is_away_for_longer_than_anything_may_be_stuck() {
    let manager = Manager::new();
    let mut redis = RedisServer::start(&[]);
    let daemon = manager
        .starts(Daemon::builder(redis.url()))
        .env("WATCHDOG_USEC", 2_000_000)
        .start();
    daemon.client().command(&["INCR", "fed"]);
    daemon.flush();
    redis.pause();
    daemon.client().command(&["INCR", "fed"]);
    manager.until("READY=1");
    // One a second.
    for _ in 0..20 {
        let told = manager.until("WATCHDOG=1");
        assert!(!has(&told, "STATUS=stuck"), "{told:?}");
    }
    assert_eq!(daemon.client().number(&["INCR", "fed"]), 3);
    redis.resume();
    daemon.flush();
    assert_eq!(redis.counter("fed"), 3);
}

/// The thread that passes the point never comes back. Seen to fail when the pings did not ask.
#[cfg(feature = "fail-points")]
#[test]
fn the_watchdog_starves_when_the_ingest_thread_or_the_flush_stage_is_stuck() {
    let cases = [
        ("epoch.closed@1", "the ingest thread"),
        ("seal.done@1", "the flush stage"),
    ];
    let tests = cases.map(|(point, who)| {
        std::thread::spawn(move || {
            let manager = Manager::new();
            let daemon = manager
                .starts(Daemon::builder("embedded").flush_interval(NEVER))
                .env("WATCHDOG_USEC", 400_000)
                .env("TALLYD_STICK_POINT", point)
                .start();
            manager.until("WATCHDOG=1");
            manager.until("WATCHDOG=1");
            daemon.client().command(&["INCR", "k"]);
            daemon.signal(Signal::USR1);
            manager.until(&format!("STATUS=stuck: {who}; "));
            // Five times the period of the pings. More would be no proof either.
            let window = Duration::from_secs(1);
            manager.socket.set_read_timeout(Some(window)).unwrap();
            let mut buffer = [0; 8192];
            while let Ok(length) = manager.socket.recv(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]);
                assert!(!text.contains("WATCHDOG=1"), "{who}: {text}");
            }
        })
    });
    for test in tests {
        test.join().unwrap();
    }
}

/// A socket that outlives the daemon, as systemd holds it.
fn held(dir: &Path) -> (PathBuf, UnixListener) {
    let path = dir.join("held.sock");
    let listener = UnixListener::bind(&path).unwrap();
    (path, listener)
}

#[test]
fn a_held_socket_is_served_and_left_where_it_is() {
    let dir = TempDir::new().unwrap();
    for name in ["tallyd", "unknown", "counters.socket"] {
        let (path, listener) = held(dir.path());
        let mut daemon = Daemon::builder("embedded")
            .socket(&path)
            .held(listener.into(), name)
            // The unit's affair: a group that is not there would end the start.
            .set("listen.group", "no-such-group")
            .start();
        assert_eq!(daemon.client().number(&["INCR", "k"]), 1);
        assert!(daemon.log().contains("systemd holds the socket"));
        assert!(daemon.term().success());
        assert!(path.exists(), "the path is systemd's");
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn variables_that_were_meant_for_another_process_are_left_alone() {
    let mut daemon = Daemon::builder("embedded")
        .env("LISTEN_PID", 1)
        .env("LISTEN_FDS", 1)
        .env("LISTEN_FDNAMES", "tallyd")
        .start();
    assert!(!daemon.log().contains("systemd holds the socket"));
    assert!(daemon.term().success());
    assert!(!daemon.socket().exists(), "the socket was its own");
}

#[test]
fn what_is_no_listening_unix_socket_or_not_ours_is_refused_with_78() {
    let dir = TempDir::new().unwrap();
    let listener = || -> OwnedFd { held(TempDir::new_in(dir.path()).unwrap().path()).1.into() };
    let cases: [(OwnedFd, &str, &str); 4] = [
        (listener(), "tallyd-admin", "FileDescriptorName=tallyd"),
        (listener(), "tallyd:b", "$LISTEN_FDNAMES"),
        (
            UnixDatagram::unbound().unwrap().into(),
            "tallyd",
            "of another type",
        ),
        (
            tempfile::tempfile().unwrap().into(),
            "unknown",
            "no listening Unix stream socket",
        ),
    ];
    for (descriptor, name, word) in cases {
        let (code, said) = Daemon::builder("embedded")
            .held(descriptor, name)
            .run_to_exit();
        assert_eq!(code, Some(78), "{said}");
        assert!(
            said.lines().any(|line| line.contains(word)),
            "{word}: {said}"
        );
        assert!(!said.contains("panicked"), "{said}");
    }
}

/// A client that connects again whenever its connection ends, and counts what was acknowledged.
/// A stop answers all that it has read, so what was not answered was not counted: it is sent again.
fn count_through_restarts(socket: &Path, key: &str, stop: &AtomicBool, all: &AtomicI64) -> i64 {
    let mut acknowledged = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut client = Client::unix(socket).expect("no connection is refused");
        while !stop.load(Ordering::Relaxed) {
            match client.try_command(&["INCR", key]) {
                Ok(value) => {
                    value.number();
                    acknowledged += 1;
                    all.fetch_add(1, Ordering::Relaxed);
                }
                Err(_) => break,
            }
        }
    }
    acknowledged
}

/// Seen to fail when the daemon bound a socket of its own instead.
#[test]
fn restarts_under_load_with_a_held_socket_refuse_nobody_and_count_exactly() {
    let redis = RedisServer::start(&[]);
    let dir = TempDir::new().unwrap();
    let (path, listener) = held(dir.path());
    let mut daemon = Daemon::builder(redis.url())
        .socket(&path)
        .held(listener.into(), "tallyd")
        .start();
    let stop = Arc::new(AtomicBool::new(false));
    let all = Arc::new(AtomicI64::new(0));
    let clients: Vec<_> = (0..8)
        .map(|number| {
            let (stop, all, path) = (Arc::clone(&stop), Arc::clone(&all), path.clone());
            let key = format!("restart:{number}");
            std::thread::spawn(move || {
                let acknowledged = count_through_restarts(&path, &key, &stop, &all);
                (key, acknowledged)
            })
        })
        .collect();
    for _ in 0..5 {
        let before = all.load(Ordering::Relaxed);
        wait_until("the load goes on", || {
            all.load(Ordering::Relaxed) > before + 1_000
        });
        assert!(daemon.term().success());
        daemon.restart();
    }
    stop.store(true, Ordering::Relaxed);
    let counted: Vec<_> = clients
        .into_iter()
        .map(|client| client.join().unwrap())
        .collect();
    daemon.flush();
    for (key, acknowledged) in counted {
        assert_eq!(redis.counter(&key), acknowledged, "{key}");
    }
}

/// A child that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_connection_to_systemds_socket_starts_the_daemon() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    // It becomes the daemon with the first connection.
    let mut daemon = Running(
        Command::new("systemd-socket-activate")
            .arg("--fdname=tallyd")
            .arg("--listen")
            .arg(path("tallyd.sock"))
            .arg(env!("CARGO_BIN_EXE_tallyd"))
            .arg("run")
            .arg("--socket")
            .arg(path("tallyd.sock"))
            .arg("--state-dir")
            .arg(path("state"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("systemd-socket-activate; tests/run installs systemd"),
    );
    wait_until("the socket is there", || path("tallyd.sock").exists());
    let mut client = Client::unix(&path("tallyd.sock")).unwrap();
    assert_eq!(client.number(&["INCR", "activated"]), 1);
    signal(&daemon.0, Signal::TERM);
    assert!(wait_exit(&mut daemon.0, LIMIT, "the daemon").success());
}

/// A copy of the units that names the program that was built.
fn units() -> (TempDir, [PathBuf; 2]) {
    let dir = TempDir::new().unwrap();
    let paths = ["tallyd.service", "tallyd.socket"].map(|name| {
        let unit = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("systemd")
            .join(name);
        let text = std::fs::read_to_string(unit).unwrap();
        let copy = dir.path().join(name);
        let text = text.replace("/usr/bin/tallyd", env!("CARGO_BIN_EXE_tallyd"));
        std::fs::write(&copy, text).unwrap();
        copy
    });
    (dir, paths)
}

/// systemd-analyze, which says nothing about units that are well.
fn analyze(args: &[&str], units: &[PathBuf]) -> (bool, String) {
    let (status, said) = finish(Command::new("systemd-analyze").args(args).args(units), b"");
    (status.success(), said)
}

#[test]
fn the_units_are_well_formed() {
    let (_dir, units) = units();
    // The manual pages are the package's.
    let verify = |units: &[PathBuf]| analyze(&["verify", "--man=no"], units);
    assert_eq!(verify(&units), (true, String::new()));
    let mut text = std::fs::read_to_string(&units[0]).unwrap();
    text.push_str("[Service]\nWatchdogSec=often\n");
    std::fs::write(&units[0], text).unwrap();
    assert!(verify(&units).1.contains("often"), "it would notice");
}

#[test]
fn the_service_is_exposed_to_little() {
    let (_dir, units) = units();
    let exposed = |threshold: &str| {
        let args = ["security", "--offline=true", "--no-pager", threshold];
        analyze(&args, &units[..1])
    };
    let (passes, said) = exposed("--threshold=15");
    assert!(passes, "{said}");
    assert!(!exposed("--threshold=5").0, "the threshold is looked at");
}
