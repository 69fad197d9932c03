//! Promise 1: after a flush every counter in Redis equals what clients had acknowledged.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Command;
use std::thread;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value, encode_into};
use crate::support::{seed, wait_until};

type Oracle = BTreeMap<Vec<u8>, i64>;

/// Sends random increments of random shape on one connection; what each key must have gained.
fn random_increments(mut client: Client, keys: &[Vec<u8>], mut rng: fastrand::Rng) -> Oracle {
    let mut oracle = Oracle::new();
    for _ in 0..400 {
        let transaction = rng.u8(..) < 40;
        let burst = rng.usize(1..=60);
        let mut bytes = Vec::new();
        if transaction {
            encode_into(&mut bytes, &["MULTI"]);
        }
        for _ in 0..burst {
            let key = &keys[rng.usize(..keys.len())];
            let amount = rng.i64(-1_000_000..=1_000_000);
            let (verb, argument, delta) = match rng.u8(..4) {
                0 => ("INCR", None, 1),
                1 => ("DECR", None, -1),
                2 => ("INCRBY", Some(amount), amount),
                _ => ("DECRBY", Some(amount), -amount),
            };
            let mut command = vec![verb.as_bytes().to_vec(), key.clone()];
            command.extend(argument.map(|n| n.to_string().into_bytes()));
            encode_into(&mut bytes, &command);
            *oracle.entry(key.clone()).or_default() += delta;
        }
        if transaction {
            encode_into(&mut bytes, &["EXEC"]);
        }
        client.send_raw(&bytes).unwrap();
        if transaction {
            for _ in 0..=burst {
                assert!(matches!(client.read().unwrap(), Value::Status(_)));
            }
            assert_eq!(client.read().unwrap().items().len(), burst);
        } else {
            for _ in 0..burst {
                let reply = client.read().unwrap();
                assert!(matches!(reply, Value::Integer(_)), "{reply:?}");
            }
        }
    }
    oracle
}

fn mixed_load_ends_exact(redis: &RedisServer, daemon: &Daemon, rng: &mut fastrand::Rng) {
    let mut keys: Vec<Vec<u8>> = (0..500)
        .map(|n| format!("mixed:{n}").into_bytes())
        .collect();
    keys.extend((0..50).map(|n: u8| vec![0xff, 0, n, b'\r', b'\n']));
    let mut expected = Oracle::new();
    // Some are there before: what the daemon adds goes on top.
    for key in &keys[..100] {
        redis.cli(&[b"SET", &key[..], b"1000"]);
        expected.insert(key.clone(), 1000);
    }
    let shares: Vec<Oracle> = thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|_| {
                let (client, rng, keys) = (daemon.client(), rng.fork(), &keys);
                scope.spawn(move || random_increments(client, keys, rng))
            })
            .collect();
        clients.into_iter().map(|c| c.join().unwrap()).collect()
    });
    for (key, delta) in shares.into_iter().flatten() {
        *expected.entry(key).or_default() += delta;
    }
    daemon.flush();
    assert_eq!(redis.counters(), expected);
    // And the daemon says the same.
    let mut client = daemon.client();
    for (key, value) in &expected {
        assert_eq!(
            client.number(&[b"GET", &key[..]]),
            *value,
            "{}",
            key.escape_ascii()
        );
    }
}

#[test]
fn after_a_flush_every_counter_equals_the_sum_of_what_was_acknowledged() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval("20ms").start();
    mixed_load_ends_exact(&redis, &daemon, &mut rng);
}

#[test]
fn small_batches_early_seals_and_a_unix_socket_to_redis_change_nothing() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.unix_url())
        .flush_interval("10ms")
        .set("flush.batch_keys", 7)
        .set("flush.max_keys", 100)
        .start();
    mixed_load_ends_exact(&redis, &daemon, &mut rng);
}

#[test]
fn a_load_at_least_once_ends_exact_when_nothing_breaks() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval("20ms")
        .set("flush.delivery", "at-least-once")
        .start();
    mixed_load_ends_exact(&redis, &daemon, &mut rng);
}

