//! Which store is it? What was flushed to one is not sent to another, and what a store has lost is.

use std::path::Path;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::redis::RedisServer;
use crate::support::resp::Value;

/// One life of a daemon on this store, with ten increments that are flushed; returns its log.
fn live(state: &Path, store: &str) -> String {
    let mut daemon = Daemon::builder(store)
        .flush_interval(NEVER)
        .state_dir(state)
        .set("flush.retain", "1h")
        .start();
    let mut client = daemon.client();
    for _ in 0..10 {
        client.command(&["INCR", "k"]);
    }
    daemon.flush();
    daemon.term();
    daemon.log()
}

fn id(redis: &RedisServer) -> String {
    redis.cli(&["GET", "tallyd:store"]).text()
}

/// The story: ten increments counted in the embedded store arrived again in a Redis.
#[test]
fn another_store_gets_what_is_pending_and_nothing_that_the_former_one_has() {
    let (first, second) = (RedisServer::start(&[]), RedisServer::start(&[]));
    // Somebody else's store by now.
    second.cli(&["SET", "tallyd:store", &"5".repeat(32)]);
    let state = tempfile::tempdir().unwrap();
    live(state.path(), "embedded");
    let log = live(state.path(), &first.url());
    assert_eq!(first.counter("k"), 10);
    assert_eq!(log.matches("this is another store").count(), 1, "{log}");
    assert!(
        log.contains("embedded:") && log.contains(&id(&first)),
        "{log}"
    );
    let log = live(state.path(), &second.url());
    assert_eq!(second.counter("k"), 10);
    assert_eq!(log.matches("this is another store").count(), 1, "{log}");
    assert_eq!(id(&second), "5".repeat(32));
    // And back, to one that has an older token of this node.
    let log = live(state.path(), &first.url());
    assert_eq!(first.counter("k"), 20);
    assert_eq!(log.matches("this is another store").count(), 1, "{log}");
    let log = live(state.path(), "embedded");
    assert_eq!(log.matches("this is another store").count(), 1, "{log}");
    let log = live(state.path(), "embedded");
    assert!(!log.contains("this is another store"), "{log}");
    let daemon = Daemon::builder("embedded").state_dir(state.path()).start();
    assert_eq!(daemon.client().command(&["GET", "k"]), Value::bulk("30"));
    assert_eq!((first.counter("k"), second.counter("k")), (20, 10));
}

#[test]
fn the_same_store_at_another_address_goes_on() {
    let redis = RedisServer::start(&[]);
    let state = tempfile::tempdir().unwrap();
    live(state.path(), &redis.url());
    let log = live(state.path(), &redis.unix_url());
    assert_eq!(redis.counter("k"), 20);
    assert!(!log.contains("another store"), "{log}");
}

/// As before: a fail-over to a server that had not got anything yet.
#[test]
fn a_server_without_an_id_is_the_store_without_its_data() {
    let (first, second) = (RedisServer::start(&[]), RedisServer::start(&[]));
    let state = tempfile::tempdir().unwrap();
    live(state.path(), &first.url());
    let log = live(state.path(), &second.url());
    assert_eq!(second.counter("k"), 20, "what it lost is sent again\n{log}");
    assert_eq!(id(&second), id(&first), "and the other nodes know it, too");
}

/// What was pending when the daemon went is nobody's yet.
#[test]
fn what_is_pending_goes_to_the_other_store() {
    let (mut first, second) = (RedisServer::start(&[]), RedisServer::start(&[]));
    second.cli(&["SET", "tallyd:store", &"5".repeat(32)]);
    let state = tempfile::tempdir().unwrap();
    live(state.path(), &first.url());
    {
        let mut daemon = Daemon::builder(first.url())
            .flush_interval(NEVER)
            .state_dir(state.path())
            .start();
        first.pause();
        for _ in 0..3 {
            daemon.client().command(&["INCR", "k"]);
        }
        daemon.kill9();
        first.resume();
    }
    live(state.path(), &second.url());
    assert_eq!((first.counter("k"), second.counter("k")), (10, 13));
}

#[test]
fn an_id_that_somebody_wrote_over_is_named() {
    let redis = RedisServer::start(&[]);
    redis.cli(&["SET", "tallyd:store", "mine"]);
    let daemon = Daemon::builder(redis.url()).start();
    let mut client = daemon.client();
    client.command(&["INCR", "k"]);
    let answer = client.command(&["TALLY.FLUSH", "2000"]);
    let said = answer.error();
    assert!(
        said.contains("key tallyd:store holds no store id"),
        "{said}"
    );
    redis.cli(&["DEL", "tallyd:store"]);
    daemon.flush();
    assert_eq!(redis.counter("k"), 1);
}
