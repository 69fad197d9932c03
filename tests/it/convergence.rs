//! Promise 5 between nodes: every view comes to the store's value, whatever was lost on the way.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::support::daemon::{Daemon, NEVER, Settings};
use crate::support::proxy::Proxy;
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value, encode_into};
use crate::support::{seed, wait_until};

const CHANNEL: &str = "tallyd:deltas";

pub fn quiet(redis: &RedisServer) -> Settings {
    Daemon::builder(redis.url()).flush_interval(NEVER)
}

pub fn stat(daemon: &Daemon, name: &str) -> i64 {
    daemon.client().command(&["TALLY.STATS"]).fields()[name].number()
}

pub fn get(daemon: &Daemon, key: &str) -> Option<i64> {
    match daemon.client().command(&["GET", key]) {
        Value::Nil => None,
        value => Some(value.number()),
    }
}

#[track_caller]
pub fn wait_shown(daemon: &Daemon, key: &str, value: i64) {
    wait_until(&format!("{key} shows {value}"), || {
        get(daemon, key) == Some(value)
    });
}

pub fn wait_subscribed(daemon: &Daemon) {
    wait_until("it is subscribed", || stat(daemon, "subscribed") == 1);
}

fn mget(client: &mut Client, keys: &[String]) -> Vec<Value> {
    let mut command = vec!["MGET".to_owned()];
    command.extend_from_slice(keys);
    client.command(&command).items().to_vec()
}

/// A message of a node that does not exist.
pub fn message(node: &str, seq: u64, clock: u64, deltas: &str) -> String {
    let digits = node.bytes().fold(String::new(), |mut digits, byte| {
        let _ = write!(digits, "{byte:02x}");
        digits
    });
    format!(
        r#"{{"v":1,"node":"{digits:0>32}","name":"fake","run":"0000000000000001","seq":{seq},"clock":{clock},"at":1,"deltas":[{deltas}]}}"#
    )
}

pub fn publish(redis: &RedisServer, text: impl AsRef<[u8]>) {
    let mut client = redis.client();
    client.command(&[b"PUBLISH", CHANNEL.as_bytes(), text.as_ref()]);
}

pub fn clock(redis: &RedisServer) -> u64 {
    redis.counter("tallyd:clock") as u64
}

