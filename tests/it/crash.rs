//! Promise 2: what was acknowledged survives `kill -9` at any instant, and is applied once.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::load::{Counted, Load};
use crate::support::redis::RedisServer;
use crate::support::resp::encode;
use crate::support::seed;

/// What each key may hold: at least what was acknowledged, at most what was sent.
#[derive(Default)]
pub struct Bounds(BTreeMap<String, RangeInclusive<i64>>);

impl Bounds {
    pub fn add(&mut self, counted: &[Counted]) {
        for client in counted {
            let bounds = self.0.entry(client.key.clone()).or_insert(0..=0);
            *bounds = bounds.start() + client.acknowledged..=bounds.end() + client.sent;
        }
    }

    #[track_caller]
    pub fn assert_hold(&self, redis: &RedisServer) {
        for (key, bounds) in &self.0 {
            let value = redis.counter(key);
            assert!(
                bounds.contains(&value),
                "{key} is {value}, must be in {bounds:?}"
            );
        }
    }

    /// What an unanswered increment became is known once Redis has it.
    pub fn settle(&mut self, redis: &RedisServer) {
        for (key, bounds) in &mut self.0 {
            let value = redis.counter(key);
            *bounds = value..=value;
        }
    }
}

/// Lets the daemon run until a random moment under load, then kills it.
fn kill_under_load(daemon: &mut Daemon, rng: &mut fastrand::Rng, pipeline: usize) -> Vec<Counted> {
    let load = Load::start(daemon.socket(), "crash", 8, pipeline);
    load.wait_acknowledged(rng.i64(1..5000));
    daemon.kill9();
    load.join()
}

#[test]
fn what_was_acknowledged_survives_a_kill_and_is_applied_once() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let redis = RedisServer::start(&[]);
    // Flushing all the time: the kill hits every stage of a flush.
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval("5ms")
        .set("flush.batch_keys", 3)
        .start();
    let mut bounds = Bounds::default();
    for round in 0..10 {
        bounds.add(&kill_under_load(
            &mut daemon,
            &mut rng,
            if round % 2 == 0 { 1 } else { 20 },
        ));
        daemon.restart();
        daemon.flush();
        bounds.assert_hold(&redis);
        bounds.settle(&redis);
    }
}

#[test]
fn what_was_acknowledged_survives_a_kill_while_redis_is_down() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let mut redis = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let mut daemon = Daemon::builder(redis.url()).flush_interval("10ms").start();
    let mut bounds = Bounds::default();
    for _ in 0..5 {
        // Something of this run is in Redis already, the rest is not.
        bounds.add(&{
            let load = Load::start(daemon.socket(), "crash", 8, 1);
            load.wait_acknowledged(1000);
            load.stop()
        });
        redis.kill9();
        bounds.add(&kill_under_load(&mut daemon, &mut rng, 1));
        // And once more, with what is left of two runs.
        daemon.restart();
        bounds.add(&kill_under_load(&mut daemon, &mut rng, 7));
        redis.restart();
        daemon.restart();
        daemon.flush();
        bounds.assert_hold(&redis);
        bounds.settle(&redis);
    }
}

/// Many kills in a row, with no store to flush to between them: each start recovers what the ones
/// before left.
#[test]
fn pending_increments_outlive_many_kills() {
    let mut redis = RedisServer::start(&[]);
    redis.kill9();
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("reply.cold", "delta")
        .start();
    for round in 1..=10 {
        let mut client = daemon.client();
        assert_eq!(client.number(&["INCRBY", "many", "3"]), 3 * round);
        assert_eq!(client.number(&["TALLY.PENDING", "many"]), 3 * round);
        assert_eq!(
            client.number(&["DECRBY", &format!("round:{round}"), "8"]),
            -8
        );
        daemon.kill9();
        daemon.restart();
    }
    redis.restart();
    daemon.flush();
    let counters = redis.counters();
    assert_eq!(counters[&b"many"[..]], 30);
    assert_eq!(counters.len(), 11);
    assert_eq!(counters.values().sum::<i64>(), 30 - 80);
}

/// A transaction of a client is in the journal as a whole once `EXEC` is answered; keys of every
/// length come back as they were.
#[test]
fn keys_of_every_shape_survive_a_kill() {
    let redis = RedisServer::start(&[]);
    let mut daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    let mut expected = BTreeMap::new();
    let mut request = encode(&["MULTI"]);
    for len in (0..=1024).step_by(7).chain([1024]) {
        let key: Vec<u8> = (0..len).map(|n: usize| (n * 31 + len) as u8).collect();
        let delta = i64::MAX - len as i64;
        request.extend(encode(&[b"INCRBY", &key[..], delta.to_string().as_bytes()]));
        expected.insert(key, delta);
    }
    request.extend(encode(&["EXEC"]));
    client.send_raw(&request).unwrap();
    for _ in 0..=expected.len() {
        client.read().unwrap();
    }
    assert_eq!(client.read().unwrap().items().len(), expected.len());
    daemon.kill9();
    daemon.restart();
    daemon.flush();
    assert_eq!(redis.counters(), expected);
}

/// Replies need not be read: what the daemon took counts, at most once.
#[test]
fn increments_without_replies_are_taken_and_survive_a_kill() {
    let redis = RedisServer::start(&[]);
    let mut daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    client
        .send_raw(&encode(&["CLIENT", "REPLY", "OFF"]))
        .unwrap();
    client
        .send_raw(&encode(&["INCR", "silent"]).repeat(50_000))
        .unwrap();
    client
        .send_raw(&encode(&["CLIENT", "REPLY", "ON"]))
        .unwrap();
    client.set_limit(Duration::from_secs(30));
    assert_eq!(
        client.read().unwrap().text(),
        "OK",
        "everything before it was taken"
    );
    daemon.kill9();
    daemon.restart();
    daemon.flush();
    assert_eq!(redis.counter("silent"), 50_000);
}
