//! Promise 6: descriptors and maps have limits, and clients cannot take those that the journal, the
//! store and the admin server need.

use std::fs;
use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::support::daemon::{Daemon, NEVER};
use crate::support::http::Address;
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value};
use crate::support::wait_until;

const TOO_MANY: &str = "ERR max number of clients reached";

/// Connects until one more is refused in words.
fn crowd(daemon: &Daemon) -> Vec<Client> {
    let mut crowd = Vec::new();
    loop {
        let mut client = Client::unix(daemon.socket()).unwrap();
        client.set_limit(Duration::from_secs(5));
        match client.try_command(&["PING"]) {
            Ok(Value::Error(text)) => {
                assert_eq!(text, TOO_MANY);
                return crowd;
            }
            Ok(value) => assert_eq!(value, Value::Status("PONG".into())),
            // It was refused before it had asked.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return crowd,
            Err(error) => panic!("client {} hears nothing: {error}", crowd.len()),
        }
        crowd.push(client);
        assert!(crowd.len() < 64, "there is no limit");
    }
}

fn open_files(daemon: &Daemon) -> usize {
    fs::read_dir(format!("/proc/{}/fd", daemon.pid()))
        .unwrap()
        .count()
}

fn segments(daemon: &Daemon) -> (usize, usize) {
    let of_segment = |text: &str| text.contains("/segments/");
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let files = files.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let files = files.filter(|target| of_segment(&target.to_string_lossy()));
    let maps = fs::read_to_string(format!("/proc/{}/maps", daemon.pid())).unwrap();
    let maps = maps.lines().filter(|line| of_segment(line)).count();
    (files.count(), maps)
}

/// Idle clients took every descriptor, and the flush stage had none to connect with, nor for the next
/// segment. Seen to fail when clients were counted against `listen.max_connections` alone.
#[test]
fn idle_clients_leave_descriptors_for_the_journal_the_store_and_admin() {
    let mut redis = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let dir = tempfile::tempdir().unwrap();
    let admin = dir.path().join("admin.sock");
    for with_admin in [false, true] {
        let mut settings = Daemon::builder(redis.url())
            .flush_interval("20ms")
            .set("flush.retain", "200ms")
            .files_max(64);
        if with_admin {
            settings = settings.set("admin.listen", format!("unix:{}", admin.display()));
        }
        let daemon = settings.start();
        let key = format!("with-admin:{with_admin}");
        let mut known = daemon.client();
        assert_eq!(known.number(&["INCR", &key]), 1);
        let crowd = crowd(&daemon);
        assert!(crowd.len() > 3, "{} clients", crowd.len());
        for n in 2..=200 {
            if n % 50 == 0 {
                // Every connection to the store is made anew.
                redis.restart();
            }
            assert_eq!(known.number(&["INCR", &key]), n);
            // A key never seen is read from the store.
            known.command(&["INCR", &format!("{key}:{n}")]);
            thread::sleep(Duration::from_millis(2));
        }
        wait_until("all of it is in the store", || redis.counter(&key) == 200);
        if with_admin {
            let address = Address::Unix(admin.clone());
            let pages: Vec<_> = (0..70).map(|_| address.connect()).collect();
            drop(pages);
            // One that is refused may be reset before it has read why.
            wait_until("the admin server answers", || {
                let mut stream = address.connect();
                let mut answer = Vec::new();
                let _ = stream.write_all(
                    b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
                );
                let _ = stream.read_to_end(&mut answer);
                answer.starts_with(b"HTTP/1.1 200")
            });
        }
        assert_eq!(known.command(&["TALLY.FLUSH", "50000"]), Value::ok());
        let stats = known.command(&["TALLY.STATS"]).fields();
        assert_eq!(
            stats["connections_refused_descriptors_total"],
            Value::Integer(0)
        );
        assert!(stats["connections_refused_limit_total"].number() > 0);
        let log = daemon.log();
        for wrong in ["Too many open files", "os error 24"] {
            assert!(!log.contains(wrong), "{log}");
        }
        // Said once, with both numbers, and what to do.
        let warned: Vec<&str> = log.lines().filter(|l| l.contains("LimitNOFILE")).collect();
        assert_eq!(warned.len(), 1, "{log}");
        for word in ["listen.max_connections", "10000", "64"] {
            assert!(warned[0].contains(word), "{}", warned[0]);
        }
        drop(crowd);
        wait_until("others get in", || {
            let client = Client::unix(daemon.socket());
            client
                .and_then(|mut client| client.try_command(&["PING"]))
                .is_ok_and(|value| value == Value::Status("PONG".into()))
        });
    }
}

