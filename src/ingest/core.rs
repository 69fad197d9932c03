//! The owner of the counters: the table, the open segment, and what the stages tell them.
//!
//! Invariants:
//! 1. Table and open segment change together, within one borrow and without an await.
//! 2. No message from a stage makes a client wait; no client makes a stage wait.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use super::durable::Durable;
use super::hub::{Hub, KEY_CHANNEL};
use super::loads::Loads;
use super::notices::Notices;
use super::{Access, IngestConfig};
use crate::counters::{
    Announced, BadValue, GROUP, Observed, Op, Reach, Recorder, Sent, StaleSweep, Table,
};
use crate::fail_point::fail_point;
use crate::flush::{Closed, Command, Heard, Settled, ToCounters};
use crate::hot::Hot;
use crate::journal::{Sealed, Writer};
use crate::stats::Stats;
use crate::store::{Delta, KeyError, Reading};
use crate::time::unix_ms;

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
    /// Values that may or may not contain a batch of this node whose answer is still under way.
    unsettled: HashMap<Bytes, Unsettled>,
    /// The search for values to be read anew, while it goes on.
    sweep: Option<StaleSweep>,
    /// Keys of that search that are being read.
    sweeping: usize,
    /// Whether keys of that search could not be read: it begins anew at the next tick.
    sweep_again: bool,
}

struct Unsettled {
    value: Option<i64>,
    clock: u64,
    reach: Reach,
    /// Whether a whole tick has passed since.
    aged: bool,
}

/// Values that may wait for a batch to settle; beyond it the view is read anew.
const UNSETTLED_MAX: usize = 100_000;
/// Keys of one step of the search for stale values.
const SWEEP_KEYS: usize = 1000;

/// What all connections share.
pub struct Core {
    /// See [`IngestConfig`].
    pub config: IngestConfig,
    /// Who may connect, and which keys they may use; borrowed only between awaits.
    pub access: RefCell<Access>,
    /// What the log is told.
    pub notices: Notices,
    /// The counters; borrowed only between awaits.
    pub state: RefCell<State>,
    /// What a read brings, before it is decoded.
    pub input: RefCell<Vec<u8>>,
    /// Replies of one burst, before they are written.
    pub replies: RefCell<Vec<u8>>,
    /// What all clients hold in unread answers and unfinished commands, in bytes.
    pub client_bytes: Cell<usize>,
    /// Numbers.
    pub stats: Arc<Stats>,
    /// What was heard, for those who read the store.
    pub heard: Arc<Heard>,
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
    /// Which keys change.
    pub hot: Arc<Hot>,
    seal_wanted: Arc<Notify>,
    /// When the open epoch was first seen to have a delta; 0: it has none.
    epoch_since: Cell<u64>,
}

/// What [`Core`] is built from.
pub struct Parts {
    /// See [`IngestConfig`].
    pub config: IngestConfig,
    /// Who may connect, and which keys they may use.
    pub access: Access,
    /// The counters, with what was recovered.
    pub table: Table,
    /// The open segment.
    pub writer: Writer,
    /// Numbers.
    pub stats: Arc<Stats>,
    /// What was heard, for those who read the store.
    pub heard: Arc<Heard>,
    /// To the loader.
    pub wanted: mpsc::Sender<Vec<Bytes>>,
    /// To the flush stage.
    pub flush: mpsc::Sender<Command>,
    /// Rung when the open epoch has many keys.
    pub seal_wanted: Arc<Notify>,
    /// Which keys change.
    pub hot: Arc<Hot>,
}

