//! Promise 6: however long the work is that somebody causes, the ingest thread looks at the other clients
//! after a bounded piece of it. Work is counted, not timed; the pauses of a `PING` are printed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tallyd::ingest::glob::Glob;
use tallyd::ingest::slice::SLICE_UNITS;

use crate::convergence::{publish, quiet, stat, wait_subscribed};
use crate::support::daemon::Daemon;
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value, encode_into};
use crate::support::wait_until;

/// A slice ends with the piece of work that reaches its bound: a reading of 1,000 keys, or a step of the
/// search for stale ones.
const PIECE_UNITS: i64 = 4_000;

/// Pings until it is dropped, and then prints the longest pause.
pub struct Pinger {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<(Duration, u64)>>,
}

impl Pinger {
    pub fn start(daemon: &Daemon) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, mut client) = (Arc::clone(&stop), daemon.client());
        let thread = std::thread::spawn(move || {
            let (mut longest, mut count) = (Duration::ZERO, 0);
            while !stopped.load(Ordering::Relaxed) {
                let begin = Instant::now();
                assert_eq!(client.command(&["PING"]), Value::Status("PONG".into()));
                longest = longest.max(begin.elapsed());
                count += 1;
            }
            (longest, count)
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// How often it was answered.
    pub fn finish(mut self, what: &str) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().unwrap();
        let (longest, count) = thread.join().unwrap();
        eprintln!("{what}: {count} PINGs, the longest took {longest:?}");
        count
    }
}

fn pipeline(client: &mut Client, commands: impl Iterator<Item = Vec<String>>) {
    let mut request = Vec::new();
    let mut count = 0;
    for command in commands {
        encode_into(&mut request, &command);
        count += 1;
    }
    let mut writer = client.stream().duplicate();
    std::thread::scope(|scope| {
        scope.spawn(move || std::io::Write::write_all(&mut writer, &request).unwrap());
        for _ in 0..count {
            client.read().unwrap();
        }
    });
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

#[track_caller]
fn assert_sliced(daemon: &Daemon, what: &str) {
    let longest = stat(daemon, "slice_units_max");
    assert!(
        longest <= SLICE_UNITS as i64 + PIECE_UNITS,
        "{what}: {longest} units at a time"
    );
}

#[test]
fn patterns_that_mean_ill_do_not_freeze_the_daemon() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    let mut evil = daemon.client();
    let patterns = (0..1000).map(|number| {
        let many = "a".repeat(200);
        words(&["PSUBSCRIBE", &format!("*{many}{number}*b")])
    });
    pipeline(&mut evil, patterns);
    let keys = |range: std::ops::Range<usize>| {
        range.map(|key| words(&["INCR", &format!("{}{key}", "a".repeat(500))]))
    };
    pipeline(&mut daemon.client(), keys(0..60));
    let pinger = Pinger::start(&daemon);
    daemon.flush();
    let answered = pinger.finish("a flush of 60 keys for 1,000 patterns of 200 characters");
    assert!(answered > 3, "{answered} PINGs while it settled");
    assert_sliced(&daemon, "patterns");
    assert!(stat(&daemon, "slice_units_max") > 0);

    let mut client = daemon.client();
    let more = client.command(&["PSUBSCRIBE", "one*more"]);
    assert_eq!(
        more.error(),
        "ERR all clients together may have 1000 different patterns"
    );
    drop(evil);
    wait_until("its patterns are gone", || {
        daemon.client().number(&["PUBSUB", "NUMPAT"]) == 0
    });
    let long = client.command(&["PSUBSCRIBE", &format!("{}*b", "?".repeat(300))]);
    assert!(
        long.error().starts_with("ERR a pattern may have "),
        "{long:?}"
    );
}

