//! tallyd: a local daemon that takes high-write counters off Redis.

pub mod counters;
pub mod flush;
pub mod ingest;
pub mod journal;
pub mod stats;
pub mod store;
pub mod sync;
pub mod wire;
