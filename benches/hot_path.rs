//! The way of an increment within the process: decode, apply, journal, encode.
//!
//! `cargo bench --bench hot_path`. The requests are encoded beforehand and copied, 64 KiB at a time,
//! to where a `read` would put them; no socket, no task. Times are the thread's CPU time, so that
//! neighbours on the machine disturb them less. Every table and journal is summed up afterwards and
//! must hold what was put in.
//!
//! - parse, apply, encode: each alone, in groups of 64
//! - all: together, over 1,000 keys and 1,000,000 keys by Zipf 1.0, with three recorders:
//!   `count` keeps no journal, `journal` is one long epoch, `seals` begins a new segment at every
//!   100,000 keys, as a flush four times a second would, so that at a million keys 4 of 10 increments
//!   append
//! - ratio: journal on against off, in turns, the median of the pairs
//! - memory: what a key costs beyond its bytes, as the table counts it and as the system does

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use rustix::time::{ClockId, clock_gettime};
use tallyd::counters::{Answer, Kind, Op, RecordError, Recorder, Table, TableLimits};
use tallyd::journal::{Directory, Writer};
use tallyd::wire::decode::increment;
use tallyd::wire::encode;

const GROUP: usize = 64;
const READ_BYTES: usize = 64 * 1024;
const SEAL_KEYS: u32 = 100_000;
const LIMITS: TableLimits = TableLimits {
    bytes_max: 1 << 30,
    pending_keys_max: 0,
};

/// Requests, cut into reads at whole frames.
struct Load {
    keys: usize,
    increments: u64,
    reads: Vec<Vec<u8>>,
}

fn key(number: usize) -> String {
    format!("like:{number:07}")
}

fn load(keys: usize, increments: u64) -> Load {
    let mut rng = fastrand::Rng::with_seed(7);
    let mut sum = 0.0;
    let cdf: Vec<f64> = (1..=keys)
        .map(|rank| {
            sum += 1.0 / rank as f64;
            sum
        })
        .collect();
    let mut numbers: Vec<usize> = (0..keys).collect();
    rng.shuffle(&mut numbers);
    let mut reads = vec![Vec::with_capacity(READ_BYTES)];
    for _ in 0..increments {
        let draw = rng.f64() * sum;
        let key = key(numbers[cdf.partition_point(|&below| below < draw).min(keys - 1)]);
        let frame = format!("*2\r\n$4\r\nINCR\r\n${}\r\n{key}\r\n", key.len());
        if reads
            .last()
            .is_some_and(|read| read.len() + frame.len() > READ_BYTES)
        {
            reads.push(Vec::with_capacity(READ_BYTES));
        }
        if let Some(read) = reads.last_mut() {
            read.extend_from_slice(frame.as_bytes());
        }
    }
    Load {
        keys,
        increments,
        reads,
    }
}

fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn timed(rounds: u64, mut work: impl FnMut()) -> Duration {
    let start = cpu_time();
    for _ in 0..rounds {
        work();
    }
    cpu_time().saturating_sub(start)
}

/// Keeps no journal.
#[derive(Default)]
struct Count {
    sum: i64,
}

impl Recorder for Count {
    fn epoch(&self) -> u32 {
        1
    }

    fn append(&mut self, _: &[u8], amount: i64) -> Result<u32, RecordError> {
        self.add(0, amount).map(|()| 0)
    }

    fn add(&mut self, _: u32, amount: i64) -> Result<(), RecordError> {
        self.sum += amount;
        Ok(())
    }

    fn delta(&self, _record: u32) -> i64 {
        0
    }

    fn prefetch(&self, _: u32) {}
}

/// A journal in a directory of its own.
struct Journal {
    directory: Directory,
    writer: Writer,
    /// Records at which the segment is sealed.
    seal_at: u32,
    next_batch: u64,
    /// What sealed segments hold.
    sealed: i64,
    _dir: tempfile::TempDir,
}

impl Journal {
    fn new(seal_at: u32) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (directory, _, writer) =
            Directory::open(dir.path(), 1000, 1 << 30).expect("a journal opens");
        Journal {
            directory,
            writer,
            seal_at,
            next_batch: 1,
            sealed: 0,
            _dir: dir,
        }
    }

    fn roll(&mut self) {
        let mut next = self.directory.create_segment(1 << 30).expect("room");
        next.expect(self.writer.bytes()).expect("room");
        self.next_batch = self.writer.next_first_batch();
        next.begin(self.next_batch);
        let sealed = std::mem::replace(&mut self.writer, next)
            .seal()
            .expect("sealed");
        self.sealed += sealed.deltas().map(|delta| delta.amount).sum::<i64>();
        sealed.keep().remove().expect("removed");
    }
}

