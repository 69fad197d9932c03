//! Promise 5 on one node: a read is the last value known from the store plus what is pending.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::convergence::stat;
use crate::support::daemon::{Daemon, NEVER};
use crate::support::redis::RedisServer;
use crate::support::resp::{Value, encode_into};

#[test]
fn the_first_increment_of_a_key_goes_on_from_its_value_in_redis() {
    let redis = RedisServer::start(&[]);
    redis.cli(&["SET", "k", "41"]);
    redis.cli(&["SET", "negative", "-9223372036854775808"]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    assert_eq!(client.number(&["INCR", "k"]), 42);
    assert_eq!(client.number(&["DECRBY", "k", "2"]), 40);
    assert_eq!(client.number(&["INCR", "negative"]), i64::MIN + 1);
    assert_eq!(client.number(&["INCR", "new"]), 1);
    assert_eq!(redis.counter("k"), 41, "nothing is flushed yet");
    daemon.flush();
    assert_eq!((redis.counter("k"), redis.counter("new")), (40, 1));
}

#[test]
fn reads_answer_from_the_view_and_go_through_to_redis_when_cold() {
    let redis = RedisServer::start(&[]);
    redis.cli(&["SET", "there", "7"]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    assert_eq!(client.command(&["GET", "there"]), Value::bulk("7"));
    assert_eq!(client.command(&["GET", "missing"]), Value::Nil);
    assert_eq!(client.number(&["EXISTS", "there", "missing", "there"]), 2);
    assert_eq!(client.number(&["INCRBY", "pending", "3"]), 3);
    assert_eq!(
        client.command(&["MGET", "there", "missing", "pending", "there"]),
        Value::Array(vec![
            Value::bulk("7"),
            Value::Nil,
            Value::bulk("3"),
            Value::bulk("7")
        ])
    );
    assert_eq!(
        client.number(&["EXISTS", "pending"]),
        1,
        "it will exist: it was acknowledged"
    );
    assert_eq!(client.number(&["INCRBY", "there", "10"]), 17);
    assert_eq!(client.number(&["TALLY.PENDING", "there"]), 10);
    assert_eq!(client.number(&["TALLY.PENDING", "missing"]), 0);
    daemon.flush();
    assert_eq!(client.command(&["GET", "there"]), Value::bulk("17"));
    assert_eq!(client.number(&["TALLY.PENDING", "there"]), 0);
}

#[test]
fn a_view_without_loading_counts_from_what_is_pending() {
    let redis = RedisServer::start(&[]);
    redis.cli(&["SET", "k", "41"]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("reply.cold", "delta")
        .start();
    let mut client = daemon.client();
    assert_eq!(client.number(&["INCR", "k"]), 1);
    assert_eq!(client.number(&["INCR", "k"]), 2);
    daemon.flush();
    assert_eq!(redis.counter("k"), 43);
    assert_eq!(
        client.number(&["INCR", "k"]),
        44,
        "the flush has told it the value"
    );
}

#[test]
fn a_key_of_another_type_is_answered_as_redis_does() {
    let redis = RedisServer::start(&[]);
    redis.cli(&["LPUSH", "list", "x"]);
    redis.cli(&["SET", "word", "hello"]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    let wrong_type = "WRONGTYPE Operation against a key holding the wrong kind of value";
    assert_eq!(client.command(&["GET", "list"]).error(), wrong_type);
    assert_eq!(
        client.command(&["MGET", "list"]),
        Value::Array(vec![Value::Nil])
    );
    assert_eq!(client.number(&["EXISTS", "list"]), 1);
    assert_eq!(client.command(&["INCR", "list"]).error(), wrong_type);
    assert_eq!(
        client.command(&["INCR", "word"]).error(),
        "ERR value is not an integer or out of range"
    );
    assert_eq!(client.number(&["EXISTS", "word"]), 1);
    // And none of it stands in the way of others.
    assert_eq!(client.number(&["INCR", "fine"]), 1);
    client.command(&["TALLY.FLUSH", "20000"]);
    assert_eq!(redis.counter("fine"), 1);
    assert_eq!(redis.cli(&["GET", "word"]), Value::bulk("hello"));
}

#[test]
fn an_overflow_is_refused_before_it_is_taken() {
    let redis = RedisServer::start(&[]);
    redis.cli(&["SET", "top", "9223372036854775806"]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    assert_eq!(client.number(&["INCR", "top"]), i64::MAX);
    assert_eq!(
        client.command(&["INCR", "top"]).error(),
        "ERR increment or decrement would overflow"
    );
    assert_eq!(client.number(&["GET", "top"]), i64::MAX);
    daemon.flush();
    assert_eq!(redis.counter("top"), i64::MAX);
}

/// All cold reads of a moment share one round trip: a cold pipeline must not cost one each.
#[test]
fn cold_keys_of_one_pipeline_are_loaded_together() {
    let redis = RedisServer::start(&[]);
    let keys: Vec<String> = (0..1000).map(|n| format!("cold:{n}")).collect();
    for (n, key) in keys.iter().enumerate() {
        redis.cli(&["SET", key, &(n * 10).to_string()]);
    }
    // Long enough that no answer comes from a time-out.
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("reply.load_timeout", "20s")
        .start();
    daemon.client().command(&["GET", "first"]);
    redis.cli(&["CONFIG", "RESETSTAT"]);
    let mut bytes = Vec::new();
    for key in &keys {
        encode_into(&mut bytes, &["INCR", key]);
    }
    let mut client = daemon.client();
    client.send_raw(&bytes).unwrap();
    for n in 0..1000 {
        assert_eq!(
            client.read().unwrap(),
            Value::Integer(n * 10 + 1),
            "in order, each its own"
        );
    }
    let calls = redis.command_calls();
    let transactions = calls.get("exec").copied().unwrap_or(0);
    assert!(
        transactions <= 50,
        "1,000 cold keys took {transactions} round trips: {calls:?}"
    );
}

#[test]
fn many_clients_that_start_on_the_same_cold_key_see_every_number_once() {
    let redis = RedisServer::start(&[]);
    redis.cli(&["SET", "ids", "1000"]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval("1ms")
        .set("reply.load_timeout", "20s")
        .start();
    let mut all: Vec<i64> = thread::scope(|scope| {
        let clients: Vec<_> = (0..16)
            .map(|_| {
                let mut client = daemon.client();
                scope.spawn(move || {
                    (0..200)
                        .map(|_| client.number(&["INCR", "ids"]))
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        clients
            .into_iter()
            .flat_map(|c| c.join().unwrap())
            .collect()
    });
    all.sort_unstable();
    assert_eq!(all, (1001..=1000 + 3200).collect::<Vec<_>>());
}

/// The story: whoever asked for very many keys at once held up everybody's reads, which then said that keys
/// do not exist.
#[test]
fn one_that_reads_very_many_cold_keys_does_not_hold_up_another() {
    const MGETS: usize = 10;
    let redis = RedisServer::start(&[]);
    for n in 0..20 {
        redis.cli(&["SET", &format!("there:{n}"), &n.to_string()]);
    }
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("reply.load_timeout", "60s")
        .start();
    let (mut greedy, mut other) = (daemon.client(), daemon.client());
    let mut bytes = Vec::new();
    for round in 0..MGETS {
        let keys = (0..55_000).map(|n| format!("no:{round}:{n}"));
        let words: Vec<String> = std::iter::once("MGET".to_owned()).chain(keys).collect();
        encode_into(&mut bytes, &words);
    }
    let answered = AtomicUsize::new(0);
    thread::scope(|scope| {
        let mut writer = greedy.stream().duplicate();
        scope.spawn(move || std::io::Write::write_all(&mut writer, &bytes).unwrap());
        scope.spawn(|| {
            for _ in 0..MGETS {
                assert_eq!(greedy.read().unwrap().items().len(), 55_000);
                answered.fetch_add(1, Ordering::Relaxed);
            }
        });
        crate::support::wait_until("it has begun", || stat(&daemon, "loads_total") > 0);
        for n in 0..20 {
            let value = other.command(&["GET", &format!("there:{n}")]);
            assert_eq!(value, Value::bulk(&n.to_string()));
        }
        let answered = answered.load(Ordering::Relaxed);
        assert!(answered < MGETS, "it waited for all of them");
    });
    assert_eq!(stat(&daemon, "unloaded_reads_total"), 0);
}

#[test]
fn a_read_that_cannot_be_answered_in_time_is_an_error_and_not_a_lie() {
    let mut redis = RedisServer::start(&[]);
    let daemon = |on_timeout: &str| {
        Daemon::builder(redis.url())
            .flush_interval(NEVER)
            .set("reply.load_timeout", "50ms")
            .set("reply.on_timeout", on_timeout)
            .start()
    };
    let (strict, lenient) = (daemon("error"), daemon("nil"));
    for daemon in [&strict, &lenient] {
        daemon.client().command(&["INCR", "known"]);
        daemon.flush();
    }
    redis.pause();
    let mut client = strict.client();
    let unloaded = "LOADING the store has not told this key's value within reply.load_timeout; \
                    what is counted here is safe";
    assert_eq!(client.command(&["GET", "k"]).error(), unloaded);
    assert_eq!(client.command(&["MGET", "known", "k"]).error(), unloaded);
    assert_eq!(client.command(&["EXISTS", "k"]).error(), unloaded);
    assert!(client.number(&["GET", "known"]) > 0);
    // Increments go on, and then it is known what is pending.
    assert_eq!(client.number(&["INCR", "k"]), 1);
    assert_eq!(client.command(&["GET", "k"]), Value::bulk("1"));
    client.command(&["MULTI"]);
    client.command(&["GET", "other"]);
    client.command(&["INCR", "k"]);
    let exec = client.command(&["EXEC"]);
    assert_eq!(exec.items()[0].error(), unloaded);
    assert_eq!(exec.items()[1], Value::Integer(2));
    assert_eq!(stat(&strict, "unloaded_reads_total"), 4);
    assert_eq!(stat(&strict, "unloaded_increments_total"), 2);

    let mut client = lenient.client();
    assert_eq!(client.command(&["GET", "k"]), Value::Nil);
    let both = client.command(&["MGET", "known", "k"]);
    assert_eq!(both.items()[1], Value::Nil);
    assert_eq!(client.number(&["EXISTS", "k"]), 0);
    redis.resume();
    crate::support::wait_until("it is read", || {
        strict.client().command(&["GET", "other"]) == Value::Nil
    });
}
