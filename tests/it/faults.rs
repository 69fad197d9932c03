//! Promise 3: connections to Redis that break anywhere, replies that never come, bytes that come
//! late: nothing is counted twice, nothing is lost.

use std::thread;

use rustix::process::Signal;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::load::Load;
use crate::support::proxy::{Direction, Proxy};
use crate::support::redis::RedisServer;
use crate::support::resp::{Value, encode};
use crate::support::{seed, wait_until};

/// Only the connection that flushes sends this.
const LANE: &[u8] = b"INCRBY";

/// One of several sweeps that share the work: each has its own servers, and mostly waits for the
/// daemon to try again.
fn sweep(first: u64, step: usize) -> u64 {
    let redis = RedisServer::start(&[]);
    let proxy = Proxy::start(redis.address());
    let daemon = Daemon::builder(proxy.url())
        .flush_interval(NEVER)
        .set("publish.enabled", false)
        .start();
    let mut client = daemon.client();
    let keys = ["cut:a", "cut:b", "cut:c"];
    let mut rounds = 0;
    let mut flush = |cut: &str| {
        for key in keys {
            client.command(&["INCRBY", key, "1000000"]);
        }
        daemon.flush();
        rounds += 1;
        for key in keys {
            assert_eq!(redis.counter(key), rounds * 1_000_000, "{cut}");
        }
    };
    flush("no cut");
    // How many bytes one flush has, each way.
    let before = [Direction::Requests, Direction::Replies].map(|d| (d, proxy.passed(d)));
    flush("no cut");
    for (direction, before) in before.map(|(d, before)| (d, proxy.passed(d) - before)) {
        assert!(before > 20, "{direction:?}: {before} bytes are no flush");
        for at in (first..=before).step_by(step) {
            proxy.cut_after(direction, at);
            flush(&format!("cut after {at} bytes of {direction:?}"));
        }
    }
    proxy.cuts()
}

#[test]
fn a_connection_cut_at_any_byte_of_a_flush_counts_once() {
    let sweeps = 8;
    // Every third byte in all; which ones changes from run to run.
    let start = fastrand::Rng::with_seed(seed()).u64(0..3);
    let cuts: u64 = thread::scope(|scope| {
        let workers: Vec<_> = (0..sweeps)
            .map(|n| scope.spawn(move || sweep(start + 3 * n, 3 * sweeps as usize)))
            .collect();
        workers.into_iter().map(|w| w.join().unwrap()).sum()
    });
    assert!(cuts > 40, "{cuts} cuts");
}

#[test]
fn connections_that_keep_breaking_at_random_under_load_end_exact() {
    let seed = seed();
    let redis = RedisServer::start(&[]);
    let proxy = Proxy::start(redis.address());
    let daemon = Daemon::builder(proxy.url())
        .flush_interval("5ms")
        .set("flush.batch_keys", 3)
        .start();
    proxy.cut_at_random(seed, 3000);
    let load = Load::start(daemon.socket(), "random", 8, 5);
    wait_until("connections have broken", || proxy.cuts() >= 40);
    let counted = load.stop();
    proxy.heal();
    daemon.flush();
    for c in counted {
        assert_eq!(redis.counter(&c.key), c.acknowledged, "{c:?}");
    }
}

