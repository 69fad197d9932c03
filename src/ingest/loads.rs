//! Clients that wait for a value of the store.
//!
//! Each key is asked for once, whoever waits for it. When the store does not answer, nobody waits
//! for it again for [`AWAY`]: an increment is taken and answered from what is known.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

/// So long after a failed read no answer waits.
const AWAY: Duration = Duration::from_secs(1);
/// Keys asked for at a time, in all.
const ASKED_MAX: usize = 100_000;

/// What is needed to answer each operation on a key that was not known, in its turn, though the
/// value comes later and flushes may come in between.
///
/// The sum of all that was added to the key until an operation tells its place; once the value is
/// known, so is the base on which all these sums stand.
#[derive(Debug, Default)]
pub struct ColdKey {
    total: Cell<i64>,
    base: Cell<Option<i64>>,
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
}

/// See the module's documentation.
pub struct Loads {
    wanted: mpsc::Sender<Vec<Bytes>>,
    timeout: Duration,
    asked: RefCell<HashSet<Bytes>>,
    cold: RefCell<HashMap<Bytes, Rc<ColdKey>>>,
    some_arrived: Notify,
    /// When the store last answered.
    answered: Cell<Option<Instant>>,
    away_until: Cell<Option<Instant>>,
}

impl Loads {
    /// Asks through `wanted`; waits for `timeout` at most.
    pub fn new(wanted: mpsc::Sender<Vec<Bytes>>, timeout: Duration) -> Self {
        Loads {
            wanted,
            timeout,
            asked: RefCell::default(),
            cold: RefCell::default(),
            some_arrived: Notify::new(),
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
    pub fn known(&self, key: &[u8], view: impl FnOnce() -> Option<i64>) {
        let mut cold = self.cold.borrow_mut();
        if let Some(known) = cold.get(key)
            && let Some(view) = view()
        {
            known.base.set(Some(view.wrapping_sub(known.total.get())));
            // Whoever waits has it; from now on operations find the key known.
            cold.remove(key);
        }
    }

    /// Forgets the keys for which nobody waits any more.
    pub fn tidy(&self) {
        self.cold
            .borrow_mut()
            .retain(|_, key| Rc::strong_count(key) > 1);
    }

    /// Asks for the keys without waiting. `false`: there was no room for some.
    pub fn ask(&self, keys: &[Bytes]) -> bool {
        let mut asked = self.asked.borrow_mut();
        let mut full = false;
        let new: Vec<Bytes> = keys
            .iter()
            .filter(|key| {
                let room = asked.len() < ASKED_MAX;
                full |= !room && !asked.contains(*key);
                room && asked.insert((*key).clone())
            })
            .cloned()
            .collect();
        if !new.is_empty()
            && let Err(error) = self.wanted.try_send(new)
        {
            full = true;
            for key in error.into_inner() {
                asked.remove(&key);
            }
        }
        !full
    }

    /// Asks for the keys and waits until all were answered, well or not, or the time is up.
    pub async fn wait(&self, keys: &[Bytes]) {
        self.ask(keys);
        let now = Instant::now();
        if self.away_until.get().is_some_and(|until| now < until) {
            return;
        }
        let deadline = now + self.timeout;
        loop {
            let arrived = self.some_arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            if keys.iter().all(|key| !self.asked.borrow().contains(key)) {
                return;
            }
            if tokio::time::timeout_at(deadline, arrived).await.is_err() {
                // It may have answered, and the value waits for what this node is sending.
                if self.answered.get() < Some(now) {
                    self.away_until.set(Some(Instant::now() + AWAY));
                }
                return;
            }
        }
    }

    /// The keys were answered.
    pub fn arrived<'a>(&self, keys: impl IntoIterator<Item = &'a Bytes>, well: bool) {
        let mut asked = self.asked.borrow_mut();
        for key in keys {
            asked.remove(key);
        }
        drop(asked);
        let now = Instant::now();
        if well {
            self.answered.set(Some(now));
        }
        self.away_until.set((!well).then(|| now + AWAY));
        self.some_arrived.notify_waiters();
    }
}
