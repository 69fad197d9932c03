//! The edge to the applications: a Unix socket that speaks the Redis protocol.
//!
//! Everything here runs on one thread, as in Redis: what a burst of commands changes, it changes
//! without a lock. A burst is read, decoded, applied in groups and answered with one write.
//!
//! - [`listener`]: the socket
//! - [`connection`]: read, answer, write; what a client may have to wait for
//! - [`account`]: what clients hold in memory
//! - [`books`]: what became of all that was taken
//! - [`peers`]: who may connect
//! - [`keys`]: which keys clients may use
//! - [`session`]: what one client's commands do; the hot path
//! - [`commands`]: the commands beside the counters
//! - [`core`]: the counters' owner: table, open segment, messages from the stages
//! - [`loads`]: clients that wait for a value of the store
//! - [`durable`]: clients that wait for the disk
//! - [`gate`]: transactions that are applied in several slices
//! - [`hub`]: who subscribes to what
//! - [`inbox`]: what a subscriber is still to be sent
//! - [`mod@glob`]: what patterns match
//! - [`view`]: what the stages tell of values
//! - [`mod@slice`]: long work, with clients in between
//! - [`notices`]: what the log is told of clients and limits
//! - [`report`]: `INFO`, `TALLY.STATS`

pub mod account;
pub mod books;
pub mod commands;
pub mod connection;
pub mod core;
pub mod durable;
pub mod gate;
pub mod glob;
pub mod hub;
pub mod inbox;
pub mod keys;
pub mod listener;
pub mod loads;
pub mod notices;
pub mod peers;
pub mod report;
pub mod session;
pub mod slice;
mod taken;
pub mod view;

use std::time::Duration;

use keys::AllowedKeys;
use peers::AllowedPeers;

/// What this room needs to know.
#[derive(Debug, Clone)]
pub struct IngestConfig {
    /// Longest key, in bytes.
    pub key_bytes_max: usize,
    /// An epoch with so many keys is sealed early.
    pub epoch_keys_max: usize,
    /// Whether a key never seen is read from the store before its first answer.
    pub load: bool,
    /// How long an answer waits for that.
    pub load_timeout: Duration,
    /// Whether a read whose value did not come by then is answered with an error, not with nothing.
    pub unloaded_is_error: bool,
    /// A read of a value that was not seen for so long asks the store anew.
    pub view_age_max: Duration,
    /// Whether answers wait until the journal is on the disk.
    pub sync_always: bool,
    /// Connections at a time.
    pub connections_max: usize,
    /// `listen.max_connections`: more, where the limit of open files does not allow it.
    pub connections_wanted: usize,
    /// What all clients together may hold in memory, in bytes.
    pub client_bytes_max: usize,
    /// What one client's `MULTI` may hold of that.
    pub transaction_bytes_max: usize,
    /// The channel of deltas.
    pub channel: String,
}

/// Who may connect and which keys they may use; can change while the daemon runs.
#[derive(Debug, Clone)]
pub struct Access {
    /// See [`peers`].
    pub peers: AllowedPeers,
    /// See [`keys`].
    pub keys: AllowedKeys,
}

impl Access {
    /// From the configuration's lists.
    ///
    /// # Errors
    /// A user or a group that the system does not know, or a pattern that is too long.
    pub fn find(
        users: &[String],
        groups: &[String],
        patterns: &[String],
    ) -> Result<Self, crate::socket::ListenError> {
        Ok(Self {
            peers: AllowedPeers::find(users, groups)?,
            keys: AllowedKeys::new(patterns).map_err(|(place, source)| {
                crate::socket::ListenError::Pattern {
                    place,
                    source: Box::new(source),
                }
            })?,
        })
    }
}
