//! Clients that wait for a value of the store.
//!
//! Each key is asked for once, whoever waits for it; whose turn it is, [`queue`] knows. A small read does
//! not wait for large ones. When the store does not answer, nobody waits for it again for [`AWAY`]: an
//! increment is taken and answered from what is known.

mod queue;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use queue::Queue;
pub use queue::{KEY_BYTES, Waiter};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::counters::View;

/// So long after a failed read no answer waits.
const AWAY: Duration = Duration::from_secs(1);
/// A read of fewer keys is small: one at a time is under way, so that those of a moment gather.
const SMALL_KEYS: usize = 64;
/// Large reads under way at a time.
const LARGE_READS_MAX: usize = 3;
/// Reads under way at a time.
pub const READS_MAX: usize = LARGE_READS_MAX + 1;
/// Keys without a counter that are asked for again between two calls of [`Loads::tidy`].
const ASKED_AGAIN_MAX: usize = 10_000;
/// Who asks on behalf of no client.
pub const OWN: u64 = 0;

/// What is needed to answer each operation on a key that was not known, in its turn, though the
/// value comes later and flushes may come in between.
///
/// The sum of all that was added to the key until an operation tells its place; once the value is
/// known, so is the base on which all these sums stand.
#[derive(Debug, Default)]
pub struct ColdKey {
    total: Cell<i64>,
    base: Cell<Option<i64>>,
    /// Whether the store had the key before anything of this was added to it.
    existed: Cell<bool>,
}

impl ColdKey {
    /// Notes an addition; returns the sum so far.
    pub fn add(&self, amount: i64) -> i64 {
        self.total.set(self.total.get().wrapping_add(amount));
        self.total.get()
    }

    /// What an operation that returned `sum` is answered, if `view` is the view now.
    pub fn answer(&self, sum: i64, view: i64) -> i64 {
        let base = self
            .base
            .get()
            .unwrap_or_else(|| view.wrapping_sub(self.total.get()));
        base.wrapping_add(sum)
    }

    /// Whether a read that came before any addition finds the key; `None`: that is not known yet.
    pub fn existed(&self) -> Option<bool> {
        self.base.get().map(|_| self.existed.get())
    }
}

/// See the module's documentation.
pub struct Loads {
    wanted: mpsc::Sender<Vec<Bytes>>,
    timeout: Duration,
    queue: RefCell<Queue>,
    /// Of [`ask_again`](Self::ask_again), since the last [`tidy`](Self::tidy).
    asked_again: RefCell<HashSet<Bytes>>,
    /// Reads under way, small and large.
    small: Cell<usize>,
    large: Cell<usize>,
    cold: RefCell<HashMap<Bytes, Rc<ColdKey>>>,
    /// When the store last answered.
    answered: Cell<Option<Instant>>,
    away_until: Cell<Option<Instant>>,
}

impl Loads {
    /// Asks through `wanted`, which has room for [`READS_MAX`]; waits for `timeout` at most.
    pub fn new(wanted: mpsc::Sender<Vec<Bytes>>, timeout: Duration) -> Self {
        Loads {
            wanted,
            timeout,
            queue: RefCell::default(),
            asked_again: RefCell::default(),
            small: Cell::new(0),
            large: Cell::new(0),
            cold: RefCell::default(),
            answered: Cell::new(None),
            away_until: Cell::new(None),
        }
    }

    /// An operation met `key` while its value is not known.
    pub fn cold(&self, key: &[u8]) -> Rc<ColdKey> {
        let mut cold = self.cold.borrow_mut();
        if let Some(known) = cold.get(key) {
            return Rc::clone(known);
        }
        Rc::clone(cold.entry(Bytes::copy_from_slice(key)).or_default())
    }

    /// Whether any operation waits for a value.
    pub fn any_cold(&self) -> bool {
        !self.cold.borrow().is_empty()
    }

    /// The value of `key` has become known; `view` is the view with it.
    pub fn known(&self, key: &[u8], view: impl FnOnce() -> Option<View>) {
        let mut cold = self.cold.borrow_mut();
        if let Some(known) = cold.get(key)
            && let Some(view) = view()
        {
            let total = known.total.get();
            let base = view.value.saturating_add(view.pending).wrapping_sub(total);
            known.base.set(Some(base));
            // What began at zero and is flushed in part was brought about by these additions.
            let existed = view.stored && (base != 0 || view.pending == total);
            known.existed.set(existed);
            // Whoever waits has it; from now on operations find the key known.
            cold.remove(key);
        }
    }

