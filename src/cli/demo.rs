//! `tallyd demo`: a daemon on the embedded store in a temporary directory, clients that press a
//! "like" button as fast as they can, and at the end every total compared.
//!
//! 1. Each client counts by itself what was acknowledged to it. Nothing of the daemon's own
//!    numbers is used to tell whether the totals are right.
//! 2. The totals are read from the store's file after the daemon has ended, not through it.
//! 3. The daemon is stopped and the directory removed whatever happens, but for `kill -9`.

use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::args::DemoArgs;
use super::exit::ExitCode;
use super::run;
use crate::config::{Config, Environment, LogLevel, StoreUrl};
use crate::daemon::{self, DaemonError, Event, Surroundings};
use crate::log;
use crate::stats::Stats;
use crate::store::embedded::EmbeddedStore;
use crate::store::{Identity, NodeId, READ_KEYS_MAX, RunId, Store, StoreError};

/// Clients that count at the same time.
const CLIENTS: u64 = 4;
/// Posts that can be liked; one counter each.
const POSTS: usize = 3_000;
/// Likes that a client sends before it reads the replies.
const PIPELINE: u64 = 128;
/// The progress is shown so often on a terminal.
const REFRESH: Duration = Duration::from_millis(100);
/// The progress is shown so often elsewhere.
const LINE: Duration = Duration::from_secs(1);
/// The longest that the daemon may take for one answer.
const ANSWER: Duration = Duration::from_secs(30);

/// Why there is no happy end.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("cannot {action}: {source}")]
    Io {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error("cannot read the totals: {0}")]
    Store(#[from] StoreError),
    #[error("the daemon answered {0:?}")]
    Answer(String),
    #[error("the daemon's thread panicked")]
    Panicked,
    #[error("{differ} of {keys} totals differ")]
    Differ { differ: usize, keys: usize },
}

impl DemoError {
    fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }

    fn exit(&self) -> ExitCode {
        match self {
            Self::Io { .. } | Self::Store(_) => ExitCode::Io,
            Self::Daemon(error) => run::exit_code(error),
            Self::Answer(_) | Self::Panicked | Self::Differ { .. } => ExitCode::Internal,
        }
    }
}

/// Runs the demo; the result goes to stdout, progress and complaints to stderr.
pub fn demo(args: &DemoArgs) -> ExitCode {
    let mut config = Config::defaults(&Environment::default());
    config.log.level = LogLevel::Warn;
    // Without a log the demo is as good.
    let _ = log::init(&config.log);
    let enough = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The first one ends the counting, the second one the process. Without them the demo is
        // as good.
        let _ = signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&enough));
        let _ = signal_hook::flag::register(signal, Arc::clone(&enough));
    }
    match count_and_compare(args, config, &enough, &mut io::stdout().lock()) {
        Ok(()) => ExitCode::Success,
        Err(error) => {
            eprintln!("tallyd: demo: {error}");
            error.exit()
        }
    }
}

fn count_and_compare(
    args: &DemoArgs,
    mut config: Config,
    enough: &AtomicBool,
    out: &mut dyn Write,
) -> Result<(), DemoError> {
    let dir = TempDir::with_prefix("tallyd-demo-")
        .map_err(DemoError::io("make a temporary directory"))?;
    let state_dir = dir.path().join("state");
    let socket = dir.path().join("tallyd.sock");
    config.node.state_dir.clone_from(&state_dir);
    config.listen.socket.clone_from(&socket);
    config.store.url = StoreUrl::Embedded;

    let output = || DemoError::io("write the result");
    writeln!(
        out,
        "{CLIENTS} clients like {} posts, a few of them far more than the others, for {}.",
        HumanCount(POSTS as u64),
        match args.ops {
            Some(ops) => format!("{} s or {} likes", args.seconds, HumanCount(ops)),
            None => format!("{} s", args.seconds),
        }
    )
    .map_err(output())?;

    let daemon = Daemon::start(config)?;
    let counted = count(args, &socket, &daemon.stats, enough).and_then(|counted| {
        ask(&socket, "TALLY.FLUSH 30000\r\n", 1)
            .and_then(|answer| expect(&answer, "+OK"))
            .map(|()| counted)
    });
    let stats = Arc::clone(&daemon.stats);
    // Also when something went wrong: the directory must not go while a daemon writes to it.
    daemon.stop()?;
    let counted = counted?;
    let stored = read_totals(&state_dir.join("store.redb"))?;
    let saw = Saw {
        commands: stats.flushed_keys_total.get(),
        epochs: stats.seals_total.get(),
    };
    print(&counted, &saw, out).map_err(output())?;
    compare(&counted.totals, &stored, out)
}

