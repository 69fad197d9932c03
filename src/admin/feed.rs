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
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame};
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Context as Daemon;
use super::samples::{Rates, SAMPLES_MAX, Sample, Took, minute_ago, rates, ratio, took};
use crate::health::Phase;
use crate::hot::Hot;
use crate::time::unix_ms;

/// Between two samples, and between two states.
pub const EVERY: Duration = Duration::from_secs(1);
/// Streams at the same time; the connections that are left are for scrapers and probes.
pub const STREAMS_MAX: usize = 32;
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

#[derive(Debug, PartialEq, Serialize)]
struct Ratio {
    minute: Option<f64>,
    ever: Option<f64>,
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
        let feed = &daemon.feed;
        let mut samples = feed.samples.lock().unwrap_or_else(PoisonError::into_inner);
        if samples.len() == SAMPLES_MAX {
            samples.pop_front();
        }
        samples.push_back(Sample::now(&daemon.stats));
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

#[cfg(test)]
mod tests {
    use super::*;

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
