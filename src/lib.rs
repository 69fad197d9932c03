//! tallyd: a local daemon that takes high-write counters off Redis.

pub mod config;
pub mod store;
