//! The daemon as its users see it: a process, a socket, real Redis servers, real clients. A module
//! is a scenario.

mod support;

mod clients;
mod crash;
mod exact;
mod faults;
mod listen;
mod protocol;
mod publish;
mod reads;
mod shutdown;
mod store_down;
