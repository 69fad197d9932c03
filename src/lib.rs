//! tallyd: a local daemon that takes high-write counters off Redis.

pub mod cli;
pub mod config;
pub mod counters;
pub mod daemon;
pub mod fail_point;
pub mod flush;
pub mod ingest;
pub mod journal;
pub mod log;
pub mod stats;
pub mod store;
pub mod sync;
pub mod wire;
