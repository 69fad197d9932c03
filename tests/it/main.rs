//! The daemon as its users see it: a process, a socket, real Redis servers, real clients. A module
//! is a scenario.

// The lint knows tests by their attribute, and not what tests call.
#![allow(clippy::unwrap_used)]

mod support;

mod access;
mod admin;
mod admin_places;
mod architecture;
mod browser;
mod chaos;
mod client_list;
mod client_memory;
mod clients;
#[allow(clippy::format_push_string)]
mod convergence;
mod corpus;
mod crash;
mod demo;
mod descriptors;
mod disk_full;
mod durable;
mod exact;
mod fairness;
mod faults;
mod forged;
mod hostile_store;
mod journal;
#[cfg(feature = "fail-points")]
mod kill_points;
mod large_groups;
mod limits;
mod listen;
mod logs;
mod metrics;
mod page;
mod protocol;
mod publish;
mod readme;
mod reads;
mod replicas;
mod sentinel;
mod shutdown;
mod simulation;
mod state_dir;
mod store_down;
mod store_embedded;
mod store_faults;
mod store_full_disk;
mod store_identity;
mod store_redis;
mod store_redis_faults;
mod store_support;
mod systemd;
mod top;
