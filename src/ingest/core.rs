//! The owner of the counters: the table, the open segment, and what the stages tell them.
//!
//! Invariants:
//! 1. Table and open segment change together, within one borrow and without an await.
//! 2. No message from a stage makes a client wait; no client makes a stage wait.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use super::IngestConfig;
use super::durable::Durable;
use super::hub::Hub;
use super::loads::Loads;
use crate::counters::{BadValue, Op, Reach, Recorder, Table};
use crate::fail_point::fail_point;
use crate::flush::{Closed, Command, Settled, ToCounters};
use crate::journal::Writer;
use crate::stats::Stats;
use crate::store::{KeyError, Reading};

/// Bytes read from a socket at a time; fits the second-level cache with the replies.
const READ_BYTES: usize = 64 * 1024;

/// Table and open segment.
pub struct State {
    /// The counters.
    pub table: Table,
    /// The open segment.
    pub writer: Writer,
    /// Whether the flush stage was asked to seal this epoch early.
    seal_asked: bool,
}

/// What all connections share.
pub struct Core {
    /// See [`IngestConfig`].
    pub config: IngestConfig,
    /// The counters; borrowed only between awaits.
    pub state: RefCell<State>,
    /// What a read brings, before it is decoded.
    pub input: RefCell<Vec<u8>>,
    /// Replies of one burst, before they are written.
    pub replies: RefCell<Vec<u8>>,
    /// What all clients hold in unread answers and unfinished commands, in bytes.
    pub client_bytes: Cell<usize>,
    /// Batches settled so far.
    pub settles: Cell<u64>,
    /// Numbers.
    pub stats: Arc<Stats>,
    /// Clients that wait for values.
    pub loads: Loads,
    /// Clients that wait for the disk.
    pub durable: Durable,
    /// Subscribers.
    pub hub: RefCell<Hub>,
    /// To the flush stage.
    pub flush: mpsc::Sender<Command>,
    /// Connected clients.
    pub clients: super::listener::Clients,
    /// When the process began to serve.
    pub started: Instant,
    seal_wanted: Arc<Notify>,
    pending_since: Cell<u64>,
}

/// What [`Core`] is built from.
pub struct Parts {
    /// See [`IngestConfig`].
    pub config: IngestConfig,
    /// The counters, with what was recovered.
    pub table: Table,
    /// The open segment.
    pub writer: Writer,
    /// Numbers.
    pub stats: Arc<Stats>,
    /// To the loader.
    pub wanted: mpsc::Sender<Vec<Bytes>>,
    /// To the flush stage.
    pub flush: mpsc::Sender<Command>,
    /// Rung when the open epoch has many keys.
    pub seal_wanted: Arc<Notify>,
}

impl Core {
    /// Builds it; nothing runs yet.
    pub fn new(parts: Parts) -> Rc<Self> {
        let load_timeout = parts.config.load_timeout;
        Rc::new(Core {
            config: parts.config,
            state: RefCell::new(State {
                table: parts.table,
                writer: parts.writer,
                seal_asked: false,
            }),
            input: RefCell::new(vec![0; READ_BYTES]),
            replies: RefCell::new(Vec::with_capacity(READ_BYTES)),
            client_bytes: Cell::new(0),
            settles: Cell::new(0),
            stats: parts.stats,
            loads: Loads::new(parts.wanted, load_timeout),
            durable: Durable::default(),
            hub: RefCell::new(Hub::default()),
            flush: parts.flush,
            clients: super::listener::Clients::default(),
            started: Instant::now(),
            seal_wanted: parts.seal_wanted,
            pending_since: Cell::new(0),
        })
    }

    /// Applies a group of operations on keys in `input`.
    pub fn apply(&self, input: &[u8], ops: &mut [Op]) {
        let mut state = self.state.borrow_mut();
        let State {
            table,
            writer,
            seal_asked,
        } = &mut *state;
        table.apply(input, ops, writer);
        if writer.records() as usize >= self.config.epoch_keys_max && !*seal_asked {
            *seal_asked = true;
            self.seal_wanted.notify_one();
        }
    }

