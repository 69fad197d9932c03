//! Promise 6: at a limit a client gets an error that names it, nothing is dropped in silence, and
//! it passes by itself when its cause does.

use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::disk::Disk;
use crate::support::load::fill;
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value, encode, encode_into};
use crate::support::{seed, wait_until};

const KEEPS_ALL: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

fn stat(daemon: &Daemon, name: &str) -> i64 {
    daemon.client().command(&["TALLY.STATS"]).fields()[name].number()
}

fn lines(daemon: &Daemon, what: &str) -> usize {
    daemon.log().lines().filter(|l| l.contains(what)).count()
}

fn resident_mib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib: u64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib / 1024
}

fn is_taken(client: &mut Client, key: &str) -> bool {
    match client.command(&["INCR", key]) {
        Value::Integer(_) => true,
        Value::Error(_) => false,
        other => panic!("{other:?}"),
    }
}

/// Guards the budget of the open epoch, also of one that follows what a former process left.
/// Seen to fail when a restart did not count what was left.
#[test]
fn pending_bytes_are_bounded_and_the_error_names_the_limit() {
    let mut redis = RedisServer::start(&KEEPS_ALL);
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval("1s")
        .set("reply.cold", "delta")
        .set("flush.max_keys", 1_000_000)
        .set("limits.max_pending_bytes", "1MiB")
        .start();
    redis.kill9();
    let mut client = daemon.client();
    // Sealed once, at most; the rest gathers in the next epoch.
    assert!(is_taken(&mut client, "first"));
    wait_until("an epoch is sealed", || stat(&daemon, "sealed_keys") > 0);
    assert!(is_taken(&mut client, "known"));
    let (taken, refusal) = fill(&mut client, "pending", 100_000);
    assert!(refusal.unwrap().contains("limits.max_pending_bytes"));
    assert!((10_000..50_000).contains(&taken), "{taken} in one MiB");
    for n in 2..=100 {
        assert_eq!(client.number(&["INCR", "known"]), n, "known keys go on");
    }
    for _ in 0..3 {
        // A restart is no way around the limit: what is pending already counts.
        daemon.restart();
        client = daemon.client();
        let (more, refusal) = fill(&mut client, "restarted", 100_000);
        let refusal = refusal.unwrap();
        assert_eq!(more, 0);
        assert!(refusal.contains("limits.max_pending_bytes"), "{refusal}");
        // So is a key that has something pending, of which nothing else may be said.
        assert_eq!(client.command(&["INCR", "known"]).error(), refusal);
        assert!(refusal.contains("no further record fits"), "{refusal}");
    }
    redis.restart();
    wait_until("new keys are taken again", || {
        is_taken(&mut client, "afterwards")
    });
    let afterwards = client.number(&["GET", "afterwards"]);
    daemon.flush();
    let counters = redis.counters();
    assert_eq!(counters[&b"first"[..]], 1);
    assert_eq!(counters[&b"known"[..]], 100);
    assert_eq!(counters[&b"afterwards"[..]], afterwards);
    assert_eq!(
        counters.len(),
        taken + 3,
        "exactly the keys that were taken"
    );
}

/// Guards that evicted keys are read again, and that a key is not evicted while it is unsettled.
/// Seen to fail when it was.
#[test]
fn values_are_right_while_keys_come_and_go_within_the_view_s_limit() {
    const KEYS: usize = 20_000;
    let mut rng = fastrand::Rng::with_seed(seed());
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval("10ms")
        .set("limits.max_view_bytes", "1MiB")
        .set("reply.load_timeout", "10s")
        .start();
    let mut client = daemon.client();
    let mut expected = vec![0; KEYS];
    for round in 0..80 {
        let mut bytes = Vec::new();
        let mut answers = Vec::new();
        for _ in 0..1000 {
            let n = rng.usize(..KEYS);
            // Often they cancel each other out.
            let amount = if expected[n] == 0 { 5 } else { -5 };
            let amount = if rng.u8(..) < 50 { 1 } else { amount };
            expected[n] += amount;
            answers.push((n, expected[n]));
            encode_into(
                &mut bytes,
                &["INCRBY", &format!("view:{n}"), &amount.to_string()],
            );
        }
        client.send_raw(&bytes).unwrap();
        for (n, value) in answers {
            assert_eq!(
                client.read().unwrap(),
                Value::Integer(value),
                "{round}: {n}"
            );
        }
        assert!(stat(&daemon, "view_bytes") <= 1 << 20);
        // What is pending stays in memory: on a slow disk it would fill it.
        wait_until("there is room", || {
            stat(&daemon, "epoch_keys") + stat(&daemon, "sealed_keys") < 3000
        });
    }
    daemon.flush();
    assert!(stat(&daemon, "view_evictions_total") > 10_000);
    for (n, value) in expected.iter().enumerate().step_by(7) {
        let key = format!("view:{n}");
        assert_eq!(redis.counter(&key), *value, "{key}");
        let seen = client.command(&["GET", &key]);
        assert!(
            seen == Value::Nil && *value == 0 || seen.number() == *value,
            "{key}: {seen:?}"
        );
        assert_eq!(client.number(&["TALLY.PENDING", &key]), 0, "{key}");
    }
}

