//! Real clients, unchanged, over the daemon's socket. Their versions are pinned in `tests/clients`;
//! `tests/run` installs them.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::support::daemon::Daemon;
use crate::support::redis::RedisServer;
use crate::support::resp::encode;
use crate::support::{LIMIT, finish};

/// Where `tests/run` puts the client libraries.
pub fn installed(what: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let path = target.join("clients").join(what);
    assert!(
        path.exists(),
        "{} is missing: the client libraries are not installed. Run tests/run once, which installs them.",
        path.display()
    );
    path
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/clients")
        .join(name)
}

pub fn node() -> Command {
    // The one that tests/run installed where the system's is missing or too old.
    let own = installed("venv").join("bin/node");
    Command::new(if own.exists() { own } else { "node".into() })
}

/// Runs a client to its end; its output.
#[track_caller]
fn run(command: &mut Command, input: &[u8]) -> String {
    let (status, output) = finish(command, input);
    assert!(status.success(), "{command:?}: {status}\n{output}");
    output
}

fn pair() -> (RedisServer, Daemon) {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).start();
    (redis, daemon)
}

fn port(redis: &RedisServer) -> String {
    redis.address().port().to_string()
}

#[track_caller]
fn redis_py(protocol: &str, version: &str, library: Option<&str>) {
    let (redis, daemon) = pair();
    let mut command = Command::new(installed("venv").join("bin/python"));
    if let Some(library) = library {
        command.env("PYTHONPATH", installed(library));
    }
    command
        .arg(script("redis_py.py"))
        .arg(daemon.socket())
        .args([&port(&redis), protocol, version]);
    assert_eq!(run(&mut command, b""), "ok\n");
}

#[test]
fn redis_py_8_works_unchanged_with_protocol_2() {
    redis_py("2", "8", None);
}

#[test]
fn redis_py_8_works_unchanged_with_protocol_3() {
    redis_py("3", "8", None);
}

#[test]
fn redis_py_7_works_unchanged_with_protocol_2() {
    redis_py("2", "7.4", Some("redis-py-7"));
}

#[test]
fn redis_py_7_works_unchanged_with_protocol_3() {
    redis_py("3", "7.4", Some("redis-py-7"));
}

#[track_caller]
fn node_script(name: &str, arguments: &[&str]) {
    let (redis, daemon) = pair();
    let mut command = node();
    command
        .arg(script(name))
        .arg(installed("node"))
        .arg(daemon.socket())
        .arg(port(&redis))
        .args(arguments);
    assert_eq!(run(&mut command, b""), "ok\n");
}

#[test]
fn ioredis_6_works_unchanged() {
    node_script("ioredis.mjs", &["ioredis", "6"]);
}

#[test]
fn ioredis_5_works_unchanged() {
    node_script("ioredis.mjs", &["ioredis5", "5"]);
}

#[test]
fn node_redis_6_works_unchanged_with_protocol_2() {
    node_script("node_redis.mjs", &["2"]);
}

#[test]
fn node_redis_6_works_unchanged_with_protocol_3() {
    node_script("node_redis.mjs", &["3"]);
}

#[test]
fn the_rust_crate_works_unchanged() {
    let (store, daemon) = pair();
    for protocol in ["resp2", "resp3"] {
        let url = format!(
            "redis+unix://{}?protocol={protocol}",
            daemon.socket().display()
        );
        let mut connection = redis::Client::open(url).unwrap().get_connection().unwrap();
        let key = format!("rust:{protocol}");
        let value: i64 = redis::cmd("INCRBY")
            .arg(&key)
            .arg(41)
            .query(&mut connection)
            .unwrap();
        assert_eq!(value, 41);
        for atomic in [true, false] {
            let mut pipe = redis::pipe();
            if atomic {
                pipe.atomic();
            }
            pipe.cmd("INCR")
                .arg(&key)
                .cmd("GET")
                .arg(&key)
                .cmd("DECR")
                .arg(&key);
            assert_eq!(
                pipe.query::<(i64, i64, i64)>(&mut connection).unwrap(),
                (42, 42, 41)
            );
        }
        let error = redis::cmd("INCRBY")
            .arg(&key)
            .arg("x")
            .query::<i64>(&mut connection)
            .unwrap_err();
        assert!(error.to_string().contains("not an integer"), "{error}");
        let missing: Option<i64> = redis::cmd("GET")
            .arg("rust:missing")
            .query(&mut connection)
            .unwrap();
        assert_eq!(missing, None);
        daemon.flush();
        assert_eq!(store.counter(&key), 41);
    }
}

fn redis_cli(daemon: &Daemon) -> Command {
    let mut command = Command::new("redis-cli");
    command.arg("-s").arg(daemon.socket());
    command
}

