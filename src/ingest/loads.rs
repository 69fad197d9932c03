//! Clients that wait for a value of the store.
//!
//! Each key is asked for once, whoever waits for it. When the store does not answer, nobody waits
//! for it again for [`AWAY`]: an increment is taken and answered from what is known.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

/// So long after a failed read no answer waits.
const AWAY: Duration = Duration::from_secs(1);
/// Keys asked for at a time, in all.
const ASKED_MAX: usize = 100_000;

/// See the module's documentation.
pub struct Loads {
    wanted: mpsc::Sender<Vec<Bytes>>,
    timeout: Duration,
    asked: RefCell<HashSet<Bytes>>,
    some_arrived: Notify,
    away_until: Cell<Option<Instant>>,
}

impl Loads {
    /// Asks through `wanted`; waits for `timeout` at most.
    pub fn new(wanted: mpsc::Sender<Vec<Bytes>>, timeout: Duration) -> Self {
        Loads {
            wanted,
            timeout,
            asked: RefCell::default(),
            some_arrived: Notify::new(),
            away_until: Cell::new(None),
        }
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
                self.away_until.set(Some(Instant::now() + AWAY));
                return;
            }
        }
    }

    /// The keys were answered.
    pub fn arrived(&self, keys: &[Bytes], well: bool) {
        let mut asked = self.asked.borrow_mut();
        for key in keys {
            asked.remove(key);
        }
        drop(asked);
        self.away_until.set((!well).then(|| Instant::now() + AWAY));
        self.some_arrived.notify_waiters();
    }
}