/// The daemon on its own thread.
struct Daemon {
    stats: Arc<Stats>,
    events: mpsc::Sender<Event>,
    thread: JoinHandle<Result<(), DaemonError>>,
}

impl Daemon {
    /// Starts it, and waits until clients can connect.
    fn start(config: Config) -> Result<Self, DemoError> {
        let runtime = runtime()?;
        let (events, received) = mpsc::channel(1);
        let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("tallyd-stages".to_owned())
            .spawn(move || {
                runtime.block_on(daemon::run(
                    config,
                    Surroundings::default(),
                    received,
                    |stats| {
                        // Whoever started it waits for this.
                        let _ = ready.send(Arc::clone(stats));
                    },
                ))
            })
            .map_err(DemoError::io("start a thread"))?;
        match is_ready.recv() {
            Ok(stats) => Ok(Self {
                stats,
                events,
                thread,
            }),
            // It ended before it was ready.
            Err(_) => Err(ended(thread).err().unwrap_or(DemoError::Panicked)),
        }
    }

    fn stop(self) -> Result<(), DemoError> {
        // A daemon that has ended by itself says why below.
        let _ = self.events.blocking_send(Event::Stop);
        ended(self.thread)
    }
}

fn ended(thread: JoinHandle<Result<(), DaemonError>>) -> Result<(), DemoError> {
    Ok(thread.join().map_err(|_| DemoError::Panicked)??)
}

fn runtime() -> Result<Runtime, DemoError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(DemoError::io("start a runtime"))
}

/// What the clients know when they are done.
struct Counted {
    /// Acknowledged likes, by post.
    totals: Vec<i64>,
    took: Duration,
    live: Live,
}

impl Counted {
    fn increments(&self) -> u64 {
        self.totals.iter().sum::<i64>() as u64
    }
}

/// A read through the socket while others count.
struct Live {
    value: i64,
    pending: i64,
}

/// When the clients stop.
struct Limit<'a> {
    deadline: Instant,
    ops: u64,
    /// Increments that a client has begun to send.
    begun: AtomicU64,
    acknowledged: AtomicU64,
    enough: &'a AtomicBool,
}

impl Limit<'_> {
    /// How many increments a client may send next; 0: it is done.
    fn next(&self) -> u64 {
        if self.enough.load(Ordering::Relaxed) || Instant::now() >= self.deadline {
            return 0;
        }
        let begun = self.begun.fetch_add(PIPELINE, Ordering::Relaxed);
        self.ops.saturating_sub(begun).min(PIPELINE)
    }
}