/// The story: with a store that was away, the view's limit refused keys long before the limit that is
/// there for what is pending.
#[test]
fn keys_with_something_pending_are_not_refused_for_the_view_s_limit() {
    let mut redis = RedisServer::start(&KEEPS_ALL);
    let daemon = Daemon::builder(redis.url())
        .flush_interval("20ms")
        .set("reply.cold", "delta")
        .set("limits.max_view_bytes", "1MiB")
        .set("limits.max_pending_bytes", "4MiB")
        .start();
    redis.kill9();
    let mut client = daemon.client();
    let (taken, refusal) = fill(&mut client, "full", 200_000);
    assert!(refusal.unwrap().contains("limits.max_pending_bytes"));
    // 32 bytes each in the journal.
    assert!((100_000..=131_072).contains(&taken), "{taken}");
    assert!(stat(&daemon, "view_bytes") >= taken as i64 * 80);
    assert!(
        client.command(&["GET", "unknown"]) == Value::Nil,
        "reads go on"
    );
    redis.restart();
    wait_until("new keys are taken again", || is_taken(&mut client, "new"));
    let new = client.number(&["GET", "new"]);
    daemon.flush();
    let counters = redis.counters();
    assert_eq!(counters.len(), taken + 1);
    assert_eq!(counters[&b"new"[..]], new);
    wait_until("the view is within its limit again", || {
        stat(&daemon, "view_bytes") <= 1 << 20
    });
}

/// Guards the preallocation of segments: without it, a write to a full disk through the map would
/// be a SIGBUS. Seen to fail when files were only made longer, at their opening and when they grow.
#[test]
fn a_disk_that_is_full_while_a_segment_grows_refuses_new_keys_and_loses_nothing() {
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
    let mut client = daemon.client();
    let mut taken = 0;
    for round in 0..3 {
        let name = format!("disk:{round}");
        let (some, refusal) = fill(&mut client, &name, 100_000);
        taken += some;
        let refusal = refusal.unwrap();
        assert!(
            refusal.contains("journal") && refusal.contains("disk"),
            "{refusal}"
        );
        // Every byte of what was preallocated has been written to by now.
        for n in 2..=50 {
            assert_eq!(client.number(&["INCR", &format!("{name}:0")]), n);
        }
        daemon.kill9();
        if round == 0 {
            // It starts without any room: what is known is there, and no more of it is taken.
            daemon.restart();
            client = daemon.client();
            assert_eq!(client.number(&["TALLY.PENDING", &format!("{name}:0")]), 50);
            assert!(!is_taken(&mut client, &format!("{name}:0")));
            daemon.kill9();
        }
        disk.free();
        daemon.restart();
        client = daemon.client();
        assert_eq!(client.number(&["TALLY.PENDING", &format!("{name}:0")]), 50);
        assert!(is_taken(&mut client, &format!("{name}:afterwards")));
        taken += 1;
        if round == 1 {
            redis.restart();
            daemon.flush();
            redis.kill9();
        }
        disk.fill();
    }
    // And without a restart: room is enough.
    let (some, refusal) = fill(&mut client, "disk:last", 100_000);
    assert!(refusal.is_some());
    taken += some;
    disk.free();
    wait_until("new keys are taken again", || {
        is_taken(&mut client, "disk:new")
    });
    assert_eq!(daemon.client().number(&["TALLY.PENDING", "disk:new"]), 1);
    taken += 1;
    redis.restart();
    daemon.flush();
    let counters = redis.counters();
    assert_eq!(counters.len(), taken);
    let fifty = (0..3).map(|round| counters[format!("disk:{round}:0").as_bytes()]);
    assert_eq!(fifty.collect::<Vec<_>>(), [50; 3]);
    assert_eq!(counters.values().sum::<i64>(), taken as i64 + 3 * 49);
}

