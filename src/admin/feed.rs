//! The feed of the live page: `/events`, server-sent events.
//!
//! A stream begins with `history` and goes on with a `state` a second; its last event is
//! `stopping`, unless the process was killed. Their data, in JSON (times are Unix ms):
//!
//! ```text
//! history   {"samples": [[at, increments a second, commands a second], …]}   oldest first
//! stopping  {}
//! state     {"at": …,
//!   "node":    {"name", "id", "version", "uptime_ms",
//!               "phase": "starting" | "ready" | "stopping", "stuck": who, or null},
//!   "store":   {"url": without its password, "up", "conflict", "error": the last one, "" when well},
//!   "rates":   {"increments", "commands"}     a second, over the last five
//!   "ratio":   {"minute", "ever"}             increments for each command; null: no command
//!   "pending": {"keys", "bytes", "bytes_max", "full", "age_ms"}
//!   "took":    {"seal_ms", "transaction_ms", "publish_ms"}   on average, in the last minute;
//!                                             null: there was none
//!   "hot":     {"covers_ms", "age_ms", "total", "keys": [{"key": as text, "count", "error"}, …]},
//!   "numbers": {every number of TALLY.STATS by its name}}
//! ```
//!
//! 1. A sample is taken every second, whether anybody looks or not, so that a page that is opened
//!    shows what has been. Five minutes of them are kept.
//! 2. A state is made once a second for all streams, and only if there is one.
//! 3. Nothing queues: a stream that falls behind misses states; one whose client takes nothing is
//!    ended by the connection's time-out.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hyper::body::{Body, Frame};
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Context as Daemon;
use crate::health::Phase;
use crate::hot::Hot;
use crate::stats::Number;

/// Between two samples, and between two states.
pub const EVERY: Duration = Duration::from_secs(1);
/// Streams at the same time; the connections that are left are for scrapers and probes.
pub const STREAMS_MAX: usize = 32;
/// Samples kept.
const SAMPLES_MAX: usize = 301;
/// A rate is taken over so many samples: commands leave in a burst with each flush.
const RATE_SAMPLES: usize = 5;
/// Samples of a minute.
const MINUTE_SAMPLES: usize = 60;
/// Keys shown.
const KEYS_SHOWN: usize = 20;
/// A lost page comes back after so many milliseconds.
const RETRY: &str = "retry: 1000\n";
const STOPPING: Bytes = Bytes::from_static(b"event: stopping\ndata: {}\n\n");

/// See the module's documentation.
#[derive(Debug)]
pub struct Feed {
    samples: Mutex<VecDeque<Sample>>,
    states: watch::Sender<Bytes>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    taken: Instant,
    at: u64,
    increments: u64,
    commands: u64,
    seals: Times,
    transactions: Times,
    publications: Times,
}

/// How often something was done, and how long all that took.
#[derive(Debug, Default, Clone, Copy)]
struct Times {
    count: u64,
    us: u64,
}

#[derive(Serialize)]
struct State<'a> {
    at: u64,
    node: Node<'a>,
    store: Store<'a>,
    rates: Rates,
    ratio: Ratio,
    pending: Pending,
    took: Took,
    hot: HotKeys,
    numbers: BTreeMap<&'static str, u64>,
}

#[derive(Serialize)]
struct Node<'a> {
    name: &'a str,
    id: Option<&'a str>,
    version: &'static str,
    uptime_ms: u64,
    phase: &'static str,
    stuck: Option<&'static str>,
}

#[derive(Serialize)]
struct Store<'a> {
    url: &'a str,
    up: bool,
    conflict: bool,
    error: String,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
struct Rates {
    increments: f64,
    commands: f64,
}

#[derive(Debug, PartialEq, Serialize)]
struct Ratio {
    minute: Option<f64>,
    ever: Option<f64>,
}

