//! tallyd: a local daemon that takes high-write counters off Redis.

pub mod cli;
pub mod config;
pub mod log;
pub mod store;
