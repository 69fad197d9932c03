//! Promises 2 and 6 on a full disk: a daemon that is started there flushes what is pending, which
//! gives room back, and refuses what it cannot write down until then; and what is kept only in case
//! takes bounded room.

use std::path::Path;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::disk::Disk;
use crate::support::load::fill;
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value};
use crate::support::wait_until;

const KEEPS_ALL: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];
const REFUSAL: &str = "ERR the journal cannot grow, the disk may be full: no further record fits";

fn stat(daemon: &Daemon, name: &str) -> i64 {
    daemon.client().command(&["TALLY.STATS"]).fields()[name].number()
}

/// Whether it was taken; it may only be refused for want of room.
fn is_taken(client: &mut Client, key: &str) -> bool {
    match client.command(&["INCR", key]) {
        Value::Integer(_) => true,
        Value::Error(text) if text == REFUSAL => false,
        other => panic!("{other:?}"),
    }
}

/// The room that the segments take, in bytes.
fn segment_bytes(state_dir: &Path) -> u64 {
    let entries = std::fs::read_dir(state_dir.join("segments")).unwrap();
    let lengths = entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len()));
    lengths.sum()
}

/// A full disk, a full segment, a restart: the room that would let it start was to be had only by
/// starting. Seen to fail when a start needed room for a new segment (and for `node.json`): it ended
/// with 74, and all that was pending stayed where it was.
#[test]
fn a_restart_on_a_full_disk_flushes_first_and_then_takes_increments_by_itself() {
    let Some(disk) = Disk::mount("6m") else {
        return;
    };
    let mut redis = RedisServer::start(&KEEPS_ALL);
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval("100ms")
        .set("reply.cold", "delta")
        .set("flush.max_keys", 1_000_000)
        .state_dir(&disk.state_dir())
        .start();
    redis.kill9();
    let mut client = daemon.client();
    assert!(is_taken(&mut client, "sealed"));
    wait_until("an epoch is sealed", || stat(&daemon, "sealed_keys") > 0);
    disk.fill();
    let (taken, refusal) = fill(&mut client, "full", 200_000);
    assert_eq!(refusal.as_deref(), Some(REFUSAL));
    // One that has something pending, but no record in the open epoch.
    assert_eq!(client.command(&["INCR", "sealed"]).error(), REFUSAL);
    daemon.kill9();
    redis.restart();
    daemon.restart();
    wait_until("all that was pending is in the store", || {
        redis.counters().len() == taken + 1
    });
    let mut client = daemon.client();
    wait_until("increments are taken again", || {
        is_taken(&mut client, "afterwards")
    });
    // And not only one of them.
    let (more, refusal) = fill(&mut client, "more", 10_000);
    assert_eq!((more, refusal), (10_000, None));
    let afterwards = client.number(&["GET", "afterwards"]);
    daemon.flush();
    let counters = redis.counters();
    assert_eq!(counters.len(), taken + more + 2);
    assert_eq!(counters[&b"afterwards"[..]], afterwards);
    assert_eq!(
        counters.values().sum::<i64>(),
        (taken + more + 1) as i64 + afterwards
    );
}

/// No store, no room, one restart after the other: nothing is acknowledged that is not in the
/// journal, and nothing of what was is lost.
#[test]
fn restarts_on_a_full_disk_without_a_store_keep_everything_and_refuse_the_rest() {
    let Some(disk) = Disk::mount("6m") else {
        return;
    };
    let mut redis = RedisServer::start(&KEEPS_ALL);
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("reply.cold", "delta")
        .set("flush.max_keys", 1_000_000)
        .state_dir(&disk.state_dir())
        .start();
    redis.kill9();
    disk.fill();
    let (mut taken, refusal) = fill(&mut daemon.client(), "full", 200_000);
    assert_eq!(refusal.as_deref(), Some(REFUSAL));
    for round in 0..5 {
        daemon.restart();
        disk.fill();
        let mut client = daemon.client();
        assert_eq!(client.number(&["TALLY.PENDING", "full:0"]), 1);
        assert_eq!(client.number(&["GET", "full:0"]), 1);
        for key in ["full:0", "new"] {
            assert_eq!(client.command(&["INCR", key]).error(), REFUSAL, "{round}");
        }
        assert_eq!(client.command(&["GET", "new"]), Value::Nil);
    }
    let said = daemon.log().matches("the disk is full").count();
    assert_eq!(said, 5, "said once at each start");
    let mut client = daemon.client();
    disk.free();
    wait_until("increments are taken again", || {
        is_taken(&mut client, "new")
    });
    taken += 1;
    redis.restart();
    daemon.flush();
    let counters = redis.counters();
    assert_eq!(counters.len(), taken);
    assert_eq!(counters.values().sum::<i64>(), taken as i64);
}