#[test]
fn much_work_of_every_kind_is_done_in_slices() {
    const CLIENTS: usize = 1000;
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).set("flush.batch_keys", 100_000).start();
    wait_subscribed(&daemon);
    let pinger = Pinger::start(&daemon);

    // Subscribers of one channel.
    let mut many: Vec<Client> = (0..CLIENTS).map(|_| daemon.client()).collect();
    for client in &mut many {
        client.command(&["SUBSCRIBE", "tallyd:key:k", "tallyd:deltas"]);
    }
    let mut client = daemon.client();
    let asked: Vec<String> = ["PUBSUB", "NUMSUB"]
        .into_iter()
        .map(str::to_owned)
        .chain((0..3000).map(|_| "tallyd:deltas".to_owned()))
        .collect();
    assert_eq!(
        client.command(&asked).items()[1],
        Value::Integer(CLIENTS as i64)
    );
    let list = client.command(&["CLIENT", "LIST"]).text();
    assert!(list.lines().count() > CLIENTS);

    // A transaction of many increments and large answers, and a command over many keys.
    let increments = (0..60_000).map(|key| words(&["INCR", &format!("key:{key}")]));
    let infos = (0..1000).map(|_| words(&["INFO"]));
    let transaction = std::iter::once(words(&["MULTI"])).chain(increments);
    let transaction = transaction.chain(infos).chain([words(&["EXEC"])]);
    pipeline(&mut client, transaction);
    let keys = (0..60_000).map(|key| format!("key:{key}"));
    let mget: Vec<String> = std::iter::once("MGET".to_owned()).chain(keys).collect();
    assert_eq!(client.command(&mget).items().len(), 60_000);
    assert_sliced(&daemon, "EXEC and MGET");

    // A batch, and the answers to all its keys; then a message, and a search through all of them.
    client.command(&["INCR", "k"]);
    let keys = 60_000;
    pipeline(
        &mut client,
        (0..keys).map(|key| words(&["INCR", &format!("key:{key}")])),
    );
    daemon.flush();
    for client in &mut many {
        assert_eq!(client.read().unwrap().items().len(), 3);
    }
    drop(many);
    redis.cli(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    wait_until("all are read anew", || {
        stat(&daemon, "rereads_total") >= keys
    });
    let deltas: Vec<String> = (0..50_000)
        .map(|key| format!("[\"key:{key}\",1,9]"))
        .collect();
    let before = stat(&daemon, "announced_total");
    publish(
        &redis,
        crate::convergence::message("n", 1, 1 << 40, &deltas.join(",")),
    );
    wait_until("it is heard", || stat(&daemon, "announced_total") > before);
    let answered = pinger.finish("subscribers, batches, messages, searches");
    assert!(answered > 10);
    assert_sliced(&daemon, "all of it");
}

/// Against the real one: the same patterns on the same names.
#[test]
fn patterns_match_what_redis_matches() {
    let redis = RedisServer::start(&[]);
    let seed = crate::support::seed();
    let mut dice = fastrand::Rng::with_seed(seed);
    let mut text = |of: &[u8], max: usize| -> Vec<u8> {
        (0..dice.usize(1..=max))
            .map(|_| *dice.choice(of).unwrap())
            .collect()
    };
    let names: Vec<Vec<u8>> = (0..300).map(|_| text(b"aabbc[]^-\\*?", 6)).collect();
    let mut client = redis.client();
    for name in &names {
        client.command(&[&b"SET"[..], name, b"1"]);
    }
    for _ in 0..2000 {
        let pattern = text(b"aabc**?[]^-\\", 8);
        let found = client.command(&[&b"KEYS"[..], &pattern]);
        let mut theirs: Vec<Vec<u8>> = found
            .items()
            .iter()
            .map(|name| match name {
                Value::Bulk(name) => name.clone(),
                other => panic!("{other:?}"),
            })
            .collect();
        theirs.sort();
        let glob = Glob::new(&pattern).unwrap();
        let mut ours: Vec<Vec<u8>> = names
            .iter()
            .filter(|name| glob.matches(name))
            .cloned()
            .collect();
        ours.sort();
        ours.dedup();
        assert_eq!(ours, theirs, "{}", pattern.escape_ascii());
    }
}