/// Fails if a message that was lost with its connection, with its node, or for good, is not made
/// up for by reading; if an old value moves a view; if a pending amount is counted twice.
#[test]
fn five_nodes_agree_with_redis_after_cuts_a_kill_and_a_stranger() {
    let mut rng = Rng::with_seed(seed());
    let redis = RedisServer::start(&[]);
    let keys: Vec<String> = (0..40).map(|number| format!("shared:{number}")).collect();
    let mut nodes: Vec<(Proxy, Daemon)> = (0..5)
        .map(|_| {
            let proxy = Proxy::start(redis.address());
            let daemon = Daemon::builder(proxy.url())
                .flush_interval("30ms")
                .set("publish.heartbeat", "200ms")
                .set("view.max_age", "2s")
                .start();
            (proxy, daemon)
        })
        .collect();
    for (number, (proxy, _)) in nodes.iter().enumerate() {
        // Some lose subscriptions alone, the others any connection.
        if number % 2 == 0 {
            proxy.only(b"SUBSCRIBE");
        }
        proxy.cut_at_random(rng.u64(..), 60_000);
    }
    let mut sums: BTreeMap<&str, i64> = BTreeMap::new();
    let mut clients: Vec<Client> = nodes.iter().map(|(_, daemon)| daemon.client()).collect();
    for round in 0..200 {
        for client in &mut clients {
            let (mut burst, count) = (Vec::new(), rng.usize(1..20));
            for _ in 0..count {
                let (key, amount) = (&keys[rng.usize(..keys.len())], rng.i64(-5..10));
                encode_into(&mut burst, &["INCRBY", key, &amount.to_string()]);
                *sums.entry(key).or_default() += amount;
            }
            client.send_raw(&burst).unwrap();
            for _ in 0..count {
                client.read().unwrap().number();
            }
        }
        if round == 100 {
            nodes[3].1.restart();
            clients[3] = nodes[3].1.client();
        }
        thread::sleep(Duration::from_millis(rng.u64(0..20)));
    }
    for (proxy, daemon) in &nodes {
        proxy.heal();
        daemon.flush();
    }
    for (key, sum) in &sums {
        assert_eq!(redis.counter(key), *sum, "{key}");
    }
    redis.cli(&["SET", &keys[0], "7"]);
    redis.cli(&["DEL", &keys[1]]);
    let expected = mget(&mut redis.client(), &keys);
    assert_eq!(expected[0], Value::bulk("7"));
    for (number, client) in clients.iter_mut().enumerate() {
        let begin = Instant::now();
        loop {
            let found = mget(client, &keys);
            if found == expected {
                break;
            }
            assert!(
                begin.elapsed() < Duration::from_secs(20),
                "node {number}: {found:?} is not {expected:?}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
    let cuts: u64 = nodes.iter().map(|(proxy, _)| proxy.cuts()).sum();
    assert!(cuts > 5, "only {cuts} connections were cut");
}

#[test]
fn another_nodes_increment_is_read_without_asking_redis() {
    let redis = RedisServer::start(&[]);
    let (a, b) = (quiet(&redis).start(), quiet(&redis).start());
    assert_eq!(get(&b, "k"), None);
    assert_eq!(b.client().number(&["INCRBY", "mine", "5"]), 5);
    // What a new connection asks for is not what is counted.
    a.client().command(&["INCR", "first"]);
    a.flush();
    wait_subscribed(&b);
    // Whatever the new subscription has read anew is read by now.
    thread::sleep(Duration::from_millis(100));
    a.client().command(&["INCRBY", "mine", "100"]);
    a.client().command(&["INCRBY", "k", "3"]);
    let before = (redis.commandstats("get"), redis.commandstats("mget"));
    a.flush();
    wait_shown(&b, "k", 3);
    wait_shown(&b, "mine", 105);
    let after = (redis.commandstats("get"), redis.commandstats("mget"));
    assert_eq!(after, before, "a view asked");
    b.flush();
    wait_shown(&a, "mine", 105);
    assert_eq!((stat(&b, "gaps_total"), stat(&b, "peers")), (0, 1));
}

#[test]
fn what_is_lost_with_the_subscription_is_read_anew() {
    let redis = RedisServer::start(&[]);
    let a = quiet(&redis).set("publish.enabled", false).start();
    let b = quiet(&redis).start();
    for key in ["k", "other"] {
        assert_eq!(b.client().number(&["INCR", key]), 1);
    }
    b.flush();
    wait_subscribed(&b);
    // Nobody tells this.
    a.client().command(&["INCRBY", "k", "10"]);
    a.flush();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(get(&b, "k"), Some(1));
    let before = stat(&b, "rereads_total");
    redis.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    wait_shown(&b, "k", 11);
    assert!(stat(&b, "rereads_total") >= before + 2);
    assert_eq!(get(&b, "other"), Some(1));
}

#[test]
fn a_gap_in_the_numbers_has_all_values_read_anew() {
    let redis = RedisServer::start(&[]);
    let a = quiet(&redis).set("publish.enabled", false).start();
    let b = quiet(&redis).start();
    assert_eq!(b.client().number(&["INCR", "k"]), 1);
    b.flush();
    wait_subscribed(&b);
    publish(&redis, message("fake", 1, 1, ""));
    publish(&redis, message("fake", 1, 1, r#"["absent",1,1]"#));
    a.client().command(&["INCRBY", "k", "10"]);
    a.flush();
    wait_until("both are heard", || stat(&b, "messages_total") >= 2);
    let gaps = stat(&b, "gaps_total");
    assert_eq!(get(&b, "k"), Some(1));
    publish(&redis, message("fake", 5, 1, r#"["absent",1,1]"#));
    wait_shown(&b, "k", 11);
    assert_eq!(stat(&b, "gaps_total"), gaps + 1);
    // A late one and a repeated one are no gap, a heartbeat that is ahead is one.
    publish(&redis, message("fake", 3, 1, r#"["absent",1,1]"#));
    publish(&redis, message("fake", 5, 1, r#"["absent",1,1]"#));
    publish(&redis, message("fake", 5, 1, ""));
    wait_until("they are heard", || stat(&b, "messages_total") >= 6);
    assert_eq!(stat(&b, "gaps_total"), gaps + 1);
    publish(&redis, message("fake", 6, 1, ""));
    wait_until("the next", || stat(&b, "gaps_total") == gaps + 2);
}

#[test]
fn what_is_not_a_message_is_counted_and_does_no_harm() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    assert_eq!(daemon.client().number(&["INCR", "k"]), 1);
    assert_eq!(daemon.client().number(&[&b"INCR"[..], b"\xff\xfe"]), 1);
    daemon.flush();
    wait_subscribed(&daemon);
    let mut local = daemon.client();
    local.command(&["SUBSCRIBE", "tallyd:deltas"]);
    let now = clock(&redis) + 10;
    let bad = [
        String::new(),
        "{".to_owned(),
        "[1,2]".to_owned(),
        message("n", 1, now, r#"["k",1]"#),
        message("n", 1, now, r#"["k",1,9223372036854775808]"#),
        message("n", 1, now, r#"["k","1",77]"#),
        message("n", 1, now, "").replace("\"v\":1", "\"v\":2"),
        message("n", 1, now, r#"["k",1,77]"#).replace("\"v\":1", "\"v\":2"),
        message("n", 1, now, "").replace(
            "\"deltas\":[]",
            r#""deltas":[["k",1,77]],"deltas_b64":[["~~",1,1]]"#,
        ),
    ];
    for text in &bad {
        publish(&redis, text);
    }
    publish(&redis, b"\xff\xfe\x00");
    let count = bad.len() as i64 + 1;
    // Those of a newer version are passed on, to whom it may concern.
    let mut heard = std::iter::from_fn(|| Some(local.read().unwrap().items()[2].text()))
        .filter(|text| !text.contains("\"v\":1")); // Its own may come late.
    for newer in &bad[6..8] {
        assert_eq!(heard.next().as_ref(), Some(newer));
    }
    wait_until("all are counted", || {
        stat(&daemon, "malformed_total") == count
    });
    assert_eq!(
        (get(&daemon, "k"), stat(&daemon, "messages_total")),
        (Some(1), 0)
    );
    let logged = daemon.log().matches("messages on the channel").count();
    assert_eq!(logged, 1, "{}", daemon.log());

    // Good ones, unusual: escapes, further fields, keys in base64, an old clock, 2 MiB.
    let odd =
        message("n", 1, now, r#"["\u006b",1,5]"#).replace("\"v\"", "\"new\":{\"x\":[]},\"v\"");
    publish(&redis, odd);
    wait_shown(&daemon, "k", 5);
    publish(&redis, message("n", 2, now - 5, r#"["k",1,4]"#));
    publish(
        &redis,
        message("n", 3, now + 1, "").replace(
            "\"deltas\":[]",
            r#""deltas":[],"deltas_b64":[["//4=",1,8]]"#,
        ),
    );
    wait_until("the key that is no text", || {
        daemon.client().number(&[&b"GET"[..], b"\xff\xfe"]) == 8
    });
    assert_eq!(get(&daemon, "k"), Some(5), "an old clock moved it");
    let mut large = r#"["k",1,6]"#.to_owned();
    for number in 0..90_000 {
        write!(large, r#",["a-key-of-nobody:{number}",1,1]"#).unwrap();
    }
    let large = message("n", 4, now + 2, &large);
    assert!(large.len() > 2 << 20);
    publish(&redis, large);
    wait_shown(&daemon, "k", 6);
    assert_eq!(stat(&daemon, "malformed_total"), count);
    // One that is larger than any can be ends the subscription, which begins anew.
    redis.cli(&[
        "CONFIG",
        "SET",
        "client-output-buffer-limit",
        "pubsub 0 0 0",
    ]);
    redis.cli(&["SET", "k", "1000"]);
    publish(&redis, vec![b' '; (64 << 20) + 1]);
    wait_shown(&daemon, "k", 1000);
}

#[test]
fn a_store_that_went_back_takes_the_views_of_all_nodes_with_it() {
    let mut redis = RedisServer::start(&[]);
    let a = quiet(&redis).start();
    let b = quiet(&redis).start();
    assert_eq!(a.client().number(&["INCRBY", "k", "10"]), 10);
    a.flush();
    assert_eq!(get(&b, "k"), Some(10));
    wait_subscribed(&b);
    redis.cli(&["SAVE"]);
    let stranger = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    for _ in 0..5 {
        stranger.client().command(&["INCRBY", "k", "100"]);
        stranger.flush();
    }
    wait_shown(&b, "k", 510);
    wait_shown(&a, "k", 510);
    // It is gone for good: nobody sends again what is lost.
    drop(stranger);
    redis.kill9();
    redis.restart();
    assert_eq!(redis.counter("k"), 10);
    wait_shown(&b, "k", 10);
    wait_shown(&a, "k", 10);
    assert_eq!(a.client().number(&["INCR", "k"]), 11);
    a.flush();
    wait_shown(&b, "k", 11);
    assert_eq!(b.client().number(&["INCR", "k"]), 12);
}

#[test]
fn what_a_stranger_sets_is_seen_after_the_greatest_age() {
    let mut redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).set("view.max_age", "2s").start();
    assert_eq!(daemon.client().number(&["INCRBY", "k", "5"]), 5);
    daemon.flush();
    redis.cli(&["SET", "k", "0"]);
    assert_eq!(get(&daemon, "k"), Some(5), "not before its age");
    wait_shown(&daemon, "k", 0);
    // A store that is away leaves the last value that is known.
    daemon.client().command(&["INCRBY", "k", "3"]);
    redis.kill9();
    thread::sleep(Duration::from_secs(4));
    assert_eq!(get(&daemon, "k"), Some(3));
}

#[test]
fn a_node_that_does_not_publish_hears_and_is_heard_by_its_own_clients_alone() {
    let redis = RedisServer::start(&[]);
    let silent = quiet(&redis).set("publish.enabled", false).start();
    let other = quiet(&redis).start();
    let mut own = subscribe(&silent, "SUBSCRIBE", CHANNEL);
    let mut others = subscribe(&other, "SUBSCRIBE", CHANNEL);
    assert_eq!(get(&silent, "k"), None);
    wait_subscribed(&silent);
    silent.client().command(&["INCR", "k"]);
    silent.flush();
    assert!(payload(&mut own).contains(r#"["k",1,1]"#));
    other.client().command(&["INCR", "k"]);
    other.flush();
    wait_shown(&silent, "k", 2);
    assert!(payload(&mut others).contains(r#"["k",1,2]"#));
    assert!(payload(&mut own).contains(r#"["k",1,2]"#));
}

fn subscribe(daemon: &Daemon, command: &str, name: &str) -> Client {
    let mut client = daemon.client();
    client.command(&[command, name]);
    client
}

/// The text of the next message that is no heartbeat.
fn payload(subscriber: &mut Client) -> String {
    loop {
        let message = subscriber.read().expect("a message in time");
        let text = message.items().last().expect("a payload").text();
        if !text.contains("\"deltas\":[]") {
            return text;
        }
    }
}

#[test]
fn local_subscribers_get_what_was_published_to_the_byte_and_once() {
    let redis = RedisServer::start(&[]);
    let (a, b) = (quiet(&redis).start(), quiet(&redis).start());
    let mut reference = redis.client();
    reference.command(&["SUBSCRIBE", CHANNEL]);
    let mut locals = [
        subscribe(&a, "SUBSCRIBE", CHANNEL),
        subscribe(&b, "SUBSCRIBE", CHANNEL),
        subscribe(&b, "PSUBSCRIBE", "tallyd:delta?"),
    ];
    wait_subscribed(&a);
    wait_subscribed(&b);
    let mut expected = Vec::new();
    for number in 0..20 {
        let daemon = [&a, &b][number % 2];
        daemon.client().command(&[&b"INCR"[..], b"k"]);
        daemon
            .client()
            .command(&[&b"INCR"[..], &[0xff, number as u8]]);
        daemon.flush();
        expected.push(payload(&mut reference));
    }
    for local in &mut locals {
        let mut found: Vec<String> = (0..20).map(|_| payload(local)).collect();
        // One's own come with the flush, the others' over the network.
        found.sort();
        let mut expected = expected.clone();
        expected.sort();
        assert_eq!(found, expected);
        local.set_limit(Duration::from_millis(300));
        let more = local.read();
        assert!(
            more.as_ref().map_or(true, |m| m
                .items()
                .last()
                .unwrap()
                .text()
                .contains("\"deltas\":[]")),
            "{more:?}"
        );
    }
}

#[test]
fn a_channel_of_one_key_tells_its_value_once_a_flush_whoever_changed_it() {
    let redis = RedisServer::start(&[]);
    let (a, b) = (quiet(&redis).start(), quiet(&redis).start());
    let mut exact = subscribe(&b, "SUBSCRIBE", "tallyd:key:k");
    exact.set_limit(Duration::from_secs(5));
    let mut pattern = subscribe(&b, "PSUBSCRIBE", "tallyd:key:*");
    wait_subscribed(&b);
    b.client().command(&["GET", "k"]);
    thread::sleep(Duration::from_millis(50));
    for (daemon, expected) in [(&a, "10"), (&b, "20"), (&a, "30")] {
        for _ in 0..10 {
            daemon.client().command(&["INCR", "k"]);
        }
        daemon.flush();
        let message = exact
            .read()
            .unwrap_or_else(|error| panic!("{expected}: {error}"));
        assert_eq!(
            message.items(),
            [
                Value::bulk("message"),
                Value::bulk("tallyd:key:k"),
                Value::bulk(expected)
            ]
        );
        assert_eq!(pattern.read().unwrap().items()[3], Value::bulk(expected));
        wait_shown(&b, "k", expected.parse().unwrap());
    }
    // A flush that leaves the value as it is tells nothing.
    b.client().command(&["INCR", "k"]);
    b.client().command(&["DECR", "k"]);
    b.flush();
    // One who watches every key of a large batch is not slow for that.
    let mut burst = Vec::new();
    for number in 0..5000 {
        encode_into(&mut burst, &["INCR", &format!("many:{number}")]);
    }
    let mut client = a.client();
    client.send_raw(&burst).unwrap();
    for _ in 0..5000 {
        client.read().unwrap().number();
    }
    a.flush();
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 5000 {
        let message = pattern.read().unwrap();
        let name = message.items()[2].text();
        assert!(name.starts_with("tallyd:key:many:"), "{message:?}");
        assert!(seen.insert(name), "{message:?}");
    }
    assert_eq!(stat(&b, "subscribers_dropped_total"), 0);
}

#[test]
fn a_subscriber_that_does_not_read_is_cut_off_alone() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    let mut slow = subscribe(&daemon, "SUBSCRIBE", CHANNEL);
    let mut steady = subscribe(&daemon, "SUBSCRIBE", CHANNEL);
    wait_subscribed(&daemon);
    let large = message("fake", 1, 1, &format!(r#"["{}",1,1]"#, "x".repeat(4 << 20)));
    for _ in 0..12 {
        publish(&redis, &large);
        assert_eq!(payload(&mut steady).len(), large.len());
    }
    wait_until("it is cut off", || {
        stat(&daemon, "subscribers_dropped_total") == 1
    });
    let rest = slow.read_to_end().unwrap().len();
    assert!(rest < 12 * large.len(), "{rest}");
    assert_eq!(daemon.client().number(&["INCR", "k"]), 1);
}

#[test]
fn pubsub_answers_as_redis_does() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    let reference = RedisServer::start(&[]);
    let mut kept = Vec::new();
    for (command, names) in [
        ("SUBSCRIBE", &["b", "a", "tallyd:key:x"][..]),
        ("SUBSCRIBE", &["a"][..]),
        ("PSUBSCRIBE", &["a*", "b*"][..]),
        ("PSUBSCRIBE", &["a*"][..]),
    ] {
        for mut client in [daemon.client(), reference.client()] {
            let words: Vec<&str> = std::iter::once(command)
                .chain(names.iter().copied())
                .collect();
            client.command(&words);
            for _ in 1..names.len() {
                client.read().unwrap();
            }
            kept.push(client);
        }
    }
    for words in [
        &["PUBSUB", "CHANNELS"][..],
        &["PUBSUB", "CHANNELS", "[ab]"],
        &["PUBSUB", "CHANNELS", "tallyd:*"],
        &["PUBSUB", "CHANNELS", "a", "b"],
        &["PUBSUB", "NUMSUB"],
        &["PUBSUB", "numsub", "a", "nobody", "b", "a"],
        &["PUBSUB", "NUMPAT"],
        &["PUBSUB", "NUMPAT", "x"],
        &["PUBSUB"],
    ] {
        let sorted = |value: Value| match value {
            Value::Array(mut items) if words[1..].first() == Some(&"CHANNELS") => {
                items.sort();
                Value::Array(items)
            }
            other => other,
        };
        let (found, expected) = (
            sorted(daemon.client().command(words)),
            sorted(reference.client().command(words)),
        );
        assert_eq!(found, expected, "{words:?}");
    }
}

#[test]
fn the_embedded_store_has_the_same_local_channels() {
    let daemon = Daemon::builder("embedded").flush_interval(NEVER).start();
    let mut deltas = subscribe(&daemon, "SUBSCRIBE", CHANNEL);
    let mut key = subscribe(&daemon, "SUBSCRIBE", "tallyd:key:k");
    daemon.client().command(&["INCRBY", "k", "4"]);
    daemon.flush();
    assert!(payload(&mut deltas).contains(r#"["k",4,4]"#));
    assert_eq!(key.read().unwrap().items()[2], Value::bulk("4"));
}
