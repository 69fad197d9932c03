//! Promise 4: increments are taken while Redis is down, slow, full or read-only; what is wrong
//! with one key does not hold up the others.

use std::time::Duration;

use serde_json::Value as Json;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::load::Load;
use crate::support::redis::RedisServer;
use crate::support::resp::Value;
use crate::support::wait_until;

const KEEPS_ALL: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

#[test]
fn increments_and_reads_go_on_while_redis_is_down_and_arrive_afterwards() {
    let mut redis = RedisServer::start(&KEEPS_ALL);
    let daemon = Daemon::builder(redis.url()).flush_interval("20ms").start();
    let mut client = daemon.client();
    for n in 1..=100 {
        assert_eq!(client.number(&["INCR", "known"]), n);
    }
    daemon.flush();
    redis.kill9();
    for n in 101..=150 {
        assert_eq!(
            client.number(&["INCR", "known"]),
            n,
            "the last known value and what is pending"
        );
    }
    assert_eq!(client.number(&["GET", "known"]), 150);
    assert_eq!(client.number(&["TALLY.PENDING", "known"]), 50);
    // A key that this node has never seen: Redis cannot be asked, the increment is taken.
    for n in 1..=20 {
        assert_eq!(client.number(&["INCR", "unknown"]), n);
    }
    let load = Load::start(daemon.socket(), "down", 8, 10);
    load.wait_acknowledged(5000);
    let counted = load.stop();
    redis.restart();
    daemon.flush();
    assert_eq!(redis.counter("known"), 150);
    assert_eq!(redis.counter("unknown"), 20);
    for c in counted {
        assert_eq!(redis.counter(&c.key), c.acknowledged);
    }
    assert_eq!(client.number(&["TALLY.PENDING", "known"]), 0);
}

#[test]
fn increments_go_on_while_redis_does_not_answer_and_are_applied_once() {
    let mut redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval("10ms").start();
    let mut client = daemon.client();
    assert_eq!(client.number(&["INCR", "warm"]), 1);
    daemon.flush();
    for round in 0..3 {
        // Flushes are under way when it stops answering.
        let load = Load::start(daemon.socket(), &format!("paused:{round}"), 4, 10);
        load.wait_acknowledged(500);
        redis.pause();
        let before = client.number(&["INCR", "warm"]);
        assert_eq!(client.number(&["INCR", "warm"]), before + 1);
        assert_eq!(client.number(&["GET", "warm"]), before + 1);
        assert_eq!(
            client.number(&["INCR", &format!("cold:{round}")]),
            1,
            "after load_timeout, from what is pending"
        );
        load.wait_acknowledged(3000);
        redis.resume();
        let counted = load.stop();
        daemon.flush();
        assert_eq!(redis.counter("warm"), 1 + 2 * (round + 1));
        for c in counted {
            assert_eq!(redis.counter(&c.key), c.acknowledged);
        }
    }
}

/// Redis comes back without its data. What was pending must arrive; what is kept for replay may,
/// once; and nothing is held up.
#[test]
fn after_redis_lost_its_data_increments_go_on_and_nothing_counts_twice() {
    let mut redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    for _ in 0..10 {
        client.command(&["INCRBY", "lost", "10"]);
    }
    daemon.flush();
    assert_eq!(redis.counter("lost"), 100);
    redis.kill9();
    client.command(&["INCRBY", "lost", "7"]);
    redis.restart();
    client.command(&["INCRBY", "lost", "5"]);
    daemon.flush();
    let value = redis.counter("lost");
    assert!(
        (12..=112).contains(&value),
        "{value}: 12 were pending, 112 acknowledged in all"
    );
    assert!(
        [12, 112].contains(&value),
        "{value}: a batch is replayed as a whole or not at all"
    );
    client.command(&["INCRBY", "lost", "1"]);
    daemon.flush();
    assert_eq!(redis.counter("lost"), value + 1);
    wait_until("the view follows what the store has", || {
        client.number(&["GET", "lost"]) == value + 1
    });
    let log = daemon.log().to_lowercase();
    assert!(
        log.contains("warn") || log.contains("error"),
        "it says loudly what happened:\n{log}"
    );
}

#[test]
fn a_daemon_that_starts_while_redis_is_down_takes_increments_and_delivers_them_later() {
    let mut redis = RedisServer::start(&[]);
    redis.kill9();
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval("20ms")
        .set("shutdown.timeout", "200ms")
        .start();
    for n in 1..=50 {
        assert_eq!(daemon.client().number(&["INCR", "early"]), n);
    }
    assert_eq!(daemon.term().code(), Some(0));
    daemon.restart();
    assert_eq!(daemon.client().number(&["INCR", "early"]), 51);
    redis.restart();
    daemon.flush();
    assert_eq!(redis.counter("early"), 51);
}