/// Lets the clients count, and shows how far they are.
fn count(
    args: &DemoArgs,
    socket: &Path,
    stats: &Stats,
    enough: &AtomicBool,
) -> Result<Counted, DemoError> {
    let begin = Instant::now();
    let limit = Limit {
        deadline: begin + Duration::from_secs(args.seconds),
        ops: args.ops.unwrap_or(u64::MAX),
        begun: AtomicU64::new(0),
        acknowledged: AtomicU64::new(0),
        enough,
    };
    let mut progress = Progress::new(args);
    let mut totals = vec![0; POSTS];
    let mut live = None;
    let took = std::thread::scope(|scope| {
        let (send, ended) = std::sync::mpsc::channel();
        for seed in 1..=CLIENTS {
            let (send, limit) = (send.clone(), &limit);
            scope.spawn(move || {
                // Nobody listens when another client has failed.
                let _ = send.send(client(socket, seed, limit));
            });
        }
        drop(send);
        loop {
            match ended.recv_timeout(REFRESH) {
                Ok(own) => totals
                    .iter_mut()
                    .zip(own?)
                    .for_each(|(sum, own)| *sum += own),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok::<_, DemoError>(begin.elapsed()),
            }
            let acknowledged = limit.acknowledged.load(Ordering::Relaxed);
            let done = progress.show(begin.elapsed(), acknowledged, stats);
            if live.is_none() && done >= 0.5 {
                let read = read_live(socket);
                live = Some(read.inspect_err(|_| enough.store(true, Ordering::Relaxed))?);
            }
        }
    })?;
    progress.end();
    let live = live.map_or_else(|| read_live(socket), Ok)?;
    Ok(Counted { totals, took, live })
}

fn key(post: usize) -> String {
    format!("likes:{post}")
}

/// One client: sends likes, counts those that were acknowledged.
fn client(socket: &Path, seed: u64, limit: &Limit<'_>) -> Result<Vec<i64>, DemoError> {
    let counted = count_likes(socket, seed, limit);
    if counted.is_err() {
        limit.enough.store(true, Ordering::Relaxed);
    }
    counted
}

fn count_likes(socket: &Path, seed: u64, limit: &Limit<'_>) -> Result<Vec<i64>, DemoError> {
    let requests: Vec<Vec<u8>> = (0..POSTS)
        .map(|post| {
            let key = key(post);
            format!("*2\r\n$4\r\nINCR\r\n${}\r\n{key}\r\n", key.len()).into_bytes()
        })
        .collect();
    let mut stream = connect(socket)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut totals = vec![0; POSTS];
    let mut posts = Vec::new();
    let mut burst = Vec::new();
    let mut line = Vec::new();
    loop {
        let likes = limit.next();
        if likes == 0 {
            return Ok(totals);
        }
        posts.clear();
        burst.clear();
        for _ in 0..likes {
            let post = liked(random.f64());
            posts.push(post);
            burst.extend_from_slice(&requests[post]);
        }
        stream
            .get_mut()
            .write_all(&burst)
            .map_err(DemoError::io("send to the daemon"))?;
        for &post in &posts {
            read_line(&mut stream, &mut line)?;
            if line.first() != Some(&b':') {
                return Err(DemoError::Answer(String::from_utf8_lossy(&line).into()));
            }
            totals[post] += 1;
        }
        limit.acknowledged.fetch_add(likes, Ordering::Relaxed);
    }
}

/// A post by chance (`0.0..1.0`): the n-th one is liked about 1/n as often as the first (Zipf).
fn liked(chance: f64) -> usize {
    (((POSTS + 1) as f64).powf(chance) as usize).clamp(1, POSTS) - 1
}

fn connect(socket: &Path) -> Result<BufReader<UnixStream>, DemoError> {
    let stream = UnixStream::connect(socket).map_err(DemoError::io("connect to the daemon"))?;
    stream
        .set_read_timeout(Some(ANSWER + Duration::from_secs(5)))
        .map_err(DemoError::io("prepare a connection"))?;
    Ok(BufReader::with_capacity(1 << 16, stream))
}

/// Reads a line without its end.
fn read_line(stream: &mut BufReader<UnixStream>, line: &mut Vec<u8>) -> Result<(), DemoError> {
    line.clear();
    stream
        .read_until(b'\n', line)
        .map_err(DemoError::io("read the daemon's answer"))?;
    if !line.ends_with(b"\r\n") {
        let source = io::ErrorKind::UnexpectedEof.into();
        return Err(DemoError::io("read the daemon's answer")(source));
    }
    line.truncate(line.len() - 2);
    Ok(())
}

