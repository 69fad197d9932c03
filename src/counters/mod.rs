//! The counters in memory: the last known value and the pending delta of every key, in one entry.
//!
//! Pure: no I/O, no clock, no task. What an increment changes outside the table (its journal
//! record) goes through [`Recorder`], which the journal implements.
//!
//! Invariants:
//! 1. `view = value + pending` fits 64 bits after every add that is taken. (A value seen later may
//!    lead beyond; reads are then answered with the end of the range.)
//! 2. `pending` is the sum of the amounts taken and not yet settled; a delta that the recorder
//!    refused was not taken.
//! 3. An entry with something pending is never evicted.

mod entry;
mod huge;
mod op;
mod prefetch;
mod sent;
mod table;

pub use op::{Answer, BadValue, Kind, Op};
pub use prefetch::prefetch;
pub use sent::Sent;
pub use table::{Announced, GROUP, Observed, Reach, StaleSweep, Table, TableLimits, View};

/// Where the deltas of the open epoch are written down, one record a key.
pub trait Recorder {
    /// Tells one epoch's records from another's; never 0.
    fn epoch(&self) -> u32;

    /// Writes the key's first delta of this epoch and returns the record's place.
    ///
    /// # Errors
    /// The record was not written.
    fn append(&mut self, key: &[u8], amount: i64) -> Result<u32, RecordError>;

    /// Adds to the record that `append` returned in this epoch.
    ///
    /// # Errors
    /// The record is unchanged.
    fn add(&mut self, record: u32, amount: i64) -> Result<(), RecordError>;

    /// The sum that stands in the record that `append` returned in this epoch.
    fn delta(&self, record: u32) -> i64;

    /// Asks the processor for the record's memory before it is needed.
    fn prefetch(&self, record: u32);
}

/// Why a delta could not be written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The deltas of one epoch left 64 bits.
    #[error("ERR increment or decrement would overflow")]
    Overflow,
    /// `limits.max_pending_bytes` is reached.
    #[error(
        "OOM limits.max_pending_bytes is reached: no further record fits until the store has taken some of what is pending"
    )]
    Limit,
    /// The file system refused to grow the segment.
    #[error("ERR the journal cannot grow, the disk may be full: no further record fits")]
    Disk,
    /// The journal's directory is gone.
    #[error("ERR the state directory is gone: restore it and restart the daemon")]
    Gone,
    /// A sync has failed where replies promise one.
    #[error(
        "ERR the journal could not be synced, so nothing is taken any more: mend the disk and restart the daemon"
    )]
    Unsynced,
}