/// Refusals of the whole transaction: nothing is applied, everything is tried again.
#[test]
fn increments_wait_out_a_redis_that_refuses_to_write() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval("10ms").start();
    let mut client = daemon.client();
    let refusals: [(&[&str], &[&str]); 3] = [
        // OOM
        (
            &["CONFIG", "SET", "maxmemory", "1"],
            &["CONFIG", "SET", "maxmemory", "0"],
        ),
        // NOREPLICAS
        (
            &["CONFIG", "SET", "min-replicas-to-write", "1"],
            &["CONFIG", "SET", "min-replicas-to-write", "0"],
        ),
        // READONLY: it follows a master that does not exist.
        (
            &["REPLICAOF", "127.0.0.1", "1"],
            &["REPLICAOF", "NO", "ONE"],
        ),
    ];
    let mut total = 0;
    for (begin, end) in refusals {
        assert_eq!(redis.cli(begin), Value::ok());
        for _ in 0..30 {
            total += 1;
            assert_eq!(client.number(&["INCR", "refused"]), total);
        }
        // It has tried, and was refused.
        let reply = client.command(&["TALLY.FLUSH", "300"]);
        assert!(
            matches!(reply, Value::Error(_)),
            "nothing can be in the store: {reply:?}"
        );
        assert_eq!(redis.cli(end), Value::ok());
        daemon.flush();
        assert_eq!(redis.counter("refused"), total);
    }
}

fn rejected(daemon: &Daemon) -> Vec<Json> {
    std::fs::read_to_string(daemon.state_dir().join("rejected.jsonl"))
        .unwrap_or_default()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

#[test]
fn a_key_that_cannot_be_incremented_is_set_aside_and_the_others_arrive() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("reply.cold", "delta")
        .start();
    let mut client = daemon.client();
    redis.cli(&["LPUSH", "a-list", "x"]);
    redis.cli(&["SET", "a-word", "hello"]);
    redis.cli(&["SET", "full", &i64::MAX.to_string()]);
    for key in ["a-list", "a-word", "full"] {
        assert_eq!(client.number(&["INCRBY", key, "17"]), 17);
    }
    for n in 0..200 {
        client.command(&["INCRBY", &format!("good:{n}"), "2"]);
    }
    // Whether it calls that a success is its own affair; afterwards all else is in the store.
    client.command(&["TALLY.FLUSH", "20000"]);
    let good: Vec<_> = (0..200)
        .map(|n| redis.counter(format!("good:{n}")))
        .collect();
    assert_eq!(good, [2; 200]);
    assert_eq!(redis.cli(&["LLEN", "a-list"]), Value::Integer(1));
    assert_eq!(redis.cli(&["GET", "a-word"]), Value::bulk("hello"));
    assert_eq!(redis.counter("full"), i64::MAX);

    let rejected = rejected(&daemon);
    assert_eq!(rejected.len(), 3, "{rejected:?}");
    for (key, reason) in [
        ("a-list", "WRONGTYPE"),
        ("a-word", "not an integer"),
        ("full", "overflow"),
    ] {
        let line = rejected
            .iter()
            .find(|line| line["key"] == key)
            .unwrap_or_else(|| panic!("{key}: {rejected:?}"));
        assert_eq!(line["delta"], 17, "{line}");
        assert!(line.to_string().contains(reason), "{line}");
    }
    // It is not tried again and again.
    client.command(&["INCR", "good:0"]);
    daemon.flush();
    assert_eq!(redis.counter("good:0"), 3);
    assert_eq!(self::rejected(&daemon).len(), 3);
}

#[test]
fn a_user_who_may_not_write_one_key_still_gets_the_others_in() {
    let redis = RedisServer::start(&[]);
    let acl = "ACL SETUSER tally on >pw resetkeys ~ok:* ~tallyd:* allchannels +@all";
    assert_eq!(redis.cli(&acl.split(' ').collect::<Vec<_>>()), Value::ok());
    let url = format!("redis://tally:pw@{}", redis.address());
    let daemon = Daemon::builder(url)
        .flush_interval(NEVER)
        .set("reply.cold", "delta")
        .start();
    let mut client = daemon.client();
    client.command(&["INCRBY", "ok:1", "4"]);
    client.command(&["INCRBY", "forbidden", "5"]);
    client.command(&["TALLY.FLUSH", "20000"]);
    assert_eq!(redis.counter("ok:1"), 4);
    assert_eq!(redis.counter("forbidden"), 0);
    let rejected = rejected(&daemon);
    assert_eq!(rejected.len(), 1, "{rejected:?}");
    assert_eq!(
        (&rejected[0]["key"], &rejected[0]["delta"]),
        (&"forbidden".into(), &5.into())
    );
    assert!(!daemon.log().contains("pw@"), "a password in the log");
}

#[test]
fn a_flush_that_does_not_end_in_time_says_so() {
    let mut redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    client.command(&["INCR", "slow"]);
    redis.pause();
    client.set_limit(Duration::from_secs(20));
    let reply = client.command(&["TALLY.FLUSH", "200"]);
    assert!(matches!(reply, Value::Error(_)), "{reply:?}");
    assert_eq!(
        client.number(&["INCR", "slow"]),
        2,
        "the connection goes on"
    );
    redis.resume();
    daemon.flush();
    assert_eq!(redis.counter("slow"), 2);
}