// Each carries its unit.
#[allow(clippy::struct_field_names)]
#[derive(Debug, Default, PartialEq, Serialize)]
struct Took {
    seal_ms: Option<f64>,
    transaction_ms: Option<f64>,
    publish_ms: Option<f64>,
}

#[derive(Serialize)]
struct Pending {
    keys: u64,
    bytes: u64,
    bytes_max: u64,
    full: bool,
    age_ms: u64,
}

#[derive(Serialize)]
struct HotKeys {
    covers_ms: u64,
    age_ms: u64,
    total: u64,
    keys: Vec<HotKey>,
}

#[derive(Serialize)]
struct HotKey {
    key: String,
    count: u64,
    error: u64,
}

impl Default for Feed {
    fn default() -> Self {
        Feed {
            samples: Mutex::default(),
            states: watch::Sender::new(Bytes::new()),
        }
    }
}

impl Feed {
    /// To be called every [`EVERY`].
    pub fn tick(daemon: &Daemon) {
        let (feed, stats) = (&daemon.feed, &daemon.stats);
        let times = |counts: &[&Number], us: &Number| Times {
            count: counts.iter().map(|count| count.get()).sum(),
            us: us.get(),
        };
        let transactions = [
            &stats.batches_total,
            &stats.batches_refused_total,
            &stats.batches_keys_refused_total,
            &stats.batches_aborted_total,
            &stats.uncertain_total,
        ];
        let sample = Sample {
            taken: Instant::now(),
            at: unix_ms(),
            increments: stats.increments_total.get(),
            commands: stats.flushed_keys_total.get(),
            seals: times(&[&stats.seals_total], &stats.seal_us_total),
            transactions: times(&transactions, &stats.transaction_us_total),
            publications: times(&[&stats.published_total], &stats.publish_us_total),
        };
        let mut samples = feed.samples.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() == SAMPLES_MAX {
            samples.pop_front();
        }
        samples.push_back(sample);
        drop(samples);
        if feed.states.receiver_count() > 0 {
            feed.states.send_replace(feed.state(daemon).into());
        }
    }

    /// A stream; `None`: there are too many.
    pub fn stream(daemon: &Daemon) -> Option<Events> {
        let feed = &daemon.feed;
        if feed.states.receiver_count() >= STREAMS_MAX {
            return None;
        }
        let states = feed.states.subscribe();
        let first = format!("{RETRY}{}{}", feed.history(), feed.state(daemon));
        Some(Events::new(first.into(), states, daemon.stop.clone()))
    }

    fn history(&self) -> String {
        #[derive(Serialize)]
        struct History {
            samples: Vec<(u64, f64, f64)>,
        }
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let samples = (0..samples.len())
            .map(|index| {
                let rates = rates(&samples, index);
                (samples[index].at, rates.increments, rates.commands)
            })
            .collect();
        event("history", &History { samples })
    }

    fn state(&self, daemon: &Daemon) -> String {
        let stats = &daemon.stats;
        let (rates, minute, took) = {
            let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
            let last = samples.len().saturating_sub(1);
            let minute = samples.back().zip(minute_ago(&samples));
            (
                rates(&samples, last),
                minute.and_then(|(to, from)| {
                    ratio(to.increments - from.increments, to.commands - from.commands)
                }),
                minute.map(|(to, from)| took(from, to)).unwrap_or_default(),
            )
        };
        let state = State {
            at: unix_ms(),
            node: Node {
                name: &daemon.name,
                id: daemon.node.get().map(String::as_str),
                version: env!("CARGO_PKG_VERSION"),
                uptime_ms: ms(daemon.health.started().elapsed()),
                phase: match daemon.health.phase() {
                    Phase::Starting => "starting",
                    Phase::Ready => "ready",
                    Phase::Stopping => "stopping",
                },
                stuck: daemon.health.stuck(),
            },
            store: Store {
                url: &daemon.store,
                up: stats.store_up.get() == 1,
                conflict: stats.store_conflict.get() == 1,
                error: stats.store_error(),
            },
            rates,
            ratio: Ratio {
                minute,
                ever: ratio(stats.increments_total.get(), stats.flushed_keys_total.get()),
            },
            pending: pending(daemon),
            took,
            hot: hot_keys(&daemon.hot),
            numbers: stats.snapshot().into_iter().collect(),
        };
        event("state", &state)
    }
}

