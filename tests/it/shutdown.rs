//! Signals: a stop loses nothing that was answered, and counts nothing that was not.

use rustix::process::Signal;

use crate::support::daemon::{Daemon, NEVER, Settings};
use crate::support::load::{Counted, Load};
use crate::support::redis::RedisServer;
use crate::support::resp::{Value, encode};
use crate::support::wait_until;

/// A daemon whose stop may take longer than any test waits: a stop that has nothing to wait for
/// must not take its time-out.
fn patient(settings: Settings) -> Daemon {
    settings.set("shutdown.timeout", "10m").start()
}

/// A stop answers every command that was read: so each client's counter is what it was answered.
#[track_caller]
fn assert_exact(redis: &RedisServer, counted: &[Counted]) {
    for client in counted {
        assert_eq!(
            redis.counter(&client.key),
            client.acknowledged,
            "{client:?}"
        );
    }
}

#[test]
fn a_stop_under_load_leaves_in_redis_exactly_what_was_acknowledged() {
    for (signal, pipeline) in [(Signal::TERM, 1), (Signal::INT, 1), (Signal::TERM, 100)] {
        let redis = RedisServer::start(&[]);
        let mut daemon = patient(Daemon::builder(redis.url()).flush_interval("50ms"));
        let load = Load::start(daemon.socket(), "stop", 8, pipeline);
        load.wait_acknowledged(10_000);
        daemon.signal(signal);
        assert_eq!(daemon.wait_exit().code(), Some(0));
        assert_exact(&redis, &load.join());
        assert!(!daemon.socket().exists(), "the socket is removed");
    }
}

#[test]
fn a_stop_answers_what_it_read_also_when_the_client_has_sent_much_more() {
    let redis = RedisServer::start(&[]);
    let mut daemon = patient(Daemon::builder(redis.url()).flush_interval(NEVER));
    let mut client = daemon.client();
    // More than any buffer takes: the daemon is in the middle of it when it stops.
    let mut writer = client.stream().duplicate();
    let writing = std::thread::spawn(move || {
        let burst = encode(&["INCR", "flood"]).repeat(1000);
        while std::io::Write::write_all(&mut writer, &burst).is_ok() {}
    });
    let mut answered = 0;
    for _ in 0..1000 {
        answered = client.read().unwrap().number();
    }
    daemon.signal(Signal::TERM);
    while let Ok(reply) = client.read() {
        answered = reply.number();
    }
    writing.join().unwrap();
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert_eq!(redis.counter("flood"), answered);
}

#[test]
fn idle_subscribed_and_half_way_clients_do_not_hold_up_a_stop() {
    let redis = RedisServer::start(&[]);
    let mut daemon = patient(Daemon::builder(redis.url()).flush_interval(NEVER));
    let mut idle = daemon.client();
    let mut subscribed = daemon.client();
    subscribed.command(&["SUBSCRIBE", "tallyd:deltas"]);
    let mut half = daemon.client();
    half.send_raw(b"*2\r\n$4\r\nINCR\r\n$4\r\nha").unwrap();
    let mut queued = daemon.client();
    queued.command(&["MULTI"]);
    queued.command(&["INCR", "queued"]);
    assert_eq!(idle.number(&["INCRBY", "idle", "3"]), 3);
    assert_eq!(daemon.term().code(), Some(0));
    assert_eq!(idle.read_to_end().unwrap(), b"", "the connection is closed");
    assert_eq!(redis.counter("idle"), 3);
    assert_eq!(
        redis.counter("queued"),
        0,
        "a transaction without EXEC is nothing"
    );
}

#[test]
fn usr1_flushes_now() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    daemon.client().command(&["INCRBY", "now", "9"]);
    assert_eq!(redis.counter("now"), 0);
    daemon.signal(Signal::USR1);
    wait_until("the signal flushes", || redis.counter("now") == 9);
}

#[test]
fn hup_leaves_a_running_daemon_running() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).start();
    let mut client = daemon.client();
    client.command(&["INCR", "hup"]);
    daemon.signal(Signal::HUP);
    // Signals are delivered in order of number, not of sending: the flush shows that it still serves.
    assert_eq!(client.number(&["INCR", "hup"]), 2);
    daemon.flush();
    assert_eq!(redis.counter("hup"), 2);
}

#[test]
fn a_stop_while_redis_is_away_ends_in_time_and_the_next_start_has_the_rest() {
    let mut redis = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("shutdown.timeout", "500ms")
        .start();
    let mut client = daemon.client();
    assert_eq!(client.number(&["INCRBY", "rest", "5"]), 5);
    daemon.flush();
    assert_eq!(client.number(&["INCRBY", "rest", "7"]), 12);
    redis.kill9();
    assert_eq!(
        daemon.term().code(),
        Some(0),
        "the journal keeps what is left"
    );
    redis.restart();
    assert_eq!(redis.counter("rest"), 5);
    daemon.restart();
    assert_eq!(daemon.client().number(&["GET", "rest"]), 12);
    daemon.flush();
    assert_eq!(redis.counter("rest"), 12);
}

#[test]
fn a_second_signal_ends_a_stop_at_once() {
    let mut redis = RedisServer::start(&[]);
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("shutdown.timeout", "10m")
        .start();
    let mut client = daemon.client();
    assert_eq!(client.number(&["INCR", "patience"]), 1);
    redis.pause();
    daemon.signal(Signal::TERM);
    // The stop has begun when it closes its clients.
    assert_eq!(client.read_to_end().unwrap(), b"");
    // It now waits for Redis, for ten minutes if nobody hurries it.
    daemon.signal(Signal::TERM);
    daemon.wait_exit();
    redis.resume();
    daemon.restart();
    daemon.flush();
    assert_eq!(redis.counter("patience"), 1);
    assert_eq!(
        daemon.client().command(&["PING"]),
        Value::Status("PONG".into())
    );
}

/// Seen to fail when the last flush waited for every client to have its answers.
#[test]
fn a_client_that_does_not_read_its_answers_does_not_keep_the_rest_from_the_last_flush() {
    let redis = RedisServer::start(&[]);
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("shutdown.timeout", "4s")
        .start();
    let mut deaf = daemon.client();
    // More than the sockets' buffers hold.
    let burst = crate::support::resp::encode(&["ECHO", &"x".repeat(1000)]).repeat(2000);
    deaf.send_raw(&burst).unwrap();
    assert_eq!(daemon.client().number(&["INCRBY", "heard", "3"]), 3);
    assert_eq!(daemon.term().code(), Some(0));
    assert_eq!(redis.counter("heard"), 3);
    drop(deaf);
}
