//! Promises 5 and 6: whoever may publish on the channel can make a view wrong for a moment, and no longer;
//! and can neither fill memory nor have the store read without a bound.

use std::process::Command;

use crate::convergence::{clock, get, message, publish, quiet, stat, wait_shown, wait_subscribed};
use crate::support::daemon::Daemon;
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value};
use crate::support::wait_until;

fn forged(daemon: &Daemon, redis: &RedisServer, node: &str, clock: u64, deltas: &str) {
    let before = stat(daemon, "messages_total");
    publish(redis, message(node, 1, clock, deltas));
    wait_until("it is heard", || stat(daemon, "messages_total") > before);
}

#[test]
fn a_forged_clock_does_not_pin_a_value() {
    for cold in ["load", "delta"] {
        let redis = RedisServer::start(&[]);
        redis.cli(&["SET", "read", "50"]);
        let daemon = quiet(&redis)
            .set("reply.cold", cold)
            .set("view.max_age", "1s")
            .start();
        let mut client = daemon.client();
        client.command(&["INCRBY", "flushed", "5"]);
        client.command(&["INCRBY", "pending", "7"]);
        daemon.flush();
        wait_subscribed(&daemon);
        if cold == "load" {
            assert_eq!(get(&daemon, "read"), Some(50));
        }
        client.command(&["INCRBY", "pending", "1"]);
        let deltas = r#"["flushed",1,999],["read",1,999],["pending",1,999]"#;
        forged(&daemon, &redis, "evil", u64::MAX, deltas);

        // One flush of the key later.
        client.command(&["INCR", "flushed"]);
        daemon.flush();
        assert_eq!(get(&daemon, "flushed"), Some(6), "{cold}");
        assert_eq!(get(&daemon, "pending"), Some(8), "{cold}");
        assert_eq!(client.number(&["INCR", "flushed"]), 7, "{cold}");
        assert!(stat(&daemon, "disputed_total") >= 2, "{cold}");
        // One reading later, which its age asks for.
        if cold == "load" {
            wait_shown(&daemon, "read", 50);
        }
        // Later messages are believed again: those of another node.
        let other = quiet(&redis).start();
        other.client().command(&["INCRBY", "flushed", "10"]);
        other.flush();
        wait_shown(&daemon, "flushed", 17);
        daemon.flush();
        wait_shown(&daemon, "flushed", 17);
        let log = daemon.log();
        assert!(!log.contains("went back in time"), "{log}");
        // Who said so is named, once.
        assert_eq!(
            log.matches("ahead of the store's clock").count(),
            1,
            "{log}"
        );
        assert!(log.contains(&format!("node={:0>32}", "6576696c")), "{log}");
    }
}

/// A clock that may be true, and a value that is not: no clock tells, so the next flush of the key or the
/// next reading does.
#[test]
fn a_plausible_forgery_lasts_until_the_next_word_of_the_store() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).set("view.max_age", "1s").start();
    let mut client = daemon.client();
    client.command(&["INCRBY", "a", "5"]);
    client.command(&["INCRBY", "b", "5"]);
    daemon.flush();
    wait_subscribed(&daemon);
    let next = clock(&redis) + 1;
    forged(&daemon, &redis, "evil", next, r#"["a",1,999],["b",1,999]"#);
    client.command(&["INCR", "a"]);
    daemon.flush();
    assert_eq!(get(&daemon, "a"), Some(6));
    wait_shown(&daemon, "b", 5);
}

#[test]
fn names_that_are_no_ids_are_refused_and_not_kept() {
    // However slowly they are read.
    let unlimited = ["--client-output-buffer-limit", "pubsub", "0", "0", "0"];
    let redis = RedisServer::start(&unlimited);
    let daemon = quiet(&redis).start();
    wait_subscribed(&daemon);
    let long = "x".repeat(2 << 20);
    let whole = message("n", 1, 1, "");
    let node = format!("{:0>32}", "6e");
    for number in 0..200 {
        publish(&redis, whole.replace(&node, &format!("{number}{long}")));
    }
    wait_until("all are refused", || {
        stat(&daemon, "malformed_total") >= 200
    });
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let rss = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    let kib: u64 = rss.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 100 << 10, "{kib} KiB");
    let log = daemon.log();
    assert!(log.contains("is no node id"), "{log}");
    assert!(log.len() < 4096, "{} bytes of log", log.len());
}

