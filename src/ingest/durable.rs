//! Clients that wait for the disk (`journal.sync = "always"`): one `fdatasync` for all who wait.
//!
//! While one sync is under way others gather behind the next one. After a failed sync the system
//! may have dropped what it could not write, so the failure latches: nothing more is acknowledged
//! as durable by this process.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tokio::sync::Notify;

use crate::journal::SyncHandle;
use crate::stats::Stats;

/// See the module's documentation.
#[derive(Default)]
pub struct Durable {
    wanted: Cell<u64>,
    reached: Cell<u64>,
    /// Segments that left the table since the last sync.
    closed: RefCell<Vec<SyncHandle>>,
    failure: RefCell<Option<Rc<str>>>,
    work: Notify,
    done: Notify,
}

impl Durable {
    /// A segment that may hold what someone waits for is no longer the open one.
    pub fn also(&self, segment: SyncHandle) {
        if self.wanted.get() > self.reached.get() {
            self.closed.borrow_mut().push(segment);
        }
    }

    /// Notes that what was written until now must reach the disk; pass the result to `wait`.
    pub fn ask(&self) -> u64 {
        let ticket = self.wanted.get() + 1;
        self.wanted.set(ticket);
        self.work.notify_one();
        ticket
    }

    /// Waits until what was written before `ask` is on the disk.
    ///
    /// # Errors
    /// The text of the first failed sync, for ever.
    pub async fn wait(&self, ticket: u64) -> Result<(), Rc<str>> {
        loop {
            let done = self.done.notified();
            tokio::pin!(done);
            done.as_mut().enable();
            if let Some(failure) = &*self.failure.borrow() {
                return Err(Rc::clone(failure));
            }
            if self.reached.get() >= ticket {
                return Ok(());
            }
            done.await;
        }
    }

    /// Why nothing is durable any more, if so.
    pub fn failure(&self) -> Option<Rc<str>> {
        self.failure.borrow().clone()
    }

    /// Syncs whenever someone waits; `open` gives the open segment.
    pub async fn run(&self, stats: &Stats, open: impl Fn() -> SyncHandle) {
        loop {
            self.work.notified().await;
            let ticket = self.wanted.get();
            if ticket <= self.reached.get() {
                continue;
            }
            let mut segments = std::mem::take(&mut *self.closed.borrow_mut());
            segments.push(open());
            let synced =
                tokio::task::spawn_blocking(move || segments.iter().try_for_each(SyncHandle::sync))
                    .await;
            match synced {
                Ok(Ok(())) => {
                    stats.syncs_total.add(1);
                    self.reached.set(ticket);
                }
                Ok(Err(error)) => {
                    tracing::error!(%error, "the journal cannot be synced: no increment is taken any more");
                    *self.failure.borrow_mut() = Some(error.to_string().into());
                }
                Err(_) => return,
            }
            self.done.notify_waiters();
        }
    }
}