/// Where increments are written down, and when that is changed.
trait Epochs {
    type Recorder: Recorder;
    fn recorder(&mut self) -> &mut Self::Recorder;
    /// Not timed: another thread's work.
    fn after_read(&mut self) {}
    /// Is it time for `after_read`?
    fn is_full(&self) -> bool {
        false
    }
    fn sum(self) -> i64;
}

impl Epochs for Count {
    type Recorder = Count;

    fn recorder(&mut self) -> &mut Count {
        self
    }

    fn sum(self) -> i64 {
        self.sum
    }
}

impl Epochs for Journal {
    type Recorder = Writer;

    fn recorder(&mut self) -> &mut Writer {
        &mut self.writer
    }

    fn after_read(&mut self) {
        self.roll();
    }

    fn is_full(&self) -> bool {
        self.writer.records() >= self.seal_at
    }

    fn sum(mut self) -> i64 {
        self.roll();
        self.sealed
    }
}

/// All that one way of recording needs to serve a load again and again.
struct Server<E> {
    table: Table,
    epochs: E,
    input: Vec<u8>,
    out: Vec<u8>,
    ops: Vec<Op>,
    taken: u64,
}

impl<E: Epochs> Server<E> {
    fn new(epochs: E) -> Self {
        Server {
            table: Table::new(LIMITS),
            epochs,
            input: vec![0; READ_BYTES],
            out: Vec::with_capacity(READ_BYTES),
            ops: Vec::with_capacity(GROUP),
            taken: 0,
        }
    }

    /// Serves all of the load once; the CPU time it took.
    fn serve(&mut self, load: &Load) -> Duration {
        let mut start = cpu_time();
        let mut time = Duration::ZERO;
        for read in &load.reads {
            self.input[..read.len()].copy_from_slice(read);
            self.out.clear();
            self.burst(read.len());
            black_box(&self.out);
            if self.epochs.is_full() {
                time += cpu_time().saturating_sub(start);
                self.epochs.after_read();
                start = cpu_time();
            }
        }
        self.taken += load.increments;
        time + cpu_time().saturating_sub(start)
    }

    /// As `Session::burst` does it.
    #[inline(never)]
    fn burst(&mut self, len: usize) {
        let input = &self.input[..len];
        let mut at = 0;
        loop {
            let next = increment(&input[at..]);
            if let Some(found) = next.clone() {
                let key = found.key;
                let op = Op::new(Kind::Add, at + key.start, key.len(), found.amount);
                self.ops.push(op);
                at += found.used;
            }
            if self.ops.len() == GROUP || next.is_none() {
                self.table
                    .apply(input, &mut self.ops, self.epochs.recorder());
                for op in &self.ops {
                    match op.answer {
                        Answer::Value(value) | Answer::Cold(value) => {
                            encode::integer(&mut self.out, value);
                        }
                        other => panic!("{other:?}"),
                    }
                }
                self.ops.clear();
            }
            if next.is_none() {
                break;
            }
        }
        assert_eq!(at, len, "every frame is whole");
    }

    /// The table and the records must hold all that was taken.
    fn check(self, load: &Load) {
        let pending: i64 = (0..load.keys)
            .filter_map(|number| self.table.view(key(number).as_bytes()))
            .map(|view| view.pending)
            .sum();
        assert_eq!(pending as u64, self.taken);
        assert_eq!(self.epochs.sum() as u64, self.taken);
    }
}

fn bench_server<E: Epochs>(criterion: &mut Criterion, name: &str, load: &Load, epochs: E) {
    let mut server = Server::new(epochs);
    server.serve(load);
    let mut group = criterion.benchmark_group("all");
    group.throughput(Throughput::Elements(load.increments));
    group.bench_function(BenchmarkId::new(name, load.keys), |bencher| {
        bencher.iter_custom(|rounds| (0..rounds).map(|_| server.serve(load)).sum());
    });
    group.finish();
    server.check(load);
}

