//! What has been acknowledged and is not yet known to be in the store, on disk.
//!
//! The journal is not a log of increments: a segment holds one record for each key of its epoch,
//! updated in place through a memory map. It costs no system call an increment and grows with
//! distinct keys, not with traffic. A sealed segment *is* the list of batches to send.
//!
//! - [`mod@format`]: the bytes
//! - [`segment`]: the open segment and the sealed ones
//! - [`examine`]: a file as it lies on the disk, sound or not
//! - [`plan`]: what recovery does with each file
//! - [`power`]: whether the youngest writes may be missing
//! - [`directory`]: the state directory: lock, node id, recovery
//! - [`reserve`]: room for a start on a full disk
//! - [`place`]: whether the directory is still there
//! - [`rejected`]: deltas that the store refused for good

pub mod directory;
pub mod examine;
pub mod format;
pub mod place;
pub mod plan;
pub mod power;
pub mod rejected;
mod reserve;
pub mod segment;
mod store16;

pub use directory::{Directory, JournalError, Names, Recovery};
pub use place::Place;
pub use segment::{Kept, Sealed, Stuck, SyncHandle, Writer};

#[cfg(test)]
mod tests;