#[test]
fn bytes_of_a_dead_connection_that_redis_executes_late_do_not_count_again() {
    let redis = RedisServer::start(&[]);
    let proxy = Proxy::start(redis.address());
    proxy.only(LANE);
    let daemon = Daemon::builder(proxy.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    client.command(&["INCR", "late"]);
    daemon.flush();
    let mut total = 1;
    for round in 0..12 {
        proxy.hold(Direction::Requests);
        total += 10;
        assert_eq!(client.number(&["INCRBY", "late", "10"]), total);
        daemon.signal(Signal::USR1);
        wait_until("the transaction is under way", || proxy.holding() > 0);
        proxy.cut_daemon_side();
        // Before, while and after the next connection delivers the same batch.
        if round % 3 == 0 {
            proxy.release(Direction::Requests);
        }
        wait_until("the batch arrives", || redis.counter("late") >= total);
        proxy.release(Direction::Requests);
        wait_until("nothing is held any more", || proxy.holding() == 0);
        daemon.flush();
        assert_eq!(redis.counter("late"), total, "round {round}");
    }
}

#[test]
fn a_transaction_whose_reply_is_lost_counts_once() {
    let redis = RedisServer::start(&[]);
    let proxy = Proxy::start(redis.address());
    let daemon = Daemon::builder(proxy.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    client.command(&["INCR", "reply"]);
    daemon.flush();
    for n in 2..8 {
        proxy.only(LANE);
        proxy.swallow(Direction::Replies);
        assert_eq!(client.number(&["INCR", "reply"]), n);
        daemon.signal(Signal::USR1);
        wait_until("Redis has executed it", || redis.counter("reply") == n);
        proxy.cut_daemon_side();
        proxy.heal();
        daemon.flush();
        assert_eq!(redis.counter("reply"), n);
        assert_eq!(
            client.number(&["GET", "reply"]),
            n,
            "the values were read back"
        );
        assert_eq!(client.number(&["TALLY.PENDING", "reply"]), 0);
    }
}

/// The daemon is killed while what became of its last batch is unknown: the next process must
/// find out from the token.
#[test]
fn a_kill_between_a_transaction_and_its_reply_counts_once() {
    let redis = RedisServer::start(&[]);
    let proxy = Proxy::start(redis.address());
    let mut daemon = Daemon::builder(proxy.url()).flush_interval(NEVER).start();
    daemon.client().command(&["INCR", "between"]);
    daemon.flush();
    let mut total = 1;
    for _ in 0..5 {
        proxy.only(LANE);
        proxy.swallow(Direction::Replies);
        daemon.client().command(&["INCRBY", "between", "100"]);
        total += 100;
        daemon.signal(Signal::USR1);
        wait_until("Redis has executed it", || {
            redis.counter("between") == total
        });
        daemon.kill9();
        proxy.heal();
        daemon.restart();
        daemon.client().command(&["INCR", "between"]);
        total += 1;
        daemon.flush();
        assert_eq!(redis.counter("between"), total);
    }
}

/// Bytes of a killed daemon are still on their way when its successor delivers the same batch.
#[test]
fn late_bytes_of_a_killed_daemon_do_not_count_again() {
    let redis = RedisServer::start(&[]);
    let proxy = Proxy::start(redis.address());
    let mut daemon = Daemon::builder(proxy.url()).flush_interval(NEVER).start();
    proxy.only(LANE);
    daemon.client().command(&["INCR", "ghost"]);
    daemon.flush();
    let mut total = 1;
    for round in 0..6 {
        proxy.hold(Direction::Requests);
        daemon.client().command(&["INCRBY", "ghost", "10"]);
        total += 10;
        daemon.signal(Signal::USR1);
        wait_until("the transaction is under way", || proxy.holding() > 0);
        daemon.kill9();
        if round % 2 == 0 {
            proxy.release(Direction::Requests);
        }
        daemon.restart();
        daemon.flush();
        proxy.release(Direction::Requests);
        wait_until("nothing is held any more", || proxy.holding() == 0);
        daemon.client().command(&["INCR", "ghost"]);
        total += 1;
        daemon.flush();
        assert_eq!(redis.counter("ghost"), total, "round {round}");
    }
}

/// A store behind something that refuses `MULTI` would run the increments unguarded: the daemon
/// must notice before it sends one, and keep accepting.
#[test]
fn a_store_that_refuses_transactions_gets_no_increment_unless_that_was_asked_for() {
    let redis = RedisServer::start(&[]);
    redis.cli(&["ACL", "SETUSER", "default", "-multi", "-exec"]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("reply.cold", "delta")
        .start();
    let mut client = daemon.client();
    assert_eq!(client.number(&["INCR", "guarded"]), 1);
    let refused = client.command(&["TALLY.FLUSH", "500"]);
    assert!(matches!(refused, Value::Error(_)), "{refused:?}");
    assert_eq!(redis.counter("guarded"), 0);
    let plain = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("flush.delivery", "at-least-once")
        .set("reply.cold", "delta")
        .start();
    plain
        .client()
        .send_raw(&encode(&["INCR", "plain"]))
        .unwrap();
    wait_until("it is taken", || {
        plain.client().number(&["TALLY.PENDING", "plain"]) == 1
    });
    plain.flush();
    assert_eq!(redis.counter("plain"), 1);
    // Once it may, what waited arrives.
    redis.cli(&["ACL", "SETUSER", "default", "+multi", "+exec"]);
    daemon.flush();
    assert_eq!(redis.counter("guarded"), 1);
}
