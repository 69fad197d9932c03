//! tallyd: a local daemon that takes high-write counters off Redis.

pub mod counters;
pub mod journal;
pub mod store;
pub mod wire;
