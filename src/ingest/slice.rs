//! Long work in slices: what takes longer than a millisecond lets the clients in between.
//!
//! Work is counted, not timed, in units that are some 50 ns each on a machine of 2025: a key settled, a
//! subscriber served, 16 steps of a pattern.

use std::cell::Cell;

use crate::stats::Stats;

/// Units of one slice, at most, but for the piece of work that reaches it: half a millisecond.
pub const SLICE_UNITS: usize = 10_000;

/// Counts the units of the work at hand.
#[derive(Debug, Default)]
pub struct Slice(Cell<usize>);

impl Slice {
    /// So much was done.
    pub fn spend(&self, units: usize) {
        self.0.set(self.0.get() + units);
    }

    /// What is left of this slice.
    pub fn left(&self) -> usize {
        SLICE_UNITS.saturating_sub(self.0.get())
    }

    /// Lets the clients in, if the slice is used up.
    pub async fn pause_if_due(&self, stats: &Stats) {
        if self.left() == 0 {
            self.pause(stats).await;
        }
    }

    /// Lets the clients in.
    pub async fn pause(&self, stats: &Stats) {
        let units = self.0.replace(0) as u64;
        if units > stats.slice_units_max.get() {
            stats.slice_units_max.set(units);
        }
        tokio::task::yield_now().await;
    }
}
