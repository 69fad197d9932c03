//! Promise 6: whatever clients send, and whatever they do not read, what is held for all of them stays
//! within `limits.max_client_bytes`, and a client that behaves is served.
//!
//! `TALLYD_ATTACKS=full` runs the attacks at full size against the default limit; for a release build. The
//! figures are printed.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::convergence::{quiet, stat};
use crate::fairness::Pinger;
use crate::support::daemon::Daemon;
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value, encode_into};
use crate::support::wait_until;

const MIB: usize = 1 << 20;
/// What the process may hold besides its clients' memory.
const REST: usize = 64 * MIB;
/// An empty argument takes six bytes of a request, and a request may have a MiB.
const EMPTY_ARGS: usize = 170_000;

/// The most that was ever resident, in bytes.
fn resident_max(daemon: &Daemon) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<usize>().unwrap() * 1024
}

/// What is resident now, in bytes.
fn resident(daemon: &Daemon) -> usize {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", daemon.pid())).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// A client that sends as long as it is let, and reads nothing.
fn pour(daemon: &Daemon, bytes: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    stream
        .set_write_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    for chunk in bytes.chunks(64 << 10) {
        if stream.write_all(chunk).is_err() {
            break; // It is cut off, or not read from any more.
        }
    }
    stream
}

fn request(words: &[&str]) -> Vec<u8> {
    let mut request = Vec::new();
    encode_into(&mut request, words);
    request
}

/// `command` with as many empty arguments as a request may have.
fn with_empty_args(command: &str) -> Vec<u8> {
    let mut words = vec![""; EMPTY_ARGS];
    words[0] = command;
    request(&words)
}

/// Each holds more than there may be, were it not stopped. `times` 1: for a limit of 32 MiB.
fn attack(daemon: &Daemon, name: &str, times: usize) -> Vec<UnixStream> {
    match name {
        "a transaction of empty arguments" => {
            let mut bytes = request(&["MULTI"]);
            for _ in 0..20 * times {
                bytes.extend(with_empty_args("COMMAND"));
            }
            vec![pour(daemon, &bytes)]
        }
        "answers within EXEC" => {
            let mut bytes = request(&["MULTI"]);
            for _ in 0..4000 * times {
                bytes.extend(request(&["INFO"]));
            }
            bytes.extend(request(&["EXEC"]));
            vec![pour(daemon, &bytes)]
        }
        "names of channels" => {
            let names = (0..20).flat_map(|number| {
                request(&["SUBSCRIBE", &format!("{number}{}", "n".repeat(1_000_000))])
            });
            let bytes: Vec<u8> = names.collect();
            (0..4 * times).map(|_| pour(daemon, &bytes)).collect()
        }
        "subscribers that do not read" => {
            let deaf = (0..6 * times)
                .map(|number| {
                    let pattern = format!("tallyd:key:{}", "*".repeat(number + 1));
                    pour(daemon, &request(&["PSUBSCRIBE", &pattern]))
                })
                .collect();
            let mut bytes = Vec::new();
            for key in 0..1000 {
                bytes.extend(request(&["INCR", &format!("{}{key}", "k".repeat(1000))]));
            }
            let mut client = daemon.client();
            for _ in 0..6 {
                client.stream().duplicate().write_all(&bytes).unwrap();
                (0..1000).for_each(|_| drop(client.read().unwrap()));
                daemon.flush();
            }
            deaf
        }
        "many that ask for much and read nothing" => {
            let bytes = "INFO\n".repeat(540);
            (0..15 * times)
                .map(|_| pour(daemon, bytes.as_bytes()))
                .collect()
        }
        "requests that never end" => {
            let mut bytes = with_empty_args("MGET");
            bytes.truncate(bytes.len() - 1);
            (0..20 * times).map(|_| pour(daemon, &bytes)).collect()
        }
        other => panic!("{other}"),
    }
}

#[test]
fn no_attack_on_the_memory_gets_beyond_its_limit() {
    let full = std::env::var("TALLYD_ATTACKS").is_ok_and(|how| how == "full");
    let (limit, times) = if full { (256, 10) } else { (32, 1) };
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis)
        .set("limits.max_client_bytes", format!("{limit}MiB"))
        .set("limits.max_transaction_bytes", format!("{}MiB", limit / 4))
        .start();
    let pinger = Pinger::start(&daemon);
    let mut honest = daemon.client();
    let mut sum = 0;
    for name in [
        "a transaction of empty arguments",
        "answers within EXEC",
        "names of channels",
        "subscribers that do not read",
        "many that ask for much and read nothing",
        "requests that never end",
    ] {
        let begin = Instant::now();
        let attackers = attack(&daemon, name, times);
        sum += 1;
        assert_eq!(honest.number(&["INCR", "honest"]), sum, "{name}");
        let held = stat(&daemon, "client_bytes");
        let evicted = stat(&daemon, "clients_evicted_total");
        drop(attackers);
        wait_until("what they held is back", || {
            stat(&daemon, "client_bytes") < MIB as i64
        });
        eprintln!(
            "{name}: {held} bytes held at the end, {evicted} clients evicted so far, \
             {} MiB resident at most, {:?}",
            resident_max(&daemon) / MIB,
            begin.elapsed()
        );
        assert!(resident_max(&daemon) < limit * MIB + REST, "{name}");
    }
    assert!(stat(&daemon, "clients_evicted_total") > 0);
    assert!(
        daemon.log().contains("limits.max_client_bytes ("),
        "{}",
        daemon.log()
    );
    pinger.finish("attacks on the memory");
    daemon.flush();
    assert_eq!(redis.counter("honest"), sum);
}