fn pending(daemon: &Daemon) -> Pending {
    let stats = &daemon.stats;
    let bytes = stats.sealed_bytes.get() + stats.epoch_bytes.get();
    let since = stats.pending_since_ms.get();
    Pending {
        keys: stats.sealed_keys.get() + stats.epoch_keys.get(),
        bytes,
        bytes_max: stats.pending_bytes_max.get(),
        // The longest key would find no room.
        full: bytes + daemon.record_bytes_max > stats.pending_bytes_max.get(),
        age_ms: if since == 0 {
            0
        } else {
            unix_ms().saturating_sub(since)
        },
    }
}

fn hot_keys(hot: &Hot) -> HotKeys {
    let hottest = hot.hottest(KEYS_SHOWN);
    HotKeys {
        covers_ms: ms(hottest.until - hottest.since),
        age_ms: ms(hottest.until.elapsed()),
        total: hottest.total,
        keys: hottest
            .keys
            .iter()
            .map(|key| HotKey {
                key: key.text(),
                count: key.count,
                error: key.error,
            })
            .collect(),
    }
}

/// The rates up to a sample.
fn rates(samples: &VecDeque<Sample>, index: usize) -> Rates {
    let first = index.saturating_sub(RATE_SAMPLES);
    let (Some(from), Some(to)) = (samples.get(first), samples.get(index)) else {
        return Rates::default();
    };
    let seconds = (to.taken - from.taken).as_secs_f64();
    if seconds == 0.0 {
        return Rates::default();
    }
    let rate = |from: u64, to: u64| ((to - from) as f64 / seconds * 10.0).round() / 10.0;
    Rates {
        increments: rate(from.increments, to.increments),
        commands: rate(from.commands, to.commands),
    }
}

/// The sample from which the last minute is told.
fn minute_ago(samples: &VecDeque<Sample>) -> Option<&Sample> {
    samples.get(samples.len().saturating_sub(MINUTE_SAMPLES + 1))
}

/// How long things took between two samples.
fn took(from: &Sample, to: &Sample) -> Took {
    let mean_ms = |from: Times, to: Times| {
        let count = to.count - from.count;
        (count > 0).then(|| (to.us - from.us) as f64 / count as f64 / 1000.0)
    };
    Took {
        seal_ms: mean_ms(from.seals, to.seals),
        transaction_ms: mean_ms(from.transactions, to.transactions),
        publish_ms: mean_ms(from.publications, to.publications),
    }
}

fn ratio(increments: u64, commands: u64) -> Option<f64> {
    (commands > 0).then(|| increments as f64 / commands as f64)
}

fn event(name: &str, data: &impl Serialize) -> String {
    // JSON in one line; keys, being text, cannot end it.
    let data = serde_json::to_string(data).expect("maps have keys of text, and numbers are finite");
    format!("event: {name}\ndata: {data}\n\n")
}

/// The body of one stream.
pub struct Events {
    first: Option<Bytes>,
    /// None after the last event.
    next: Option<Next>,
    stop: CancellationToken,
}

type States = watch::Receiver<Bytes>;
/// An event, and where those after it come from.
type Next = Pin<Box<dyn Future<Output = (Bytes, Option<States>)> + Send>>;

impl Events {
    fn new(first: Bytes, states: States, stop: CancellationToken) -> Self {
        Events {
            first: Some(first),
            next: Some(Box::pin(next(states, stop.clone()))),
            stop,
        }
    }
}