#[test]
fn claimed_losses_have_values_read_anew_at_a_bounded_rate() {
    const KEYS: usize = 30_000;
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).set("publish.heartbeat", "100ms").start();
    let mut client = daemon.client();
    for first in (0..KEYS).step_by(1000) {
        let mut request = Vec::new();
        for key in first..first + 1000 {
            crate::support::resp::encode_into(&mut request, &["INCR", &format!("key:{key}")]);
        }
        client.send_raw(&request).unwrap();
        for _ in 0..1000 {
            client.read().unwrap();
        }
    }
    daemon.flush();
    wait_subscribed(&daemon);
    let seconds = |client: &mut Client| {
        let info = client.command(&["INFO", "server"]).text();
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix("uptime_in_seconds:"));
        line.unwrap().trim().parse::<i64>().unwrap()
    };
    // Shortly after it has subscribed, nobody new can have been missed.
    let mut probe = 0;
    wait_until("a gap is taken for one", || {
        probe += 1;
        publish(&redis, message(&format!("probe{probe}"), 77, 1, ""));
        stat(&daemon, "gaps_total") > 0
    });
    let (before, begin) = (stat(&daemon, "rereads_total"), seconds(&mut client));
    let mut publisher = redis.client();
    let mut request = Vec::new();
    // Each from another node that nobody heard of, in the middle of its numbers.
    for node in 0..20_000 {
        let text = message(&format!("{node:08}"), 77, 1, "");
        crate::support::resp::encode_into(&mut request, &["PUBLISH", "tallyd:deltas", &text]);
    }
    publisher.send_raw(&request).unwrap();
    for _ in 0..20_000 {
        publisher.read().unwrap();
    }
    wait_until("all are heard", || stat(&daemon, "gaps_total") >= 20_000);
    let (read, time) = (
        stat(&daemon, "rereads_total") - before,
        seconds(&mut client) - begin,
    );
    assert!(read <= 100_000 * (time + 2), "{read} keys in {time} s");
    // And what was said to be lost is found: another writer's value, which no message told.
    redis.cli(&["SET", "key:7", "77"]);
    publish(&redis, message("last", 9, 1, ""));
    wait_shown(&daemon, "key:7", 77);
}

/// As the README has them.
fn permissions() -> Vec<String> {
    let readme = include_str!("../../README.md");
    let (_, rest) = readme.split_once("<!-- acl: begin -->").unwrap();
    let (block, _) = rest.split_once("<!-- acl: end -->").unwrap();
    let lines = block.lines().filter(|line| line.starts_with("ACL "));
    lines.map(str::to_owned).collect()
}

#[test]
fn with_the_permissions_of_the_readme_the_daemon_does_its_work_and_applications_cannot_publish() {
    let redis = RedisServer::start(&[]);
    let mut admin = redis.client();
    for line in permissions() {
        let words: Vec<&str> = line.split(' ').collect();
        // Our own connection stays the default user's.
        if words[2] != "default" {
            assert_eq!(admin.command(&words), Value::ok(), "{line}");
        }
    }
    let url = format!("redis://tallyd:PASSWORD@{}", redis.address());
    let two: Vec<Daemon> = (0..2)
        .map(|_| {
            Daemon::builder(&url)
                .set("reply.load_timeout", "5s")
                .start()
        })
        .collect();
    two.iter().for_each(wait_subscribed);
    assert_eq!(two[0].client().number(&["INCRBY", "k", "3"]), 3);
    two[0].flush();
    wait_shown(&two[1], "k", 3);
    assert_eq!(redis.counter("k"), 3);
    for daemon in &two {
        let log = daemon.log();
        assert!(!log.contains("NOPERM") && !log.contains("WARN"), "{log}");
    }
    let cli = |words: &[&str]| {
        let mut command = Command::new("redis-cli");
        command.args([
            "--user",
            "application",
            "--pass",
            "OTHER",
            "--no-auth-warning",
            "-p",
        ]);
        let port = redis.address().port().to_string();
        let output = command.arg(port).args(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(cli(&["GET", "k"]), "3\n");
    assert!(cli(&["PUBLISH", "tallyd:deltas", "{}"]).starts_with("NOPERM"));
    assert!(cli(&["PUBLISH", "app:x", "{}"]).starts_with('0'));
    assert_eq!(get(&two[0], "k"), Some(3));
}
