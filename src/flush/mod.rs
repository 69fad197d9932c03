//! From sealed segments to the store, each batch exactly once.
//!
//! - [`link`]: what stages say to the counters
//! - [`resolve`]: what the token means
//! - [`stage`]: when to seal; sends, finds out, retries

pub mod link;
pub mod resolve;
pub mod stage;

pub use link::{Announcement, Asked, Closed, Heard, Sending, Settled, Sums, ToCounters};
pub use stage::{Command, FileWork, Flush, FlushConfig, FlushError};