async fn next(mut states: States, stop: CancellationToken) -> (Bytes, Option<States>) {
    let changed = tokio::select! {
        biased;
        () = stop.cancelled() => false,
        changed = states.changed() => changed.is_ok(),
    };
    if changed {
        let state = states.borrow_and_update().clone();
        (state, Some(states))
    } else {
        (STOPPING, None)
    }
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        if let Some(first) = this.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        let Some(next_event) = &mut this.next else {
            return Poll::Ready(None);
        };
        let (event, states) = ready!(next_event.as_mut().poll(cx));
        this.next = states.map(|states| Box::pin(next(states, this.stop.clone())) as _);
        Poll::Ready(Some(Ok(Frame::data(event))))
    }
}

fn ms(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sample each second, with the totals given.
    fn samples(totals: &[(u64, u64)]) -> VecDeque<Sample> {
        let begin = Instant::now();
        let sample = |(index, &(increments, commands)): (usize, &(u64, u64))| Sample {
            taken: begin + Duration::from_secs(index as u64),
            at: 1000 * index as u64,
            increments,
            commands,
            seals: Times::default(),
            transactions: Times {
                count: commands / 10,
                us: commands * 250,
            },
            publications: Times::default(),
        };
        totals.iter().enumerate().map(sample).collect()
    }

    #[test]
    fn rates_are_of_the_last_five_seconds() {
        let totals: Vec<_> = (0..20).map(|n| (100 * n * n, n / 2)).collect();
        let samples = samples(&totals);
        let at = |index| {
            (
                rates(&samples, index).increments,
                rates(&samples, index).commands,
            )
        };
        assert_eq!(at(0), (0.0, 0.0));
        assert_eq!(at(1), (100.0, 0.0));
        assert_eq!(at(2), (200.0, 0.5));
        // 10² - 5² = 75 hundreds in 5 s.
        assert_eq!(at(10), (1500.0, 0.6));
        assert_eq!(rates(&VecDeque::new(), 0), Rates::default());
    }

    #[test]
    fn a_minute_forgets_what_was_before() {
        assert!(minute_ago(&VecDeque::new()).is_none());
        let totals: Vec<_> = (0..100).map(|n| (n, 10 * n)).collect();
        let commands = |count| minute_ago(&samples(&totals[..count])).map(|s| s.commands);
        assert_eq!((commands(1), commands(61)), (Some(0), Some(0)));
        assert_eq!((commands(62), commands(100)), (Some(10), Some(390)));
    }

    #[test]
    fn means_are_of_what_was_done_meanwhile() {
        assert_eq!((ratio(7, 0), ratio(7, 2)), (None, Some(3.5)));
        let samples = samples(&[(0, 40), (0, 60), (0, 60)]);
        assert_eq!(took(&samples[1], &samples[2]), Took::default());
        let told = took(&samples[0], &samples[1]);
        assert_eq!((told.seal_ms, told.transaction_ms), (None, Some(2.5)));
    }

    #[test]
    fn an_event_is_one_line_of_data_whatever_is_in_it() {
        let text = event(
            "state",
            &BTreeMap::from([("key", "a\n\r\u{2028}</script>\n\ndata: x")]),
        );
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(
            text.ends_with("\n\n") && text.trim_end().matches('\n').count() == 1,
            "{text}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_stream_misses_states_and_still_hears_the_end() {
        use http_body_util::BodyExt;

        let states = watch::Sender::new(Bytes::new());
        let stop = CancellationToken::new();
        let mut events = Events::new("first".into(), states.subscribe(), stop.clone());
        for n in 0..1000 {
            states.send_replace(format!("state {n}").into());
        }
        let mut heard = Vec::new();
        for _ in 0..2 {
            let frame = events.frame().await.unwrap().unwrap();
            heard.push(frame.into_data().unwrap());
        }
        assert_eq!(heard, ["first", "state 999"]);
        stop.cancel();
        let rest = events.collect().await.unwrap().to_bytes();
        assert_eq!(rest, STOPPING);
        assert_eq!(states.receiver_count(), 0);
    }
}
