//! Transactions, and commands over very many keys, that are done in slices: answered as Redis answers them,
//! whole for everyone who looks, and whole whatever becomes of the client.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::convergence::quiet;
use crate::support::daemon::{Daemon, NEVER};
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value, encode_into};
use crate::support::seed;

/// More than a slice.
const MANY: usize = 10_000;

fn send(client: &mut Client, commands: &[Vec<String>]) -> Vec<Value> {
    let mut bytes = Vec::new();
    for command in commands {
        encode_into(&mut bytes, command);
    }
    let mut writer = client.stream().duplicate();
    thread::scope(|scope| {
        scope.spawn(move || writer.write_all(&bytes).unwrap());
        commands.iter().map(|_| client.read().unwrap()).collect()
    })
}

fn words(text: &str) -> Vec<String> {
    text.split(' ').map(str::to_owned).collect()
}

#[test]
fn large_ones_are_answered_as_redis_answers_them() {
    let mut dice = fastrand::Rng::with_seed(seed());
    let (redis, store) = (RedisServer::start(&[]), RedisServer::start(&[]));
    for server in [&redis, &store] {
        server.cli(&["SET", "word", "hello"]);
        server.cli(&["RPUSH", "list", "1"]);
        for n in 0..100 {
            // None is zero: whether that is there, or began with an increment, nobody can tell after a flush.
            server.cli(&["SET", &format!("k:{n}"), &(n + 1).to_string()]);
        }
    }
    let daemon = Daemon::builder(store.url())
        .flush_interval("20ms")
        .set("reply.load_timeout", "60s")
        .start();
    for round in 0..3 {
        let mut commands = vec![words("MULTI")];
        for _ in 0..MANY {
            let key = format!("k:{}", dice.usize(..500));
            commands.push(match dice.u8(..12) {
                0 => words(&format!("GET {key}")),
                1 => words(&format!("MGET {key} missing k:1 {key}")),
                2 => words(&format!("EXISTS {key} missing {key}")),
                3 => words("PING"),
                4 => words(&format!("INCRBY {key} nonsense")),
                5 => words(&format!("DECRBY {key} {}", dice.u16(..))),
                6 => words("INCR word"),
                7 => words("GET missing"),
                _ => words(&format!("INCR {key}")),
            });
        }
        commands.push(words("EXEC"));
        let mut keys = words("MGET");
        keys.extend((0..MANY).map(|_| format!("k:{}", dice.usize(..600))));
        commands.push(keys.clone());
        keys[0] = "EXISTS".to_owned();
        commands.push(keys);
        let theirs = send(&mut redis.client(), &commands);
        let ours = send(&mut daemon.client(), &commands);
        for (at, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            if let (Value::Array(ours), Value::Array(theirs)) = (ours, theirs) {
                for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                    assert_eq!(ours, theirs, "{round}: answer {index} of command {at}");
                }
            }
            assert_eq!(ours, theirs, "{round}: command {at}");
        }
    }
    daemon.flush();
    for server in [&redis, &store] {
        server.cli(&["DEL", "word", "list"]);
    }
    assert_eq!(store.counters(), redis.counters());
}

/// Increments of `first`, very many others, and `last`.
fn transaction() -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_into(&mut bytes, &["MULTI"]);
    encode_into(&mut bytes, &["INCR", "first"]);
    for n in 0..2 * MANY {
        encode_into(&mut bytes, &["INCR".to_owned(), format!("k:{n}")]);
    }
    encode_into(&mut bytes, &["INCR", "last"]);
    encode_into(&mut bytes, &["EXEC"]);
    bytes
}

/// Reads both until told to stop.
fn watch(daemon: &Daemon, stop: &AtomicBool) {
    let mut client = daemon.client();
    while !stop.load(Ordering::Relaxed) {
        let both = client.command(&["MGET", "first", "last"]);
        assert_eq!(both.items()[0], both.items()[1], "a part of it is seen");
    }
}

#[test]
fn a_large_transaction_is_seen_whole_or_not_at_all() {
    const ROUNDS: i64 = 5;
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval("5ms").start();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| watch(&daemon, &stop));
        let mut writers = Vec::new();
        for _ in 0..2 {
            writers.push(scope.spawn(|| {
                let mut client = daemon.client();
                for _ in 0..ROUNDS {
                    let bytes = transaction();
                    let mut writer = client.stream().duplicate();
                    thread::scope(|scope| {
                        scope.spawn(move || writer.write_all(&bytes).unwrap());
                        (0..2 * MANY + 3).for_each(|_| drop(client.read().unwrap()));
                        assert_eq!(client.read().unwrap().items().len(), 2 * MANY + 2);
                    });
                }
            }));
        }
        for writer in writers {
            writer.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    daemon.flush();
    let counters = redis.counters();
    assert_eq!(counters.len(), 2 * MANY + 2);
    assert!(counters.values().all(|value| *value == 2 * ROUNDS));
}

#[test]
fn a_large_transaction_counts_whole_or_not_at_all_when_its_client_is_cut_off() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    let mut admin = daemon.client();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| watch(&daemon, &stop));
        for round in 0..12 {
            let mut client = daemon.client();
            let id = client.number(&["CLIENT", "ID"]).to_string();
            let mut writer = client.stream().duplicate();
            let sending = scope.spawn(move || writer.write_all(&transaction()));
            // All of it is queued, and then it is somewhere in the middle.
            let queued = (0..2 * MANY + 3).filter(|_| client.read().is_ok()).count();
            assert_eq!(queued, 2 * MANY + 3);
            thread::sleep(std::time::Duration::from_micros(500 * round));
            admin.command(&["CLIENT", "KILL", "ID", &id]);
            let _ = sending.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    daemon.flush();
    let counters = redis.counters();
    let whole = counters.get(&b"first"[..]).copied().unwrap_or(0);
    let sum: i64 = counters.values().sum();
    assert_eq!(sum, whole * (2 * MANY as i64 + 2));
}

/// Guards that what is applied in slices shares an epoch: it is not sealed in between.
#[test]
fn a_large_transaction_shares_an_epoch() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("flush.max_keys", 1000)
        .set("flush.batch_keys", 1000)
        .start();
    let mut client = daemon.client();
    let bytes = transaction();
    let mut writer = client.stream().duplicate();
    thread::scope(|scope| {
        scope.spawn(move || writer.write_all(&bytes).unwrap());
        (0..2 * MANY + 4).for_each(|_| drop(client.read().unwrap()));
    });
    daemon.flush();
    assert_eq!(crate::convergence::stat(&daemon, "seals_total"), 1);
}