#[test]
fn a_password_and_a_database_number_are_used() {
    let redis = RedisServer::start(&["--requirepass", "hard to guess"]);
    let url = format!("redis://:hard%20to%20guess@{}/3", redis.address());
    let daemon = Daemon::builder(url).start();
    daemon.client().command(&["INCRBY", "in-db-3", "12"]);
    daemon.flush();
    let mut client = redis.client();
    assert_eq!(client.command(&["AUTH", "hard to guess"]), Value::ok());
    assert_eq!(
        client.command(&["GET", "in-db-3"]),
        Value::Nil,
        "not in database 0"
    );
    assert_eq!(client.command(&["SELECT", "3"]), Value::ok());
    assert_eq!(client.number(&["GET", "in-db-3"]), 12);
    assert!(!daemon.log().contains("hard"), "a secret in the log");
}

/// Sum and number of all counters in Redis.
fn totals(redis: &RedisServer) -> (i64, u64) {
    let counters = redis.counters();
    (counters.values().sum(), counters.len() as u64)
}

#[test]
fn a_million_increments_of_redis_benchmark_arrive_to_the_unit_with_one_incrby_a_key() {
    let redis = RedisServer::start(&[]);
    // One epoch: no timer, and more keys than there are.
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("flush.max_keys", 10_000_000)
        .start();
    let output = Command::new("redis-benchmark")
        .arg("-s")
        .arg(daemon.socket())
        .args("-t incr -n 1000000 -r 100000 -P 16 -c 50 -q".split(' '))
        .output()
        .expect("redis-benchmark is not installed: run tests/run");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        redis.commandstats("incrby"),
        0,
        "nothing is flushed before the epoch ends"
    );
    daemon.flush();
    let (sum, keys) = totals(&redis);
    assert_eq!(sum, 1_000_000);
    assert!(
        keys > 90_000,
        "a million draws leave few of 100,000 keys out, not {keys}"
    );
    assert_eq!(
        redis.commandstats("incrby"),
        keys,
        "one INCRBY per distinct key"
    );
}

/// Section 9 of the design: commands sent to Redis per distinct key and flush, everything counted.
#[test]
fn a_flush_costs_at_most_two_percent_more_commands_than_keys() {
    const KEYS: u64 = 50_000;
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("flush.max_keys", 10_000_000)
        .set("reply.cold", "delta")
        .start();
    // A first flush, so that what is sent once on connecting is not counted.
    daemon.client().command(&["INCR", "first"]);
    daemon.flush();
    redis.cli(&["CONFIG", "RESETSTAT"]);
    let mut client = daemon.client();
    for round in 0..2 {
        let mut bytes = Vec::new();
        for key in 0..KEYS {
            encode_into(&mut bytes, &["INCRBY", &format!("ratio:{key}"), "3"]);
        }
        let mut writer = client.stream().duplicate();
        let writing = thread::spawn(move || writer.write_all(&bytes));
        for _ in 0..KEYS {
            let reply = client.read().unwrap();
            assert_eq!(reply, Value::Integer(3 + 3 * round));
        }
        writing.join().unwrap().unwrap();
        daemon.flush();
    }
    let calls = redis.command_calls();
    assert_eq!(calls["incrby"], 2 * KEYS);
    let ours: u64 = calls
        .iter()
        .filter(|(name, _)| !["info", "config|resetstat"].contains(&name.as_str()))
        .map(|(_, n)| n)
        .sum();
    assert!(
        ours as f64 <= 1.02 * (2 * KEYS) as f64,
        "{ours} commands for {} keys: {calls:?}",
        2 * KEYS
    );
}

#[test]
fn the_timer_flushes_without_being_asked() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval("50ms").start();
    daemon.client().command(&["INCRBY", "timer", "5"]);
    wait_until("the timer flushes", || redis.counter("timer") == 5);
    assert_eq!(daemon.client().number(&["GET", "timer"]), 5);
}

#[test]
fn so_many_keys_as_configured_are_flushed_early() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("flush.max_keys", 100)
        .set("flush.batch_keys", 50)
        .start();
    let mut client = daemon.client();
    for key in 0..1000 {
        client.command(&["INCR", &format!("early:{key}")]);
    }
    wait_until("full epochs are flushed", || redis.counters().len() >= 900);
}

#[test]
fn the_embedded_store_keeps_totals_over_a_restart() {
    let mut daemon = Daemon::builder("embedded").flush_interval("20ms").start();
    let mut client = daemon.client();
    for n in 1..=500 {
        assert_eq!(client.number(&["INCR", "kept"]), n);
    }
    daemon.flush();
    assert!(daemon.term().success());
    daemon.restart();
    assert_eq!(daemon.client().number(&["GET", "kept"]), 500);
    assert_eq!(daemon.client().number(&["INCR", "kept"]), 501);
}
