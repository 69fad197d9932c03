//! What was flushed is kept until so many replicas have it (`flush.replicas`).

use crate::support::daemon::Daemon;
use crate::support::http::Address;
use crate::support::redis::RedisServer;
use crate::support::resp::Client;
use crate::support::wait_until;

fn stat(client: &mut Client, name: &str) -> i64 {
    client.command(&["TALLY.STATS"]).fields()[name].number()
}

#[test]
fn a_segment_is_kept_until_the_replicas_have_it_and_nothing_else_waits_for_them() {
    let master = RedisServer::start(&["--repl-diskless-sync-delay", "0"]);
    let of = master.address().port().to_string();
    let mut replica = RedisServer::start(&["--replicaof", "127.0.0.1", &of]);
    wait_until("the replica is in sync", || {
        let info = master.cli(&["INFO", "replication"]).text();
        info.contains("state=online")
    });
    let dir = tempfile::tempdir().unwrap();
    let admin = dir.path().join("admin.sock");
    let daemon = Daemon::builder(master.url())
        .flush_interval("20ms")
        .set("flush.retain", "50ms")
        .set("flush.replicas", 1)
        .set("admin.listen", format!("unix:{}", admin.display()))
        .start();
    let mut client = daemon.client();
    let mut count = |amount: i64| {
        client.command(&["INCRBY", "k", &amount.to_string()]);
        daemon.flush();
        assert_eq!(stat(&mut client, "sealed_segments"), 0);
    };
    let mut watcher = daemon.client();
    count(1);
    wait_until("the segment is let go", || {
        stat(&mut watcher, "retained_segments") == 0
    });
    // Where nothing is to be let go, nobody is asked.
    let asked = master.commandstats("wait");
    assert!(asked >= 1, "replicas were not counted");
    wait_until("a while passes", || {
        stat(&mut watcher, "commands_total") > 200
    });
    assert_eq!(master.commandstats("wait"), asked);

    replica.pause();
    for _ in 0..3 {
        count(1);
    }
    wait_until("three segments wait", || {
        stat(&mut watcher, "replicas_waiting_segments") == 3
    });
    wait_until("it is told", || {
        daemon
            .log()
            .contains("(flush.replicas): 0 of 1 replicas have it")
    });
    assert_eq!(stat(&mut watcher, "retained_segments"), 3);
    let address = Address::Unix(admin);
    assert_eq!(address.get("/readyz").status, 200);
    let metrics = address.get("/metrics").body;
    assert!(
        metrics.contains("tallyd_replicas_waiting_segments 3\n"),
        "{metrics}"
    );
    count(1);
    assert_eq!(master.counter("k"), 5);

    replica.resume();
    wait_until("all is let go", || {
        stat(&mut watcher, "retained_segments") == 0
    });
    assert_eq!(stat(&mut watcher, "replicas_waiting_segments"), 0);
    assert_eq!(replica.counter("k"), 5);
    wait_until("it is told", || {
        daemon.log().contains("1 replicas have all of it again")
    });
    let log = daemon.log();
    assert_eq!(log.matches("0 of 1 replicas").count(), 1, "{log}");
    assert!(!log.contains("cannot flush"), "{log}");
}

/// A connection that has written nothing has every replica's word at once.
#[test]
fn on_a_new_connection_replicas_are_not_counted_before_something_was_written_there() {
    let master = RedisServer::start(&["--repl-diskless-sync-delay", "0"]);
    let of = master.address().port().to_string();
    let mut replica = RedisServer::start(&["--replicaof", "127.0.0.1", &of]);
    wait_until("the replica is in sync", || {
        let info = master.cli(&["INFO", "replication"]).text();
        info.contains("state=online")
    });
    let daemon = Daemon::builder(master.url())
        .flush_interval("20ms")
        .set("flush.retain", "200ms")
        .set("flush.replicas", 1)
        .start();
    let mut client = daemon.client();
    replica.pause();
    for _ in 0..5 {
        client.command(&["INCR", "k"]);
        daemon.flush();
        master.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    }
    wait_until("all wait", || {
        stat(&mut client, "replicas_waiting_segments") == 5
    });
    replica.resume();
    wait_until("all is let go", || {
        stat(&mut client, "retained_segments") == 0
    });
    assert_eq!(master.counter("k"), 5);
}

#[test]
fn a_user_who_may_not_wait_is_told_so_and_flushes_go_on() {
    let master = RedisServer::start(&[]);
    master.cli(&["ACL", "SETUSER", "default", "-wait"]);
    let daemon = Daemon::builder(master.url())
        .flush_interval("20ms")
        .set("flush.retain", "10ms")
        .set("flush.replicas", 1)
        .start();
    let mut client = daemon.client();
    client.command(&["INCR", "k"]);
    daemon.flush();
    wait_until("it is told", || daemon.log().contains("(WAIT)"));
    client.command(&["INCR", "k"]);
    daemon.flush();
    assert_eq!(master.counter("k"), 2);
    assert_eq!(stat(&mut client, "retained_segments"), 2);
    assert_eq!(stat(&mut client, "retries_total"), 0);
}