impl Core {
    /// Builds it; nothing runs yet.
    pub fn new(mut parts: Parts) -> Rc<Self> {
        let load_timeout = parts.config.load_timeout;
        if parts.config.load {
            // Ages are counted in seconds.
            let ticks = parts.config.view_age_max.as_secs().max(1);
            parts
                .table
                .set_age_max(u16::try_from(ticks).unwrap_or(u16::MAX));
        }
        Rc::new(Core {
            config: parts.config,
            access: RefCell::new(parts.access),
            notices: Notices::default(),
            state: RefCell::new(State {
                table: parts.table,
                writer: parts.writer,
                seal_asked: false,
                unsettled: HashMap::new(),
                sweep: None,
                sweeping: 0,
                sweep_again: false,
            }),
            input: RefCell::new(vec![0; READ_BYTES]),
            replies: RefCell::new(Vec::with_capacity(READ_BYTES)),
            client_bytes: Cell::new(0),
            stats: parts.stats,
            heard: parts.heard,
            loads: Loads::new(parts.wanted, load_timeout),
            durable: Durable::default(),
            hub: RefCell::new(Hub::default()),
            flush: parts.flush,
            clients: super::listener::Clients::default(),
            started: Instant::now(),
            seal_wanted: parts.seal_wanted,
            hot: parts.hot,
            epoch_since: Cell::new(0),
        })
    }