/// Guards that accepting goes on after the system had no descriptor left, whoever took them. Seen to
/// fail when it ended.
#[test]
fn a_daemon_without_descriptors_serves_whom_it_has_and_recovers_when_clients_leave() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval("20ms").start();
    let mut known = daemon.client();
    assert_eq!(known.number(&["INCR", "descriptors"]), 1);
    let limit = Some(open_files(&daemon) as u64 + 24);
    let pid = Pid::from_raw(daemon.pid() as i32);
    let limit = Rlimit {
        current: limit,
        maximum: limit,
    };
    prlimit(pid, Resource::Nofile, limit).unwrap();
    let answers = || {
        let mut client = Client::unix(daemon.socket()).ok()?;
        client.set_limit(Duration::from_millis(300));
        client.try_command(&["PING"]).ok()?;
        Some(client)
    };
    let mut total = 1;
    for _ in 0..3 {
        let mut crowd = Vec::new();
        while let Some(client) = answers() {
            crowd.push(client);
            assert!(crowd.len() < 64, "there is no limit");
        }
        assert!(crowd.len() > 10, "{} clients", crowd.len());
        for _ in 0..200 {
            total += 1;
            assert_eq!(known.number(&["INCR", "descriptors"]), total);
            thread::sleep(Duration::from_millis(1));
        }
        drop(crowd);
        wait_until("new clients are served again", || answers().is_some());
        daemon.flush();
        assert_eq!(redis.counter("descriptors"), total);
    }
    let stats = known.command(&["TALLY.STATS"]).fields();
    assert!(stats["connections_refused_descriptors_total"].number() > 0);
    let said = daemon.log().matches("cannot accept a connection").count();
    assert!(said <= 6, "said {said} times");
}

#[test]
fn a_limit_that_is_high_enough_is_not_spoken_of() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .set("listen.max_connections", 100)
        .files_max(400)
        .start();
    assert!(!daemon.log().contains("LimitNOFILE"), "{}", daemon.log());
    let clients: Vec<Client> = (0..99)
        .map(|_| {
            let mut client = daemon.client();
            client.command(&["PING"]);
            client
        })
        .collect();
    assert_eq!(clients.len(), 99);
}

/// Each segment that was kept in case had a descriptor and a map: a thousand of them at short
/// intervals. Seen to fail when they had.
#[test]
fn segments_that_only_wait_are_neither_open_nor_mapped_and_are_replayed_all_the_same() {
    const EPOCHS: i64 = 60;
    let mut redis = RedisServer::start(&[]);
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("flush.retain", NEVER)
        .start();
    let mut client = daemon.client();
    let count = |client: &mut Client| {
        for n in 1..=EPOCHS {
            client.command(&["INCR", "retained"]);
            client.command(&["INCRBY", &format!("retained:{n}"), "3"]);
            assert_eq!(client.command(&["TALLY.FLUSH", "50000"]), Value::ok());
        }
    };
    let quiet = |daemon: &Daemon, segments_max: usize| {
        wait_until("nothing is open that only waits", || {
            let (files, maps) = segments(daemon);
            files <= segments_max && maps <= segments_max
        });
    };
    let is_whole = |redis: &RedisServer, total: i64| {
        let each = total / EPOCHS * 3;
        redis.counter("retained") == total
            && (1..=EPOCHS).all(|n| redis.counter(format!("retained:{n}")) == each)
    };
    let before = open_files(&daemon);
    count(&mut client);
    assert_eq!(
        client.command(&["TALLY.STATS"]).fields()["retained_segments"],
        Value::Integer(EPOCHS)
    );
    // The open one, and the next at hand.
    quiet(&daemon, 2);
    let after = open_files(&daemon);
    assert!(after <= before + 6, "{before} files before, {after} after");

    // Another process, without its data: all of it is sent again.
    redis.restart();
    // A quiet daemon does not ask before it must.
    client.command(&["INCR", "asks"]);
    daemon.flush();
    wait_until("all of it was sent again", || is_whole(&redis, EPOCHS));
    quiet(&daemon, 2);

    // Also of what a former process kept, and with more of it.
    daemon.restart();
    assert_eq!(open_files(&daemon).saturating_sub(after + 4), 0);
    client = daemon.client();
    count(&mut client);
    quiet(&daemon, 2);
    assert!(is_whole(&redis, 2 * EPOCHS));
    redis.restart();
    client.command(&["INCR", "asks"]);
    daemon.flush();
    wait_until("all of it was sent again", || is_whole(&redis, 2 * EPOCHS));
    quiet(&daemon, 2);

    // Without a store nothing is kept open either, but for what waits to be sent.
    redis.kill9();
    client.command(&["INCR", "retained"]);
    daemon.restart();
    quiet(&daemon, 3);
}