#[test]
fn redis_cli_runs_single_and_piped_commands_in_both_protocols() {
    let (redis, daemon) = pair();
    assert_eq!(run(redis_cli(&daemon).args(["INCR", "cli"]), b""), "1\n");
    assert_eq!(
        run(redis_cli(&daemon).args(["-3", "INCRBY", "cli", "9"]), b""),
        "10\n"
    );
    assert_eq!(
        run(redis_cli(&daemon).args(["-r", "5", "INCR", "cli"]), b""),
        "11\n12\n13\n14\n15\n"
    );
    assert_eq!(
        run(redis_cli(&daemon).args(["--no-raw", "GET", "cli"]), b""),
        "\"15\"\n"
    );
    assert_eq!(
        run(
            redis_cli(&daemon).args(["--no-raw", "-3", "GET", "missing"]),
            b""
        ),
        "(nil)\n"
    );
    let lines = b"PING\nINCR cli\nMULTI\nINCR cli\nINCR cli\nEXEC\nGET cli\n";
    assert_eq!(
        run(&mut redis_cli(&daemon), lines),
        "PONG\n16\nOK\nQUEUED\nQUEUED\n17\n18\n18\n"
    );
    let failed = run(
        redis_cli(&daemon).args(["--no-raw", "INCRBY", "cli", "x"]),
        b"",
    );
    assert_eq!(
        failed,
        "(error) ERR value is not an integer or out of range\n"
    );
    // What it asks when used by hand.
    for question in [
        &["COMMAND"][..],
        &["COMMAND", "DOCS"],
        &["COMMAND", "DOCS", "incr"],
        &["INFO"],
        &["COMMAND", "COUNT"],
    ] {
        let answer = run(redis_cli(&daemon).args(["--no-raw"]).args(question), b"");
        assert!(!answer.contains("(error)"), "{question:?}: {answer}");
    }
    assert_eq!(run(redis_cli(&daemon).arg("TALLY.FLUSH"), b""), "OK\n");
    assert_eq!(redis.counter("cli"), 18);
}

#[test]
fn redis_cli_pipe_mode_loads_a_hundred_thousand_commands() {
    let (redis, daemon) = pair();
    let input = encode(&["INCR", "piped"]).repeat(100_000);
    let output = run(redis_cli(&daemon).arg("--pipe"), &input);
    assert!(output.contains("errors: 0, replies: 100000"), "{output}");
    daemon.flush();
    assert_eq!(redis.counter("piped"), 100_000);
}

/// `--stat` runs until it is stopped: the first lines are enough.
#[test]
fn redis_cli_stat_and_latency_show_figures() {
    let (_redis, daemon) = pair();
    for _ in 0..10 {
        daemon.client().command(&["INCR", "stat"]);
    }
    let mut child = redis_cli(&daemon)
        .args(["--stat", "-i", "0.05"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let stdout = child.stdout.take().unwrap();
    let (lines, received) = mpsc::channel();
    let reading = thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
    let mut text = String::new();
    // Two lines of headings, then figures: keys, memory, clients, blocked, requests, connections.
    let mut figures = Vec::new();
    for _ in 0..4 {
        let line = received
            .recv_timeout(LIMIT)
            .unwrap_or_else(|_| panic!("no figures:\n{text}"));
        let _ = writeln!(text, "{line}");
        figures = line.split_whitespace().map(str::to_string).collect();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    drop(received);
    reading.join().unwrap();
    assert!(figures.len() >= 6, "{text}");
    let requests: u64 = figures[4].parse().unwrap_or_else(|_| panic!("{text}"));
    let connections: u64 = figures[figures.len() - 1]
        .parse()
        .unwrap_or_else(|_| panic!("{text}"));
    assert!(requests >= 10 && connections >= 10, "{text}");

    // Not on a terminal it measures for a second, and prints minimum, maximum, average, samples.
    let output = run(redis_cli(&daemon).args(["--latency", "-i", "1"]), b"");
    let samples = output
        .split_whitespace()
        .last()
        .and_then(|n| n.parse::<u64>().ok());
    assert!(samples.is_some_and(|n| n > 10), "{output}");
}

#[test]
fn redis_benchmark_runs_with_and_without_pipeline() {
    let (redis, daemon) = pair();
    for pipeline in ["1", "64"] {
        let output = run(
            Command::new("redis-benchmark")
                .arg("-s")
                .arg(daemon.socket())
                .args("-t ping_inline,ping_mbulk,incr,get -n 12800 -c 20 --csv -P".split(' '))
                .arg(pipeline),
            b"",
        );
        for test in ["PING_INLINE", "PING_MBULK", "INCR", "GET"] {
            assert!(output.contains(&format!("\"{test}\",")), "{test}: {output}");
        }
        assert!(!output.to_lowercase().contains("err"), "{output}");
    }
    daemon.flush();
    assert_eq!(redis.counter("counter:__rand_int__"), 2 * 12_800);
}

/// A client that is stopped in the middle of its reply must not hold up anybody.
#[test]
fn a_client_that_never_reads_does_not_hold_up_the_others() {
    let (redis, daemon) = pair();
    let deaf = daemon.client();
    deaf.set_limit(Duration::from_secs(2));
    let burst = encode(&["MGET", "a", "b", "c", "d", "e", "f", "g", "h"]).repeat(10_000);
    // Until the daemon takes no more, or closes.
    for _ in 0..200 {
        if deaf.stream().duplicate().write_all(&burst).is_err() {
            break;
        }
    }
    let mut other = daemon.client();
    for n in 1..=1000 {
        assert_eq!(other.number(&["INCR", "others"]), n);
    }
    daemon.flush();
    assert_eq!(redis.counter("others"), 1000);
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    let resident_kib: u64 = resident.split_whitespace().next().unwrap().parse().unwrap();
    assert!(
        resident_kib < 1024 * 1024,
        "{resident_kib} KiB for one client that does not read"
    );
}

#[test]
fn redis_py_reads_on_one_node_what_another_counted() {
    let redis = RedisServer::start(&[]);
    let (a, b) = (
        Daemon::builder(redis.url()).start(),
        Daemon::builder(redis.url()).start(),
    );
    let mut command = Command::new(installed("venv").join("bin/python"));
    command
        .arg(script("two_nodes.py"))
        .arg(a.socket())
        .arg(b.socket());
    assert_eq!(run(&mut command, b""), "ok\n");
}
