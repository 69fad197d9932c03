//! The log as an operator reads it: a line when something changes, then a count now and then; no
//! secret in any form.

use serde_json::Value as Json;
use tempfile::TempDir;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::redis::RedisServer;
use crate::support::resp::Value;
use crate::support::wait_until;

fn stat(daemon: &Daemon, name: &str) -> i64 {
    daemon.client().command(&["TALLY.STATS"]).fields()[name].number()
}

fn lines(daemon: &Daemon, what: &str) -> usize {
    daemon.log().lines().filter(|l| l.contains(what)).count()
}

/// Seen to fail when each failed try was told.
#[test]
fn a_store_that_is_away_is_told_once_and_so_is_its_return() {
    let mut redis = RedisServer::start(&["--appendonly", "yes"]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval("10ms")
        .set("publish.heartbeat", "20ms")
        .start();
    let mut client = daemon.client();
    client.command(&["INCR", "known"]);
    daemon.flush();
    wait_until("it is subscribed", || stat(&daemon, "subscribed") == 1);
    let before = daemon.log().lines().count();
    redis.kill9();
    let mut keys = 0;
    wait_until("everything has failed many times", || {
        keys += 1;
        client.command(&["INCR", &format!("cold:{keys}")]);
        let tries = |name| stat(&daemon, name);
        tries("retries_total") >= 10
            && tries("publish_errors_total") >= 10
            && tries("load_errors_total") >= 10
    });
    for what in [
        "cannot flush",
        "not subscribed",
        "cannot publish",
        "cannot read values",
    ] {
        assert_eq!(lines(&daemon, what), 1, "{what}");
    }
    assert_eq!(daemon.log().lines().count(), before + 4);
    redis.restart();
    daemon.flush();
    client.command(&["INCR", "cold again"]);
    for what in [
        "flushing again",
        "subscribed again",
        "publishing again",
        "reading values again",
    ] {
        wait_until(what, || lines(&daemon, what) == 1);
    }
}

/// The same with a key that the store refuses in every batch.
#[test]
fn deltas_that_are_refused_in_every_batch_are_told_once() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .set("reply.cold", "delta")
        .start();
    let mut client = daemon.client();
    for n in 0..20 {
        let key = format!("text:{n}");
        redis.client().command(&["SET", &key, "no number"]);
        client.command(&["INCR", &key]);
        daemon.flush();
    }
    assert_eq!(stat(&daemon, "rejected_total"), 20);
    assert_eq!(lines(&daemon, "the store refused deltas"), 1);
}

#[test]
fn a_limit_that_is_met_and_left_is_a_line_each() {
    let daemon = Daemon::builder("embedded")
        .flush_interval(NEVER)
        .set("limits.max_pending_bytes", "1MiB")
        .set("reply.cold", "delta")
        .start();
    let mut client = daemon.client();
    let key = |n: usize| format!("{}:{n}", "k".repeat(1000));
    let mut refused = 0;
    for n in 0..3000 {
        if let Value::Error(text) = client.command(&["INCR", &key(n)]) {
            assert!(text.contains("limits.max_pending_bytes"), "{text}");
            refused += 1;
        }
    }
    assert!(refused > 1000, "{refused}");
    let told = "limits.max_pending_bytes is reached";
    assert_eq!(lines(&daemon, told), 1);
    daemon.flush();
    wait_until("it is told that there is room", || {
        lines(&daemon, "no increments were refused in the last 5 s") == 1
    });
    let log = daemon.log();
    assert!(log.contains(&format!("refused={refused} ")), "{log}");
    assert_eq!(lines(&daemon, told), 1);
}

#[test]
fn connections_beyond_the_limit_are_told_once() {
    let daemon = Daemon::builder("embedded")
        .set("listen.max_connections", 1)
        .start();
    let mut first = None;
    wait_until("the only connection is had", || {
        let mut client = daemon.client();
        let ours = client
            .try_command(&["PING"])
            .is_ok_and(|answer| answer == Value::Status("PONG".into()));
        first = ours.then_some(client);
        ours
    });
    for _ in 0..50 {
        let answer = daemon.client().read().unwrap();
        assert_eq!(answer.error(), "ERR max number of clients reached");
    }
    assert_eq!(lines(&daemon, "listen.max_connections (1) is reached"), 1);
}