/// What an idle daemon holds is room enough for its successor.
#[test]
fn an_idle_daemon_that_is_restarted_on_a_full_disk_takes_increments() {
    let Some(disk) = Disk::mount("6m") else {
        return;
    };
    let redis = RedisServer::start(&[]);
    let mut daemon = Daemon::builder(redis.url())
        .state_dir(&disk.state_dir())
        .start();
    let mut total = 0;
    for round in 0..4 {
        let mut client = daemon.client();
        wait_until("it takes increments", || is_taken(&mut client, "idle"));
        total += 1;
        daemon.flush();
        assert_eq!(redis.counter("idle"), total);
        daemon.kill9();
        if round == 0 {
            disk.fill();
        }
        daemon.restart();
    }
    // Neither does it stand in the way of an end in order.
    assert_eq!(daemon.term().code(), Some(0));
    daemon.restart();
    daemon.flush();
    assert_eq!(redis.counter("idle"), total);
}

/// The embedded store lies on the same disk: it takes nothing, but neither is anything lost.
#[test]
fn an_embedded_store_on_a_full_disk_goes_on_when_there_is_room() {
    let Some(disk) = Disk::mount("12m") else {
        return;
    };
    let mut daemon = Daemon::builder("embedded")
        .flush_interval(NEVER)
        .state_dir(&disk.state_dir())
        .start();
    let mut client = daemon.client();
    assert!(is_taken(&mut client, "before"));
    daemon.flush();
    disk.fill();
    let (taken, _) = fill(&mut client, "full", 200_000);
    daemon.kill9();
    daemon.restart();
    assert_eq!(daemon.client().number(&["TALLY.PENDING", "full:0"]), 1);
    disk.free();
    daemon.flush();
    let mut client = daemon.client();
    assert_eq!(client.number(&["GET", "before"]), 1);
    for key in [0, taken / 2, taken - 1] {
        let key = format!("full:{key}");
        assert_eq!(client.number(&["GET", &key]), 1);
        assert_eq!(client.number(&["TALLY.PENDING", &key]), 0);
    }
}

/// Guards `flush.max_retained_bytes`. Before it only `flush.retain` and the bound on what is pending
/// limited what is kept: large epochs, one after the other, could fill the disk.
#[test]
fn what_is_retained_takes_bounded_room_and_the_oldest_goes_first() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("flush.retain", NEVER)
        .set("flush.max_retained_bytes", "1MiB")
        .start();
    let mut client = daemon.client();
    for epoch in 0..30 {
        let (taken, refusal) = fill(&mut client, &format!("retained:{epoch}"), 3_000);
        assert_eq!((taken, refusal), (3_000, None));
        daemon.flush();
    }
    let retained = stat(&daemon, "retained_segments");
    assert!((3..20).contains(&retained), "{retained} segments");
    // The open segment, and the next one at hand.
    let bytes = segment_bytes(daemon.state_dir());
    assert!(bytes <= (1 << 20) + 3 * (1 << 20), "{bytes} bytes");
    let said = daemon.log().matches("flush.max_retained_bytes").count();
    assert_eq!(said, 1);
    assert_eq!(redis.counters().len(), 30 * 3_000);
}