/// The epoch stays open where the next segment cannot be had. Guards the preallocation as well: seen
/// to fail without.
#[test]
fn a_disk_that_is_full_when_a_segment_is_opened_holds_up_flushing_alone() {
    let Some(disk) = Disk::mount("6m") else {
        return;
    };
    let redis = RedisServer::start(&[]);
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval("20ms")
        .set("flush.retain", "300ms")
        .state_dir(&disk.state_dir())
        .start();
    let mut client = daemon.client();
    let mut total = 0;
    for round in 1..=3 {
        disk.fill();
        // The segment that is at hand is used up first.
        wait_until("no segment can be had any more", || {
            total += 1;
            assert_eq!(client.number(&["INCR", "opened"]), total);
            lines(&daemon, "cannot create and preallocate") >= round
        });
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(1) {
            total += 1;
            assert_eq!(client.number(&["INCR", "opened"]), total, "it goes on");
            assert!(
                is_taken(&mut client, &format!("opened:{total}")),
                "so do new keys"
            );
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(
            lines(&daemon, "cannot create and preallocate"),
            round,
            "said once"
        );
        if round == 2 {
            daemon.kill9();
            disk.free();
            daemon.restart();
            client = daemon.client();
        } else {
            disk.free();
        }
        wait_until("it flushes again by itself", || {
            redis.counter("opened") == total
        });
        wait_until("it says so", || {
            lines(&daemon, "flushing again") + 1 >= round
        });
    }
}

/// Guards the count of connections. Seen to fail without.
#[test]
fn too_many_connections_are_refused_in_words_and_counted() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .set("listen.max_connections", 10)
        .start();
    let mut first = daemon.client();
    wait_until("the one that looked whether it is up is gone", || {
        first.command(&["TALLY.STATS"]).fields()["connections"] == Value::Integer(1)
    });
    let mut clients = vec![first];
    clients.extend((1..10).map(|_| daemon.client()));
    for client in &mut clients {
        client.command(&["INCR", "allowed"]);
    }
    for _ in 0..5 {
        let mut refused = daemon.client();
        let said = refused.read_to_end().unwrap();
        assert_eq!(said, b"-ERR max number of clients reached\r\n");
    }
    let stats = clients[0].command(&["TALLY.STATS"]).fields();
    assert_eq!(stats["connections_refused_total"], Value::Integer(5));
    assert_eq!(clients[3].number(&["INCR", "allowed"]), 11);
    clients.truncate(9);
    wait_until("there is room for another", || {
        let mut client = daemon.client();
        client
            .try_command(&["INCR", "allowed"])
            .is_ok_and(|v| v == Value::Integer(12))
    });
}

/// Guards the bound on answers that wait for one client. Seen to fail without.
#[test]
fn a_client_that_sends_and_never_reads_takes_bounded_memory_and_disturbs_nobody() {
    const COMMANDS: usize = 200_000;
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).start();
    let mut other = daemon.client();
    let keys: Vec<String> = (0..20).map(|n| format!("deaf:{n}")).collect();
    for key in &keys {
        other.command(&["INCRBY", key, "1000000000"]);
    }
    let before = resident_mib(&daemon);
    let deaf = daemon.client();
    let deaf_answer = [b"*20\r\n", &b"$10\r\n1000000000\r\n".repeat(20)[..]].concat();
    let mut words = vec!["MGET"];
    words.extend(keys.iter().map(String::as_str));
    let burst = encode(&words).repeat(1000);
    let mut writer = deaf.stream().duplicate();
    thread::scope(|scope| {
        let writing = scope.spawn(move || {
            for _ in 0..COMMANDS / 1000 {
                writer.write_all(&burst).unwrap();
            }
        });
        let begin = Instant::now();
        let mut n = 0;
        let mut most = 0;
        while begin.elapsed() < Duration::from_secs(3) {
            n += 1;
            assert_eq!(other.number(&["INCR", "heard"]), n);
            most = most.max(resident_mib(&daemon));
        }
        assert!(!writing.is_finished(), "it is not held back");
        assert!(n > 50, "{n} answers in three seconds");
        assert!(most < before + 100, "{before} MiB before, {most} MiB");
        // Once it reads, it gets every answer.
        let answer = deaf_answer.repeat(COMMANDS);
        let mut read = vec![0; answer.len()];
        deaf.stream().duplicate().read_exact(&mut read).unwrap();
        assert!(read == answer, "something else was answered");
        writing.join().unwrap();
    });
}

