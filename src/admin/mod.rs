//! The admin server: health, metrics and the live page, over HTTP/1.
//!
//! 1. It has a thread and a runtime of its own: what its clients do, slow or hostile, costs
//!    neither the counting nor the flushing anything but processor time.
//! 2. It only reads. What it reads is shared numbers; nothing waits for it.
//! 3. Everything that a client may take is bounded: connections, headers, time to send a request,
//!    time to take an answer. Bodies of requests are not read. Health has places of its own.
//! 4. There is no authentication: who reaches the address may read. What is served is numbers, and
//!    on the page the names of the hottest keys; never a secret.

mod body;
pub mod feed;
mod guard;
pub mod metrics;
mod page;
mod places;
mod routes;
mod samples;
mod server;
mod stream;

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

pub use places::PLACES_MAX;
pub use server::{AdminError, Bound, Server};

use crate::health::Health;
use crate::hot::Hot;
use crate::stats::Stats;

/// What the handlers may know.
#[derive(Debug, Default)]
pub struct Context {
    /// The numbers.
    pub stats: Arc<Stats>,
    /// Alive, ready.
    pub health: Arc<Health>,
    /// `node.name`.
    pub name: String,
    /// The node's id, once the state directory is open.
    pub node: OnceLock<String>,
    /// The store, without its password.
    pub store: String,
    /// What a record of the longest key takes in the journal.
    pub record_bytes_max: u64,
    /// Which keys change the most.
    pub hot: Arc<Hot>,
    /// What the page shows.
    pub feed: feed::Feed,
    /// Set when the server is to end: streams end then, too.
    pub stop: CancellationToken,
}

/// An address as the server was told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket, with its mode and group.
    Unix {
        /// Its path.
        path: std::path::PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The group that it is given to.
        group: Option<String>,
    },
}
