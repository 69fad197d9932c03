//! Books that balance: what was taken is in the store, pending, or rejected, to the last unit.
//!
//! Each sum has a source of its own: what was taken is added where clients are answered, what is pending is
//! the sum of the table's entries, what is in the store and what was rejected is told by the flush stage,
//! from what it sent. So a delta that is lost between any two of them shows as a difference.
//!
//! Sums wrap at 64 bits, as does their comparison.

use std::cell::Cell;

use crate::flush::Sums;
use crate::stats::Stats;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Books {
    taken: Cell<i64>,
    stored: Cell<i64>,
    rejected: Cell<i64>,
    /// Batches that the table is amid settling: the sums differ meanwhile.
    open: Cell<u32>,
}

impl Books {
    /// With what a former process has left pending.
    pub fn new(pending: i64) -> Self {
        Books {
            taken: Cell::new(pending),
            ..Books::default()
        }
    }

    /// An increment was taken.
    #[inline]
    pub fn take(&self, amount: i64) {
        self.taken.set(self.taken.get().wrapping_add(amount));
    }

    /// A batch begins to settle.
    pub fn begin(&self) {
        self.open.set(self.open.get() + 1);
    }

    /// It has settled.
    pub fn end(&self, sums: Sums) {
        self.stored.set(self.stored.get().wrapping_add(sums.stored));
        let rejected = self.rejected.get().wrapping_add(sums.rejected);
        self.rejected.set(rejected);
        self.open.set(self.open.get() - 1);
    }

    /// Tells the sums, unless a batch is settling.
    pub fn tell(&self, pending: i64, stats: &Stats) {
        if self.open.get() > 0 {
            return;
        }
        let accounted = self.stored.get().wrapping_add(self.rejected.get());
        let difference = self
            .taken
            .get()
            .wrapping_sub(accounted.wrapping_add(pending));
        stats.amount_taken.set(self.taken.get() as u64);
        stats.amount_stored.set(self.stored.get() as u64);
        stats.amount_rejected.set(self.rejected.get() as u64);
        stats.amount_pending.set(pending as u64);
        stats.conservation_difference.set(difference.unsigned_abs());
    }
}
