//! How fast the nodes' views follow each other.
//!
//! `cargo bench --bench convergence`. Starts a redis-server and daemons of its own; times are CPU
//! time of a thread or a process where a rate or a share is meant. Prints a Markdown table.
//!
//! - visible: from sending `TALLY.FLUSH` on node A to the new value at a reader of node B
//! - decode, apply: messages of 1,000 deltas over 100,000 known keys, on one core
//! - load: a node that receives 200,000 deltas a second, and its `INCR`s with and without them

// Clocks that only go up, short replies, buffers of one read.
#![allow(
    clippy::naive_bytecount,
    clippy::unchecked_time_subtraction,
    clippy::large_stack_arrays,
    clippy::format_collect
)]

use std::hint::black_box;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tallyd::counters::{Announced, Kind, Op, RecordError, Recorder, Table, TableLimits};
use tallyd::store::{Identity, NodeId, RunId};
use tallyd::sync::message::{Head, Received};

const KEYS: usize = 100_000;
const DELTAS: usize = 1000;
const ROUNDS: usize = 500;
/// Between two flushes; `flush.interval` is 1 s by default.
const PAUSE: Duration = Duration::from_millis(50);
const DELTAS_A_SECOND: usize = 200_000;

/// A process that ends with its value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).expect("it runs");
        let fields: Vec<i64> = stat[stat.rfind(')').expect("a name") + 2..]
            .split(' ')
            .filter_map(|field| field.parse().ok())
            .collect();
        // After the state: utime and stime are the 10th and 11th numbers, in hundredths.
        Duration::from_millis((fields[10] + fields[11]) as u64 * 10)
    }
}

struct Client(UnixStream);