/// Sends `request` on a new connection and reads so many lines.
fn ask(socket: &Path, request: &str, lines: usize) -> Result<Vec<String>, DemoError> {
    let mut stream = connect(socket)?;
    stream
        .get_mut()
        .write_all(request.as_bytes())
        .map_err(DemoError::io("send to the daemon"))?;
    let mut line = Vec::new();
    (0..lines)
        .map(|_| {
            read_line(&mut stream, &mut line)?;
            Ok(String::from_utf8_lossy(&line).into_owned())
        })
        .collect()
}

fn expect(answer: &[String], wanted: &str) -> Result<(), DemoError> {
    match answer {
        [line] if line == wanted => Ok(()),
        _ => Err(DemoError::Answer(answer.join(" "))),
    }
}

/// The post that everybody likes: its value, and how much of it is not in the store yet.
fn read_live(socket: &Path) -> Result<Live, DemoError> {
    let hottest = key(0);
    let request = format!("GET {hottest}\r\nTALLY.PENDING {hottest}\r\n");
    let answer = ask(socket, &request, 3)?;
    let wrong = || DemoError::Answer(answer.join(" "));
    let [_, value, pending] = &answer[..] else {
        return Err(wrong());
    };
    let pending = pending.strip_prefix(':').ok_or_else(wrong)?;
    Ok(Live {
        value: value.parse().map_err(|_| wrong())?,
        pending: pending.parse().map_err(|_| wrong())?,
    })
}

/// A bar on a terminal, a line a second elsewhere; on stderr either way.
struct Progress {
    duration: Duration,
    ops: Option<u64>,
    bar: Option<ProgressBar>,
    next_line: Duration,
}

impl Progress {
    fn new(args: &DemoArgs) -> Self {
        let style = ProgressStyle::with_template("{wide_bar} {msg}")
            .expect("the template is constant and valid");
        let bar = io::stderr()
            .is_terminal()
            .then(|| ProgressBar::new(1_000).with_style(style));
        Self {
            duration: Duration::from_secs(args.seconds),
            ops: args.ops,
            bar,
            next_line: LINE,
        }
    }

