//! Closed while a transaction is applied in several slices: nobody sees a part of it, and no epoch ends in
//! the middle of it.

use std::cell::Cell;

use tokio::sync::Notify;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Gate {
    closed: Cell<bool>,
    opened: Notify,
}

/// While it exists, the gate is closed.
pub struct Closed<'a>(&'a Gate);

impl Gate {
    /// Whether others must wait.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Waits until it is open.
    pub async fn open(&self) {
        while self.closed.get() {
            self.opened.notified().await;
        }
    }

    /// Waits until it is open, and closes it.
    pub async fn close(&self) -> Closed<'_> {
        self.open().await;
        self.closed.set(true);
        Closed(self)
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.closed.set(false);
        self.0.opened.notify_waiters();
    }
}