impl Client {
    fn connect(path: &Path) -> Self {
        let begin = Instant::now();
        loop {
            if let Ok(stream) = UnixStream::connect(path) {
                return Client(stream);
            }
            assert!(
                begin.elapsed() < Duration::from_secs(20),
                "{}",
                path.display()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a command whose reply is one line, or one line and a short string.
    fn ask(&mut self, command: &str) -> String {
        self.0.write_all(command.as_bytes()).expect("it reads");
        self.0.write_all(b"\r\n").expect("it reads");
        self.reply()
    }

    fn reply(&mut self) -> String {
        let mut text = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let got = self.0.read(&mut buffer).expect("it answers");
            assert!(got > 0, "the connection ended");
            text.extend_from_slice(&buffer[..got]);
            let lines = text.iter().filter(|&&byte| byte == b'\n').count();
            let due = if text[0] == b'$' && !text.starts_with(b"$-1") {
                2
            } else {
                1
            };
            if lines >= due && text.ends_with(b"\r\n") {
                return String::from_utf8_lossy(&text).into_owned();
            }
        }
    }
}

struct World {
    dir: tempfile::TempDir,
    port: u16,
    _redis: Running,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a port")
            .port();
        let redis = Command::new("redis-server")
            .args([
                "--port",
                &port.to_string(),
                "--save",
                "",
                "--appendonly",
                "no",
            ])
            .arg("--unixsocket")
            .arg(dir.path().join("redis"))
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        let world = World {
            dir,
            port,
            _redis: Running(redis),
        };
        assert_eq!(
            Client::connect(&world.path("redis")).ask("PING"),
            "+PONG\r\n"
        );
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn daemon(&self, name: &str, sync: &str) -> Running {
        let child = Command::new(env!("CARGO_BIN_EXE_tallyd"))
            .args(["run", "--flush-interval", "1h", "--log-level", "warn"])
            .env("TALLYD_JOURNAL__SYNC", sync)
            .args(["--store", &format!("redis://127.0.0.1:{}", self.port)])
            .arg("--socket")
            .arg(self.path(name))
            .arg("--state-dir")
            .arg(self.path(&format!("{name}.state")))
            .spawn()
            .expect("it was built");
        let running = Running(child);
        assert_eq!(Client::connect(&self.path(name)).ask("PING"), "+PONG\r\n");
        running
    }
}

fn visible(world: &World, sync: &str) -> (Duration, Duration) {
    let (_a, _b) = (world.daemon("a", sync), world.daemon("b", sync));
    let (mut a, mut b) = (
        Client::connect(&world.path("a")),
        Client::connect(&world.path("b")),
    );
    b.ask("GET visible");
    let first = 1 + a
        .ask("GET visible")
        .lines()
        .nth(1)
        .map_or(0, |value| value.parse().expect("a number"));
    thread::sleep(Duration::from_millis(500));
    let mut times = Vec::new();
    for round in first..first + ROUNDS {
        // As a timer would: the next flush does not meet the last one's sync.
        thread::sleep(PAUSE);
        assert_eq!(a.ask("INCR visible"), format!(":{round}\r\n"));
        let due = round.to_string();
        let due = format!("${}\r\n{due}\r\n", due.len());
        let begin = Instant::now();
        a.0.write_all(b"TALLY.FLUSH\r\n").expect("it reads");
        while b.ask("GET visible") != due {
            assert!(
                begin.elapsed() < Duration::from_secs(5),
                "not heard: {round}"
            );
        }
        times.push(begin.elapsed());
        assert_eq!(a.reply(), "+OK\r\n");
    }
    times.sort();
    (times[ROUNDS / 2], times[ROUNDS * 99 / 100])
}

/// Keeps no journal.
struct Count(u32);

impl Recorder for Count {
    fn epoch(&self) -> u32 {
        1
    }
    fn append(&mut self, _: &[u8], _: i64) -> Result<u32, RecordError> {
        self.0 += 1;
        Ok(self.0)
    }
    fn add(&mut self, _: u32, _: i64) -> Result<(), RecordError> {
        Ok(())
    }
    fn delta(&self, _: u32) -> i64 {
        0
    }
    fn prefetch(&self, _: u32) {}
}

fn key(number: usize) -> String {
    format!("like:{number:07}")
}

fn messages(count: usize, clock: u64, seed: u64) -> Vec<Vec<u8>> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let identity = Identity {
        node: NodeId(0x77),
        run: RunId(0x99),
    };
    let head = Head::new(identity, "bench");
    (0..count as u64)
        .map(|number| {
            let deltas: Vec<(String, i64, i64)> = (0..DELTAS)
                .map(|_| {
                    let at = rng.usize(..KEYS);
                    let value = number as i64 * 1_000_000 + at as i64;
                    (key(at), rng.i64(1..10_000), value)
                })
                .collect();
            let deltas = deltas
                .iter()
                .map(|(key, amount, value)| (key.as_bytes(), *amount, *value));
            head.message(number + 1, clock + number, 1_763_835_000_123, deltas)
        })
        .collect()
}

fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// Deltas a second: decoded, applied, and both.
fn apply() -> [f64; 3] {
    let mut table = Table::new(TableLimits {
        bytes_max: 1 << 30,
        pending_keys_max: 0,
    });
    let mut recorder = Count(0);
    for number in 0..KEYS {
        let key = key(number);
        let mut op = [Op::new(Kind::Get, 0, key.len(), 0)];
        table.apply(key.as_bytes(), &mut op, &mut recorder);
    }
    let texts = messages(2000, 1, 3);
    let (mut decode, mut observe) = (Duration::ZERO, Duration::ZERO);
    let mut last = std::collections::HashMap::new();
    for text in &texts {
        let begin = thread_time();
        let received = Received::decode(text).expect("it is whole");
        let announced = received.announced().expect("keys are text");
        decode += thread_time() - begin;
        let begin = thread_time();
        let Announced {
            keys,
            values,
            clock,
        } = &announced;
        table.observe_announced(keys, values, *clock, &recorder, |_, _, observed| {
            black_box(observed);
        });
        observe += thread_time() - begin;
        let mut at = 0;
        for &(len, value) in &announced.values {
            // Of a key that a message names twice the first counts: the clock is the same.
            let key = announced.keys[at..at + len as usize].to_vec();
            let entry = last.entry(key).or_insert((value, announced.clock));
            if entry.1 != announced.clock {
                *entry = (value, announced.clock);
            }
            at += len as usize;
        }
    }
    for (key, (value, _)) in &last {
        assert_eq!(table.view(key).expect("it is held").value, *value);
    }
    let deltas = (texts.len() * DELTAS) as f64;
    [decode, observe, decode + observe].map(|time| deltas / time.as_secs_f64())
}

struct Pace {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<usize>,
}

/// Publishes 200,000 deltas a second until told to stop.
fn publish(world: &World, clock: u64) -> Pace {
    let stop = Arc::new(AtomicBool::new(false));
    let mut client = Client::connect(&world.path("redis"));
    let texts = messages(2000, clock, 5);
    let until = Arc::clone(&stop);
    let thread = thread::spawn(move || {
        let begin = Instant::now();
        let mut sent = 0;
        while !until.load(Ordering::Relaxed) && sent < texts.len() {
            let text = &texts[sent];
            write!(
                client.0,
                "*3\r\n$7\r\nPUBLISH\r\n$13\r\ntallyd:deltas\r\n${}\r\n",
                text.len()
            )
            .and_then(|()| client.0.write_all(text))
            .expect("it reads");
            assert_eq!(client.ask(""), ":1\r\n");
            sent += 1;
            let due =
                begin + Duration::from_secs_f64((sent * DELTAS) as f64 / DELTAS_A_SECOND as f64);
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        sent
    });
    Pace { stop, thread }
}

/// `INCR`s for some seconds, 64 at a time: how many a second, and the daemon's CPU time for each.
fn increments(world: &World, daemon: &Running, seconds: u64) -> (f64, f64) {
    let mut client = Client::connect(&world.path("c"));
    let mut rng = fastrand::Rng::with_seed(9);
    let bursts: Vec<String> = (0..500)
        .map(|_| {
            (0..64)
                .map(|_| format!("*2\r\n$4\r\nINCR\r\n$12\r\n{}\r\n", key(rng.usize(..KEYS))))
                .collect()
        })
        .collect();
    let (begin, cpu, mut count) = (Instant::now(), daemon.cpu(), 0_u64);
    let mut buffer = [0; 65536];
    while begin.elapsed() < Duration::from_secs(seconds) {
        for burst in &bursts {
            client.0.write_all(burst.as_bytes()).expect("it reads");
            let mut lines = 0;
            while lines < 64 {
                let got = client.0.read(&mut buffer).expect("it answers");
                assert!(got > 0 && buffer[0] != b'-', "refused");
                lines += buffer[..got].iter().filter(|&&byte| byte == b'\n').count();
            }
            count += 64;
        }
    }
    let took = begin.elapsed().as_secs_f64();
    let cpu = (daemon.cpu() - cpu).as_nanos() as f64;
    (count as f64 / took, cpu / count as f64)
}

fn main() {
    println!("| what | measured | bar |\n| --- | --- | --- |");
    let world = World::new();
    // A seal waits for the disk, which is the flush's time and not the message's.
    for sync in ["never", "interval"] {
        let (p50, p99) = visible(&world, sync);
        println!(
            "| flush on A to value at B, journal.sync {sync:?}, {ROUNDS} rounds: p50, p99 | {p50:.2?}, {p99:.2?} | p99 ≤ 5 ms |"
        );
    }
    let [decode, observe, both] = apply().map(|rate| rate / 1e6);
    println!(
        "| deltas applied a second on one core (decoded alone, applied alone) | {both:.2} million ({decode:.2}, {observe:.2}) | ≥ 1 million |"
    );

    let daemon = world.daemon("c", "interval");
    let mut client = Client::connect(&world.path("c"));
    for number in 0..KEYS {
        // Held, so that each delta moves a value.
        if number % 1000 == 0 {
            let keys: Vec<String> = (number..number + 1000).map(key).collect();
            client
                .0
                .write_all(format!("MGET {}\r\n", keys.join(" ")).as_bytes())
                .expect("it reads");
            let mut got = 0;
            let mut buffer = [0; 65536];
            while got < "*1000\r\n".len() + 1000 * "$-1\r\n".len() {
                got += client.0.read(&mut buffer).expect("it answers");
            }
        }
    }
    thread::sleep(Duration::from_secs(1));
    let pace = publish(&world, 1_000_000);
    thread::sleep(Duration::from_millis(300));
    let (begin, cpu) = (Instant::now(), daemon.cpu());
    thread::sleep(Duration::from_secs(5));
    let share = (daemon.cpu() - cpu).as_secs_f64() / begin.elapsed().as_secs_f64();
    pace.stop.store(true, Ordering::Relaxed);
    let sent = pace.thread.join().expect("it published");
    assert!(sent > 950, "{sent} messages were published, fewer than due");
    println!(
        "| CPU of a node that receives 200,000 deltas a second | {:.1} % of a core | ≤ 20 % |",
        share * 100.0
    );

    increments(&world, &daemon, 1);
    let mut ratios = Vec::new();
    let (mut alone, mut loaded) = ((0.0, 0.0), (0.0, 0.0));
    for round in 0..3 {
        alone = increments(&world, &daemon, 2);
        let pace = publish(&world, 2_000_000 + round * 10_000);
        loaded = increments(&world, &daemon, 2);
        pace.stop.store(true, Ordering::Relaxed);
        pace.thread.join().expect("it published");
        ratios.push(loaded.0 / alone.0);
    }
    ratios.sort_by(f64::total_cmp);
    println!(
        "| its `INCR`s a second with that load, against without (pipeline 64, one connection; last round {:.0} and {:.0}, CPU {:.0} and {:.0} ns each) | {:.2} | ≥ 0.8 |",
        loaded.0, alone.0, loaded.1, alone.1, ratios[1]
    );
}
