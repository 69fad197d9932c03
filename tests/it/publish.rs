//! Section 7 of the design: what a subscriber of the channel sees.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value as Json;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::load::Load;
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value};
use crate::support::wait_until;

const CHANNEL: &str = "tallyd:deltas";

/// A message, its keys decoded.
#[derive(Debug)]
struct Message {
    node: String,
    name: String,
    run: String,
    seq: u64,
    clock: u64,
    at: u64,
    /// Key, delta, value after it.
    deltas: Vec<(Vec<u8>, i64, i64)>,
}

fn parse(text: &str) -> Message {
    let json: Json = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert_eq!(json["v"], 1, "{text}");
    let word = |key: &str| {
        json[key]
            .as_str()
            .unwrap_or_else(|| panic!("{key}: {text}"))
            .to_string()
    };
    let number = |key: &str| {
        json[key]
            .as_u64()
            .unwrap_or_else(|| panic!("{key}: {text}"))
    };
    let mut deltas = Vec::new();
    for (list, base64) in [("deltas", false), ("deltas_b64", true)] {
        for entry in json[list].as_array().into_iter().flatten() {
            let [key, delta, value] = entry.as_array().unwrap().as_slice() else {
                panic!("an entry is key, delta, value: {text}");
            };
            let key = key.as_str().unwrap();
            let key = if base64 {
                STANDARD.decode(key).unwrap()
            } else {
                key.as_bytes().to_vec()
            };
            assert_eq!(
                base64,
                std::str::from_utf8(&key).is_err(),
                "only what is not UTF-8 is in base64: {text}"
            );
            deltas.push((key, delta.as_i64().unwrap(), value.as_i64().unwrap()));
        }
    }
    assert!(
        json["deltas"].is_array(),
        "the list is there even when it is empty: {text}"
    );
    Message {
        node: word("node"),
        name: word("name"),
        run: word("run"),
        seq: number("seq"),
        clock: number("clock"),
        at: number("at"),
        deltas,
    }
}

fn subscribe(mut client: Client) -> Client {
    let reply = client.command(&["SUBSCRIBE", CHANNEL]);
    assert_eq!(reply.items()[0], Value::bulk("subscribe"));
    client
}

fn next(subscriber: &mut Client) -> Message {
    let message = subscriber.read().expect("a message in time");
    let [kind, channel, text] = message.items() else {
        panic!("{message:?}");
    };
    assert_eq!(
        (kind, channel),
        (&Value::bulk("message"), &Value::bulk(CHANNEL))
    );
    parse(&text.text())
}

/// Reads messages until their deltas add up to `total`.
fn collect(subscriber: &mut Client, total: i64) -> Vec<Message> {
    let (mut messages, mut sum) = (Vec::new(), 0);
    while sum < total {
        let message = next(subscriber);
        sum += message
            .deltas
            .iter()
            .map(|(_, delta, _)| delta)
            .sum::<i64>();
        messages.push(message);
    }
    assert_eq!(sum, total, "more was published than was sent");
    messages
}

#[test]
fn messages_are_gapless_ordered_and_add_up_to_what_was_sent() {
    let redis = RedisServer::start(&[]);
    let mut subscriber = subscribe(redis.client());
    let daemon = Daemon::builder(redis.url())
        .flush_interval("20ms")
        .set("node.name", "web-7")
        .set("flush.batch_keys", 3)
        .start();
    let load = Load::start(daemon.socket(), "published", 8, 10);
    load.wait_acknowledged(20_000);
    let counted = load.stop();
    daemon.flush();
    let total: i64 = counted.iter().map(|c| c.acknowledged).sum();
    let messages = collect(&mut subscriber, total);

    let first = &messages[0];
    assert_eq!(first.name, "web-7");
    assert_eq!(first.node.len(), 32, "{}", first.node);
    for pair in messages.windows(2) {
        let (one, two) = (&pair[0], &pair[1]);
        assert_eq!((&one.node, &one.run), (&two.node, &two.run));
        assert!(two.at >= one.at, "{one:?} {two:?}");
        if two.deltas.is_empty() {
            assert_eq!(
                (two.seq, two.clock >= one.clock),
                (one.seq, true),
                "a heartbeat repeats: {one:?} {two:?}"
            );
        } else {
            assert_eq!(two.seq, one.seq + 1, "{one:?} {two:?}");
            assert!(two.clock > one.clock, "{one:?} {two:?}");
        }
        assert!(two.deltas.len() <= 3, "one message a batch: {two:?}");
    }
    let (mut sums, mut values) = (BTreeMap::new(), BTreeMap::new());
    for (key, delta, value) in messages.iter().flat_map(|m| &m.deltas) {
        *sums.entry(key.clone()).or_insert(0) += delta;
        assert_eq!(
            sums[key],
            *value,
            "the value after it: nobody else writes {}",
            key.escape_ascii()
        );
        values.insert(key.clone(), *value);
    }
    assert_eq!(values, redis.counters());
    for client in &counted {
        assert_eq!(values[client.key.as_bytes()], client.acknowledged);
    }
}