/// A password stands in the URL or in a file, and is right or wrong; no line has it in any format.
#[test]
fn no_line_shows_a_password_in_any_format() {
    let secret = "hunter2-of-the-tests";
    let mut redis = RedisServer::start(&["--requirepass", secret]);
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("password");
    std::fs::write(&file, secret).unwrap();
    let wrong = format!("{secret}-wrong");
    let wrong_file = dir.path().join("wrong");
    std::fs::write(&wrong_file, &wrong).unwrap();
    let address = redis.address();
    let in_url = |user: &str, password: &str| format!("redis://{user}:{password}@{address}");
    let sources = [
        (in_url("", secret), None, true),
        (in_url("", &wrong), None, false),
        (in_url("joe", &wrong), None, false),
        (redis.url(), Some(&file), true),
        (redis.url(), Some(&wrong_file), false),
    ];
    let mut running = Vec::new();
    for format in ["text", "json", "journal"] {
        for (url, file, right) in &sources {
            let mut settings = Daemon::builder(url)
                .flush_interval("10ms")
                .set("log.level", "trace");
            settings = match format {
                "journal" => settings.set("log.format", "auto").journal_stream(),
                format => settings.set("log.format", format),
            };
            if let Some(file) = file {
                settings = settings.set("store.password_file", file.display());
            }
            let daemon = settings.start();
            daemon.client().command(&["INCR", "k"]);
            running.push((format, *right, daemon));
        }
    }
    for (format, right, daemon) in &running {
        wait_until("it flushes, or says that it cannot", || {
            if *right {
                stat(daemon, "batches_total") > 0
            } else {
                stat(daemon, "retries_total") >= 3 && stat(daemon, "load_errors_total") >= 1
            }
        });
        if !right {
            assert_eq!(lines(daemon, "cannot flush"), 1, "{format}");
        }
    }
    // What a lost connection says is looked at too.
    redis.kill9();
    for (format, right, daemon) in &running {
        daemon.client().command(&["INCR", "another"]);
        wait_until("the loss is noticed", || {
            stat(daemon, "store_up") == 0 && lines(daemon, "cannot flush") >= 1
        });
        let info = daemon.client().command(&["INFO"]).text();
        let log = daemon.log();
        for text in [&log, &info] {
            assert!(!text.contains(secret), "{format}, {right}: {text}");
        }
        for line in log.lines() {
            match *format {
                "json" => assert!(serde_json::from_str::<Json>(line).is_ok(), "{line}"),
                "journal" => assert!(line.starts_with('<'), "{line}"),
                _ => assert!(!line.starts_with(['<', '{']), "{line}"),
            }
        }
    }
}

/// A key with a line break and JSON's own characters, in the one line that shows keys.
#[test]
fn keys_are_escaped_in_every_format() {
    let redis = RedisServer::start(&[]);
    let key = "a\n<3>forged {\"level\":\"ERROR\"}\u{1b}[31m";
    redis.client().command(&["SET", key, "no number"]);
    for format in ["text", "json"] {
        let daemon = Daemon::builder(redis.url())
            .set("reply.cold", "delta")
            .set("log.format", format)
            .start();
        daemon.client().command(&["INCR", key]);
        daemon.flush();
        let log = daemon.log();
        let line = log
            .lines()
            .find(|line| line.contains("the store refused deltas"))
            .unwrap();
        assert!(line.contains("forged"), "{line}");
        assert!(!log.contains('\u{1b}'), "{log}");
        if format == "json" {
            let line: Json = serde_json::from_str(line).unwrap();
            let shown = line["key"].as_str().unwrap();
            assert_eq!(shown, key.escape_debug().to_string());
        }
    }
}