    /// Hears the stages until they are gone.
    pub async fn listen(self: Rc<Self>, mut messages: mpsc::Receiver<ToCounters>) {
        while let Some(message) = messages.recv().await {
            self.hear(message);
            // A settled batch is the longest of these; clients come in between.
            tokio::task::yield_now().await;
        }
    }

    /// Sets the gauges that are too dear to keep current at each command.
    pub fn refresh_gauges(&self) {
        let state = self.state.borrow();
        self.stats.view_keys.set(state.table.len() as u64);
        self.stats.view_bytes.set(state.table.bytes() as u64);
        self.stats.epoch_keys.set(u64::from(state.writer.records()));
        let pending = state.writer.records() > 0 || self.stats.sealed_keys.get() > 0;
        if !pending {
            self.pending_since.set(0);
        } else if self.pending_since.get() == 0 {
            self.pending_since.set(unix_ms());
        }
        self.stats.pending_since_ms.set(self.pending_since.get());
    }

    fn hear(&self, message: ToCounters) {
        let mut state = self.state.borrow_mut();
        let State {
            table,
            writer,
            seal_asked,
        } = &mut *state;
        match message {
            ToCounters::Seal { mut next, closed } => {
                // An epoch that was never acknowledged to anyone is not worth a segment.
                let answer = if writer.records() == 0 {
                    Closed::Empty(next)
                } else {
                    self.durable.also(writer.sync_handle());
                    next.begin(writer.next_first_batch());
                    *seal_asked = false;
                    fail_point("epoch.closed");
                    Closed::Epoch(std::mem::replace(writer, next))
                };
                // If the flush stage is gone, the segment is dropped whole and recovered later.
                let _ = closed.send(answer);
            }
            ToCounters::Settle {
                segment,
                batch,
                settled,
                clock,
            } => {
                self.settles.set(self.settles.get() + 1);
                let epoch = writer.epoch();
                for (delta, settled) in segment.batch(batch).zip(settled.iter()) {
                    match settled {
                        Settled::Stored(value) => {
                            let stored = value.map(|value| (value, clock));
                            table.settle(delta.key, delta.amount, stored, epoch);
                        }
                        Settled::Rejected(error) => {
                            table.settle(delta.key, delta.amount, None, epoch);
                            if let Some(bad) = bad_value(error) {
                                table.observe_bad(delta.key, bad);
                            }
                        }
                        Settled::Before => {}
                    }
                }
            }
            ToCounters::Restore {
                segment,
                batch,
                skip,
            } => {
                for (index, delta) in segment.batch(batch).enumerate() {
                    if !skip.contains(&index) {
                        table.restore(delta.key, delta.amount);
                    }
                }
            }
            ToCounters::ForgetClocks => table.forget_clocks(),
            ToCounters::Loaded { keys, reading } => {
                if let Ok(reading) = &reading {
                    observe(table, &keys, reading);
                }
                self.loads.arrived(&keys, reading.is_ok());
            }
            ToCounters::Budget { bytes_max } => writer.set_bytes_max(bytes_max),
            ToCounters::Flushed(done) => {
                // Whoever asked may have gone.
                let _ = done.send(());
            }
            ToCounters::Message(text) => {
                self.hub
                    .borrow_mut()
                    .publish(self.config.channel.as_bytes(), &text, &self.stats);
            }
        }
        self.stats.view_evictions_total.set(table.evicted());
    }
}

fn observe(table: &mut Table, keys: &[Bytes], reading: &Reading) {
    for (key, value) in keys.iter().zip(&reading.values) {
        match value {
            Ok(value) => {
                table.observe(key, *value, reading.clock, Reach::Read);
            }
            Err(error) => {
                if let Some(bad) = bad_value(error) {
                    table.observe_bad(key, bad);
                }
            }
        }
    }
}

fn bad_value(error: &KeyError) -> Option<BadValue> {
    match error {
        KeyError::WrongType => Some(BadValue::WrongType),
        KeyError::NotInteger => Some(BadValue::NotInteger),
        _ => None,
    }
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}