    /// Now and then: forgets the keys for which nobody waits any more.
    pub fn tidy(&self) {
        self.asked_again.take();
        self.cold
            .borrow_mut()
            .retain(|_, key| Rc::strong_count(key) > 1);
    }

    /// Asks for the keys without waiting. `false`: there was no room for some.
    pub fn ask(&self, client: u64, keys: &[Bytes]) -> bool {
        let mut queue = self.queue.borrow_mut();
        let all = keys.iter().all(|key| queue.push(client, key, None));
        drop(queue);
        self.dispatch();
        all
    }

    /// Asks for keys that held no counter when they were last read, each once in a while: what they hold
    /// instead may be large.
    pub fn ask_again(&self, client: u64, mut keys: Vec<Bytes>) {
        let mut asked = self.asked_again.borrow_mut();
        keys.retain(|key| asked.len() < ASKED_AGAIN_MAX && asked.insert(key.clone()));
        drop(asked);
        self.ask(client, &keys);
    }

    /// Asks for the keys, each of which is there once, and waits until all were answered, well or not, or
    /// none of them was for the time that an answer may wait.
    pub async fn wait(&self, client: u64, keys: &[Bytes]) {
        let now = Instant::now();
        if self.away_until.get().is_some_and(|until| now < until) {
            self.ask(client, keys);
            return;
        }
        let waiter = Rc::new(Waiter::default());
        {
            let mut queue = self.queue.borrow_mut();
            for key in keys {
                queue.push(client, key, Some(&waiter));
            }
        }
        // Also where the client is gone amid its wait.
        let _waiting = Waiting {
            loads: self,
            client,
            waiter: &waiter,
        };
        self.dispatch();
        while !waiter.is_done() {
            if tokio::time::timeout(self.timeout, waiter.done())
                .await
                .is_err()
                && !waiter.has_moved()
            {
                // It may have answered others, and these values wait for what this node is sending.
                if self.answered.get() < Some(now) {
                    self.away_until.set(Some(Instant::now() + AWAY));
                }
                return;
            }
        }
    }

    /// `client` has gone.
    pub fn leave(&self, client: u64) {
        self.queue.borrow_mut().cancel(client, None);
    }

    /// The keys were answered.
    pub fn arrived<'a>(&self, keys: impl IntoIterator<Item = &'a Bytes>, well: bool) {
        let mut queue = self.queue.borrow_mut();
        keys.into_iter().for_each(|key| queue.arrived(key));
        let now = Instant::now();
        if well {
            self.answered.set(Some(now));
        }
        self.away_until.set((!well).then(|| now + AWAY));
    }

    /// A read of so many keys has ended.
    pub fn read_ended(&self, keys: usize) {
        let under_way = self.under_way(keys);
        under_way.set(under_way.get().saturating_sub(1));
        self.dispatch();
    }

    /// How many reads of this size are under way.
    fn under_way(&self, keys: usize) -> &Cell<usize> {
        if keys < SMALL_KEYS {
            &self.small
        } else {
            &self.large
        }
    }

    /// Begins the reads that may begin.
    fn dispatch(&self) {
        loop {
            let mut queue = self.queue.borrow_mut();
            let first = queue.first_keys(SMALL_KEYS);
            let keys = if first > 0 && first < SMALL_KEYS && self.small.get() == 0 {
                queue.take_first()
            } else if self.large.get() < LARGE_READS_MAX
                && self.small.get() + self.large.get() < READS_MAX
                && (first >= SMALL_KEYS || self.small.get() == 0 || queue.has_further(SMALL_KEYS))
            {
                queue.take()
            } else {
                return;
            };
            if keys.is_empty() {
                return;
            }
            let under_way = self.under_way(keys.len());
            under_way.set(under_way.get() + 1);
            if let Err(error) = self.wanted.try_send(keys) {
                // Nobody reads any more.
                let keys = error.into_inner();
                keys.iter().for_each(|key| queue.arrived(key));
                let under_way = self.under_way(keys.len());
                under_way.set(under_way.get() - 1);
            }
        }
    }
}

/// While a client waits.
struct Waiting<'a> {
    loads: &'a Loads,
    client: u64,
    waiter: &'a Rc<Waiter>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.waiter.is_done() {
            let mut queue = self.loads.queue.borrow_mut();
            queue.cancel(self.client, Some(self.waiter));
        }
    }
}
