//! `journal.sync`: when a reply means that the disk has it. A power cut cannot be had in a test; that
//! the system was asked to sync before the reply can.

use std::thread;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::load::Load;
use crate::support::redis::RedisServer;
use crate::support::resp::Client;

fn syncs(client: &mut Client) -> i64 {
    let stats = client.command(&["TALLY.STATS"]).fields();
    stats["syncs_total"].number()
}

/// Seen to fail when answers were written without waiting for the ticket.
#[test]
fn with_always_each_reply_comes_after_a_sync_of_its_own_or_a_shared_one() {
    let redis = RedisServer::start(&[]);
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("journal.sync", "always")
        .start();
    let mut client = daemon.client();
    for n in 1..=50 {
        assert_eq!(client.number(&["INCR", "alone"]), n);
        assert!(syncs(&mut client) >= n, "a reply came before its sync");
    }
    // Reads wait for nothing.
    let before = syncs(&mut client);
    for _ in 0..50 {
        client.number(&["GET", "alone"]);
    }
    assert_eq!(syncs(&mut client), before);
    // Many clients share a sync.
    let load = Load::start(daemon.socket(), "shared", 16, 8);
    load.wait_acknowledged(2_000);
    let acknowledged: i64 = load.stop().iter().map(|client| client.acknowledged).sum();
    let shared = syncs(&mut client) - before;
    assert!(
        shared * 8 <= acknowledged,
        "{shared} syncs for {acknowledged} increments"
    );
    daemon.kill9();
    daemon.restart();
    daemon.flush();
    assert_eq!(redis.counter("alone"), 50);
}

/// Flushes change the segment while clients wait for the one before.
#[test]
fn with_always_clients_are_answered_while_epochs_come_and_go() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval("1ms")
        .set("journal.sync", "always")
        .start();
    thread::scope(|scope| {
        for number in 0..4 {
            let mut client = daemon.client();
            scope.spawn(move || {
                let key = format!("always:{number}");
                for n in 1..=200 {
                    assert_eq!(client.number(&["INCR", &key]), n);
                }
            });
        }
    });
    daemon.flush();
    for number in 0..4 {
        assert_eq!(redis.counter(format!("always:{number}")), 200);
    }
}

#[test]
fn with_interval_and_never_no_reply_waits_for_a_sync() {
    for policy in ["interval", "never"] {
        let redis = RedisServer::start(&[]);
        let daemon = Daemon::builder(redis.url())
            .flush_interval("5ms")
            .set("journal.sync", policy)
            .start();
        let mut client = daemon.client();
        for n in 1..=100 {
            assert_eq!(client.number(&["INCR", "k"]), n);
        }
        daemon.flush();
        assert_eq!(syncs(&mut client), 0, "{policy}");
        assert_eq!(redis.counter("k"), 100);
    }
}
