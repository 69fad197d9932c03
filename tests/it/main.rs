//! Scenarios against real servers. One binary, a module a scenario.

mod store_embedded;
mod store_redis;
mod store_redis_faults;
mod store_support;