/// Guards that what is decoded of a command is not decoded again for each byte, and that what is
/// kept of half commands is only their bytes.
#[test]
fn clients_that_trickle_and_half_commands_by_the_thousand_disturb_nobody() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let request = encode(&["INCR", "trickled"]);
    let before = resident_mib(&daemon);
    let mut halves: Vec<Client> = (0..1000).map(|_| daemon.client()).collect();
    for (n, half) in halves.iter_mut().enumerate() {
        half.send_raw(&request[..n % request.len()]).unwrap();
    }
    let mut trickle = daemon.client();
    let mut other = daemon.client();
    let mut n = 0;
    for byte in encode(&["INCRBY", "slowly", "7"]) {
        trickle.send_raw(&[byte]).unwrap();
        for _ in 0..20 {
            n += 1;
            assert_eq!(other.number(&["INCR", "quick"]), n);
        }
    }
    assert_eq!(trickle.read().unwrap(), Value::Integer(7));
    let after = resident_mib(&daemon);
    assert!(
        after < before + 32,
        "{before} MiB before, {after} MiB with half commands"
    );
    // A large key, a byte at a time.
    let key = "k".repeat(1024);
    for byte in encode(&["INCR", &key]) {
        trickle.send_raw(&[byte]).unwrap();
    }
    assert_eq!(trickle.read().unwrap(), Value::Integer(1));
    for (n, half) in halves.iter_mut().enumerate() {
        half.send_raw(&request[n % request.len()..]).unwrap();
        assert_eq!(half.read().unwrap(), Value::Integer(n as i64 + 1));
    }
    daemon.flush();
    assert_eq!(redis.counter("trickled"), 1000);
}

/// Guards the bound on what waits for one subscriber. Seen to fail with a queue of a million.
#[test]
fn a_subscriber_that_does_not_keep_up_is_cut_off_and_counted() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    let mut slow = daemon.client();
    slow.command(&["SUBSCRIBE", "tallyd:deltas"]);
    let mut quick = daemon.client();
    quick.command(&["SUBSCRIBE", "tallyd:deltas"]);
    let reading = thread::spawn(move || {
        let mut messages = 0;
        while quick.read().unwrap().items()[2].text().len() > 1000 {
            messages += 1;
        }
        messages
    });
    let mut client = daemon.client();
    let keys: Vec<String> = (0..50)
        .map(|n| format!("{n}:{}", "s".repeat(500)))
        .collect();
    let mut rounds = 0;
    while stat(&daemon, "subscribers_dropped_total") == 0 {
        rounds += 1;
        assert!(rounds < 3000, "it is never cut off");
        for key in &keys {
            client.command(&["INCR", key]);
        }
        daemon.flush();
    }
    assert!(resident_mib(&daemon) < 200);
    assert_eq!(lines(&daemon, "a subscriber did not keep up"), 1);
    // A short message ends the quick one's reading: it has missed none.
    client.command(&["INCR", "short"]);
    daemon.flush();
    assert_eq!(reading.join().unwrap(), rounds);
    assert_eq!(stat(&daemon, "subscribers_dropped_total"), 1);
    assert!(slow.read_to_end().is_ok(), "its connection has ended");
}

/// Guards that a stop at a limit keeps what it cannot deliver.
#[test]
fn a_full_journal_survives_a_stop() {
    let mut redis = RedisServer::start(&KEEPS_ALL);
    let mut daemon = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("reply.cold", "delta")
        .set("shutdown.timeout", "300ms")
        .set("limits.max_pending_bytes", "1MiB")
        .start();
    redis.kill9();
    let (taken, refusal) = fill(&mut daemon.client(), "stopped", 100_000);
    assert!(refusal.is_some());
    daemon.signal(Signal::USR1);
    assert_eq!(daemon.term().code(), Some(0));
    redis.restart();
    daemon.restart();
    daemon.flush();
    assert_eq!(redis.counters().len(), taken);
}