    /// Applies a group of operations on keys in `input`.
    pub fn apply(&self, input: &[u8], ops: &mut [Op]) {
        let mut state = self.state.borrow_mut();
        let State {
            table,
            writer,
            seal_asked,
            ..
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
        self.stats.epoch_bytes.set(state.writer.bytes() as u64);
        if state.writer.records() == 0 {
            self.epoch_since.set(0);
        } else if self.epoch_since.get() == 0 {
            self.epoch_since.set(unix_ms());
        }
        self.stats
            .pending_since_ms
            .set(match self.stats.sealed_since_ms.get() {
                0 => self.epoch_since.get(),
                sealed => sealed,
            });
    }

    /// What has to be done now and then: ages, values that waited too long, a search that stalled.
    pub fn tick(&self) {
        self.refresh_gauges();
        self.notices.tick();
        let mut state = self.state.borrow_mut();
        state.table.set_now(self.started.elapsed().as_secs() as u16);
        self.retry_unsettled(&mut state, true);
        self.loads.tidy();
        // A step whose keys were asked for by others ends without a reading of its own.
        state.sweeping = 0;
        if std::mem::take(&mut state.sweep_again) {
            state.sweep = Some(StaleSweep::default());
        }
        self.continue_sweep(&mut state);
    }

    fn hear(&self, message: ToCounters) {
        let mut borrowed = self.state.borrow_mut();
        let state = &mut *borrowed;
        match message {
            ToCounters::Seal { mut next, closed } => {
                // An epoch that was never acknowledged to anyone is not worth a segment.
                let answer = if state.writer.records() == 0 {
                    Closed::Empty(next)
                } else {
                    self.durable.also(state.writer.sync_handle());
                    next.begin(state.writer.next_first_batch());
                    state.seal_asked = false;
                    self.epoch_since.set(0);
                    fail_point("epoch.closed");
                    Closed::Epoch(std::mem::replace(&mut state.writer, next))
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
                self.settle(state, &segment, batch, &settled, clock);
                self.retry_unsettled(state, false);
            }
            ToCounters::Restore {
                segment,
                batch,
                skip,
            } => {
                for (index, delta) in segment.batch(batch).enumerate() {
                    if !skip.contains(&index) {
                        state.table.restore(delta.key, delta.amount);
                    }
                }
            }
            ToCounters::ForgetClocks => self.forget_clocks(state, 0),
            ToCounters::Loaded {
                keys,
                reading,
                asked,
                sent,
            } => {
                let mut waiting = HashSet::new();
                match &reading {
                    Ok(reading) => {
                        if reading.clock < asked.clock {
                            tracing::warn!("the store went back in time: all values are read anew");
                            self.forget_clocks(state, reading.clock);
                        }
                        self.heard.clock(reading.clock);
                        let reach = if asked.losses == self.heard.now().losses {
                            Reach::Read
                        } else {
                            Reach::ReadBefore
                        };
                        waiting = self.read(state, &keys, reading, reach, sent);
                        state.sweeping = state.sweeping.saturating_sub(keys.len());
                    }
                    // The search has gone past them.
                    Err(_) => state.sweep_again = true,
                }
                let done = keys.iter().filter(|key| !waiting.contains(*key));
                self.loads.arrived(done, reading.is_ok());
                self.continue_sweep(state);
            }
            ToCounters::Announced(announced) => self.announced(state, &announced),
            ToCounters::Stale => self.mark_stale(state),
            ToCounters::Budget { bytes_max } => state.writer.set_bytes_max(bytes_max),
            ToCounters::Flushed(done) => {
                // Whoever asked may have gone.
                let _ = done.send(());
            }
            // It tells of every key, so it is for those who may use every key.
            ToCounters::Message(_) if !self.access.borrow().keys.is_all() => {}
            ToCounters::Message(text) => {
                self.hub
                    .borrow_mut()
                    .publish(self.config.channel.as_bytes(), &text, self);
            }
        }
        self.stats
            .view_evictions_total
            .set(borrowed.table.evicted());
    }

    fn settle(
        &self,
        state: &mut State,
        segment: &Sealed,
        batch: u64,
        settled: &[Settled],
        clock: u64,
    ) {
        self.heard.clock(clock);
        let epoch = state.writer.epoch();
        let watched = self.hub.borrow().watches_keys();
        let table = &mut state.table;
        let deltas: Vec<Delta<'_>> = segment.batch(batch).collect();
        for (index, (delta, settled)) in deltas.iter().zip(settled).enumerate() {
            if index.is_multiple_of(GROUP) {
                table.prefetch(deltas[index..].iter().map(|delta| delta.key));
            }
            match settled {
                Settled::Stored(value) => {
                    let stored = value.map(|value| (value, clock));
                    let moved = table.settle(delta.key, delta.amount, stored, epoch);
                    self.known(table, delta.key);
                    if let Some(value) = value
                        && watched
                        && moved
                    {
                        self.tell_watchers(delta.key, *value);
                    }
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

    fn announced(&self, state: &mut State, announced: &Announced) {
        self.heard.clock(announced.clock);
        let State {
            table,
            writer,
            unsettled,
            ..
        } = state;
        let watched = self.hub.borrow().watches_keys();
        let awaited = self.loads.any_cold();
        let mut full = false;
        let mut taken = Vec::new();
        table.observe_announced(announced, writer, |key, value, observed| {
            match observed {
                Observed::Unsettled if unsettled.len() < UNSETTLED_MAX => {
                    let seen = Unsettled {
                        value: Some(value),
                        clock: announced.clock,
                        reach: Reach::Announced,
                        aged: false,
                    };
                    keep_newest(unsettled, key, seen);
                }
                Observed::Unsettled => full = true,
                Observed::Taken { .. } if awaited => taken.push(key.to_vec()),
                _ => {}
            }
            if watched && matches!(observed, Observed::Taken { moved: true } | Observed::Absent) {
                self.tell_watchers(key, value);
            }
        });
        for key in taken {
            self.known(table, &key);
        }
        if full {
            self.mark_stale(state);
        }
    }

    /// Takes a reading. Returns the keys whose values must wait for a batch.
    fn read(
        &self,
        state: &mut State,
        keys: &[Bytes],
        reading: &Reading,
        reach: Reach,
        sent: Sent,
    ) -> HashSet<Bytes> {
        let mut waiting = HashSet::new();
        let watched = self.hub.borrow().watches_keys();
        let State {
            table,
            writer,
            unsettled,
            ..
        } = state;
        for (key, value) in keys.iter().zip(&reading.values) {
            match value {
                Ok(value) => {
                    let (value, clock) = (*value, reading.clock);
                    match table.observe(key, value, clock, reach, Some((&*writer, sent))) {
                        Observed::Unsettled if unsettled.len() < UNSETTLED_MAX => {
                            let seen = Unsettled {
                                value,
                                clock,
                                reach,
                                aged: false,
                            };
                            keep_newest(unsettled, key, seen);
                            waiting.insert(key.clone());
                        }
                        Observed::Taken { moved: true } if watched => {
                            self.tell_watchers(key, value.unwrap_or(0));
                        }
                        _ => {}
                    }
                    self.known(table, key);
                }
                Err(error) => {
                    if let Some(bad) = bad_value(error) {
                        table.observe_bad(key, bad);
                    }
                }
            }
        }
        waiting
    }

    /// Values that had to wait for a batch. At a tick those that have waited for a whole one are
    /// taken as they are, so that a store that is slow to answer this node does not hide what others
    /// do.
    fn retry_unsettled(&self, state: &mut State, tick: bool) {
        let State {
            table,
            writer,
            unsettled,
            ..
        } = state;
        if unsettled.is_empty() {
            return;
        }
        unsettled.retain(|key, seen| {
            let deltas = (!(tick && seen.aged)).then_some((&*writer, Sent::ANY));
            seen.aged |= tick;
            let observed = table.observe(key, seen.value, seen.clock, seen.reach, deltas);
            if observed == (Observed::Taken { moved: true }) {
                self.tell_watchers(key, seen.value.unwrap_or(0));
            }
            if observed != Observed::Unsettled {
                self.known(table, key);
                self.loads.arrived([key], true);
            }
            observed == Observed::Unsettled
        });
    }

    fn mark_stale(&self, state: &mut State) {
        state.table.mark_stale();
        self.heard.loss();
        for seen in state.unsettled.values_mut() {
            if seen.reach == Reach::Read {
                seen.reach = Reach::ReadBefore;
            }
        }
        state.sweep = Some(StaleSweep::default());
        self.continue_sweep(state);
    }

    /// One bounded step of reading stale values anew; the next follows when it is answered.
    fn continue_sweep(&self, state: &mut State) {
        if state.sweeping > 0 {
            return;
        }
        let Some(sweep) = &mut state.sweep else {
            return;
        };
        let mut keys = Vec::new();
        let mut more = true;
        while keys.is_empty() && more {
            more = state.table.next_stale(sweep, SWEEP_KEYS, &mut keys);
        }
        if !more {
            state.sweep = None;
        }
        if !keys.is_empty() {
            state.sweeping = keys.len();
            self.stats.rereads_total.add(keys.len() as u64);
            let keys: Vec<Bytes> = keys.into_iter().map(Bytes::from).collect();
            if !self.loads.ask(&keys) {
                state.sweep_again = true;
            }
        }
    }

    /// Whoever waits for this key's value can be answered, if it is known now.
    fn known(&self, table: &Table, key: &[u8]) {
        self.loads.known(key, || {
            let view = table.view(key).filter(|view| view.known)?;
            Some(view.value.saturating_add(view.pending))
        });
    }

    fn forget_clocks(&self, state: &mut State, clock: u64) {
        state.table.forget_clocks();
        state.unsettled.clear();
        self.heard.restart(clock);
    }

    /// Tells those who watch one counter, if there are any.
    fn tell_watchers(&self, key: &[u8], value: i64) {
        if !self.access.borrow().keys.allow(key) {
            return; // Other nodes' clients may use others.
        }
        let channel = [KEY_CHANNEL, key].concat();
        let mut hub = self.hub.borrow_mut();
        hub.publish(&channel, value.to_string().as_bytes(), self);
    }
}

fn keep_newest(unsettled: &mut HashMap<Bytes, Unsettled>, key: &[u8], new: Unsettled) {
    match unsettled.get_mut(key) {
        Some(known) if known.clock > new.clock => {}
        // At an equal clock only a reading is news, as in the table.
        Some(known) if known.clock == new.clock && new.reach == Reach::Announced => {}
        Some(known) => *known = new,
        None => {
            unsettled.insert(Bytes::copy_from_slice(key), new);
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