    /// Returns how much of the whole is done, from 0 to 1.
    fn show(&mut self, elapsed: Duration, acknowledged: u64, stats: &Stats) -> f64 {
        let by_time = elapsed.as_secs_f64() / self.duration.as_secs_f64();
        let by_ops = self.ops.map_or(0.0, |ops| acknowledged as f64 / ops as f64);
        let done = by_time.max(by_ops).min(1.0);
        let text = format!(
            "{} increments, {} commands to the store",
            HumanCount(acknowledged),
            HumanCount(stats.flushed_keys_total.get())
        );
        if let Some(bar) = &self.bar {
            bar.set_position((done * 1_000.0) as u64);
            bar.set_message(text);
        } else if elapsed >= self.next_line {
            self.next_line += LINE;
            eprintln!("{:3.0} %  {text}", done * 100.0);
        }
        done
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// What arrived at the store.
struct Saw {
    commands: u64,
    epochs: u64,
}

fn print(counted: &Counted, saw: &Saw, out: &mut dyn Write) -> io::Result<()> {
    let increments = counted.increments();
    let keys = counted.totals.iter().filter(|total| **total > 0).count();
    let seconds = counted.took.as_secs_f64();
    let rate = increments as f64 / seconds;
    let ratio = increments as f64 / saw.commands.max(1) as f64;
    let rows = [
        (
            "increments",
            increments,
            format!(
                "acknowledged in {seconds:.1} s: {} a second",
                HumanCount(rate as u64)
            ),
        ),
        ("distinct keys", keys as u64, "were counted".to_owned()),
        (
            "commands",
            saw.commands,
            "that the store saw: one INCRBY for each key touched in an epoch".to_owned(),
        ),
        (
            "epochs",
            saw.epochs,
            "one a second, and a last one".to_owned(),
        ),
        (
            "ratio",
            ratio.round() as u64,
            "increments for each command that the store saw".to_owned(),
        ),
        (
            "live read",
            counted.live.value as u64,
            format!(
                "said GET {} in the middle of it, {} of them not in the store yet",
                key(0),
                HumanCount(counted.live.pending as u64)
            ),
        ),
    ];
    for (name, number, remark) in rows {
        let number = HumanCount(number).to_string();
        writeln!(out, "{name:<14}{number:>12}  {remark}")?;
    }
    Ok(())
}

/// The totals in the store's file, by post.
fn read_totals(path: &Path) -> Result<Vec<i64>, DemoError> {
    // It only reads: who it is does not matter.
    let nobody = Identity {
        node: NodeId(0),
        run: RunId(0),
    };
    let store = EmbeddedStore::open(path, nobody)?;
    let keys: Vec<Bytes> = (0..POSTS).map(|post| Bytes::from(key(post))).collect();
    let runtime = runtime()?;
    let mut totals = Vec::with_capacity(POSTS);
    for keys in keys.chunks(READ_KEYS_MAX) {
        for value in runtime.block_on(store.read(keys))?.values {
            let value = value.map_err(|error| DemoError::Answer(error.to_string()))?;
            totals.push(value.unwrap_or(0));
        }
    }
    Ok(totals)
}

/// Every total, as acknowledged and as stored.
fn compare(acknowledged: &[i64], stored: &[i64], out: &mut dyn Write) -> Result<(), DemoError> {
    let output = || DemoError::io("write the result");
    let mut differ = 0;
    for (post, (acknowledged, stored)) in acknowledged.iter().zip(stored).enumerate() {
        if acknowledged != stored {
            differ += 1;
            let key = key(post);
            writeln!(
                out,
                "{key}: {acknowledged} acknowledged, {stored} in the store"
            )
            .map_err(output())?;
        }
    }
    if differ > 0 || acknowledged.len() != stored.len() {
        let keys = acknowledged.len();
        return Err(DemoError::Differ { differ, keys });
    }
    writeln!(out, "totals equal").map_err(output())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_planted_difference_is_reported_and_fails() {
        let acknowledged = vec![5, 0, 7];
        let mut out = Vec::new();
        compare(&acknowledged, &acknowledged, &mut out).unwrap();
        assert_eq!(out, b"totals equal\n");

        // One lost, one counted twice, one that nobody counted.
        for stored in [[4, 0, 7], [5, 0, 14], [5, 1, 7]] {
            let mut out = Vec::new();
            let error = compare(&acknowledged, &stored, &mut out).unwrap_err();
            assert_eq!(error.exit().code(), 70);
            assert_eq!(error.to_string(), "1 of 3 totals differ");
            let post = (0..3)
                .find(|&post| stored[post] != acknowledged[post])
                .unwrap();
            let (was, is) = (acknowledged[post], stored[post]);
            let line = format!("likes:{post}: {was} acknowledged, {is} in the store\n");
            assert_eq!(String::from_utf8(out).unwrap(), line);
        }
    }

    #[test]
    fn the_store_is_what_is_compared_not_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        // A store that nothing was ever flushed to.
        let stored = read_totals(&dir.path().join("store.redb")).unwrap();
        assert_eq!(stored, vec![0; POSTS]);
        let mut acknowledged = stored.clone();
        acknowledged[POSTS - 1] = 1;
        compare(&acknowledged, &stored, &mut Vec::new()).unwrap_err();
    }

    #[test]
    fn the_first_post_is_liked_most_and_each_can_be() {
        assert_eq!((liked(0.0), liked(0.999_999)), (0, POSTS - 1));
        let mut random = fastrand::Rng::with_seed(1);
        let mut totals = vec![0; POSTS];
        for _ in 0..100_000 {
            totals[liked(random.f64())] += 1;
        }
        assert!(totals[0] > totals[1] && totals[1] > totals[10] && totals[10] > totals[1_000]);
    }

    #[test]
    fn the_number_of_increments_is_kept_to() {
        let args = DemoArgs {
            seconds: 60,
            ops: Some(1_001),
        };
        let config = Config::defaults(&Environment::default());
        let mut out = Vec::new();
        count_and_compare(&args, config, &AtomicBool::new(false), &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(out.contains("increments           1,001  "), "{out}");
        assert!(out.ends_with("totals equal\n"), "{out}");
    }
}
