//! Scenarios against real servers. One binary, a module a scenario.

mod architecture;
mod store_embedded;
mod store_redis;
mod store_redis_faults;
mod store_support;
