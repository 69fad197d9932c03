//! The owner of the counters: the table, the open segment, and what the stages tell them.
//!
//! Invariants:
//! 1. Table and open segment change together, within one borrow and without an await.
//! 2. Messages of the stages are heard in their order, one after the other, by [`Core::listen`] alone.
//! 3. No message from a stage makes a client wait; no client makes a stage wait.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use super::account::Accounts;
use super::books::Books;
use super::durable::Durable;
use super::gate::Gate;
use super::hub::Hub;
use super::loads::Loads;
use super::notices::Notices;
use super::slice::Slice;
use super::view::Doubts;
use super::{Access, IngestConfig};
use crate::counters::{Answer, Kind, Op, Table};
use crate::fail_point::fail_point;
use crate::flush::{Closed, Command, Heard, Sums, ToCounters};
use crate::hot::Hot;
use crate::journal::Writer;
use crate::stats::Stats;
use crate::time::unix_ms;

/// Bytes read from a socket at a time; fits the second-level cache with the replies.
const READ_BYTES: usize = 64 * 1024;

/// What a step of [`Table::trim`] costs, in units of a [`Slice`].
const TRIM_UNITS: usize = 1000;

/// Table and open segment.
pub struct State {
    /// The counters.
    pub table: Table,
    /// The open segment.
    pub writer: Writer,
    /// Whether the flush stage was asked to seal this epoch early.
    seal_asked: bool,
    /// What is not sure of the view.
    pub(super) doubts: Doubts,
}

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
    /// What clients hold in memory.
    pub accounts: Rc<Accounts>,
    /// Closed amid a large transaction.
    pub gate: Gate,
    /// What became of all that was taken.
    pub books: Books,
    /// Why no increment is taken any more, if so: the state directory is gone.
    pub gone: OnceCell<Box<str>>,
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
    /// How long ago that was at the last tick, in seconds.
    seconds: Cell<u64>,
    /// Which keys change.
    pub hot: Arc<Hot>,
    /// The work of this thread that is not a client's.
    pub slice: Slice,
    /// Rung when the search for stale values is to go on.
    pub(super) sweep_wanted: Notify,
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
        let accounts = Accounts::new(parts.config.client_bytes_max);
        let client_bytes_max = parts.config.client_bytes_max as u64;
        parts.stats.client_bytes_max.set(client_bytes_max);
        let books = Books::new(parts.table.pending_sum());
        Rc::new(Core {
            config: parts.config,
            access: RefCell::new(parts.access),
            notices: Notices::default(),
            state: RefCell::new(State {
                table: parts.table,
                writer: parts.writer,
                seal_asked: false,
                doubts: Doubts::default(),
            }),
            input: RefCell::new(vec![0; READ_BYTES]),
            replies: RefCell::new(Vec::with_capacity(READ_BYTES)),
            accounts,
            books,
            gate: Gate::default(),
            gone: OnceCell::new(),
            stats: parts.stats,
            heard: parts.heard,
            loads: Loads::new(parts.wanted, load_timeout),
            durable: Durable::default(),
            hub: RefCell::new(Hub::default()),
            flush: parts.flush,
            clients: super::listener::Clients::default(),
            started: Instant::now(),
            seconds: Cell::new(0),
            slice: Slice::default(),
            sweep_wanted: Notify::new(),
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
        let taken = ops.iter().filter(|op| {
            op.kind == Kind::Add && matches!(op.answer, Answer::Value(_) | Answer::Cold(_))
        });
        self.books
            .take(taken.fold(0, |sum: i64, op| sum.wrapping_add(op.amount)));
        if writer.records() as usize >= self.config.epoch_keys_max && !*seal_asked {
            *seal_asked = true;
            self.seal_wanted.notify_one();
        }
    }

    /// Since when this process serves, in seconds, as of the last tick.
    pub fn seconds(&self) -> u64 {
        self.seconds.get()
    }

    /// Evicts the clients that hold most, until the rest may stay.
    #[cold]
    pub fn make_room(&self) {
        while self.accounts.excess(self.clients.leaving_bytes()) > 0 {
            let Some(client) = self.clients.largest() else {
                return;
            };
            self.stats.clients_evicted_total.add(1);
            self.notices.client_evicted(
                client.id,
                client.account.held(),
                self.config.client_bytes_max,
            );
            client.kill();
            // Nothing more is put into its inbox.
            self.hub.borrow_mut().remove(client.id);
        }
    }

    /// Hears the stages until they are gone.
    pub async fn listen(self: Rc<Self>, mut messages: mpsc::Receiver<ToCounters>) {
        loop {
            tokio::select! {
                biased;
                message = messages.recv() => match message {
                    None => return,
                    Some(message) => self.hear(message).await,
                },
                () = self.sweep_wanted.notified() => self.sweep_on().await,
            }
            // Clients come in between.
            self.slice.pause(&self.stats).await;
        }
    }

    /// Sets the gauges that are too dear to keep current at each command.
    pub fn refresh_gauges(&self) {
        self.stats.client_bytes.set(self.accounts.held() as u64);
        let state = self.state.borrow();
        self.books.tell(state.table.pending_sum(), &self.stats);
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
    pub async fn tick(&self) {
        self.refresh_gauges();
        self.notices.tick();
        let now = self.started.elapsed().as_secs();
        self.seconds.set(now);
        self.state.borrow_mut().table.set_now(now as u16);
        self.loads.tidy();
        self.tick_view().await;
        self.trim().await;
    }

    /// Forgets what was held beyond the view's limit while it was pending.
    async fn trim(&self) {
        while self.state.borrow_mut().table.trim() {
            self.slice.spend(TRIM_UNITS);
            self.slice.pause_if_due(&self.stats).await;
        }
    }

    async fn hear(&self, message: ToCounters) {
        match message {
            ToCounters::Seal { next, closed } => {
                self.gate.open().await;
                // If the flush stage is gone, the segment is dropped whole and recovered later.
                let _ = closed.send(self.close_epoch(next));
            }
            ToCounters::Settle {
                segment,
                batch,
                settled,
                clock,
                sums,
            } => {
                self.books.begin();
                self.settle(&segment, batch, &settled, clock).await;
                self.books.end(sums);
            }
            ToCounters::Restore {
                segment,
                batch,
                skip,
                lost,
            } => {
                self.books.begin();
                self.restore(&segment, batch, &skip).await;
                self.books.end(Sums {
                    stored: lost.wrapping_neg(),
                    rejected: 0,
                });
            }
            ToCounters::ForgetClocks => self.forget_clocks(&mut self.state.borrow_mut(), 0),
            ToCounters::Loaded {
                keys,
                reading,
                asked,
                sent,
            } => self.loaded(&keys, &reading, asked, sent).await,
            ToCounters::Announced { node, values } => self.announced(node, &values).await,
            ToCounters::Stale => self.mark_stale(&mut self.state.borrow_mut()),
            ToCounters::Budget { bytes_max } => {
                self.state.borrow_mut().writer.set_bytes_max(bytes_max);
            }
            ToCounters::Gone(text) => {
                // It is told once.
                let _ = self.gone.set(text.into());
            }
            ToCounters::Flushed(done) => {
                // Whoever asked may have gone.
                let _ = done.send(());
            }
            // It tells of every key, so it is for those who may use every key.
            ToCounters::Message(_) if !self.access.borrow().keys.is_all() => {}
            ToCounters::Message(text) => {
                self.publish(self.config.channel.as_bytes(), &text).await;
            }
        }
        let evicted = self.state.borrow().table.evicted();
        self.stats.view_evictions_total.set(evicted);
    }

    fn close_epoch(&self, mut next: Writer) -> Closed {
        let state = &mut *self.state.borrow_mut();
        // An epoch that was never acknowledged to anyone is not worth a segment.
        if state.writer.records() == 0 {
            if !state.writer.is_cramped() || next.is_cramped() {
                return Closed::Empty(next);
            }
            // But the one that has room is to be had by records. Before the other is given up, because
            // one of them must carry the batch number on.
            next.begin(state.writer.next_first_batch());
            return Closed::Empty(std::mem::replace(&mut state.writer, next));
        }
        self.durable.also(state.writer.sync_handle());
        next.begin(state.writer.next_first_batch());
        state.seal_asked = false;
        self.epoch_since.set(0);
        fail_point("epoch.closed");
        Closed::Epoch(std::mem::replace(&mut state.writer, next))
    }
}