#[test]
fn keys_that_are_not_text_are_published_in_base64() {
    let redis = RedisServer::start(&[]);
    let mut subscriber = subscribe(redis.client());
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let keys: [&[u8]; 4] = [
        b"\xff\x00\xfe",
        "schlüssel".as_bytes(),
        b"with \"quotes\"\\\n",
        b"",
    ];
    for key in keys {
        assert_eq!(
            daemon
                .client()
                .number(&[b"INCRBY", key, b"-9223372036854775807"]),
            -i64::MAX
        );
    }
    daemon.flush();
    let mut seen = BTreeMap::new();
    while seen.len() < keys.len() {
        for (key, delta, value) in next(&mut subscriber).deltas {
            assert!(seen.insert(key, (delta, value)).is_none());
        }
    }
    for key in keys {
        assert_eq!(
            seen[key],
            (-i64::MAX, -i64::MAX),
            "numbers are not rounded: {}",
            key.escape_ascii()
        );
    }
}

#[test]
fn a_value_includes_what_others_wrote() {
    let redis = RedisServer::start(&[]);
    redis.cli(&["SET", "shared", "1000"]);
    let mut subscriber = subscribe(redis.client());
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    assert_eq!(daemon.client().number(&["INCRBY", "shared", "5"]), 1005);
    redis.cli(&["INCRBY", "shared", "100"]);
    daemon.flush();
    let messages = collect(&mut subscriber, 5);
    assert_eq!(
        messages.last().unwrap().deltas,
        [(b"shared".to_vec(), 5, 1105)]
    );
    assert_eq!(
        daemon.client().number(&["GET", "shared"]),
        1105,
        "the view follows"
    );
}

#[test]
fn an_idle_node_repeats_its_last_number_in_an_empty_message() {
    let redis = RedisServer::start(&[]);
    let mut subscriber = subscribe(redis.client());
    let daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("publish.heartbeat", "100ms")
        .start();
    daemon.client().command(&["INCR", "once"]);
    daemon.flush();
    let last = collect(&mut subscriber, 1).pop().unwrap();
    for _ in 0..3 {
        let beat = next(&mut subscriber);
        assert_eq!(beat.deltas, []);
        assert_eq!(
            (&beat.node, &beat.run, beat.seq),
            (&last.node, &last.run, last.seq)
        );
    }
    daemon.client().command(&["INCR", "once"]);
    daemon.flush();
    let after = collect(&mut subscriber, 1).pop().unwrap();
    assert_eq!(after.seq, last.seq + 1, "heartbeats take no numbers");
}

#[test]
fn a_restart_begins_a_new_run_of_the_same_node() {
    let redis = RedisServer::start(&[]);
    let mut subscriber = subscribe(redis.client());
    let mut daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    daemon.client().command(&["INCR", "runs"]);
    daemon.flush();
    let one = collect(&mut subscriber, 1).pop().unwrap();
    daemon.term();
    daemon.restart();
    daemon.client().command(&["INCR", "runs"]);
    daemon.flush();
    let two = collect(&mut subscriber, 1).pop().unwrap();
    assert_eq!(one.node, two.node, "the id belongs to the state directory");
    assert_ne!(one.run, two.run);
    assert_eq!(one.seq, two.seq, "each run counts from its start");
    assert!(two.clock > one.clock);
}

#[test]
fn a_subscriber_on_the_daemons_own_socket_gets_the_messages_too() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval("20ms").start();
    let mut local = subscribe(daemon.client());
    let mut local_pattern = daemon.client();
    local_pattern.command(&["PSUBSCRIBE", "tallyd:d*"]);
    let load = Load::start(daemon.socket(), "local", 4, 5);
    load.wait_acknowledged(1000);
    let total = load.stop().iter().map(|c| c.acknowledged).sum();
    daemon.flush();
    let messages = collect(&mut local, total);
    assert!(!messages.is_empty());
    let reply = local_pattern.read().unwrap();
    assert_eq!(
        reply.items()[..3],
        [
            Value::bulk("pmessage"),
            Value::bulk("tallyd:d*"),
            Value::bulk(CHANNEL)
        ]
    );
    assert!(!parse(&reply.items()[3].text()).deltas.is_empty());
}

#[test]
fn nothing_is_published_when_it_is_switched_off_and_the_channel_can_be_another() {
    let redis = RedisServer::start(&[]);
    let quiet = Daemon::builder(redis.url())
        .set("publish.enabled", false)
        .set("publish.heartbeat", "50ms")
        .start();
    quiet.client().command(&["INCR", "quiet"]);
    quiet.flush();
    let named = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("publish.channel", "elsewhere")
        .start();
    let mut subscriber = redis.client();
    subscriber.command(&["SUBSCRIBE", "elsewhere"]);
    named.client().command(&["INCR", "named"]);
    named.flush();
    let message = subscriber.read().unwrap();
    assert_eq!(
        parse(&message.items()[2].text()).deltas,
        [(b"named".to_vec(), 1, 1)]
    );
    assert_eq!(redis.commandstats("publish"), 1, "the quiet one published");
}

#[test]
fn a_lost_connection_does_not_stop_publishing() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    client.command(&["INCR", "before"]);
    daemon.flush();
    redis.cli(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    let before = redis.commandstats("publish");
    // The message that found its connection dead may be lost; later ones are not.
    wait_until("it publishes again", || {
        client.command(&["INCR", "after"]);
        daemon.flush();
        redis.commandstats("publish") > before
    });
    let mut subscriber = subscribe(redis.client());
    client.command(&["INCRBY", "last", "5"]);
    daemon.flush();
    // Publishing trails the flush: what was counted before may still come.
    loop {
        let deltas = next(&mut subscriber).deltas;
        if deltas != [(b"after".to_vec(), 1, deltas[0].2)] {
            assert_eq!(deltas, [(b"last".to_vec(), 5, 5)]);
            break;
        }
    }
}