/// What redis-py's `pipeline()` of so many sends.
#[test]
fn a_transaction_of_honest_size_fits() {
    const COUNT: i64 = 100_000;
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    let mut client = daemon.client();
    let mut bytes = request(&["MULTI"]);
    for key in 0..COUNT {
        bytes.extend(request(&["INCRBY", &format!("article:{key}:likes"), "1"]));
    }
    bytes.extend(request(&["EXEC"]));
    let mut writer = client.stream().duplicate();
    let answers = std::thread::scope(|scope| {
        scope.spawn(move || writer.write_all(&bytes).unwrap());
        (0..=COUNT).for_each(|_| drop(client.read().unwrap()));
        client.read().unwrap()
    });
    assert_eq!(answers.items().len() as i64, COUNT);
    assert!(answers.items().iter().all(|one| *one == Value::Integer(1)));
    daemon.flush();
    assert_eq!(redis.counter("article:99999:likes"), 1);
}

#[test]
fn a_transaction_beyond_its_limit_is_refused_whole_and_holds_nothing() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis)
        .set("limits.max_transaction_bytes", "1MiB")
        .start();
    let mut client = daemon.client();
    client.command(&["MULTI"]);
    let long = "k".repeat(1000);
    let refused = (0..2000)
        .map(|_| client.command(&["INCR", &long]))
        .find(|answer| *answer != Value::Status("QUEUED".into()));
    assert_eq!(
        refused.unwrap().error(),
        "ERR the transaction takes more than limits.max_transaction_bytes (1048576)"
    );
    // In the middle of a transaction that will not run.
    assert_eq!(
        client.command(&["INCR", &long]),
        Value::Status("QUEUED".into())
    );
    assert!(stat(&daemon, "client_bytes") < 64 << 10);
    assert_eq!(
        client.command(&["EXEC"]).error(),
        "EXECABORT Transaction discarded because of previous errors."
    );
    assert_eq!(client.number(&["TALLY.PENDING", &long]), 0);
}

#[test]
fn what_a_transaction_held_is_the_systems_again_after_discard() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    let before = resident(&daemon);
    let mut client = daemon.client();
    client.command(&["MULTI"]);
    for _ in 0..6 {
        client
            .stream()
            .duplicate()
            .write_all(&with_empty_args("MGET"))
            .unwrap();
        assert_eq!(client.read().unwrap(), Value::Status("QUEUED".into()));
    }
    let held = stat(&daemon, "client_bytes");
    assert!(held > 32 * MIB as i64, "{held}");
    client.command(&["DISCARD"]);
    assert!(stat(&daemon, "client_bytes") < 64 << 10);
    let after = resident(&daemon);
    assert!(
        after < before + 16 * MIB,
        "{after} bytes resident, {before} before"
    );
}

#[test]
fn answers_that_are_too_large_abort_a_transaction_before_anything_of_it_counts() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    let mut client: Client = daemon.client();
    client.command(&["MULTI"]);
    client.command(&["INCR", "k"]);
    let mut many = vec!["get"; 100_000];
    many[..2].copy_from_slice(&["COMMAND", "INFO"]);
    (0..3).for_each(|_| drop(client.command(&many)));
    let answer = client.command(&["EXEC"]);
    assert_eq!(
        answer.error(),
        "EXECABORT Transaction discarded because its answers take more than 16777216 bytes"
    );
    assert_eq!(client.number(&["TALLY.PENDING", "k"]), 0);
    assert_eq!(client.number(&["INCR", "k"]), 1);
}

/// The story: what `EXEC` had taken out of the queue was charged to nobody while it waited for values.
#[test]
fn a_large_transaction_is_charged_until_it_is_answered() {
    let mut redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).set("reply.load_timeout", "60s").start();
    daemon.client().command(&["INCR", "known"]);
    redis.pause();
    let mut client = daemon.client();
    let mut bytes = request(&["MULTI"]);
    for key in 0..20_000 {
        bytes.extend(request(&["INCR", &format!("article:{key}:likes")]));
    }
    bytes.extend(request(&["EXEC"]));
    let mut writer = client.stream().duplicate();
    std::thread::scope(|scope| {
        scope.spawn(move || writer.write_all(&bytes).unwrap());
        (0..=20_000).for_each(|_| drop(client.read().unwrap()));
        wait_until("it is applied, and waits for values", || {
            stat(&daemon, "amount_pending") == 20_001
        });
        let held = stat(&daemon, "client_bytes");
        assert!(held > 20_000 * 100, "{held}");
        redis.resume();
        assert_eq!(client.read().unwrap().items().len(), 20_000);
    });
    wait_until("it is given back", || {
        stat(&daemon, "client_bytes") < 1 << 20
    });
}