fn bench_parts(criterion: &mut Criterion, load: &Load) {
    let mut group = criterion.benchmark_group("parts");
    let input = &load.reads[0];
    let mut ops = Vec::new();
    let parse = |ops: &mut Vec<Op>| {
        let mut at = 0;
        ops.clear();
        while let Some(found) = increment(&input[at..]) {
            let (key, amount) = (found.key, found.amount);
            ops.push(Op::new(Kind::Add, at + key.start, key.len(), amount));
            at += found.used;
        }
    };
    parse(&mut ops);
    group.throughput(Throughput::Elements(ops.len() as u64));
    group.bench_function(BenchmarkId::new("parse", load.keys), |bencher| {
        bencher.iter_custom(|rounds| timed(rounds, || parse(black_box(&mut ops))));
    });
    // Of one to seven digits in no order, as those of different counters are.
    let mut rng = fastrand::Rng::with_seed(9);
    let values: Vec<i64> = (0..ops.len())
        .map(|_| {
            let digits = rng.u32(1..8);
            rng.i64(0..10_i64.pow(digits))
        })
        .collect();
    let mut out = Vec::with_capacity(READ_BYTES);
    group.bench_function(BenchmarkId::new("encode", load.keys), |bencher| {
        bencher.iter_custom(|rounds| {
            timed(rounds, || {
                out.clear();
                for &value in &values {
                    encode::integer(&mut out, value);
                }
                black_box(&mut out);
            })
        });
    });
    let mut all: Vec<Vec<Op>> = load
        .reads
        .iter()
        .map(|input| {
            let mut ops = Vec::new();
            let mut at = 0;
            while let Some(found) = increment(&input[at..]) {
                let (key, amount) = (found.key, found.amount);
                ops.push(Op::new(Kind::Add, at + key.start, key.len(), amount));
                at += found.used;
            }
            ops
        })
        .collect();
    let mut journal = Journal::new(u32::MAX);
    let mut table = Table::new(LIMITS);
    let mut rounds_served = 0;
    group.throughput(Throughput::Elements(load.increments));
    group.bench_function(BenchmarkId::new("apply", load.keys), |bencher| {
        bencher.iter_custom(|rounds| {
            rounds_served += rounds;
            timed(rounds, || {
                for (input, ops) in load.reads.iter().zip(&mut all) {
                    table.apply(input, ops, &mut journal.writer);
                }
            })
        });
    });
    group.finish();
    assert_eq!(journal.sum() as u64, rounds_served * load.increments);
}

/// Journal on against off, in turns.
fn ratio(load: &Load, seal_at: u32) {
    let mut off = Server::new(Count::default());
    let mut on = Server::new(Journal::new(seal_at));
    off.serve(load);
    on.serve(load);
    let nanos = |time: Duration| time.as_secs_f64() * 1e9 / load.increments as f64;
    let mut pairs: Vec<(f64, f64)> = (0..15)
        .map(|_| (nanos(off.serve(load)), nanos(on.serve(load))))
        .collect();
    pairs.sort_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
    let (off_ns, on_ns) = pairs[pairs.len() / 2];
    println!(
        "ratio: {} keys, {}: {off_ns:.1} ns an increment without the journal, {on_ns:.1} ns with it: {:.3} ({:.3} to {:.3})",
        load.keys,
        if seal_at == u32::MAX {
            "one epoch"
        } else {
            "sealed at 100,000 keys"
        },
        on_ns / off_ns,
        pairs[0].1 / pairs[0].0,
        pairs[pairs.len() - 1].1 / pairs[pairs.len() - 1].0,
    );
    off.check(load);
    on.check(load);
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: usize = statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .expect("its second number");
    pages * rustix::param::page_size()
}

fn memory() {
    const KEYS: usize = 1_000_000;
    let before = resident_bytes();
    let mut table = Table::new(LIMITS);
    let mut count = Count::default();
    for number in 0..KEYS {
        let key = key(number);
        let mut op = [Op::new(Kind::Add, 0, key.len(), 1)];
        table.apply(key.as_bytes(), &mut op, &mut count);
    }
    let resident = resident_bytes() - before;
    assert_eq!((table.len(), count.sum), (KEYS, KEYS as i64));
    let beyond = |bytes: usize| bytes as f64 / KEYS as f64 - key(0).len() as f64;
    println!(
        "memory: {:.1} bytes a key beyond its {}, as the table counts; {:.1} as the system does",
        beyond(table.bytes()),
        key(0).len(),
        beyond(resident),
    );
    assert!(beyond(table.bytes()) <= 96.0, "{}", table.bytes());
    assert!(beyond(resident) <= 96.0, "{resident}");
}

fn main() {
    memory();
    let few = load(1_000, 1 << 20);
    let many = load(1_000_000, 1 << 21);
    if !std::env::args().any(|arg| arg == "--profile-time") {
        ratio(&few, u32::MAX);
        ratio(&many, u32::MAX);
        ratio(&many, SEAL_KEYS);
    }
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    for load in [&few, &many] {
        bench_parts(&mut criterion, load);
        bench_server(&mut criterion, "count", load, Count::default());
        bench_server(&mut criterion, "journal", load, Journal::new(u32::MAX));
        bench_server(&mut criterion, "seals", load, Journal::new(SEAL_KEYS));
    }
    criterion.final_summary();
}
