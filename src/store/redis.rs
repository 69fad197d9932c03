//! The store in a single Redis or Valkey: over TCP, TLS or a Unix socket, or wherever Sentinels say
//! that the master is.
//!
//! Connections of four kinds, none of which waits for another: a lane for batches ([`lane`]), a few for
//! reads and one for publishing ([`reads`]), and one for the subscription ([`feed`]). They are own code,
//! because the answer to "was it applied?" hangs on every byte of it, and because what a server may
//! answer is bounded. All of them come from the same place ([`origin`]), a fixed address or what
//! Sentinels name ([`sentinel`]), and begin with the same handshake ([`handshake`]) on the same kind of
//! byte stream ([`stream`]). The `redis` crate reads the URL.
//!
//! Invariants:
//! 1. A lane's connection is its own, and nothing reconnects it in silence: that would lose the
//!    `WATCH` that makes a late transaction abort.
//! 2. A lane has one batch in flight. In a chain sent blind, the `WATCH` behind an aborted `EXEC`
//!    would arm the next one, which would then count twice.
//! 3. No error and no log line carries a password: addresses are shown without credentials, and
//!    all that a server says is cleaned first ([`shown`]), as some servers echo what they were sent.
//!
//! It refuses Redis Cluster (the server answers `MOVED` or `CROSSSLOT`, which is handed up).

mod codec;
mod exchange;
mod feed;
mod handshake;
mod lane;
mod origin;
mod reads;
mod replies;
mod sentinel;
mod server_error;
mod shown;
mod stream;
mod tls;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::redis::{ConnectionAddr, RedisConnectionInfo};
use bytes::Bytes;

pub use self::lane::RedisLane;
use self::origin::Origin;
use self::reads::Pool;
pub use self::sentinel::SentinelConfig;
use super::{Identity, READ_KEYS_MAX, Reading, Standing, Store, StoreError};
pub use feed::RedisFeed;

/// Reads under way at a time: a large one does not hold up a small one.
const READS_MAX: usize = 4;

/// Why a connection ended that was left.
const LEFT: &str = "the Sentinels name another master by now";

/// What a flush promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Delivery {
    /// A transaction with a token: whatever happens to the connection, a batch counts once.
    #[default]
    ExactlyOnce,
    /// A plain pipeline, for proxies that refuse `MULTI`: a lost reply may count a batch twice.
    AtLeastOnce,
}

/// How long to wait for the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection, its TLS included, and the handshake on it: each.
    pub connect: Duration,
    /// For a batch, without a single byte going either way; and for the whole of it, beside the time
    /// that its bytes take at 64 KB a second.
    pub progress: Duration,
    /// For the answer to a read or a publish.
    pub response: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            progress: Duration::from_secs(10),
            response: Duration::from_secs(2),
        }
    }
}

/// Where the server is.
#[derive(Debug, Clone)]
pub enum Place {
    /// Here, for good.
    Server(ConnectionAddr),
    /// Where the Sentinels say that the master is.
    Sentinels(SentinelConfig),
}

/// Where the server is, and how to use it.
#[derive(Clone)]
pub struct RedisConfig {
    /// Where it is, and whether it is spoken to by TLS.
    pub place: Place,
    /// Database number, user and password.
    pub login: RedisConnectionInfo,
    /// What a flush promises.
    pub delivery: Delivery,
    /// The channel that [`Store::publish`] sends to.
    pub channel: String,
    /// How long to wait.
    pub timeouts: Timeouts,
}

/// Leaves out the credentials.
impl fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConfig")
            .field("place", &self.place)
            .field("db", &self.login.db())
            .field("delivery", &self.delivery)
            .field("channel", &self.channel)
            .field("timeouts", &self.timeouts)
            .finish_non_exhaustive()
    }
}

/// A store in one Redis or Valkey server.
#[derive(Debug)]
pub struct RedisStore {
    config: Arc<RedisConfig>,
    identity: Identity,
    /// Given to a server that has none.
    id: Mutex<String>,
    origin: Arc<Origin>,
    reads: Pool,
    publishing: Pool,
}

impl RedisStore {
    /// A store that connects when it is first used.
    pub fn new(config: RedisConfig, identity: Identity) -> Self {
        let origin = Arc::new(Origin::new(&config));
        let config = Arc::new(config);
        let pool = |connections| Pool::new(config.clone(), origin.clone(), connections);
        Self {
            reads: pool(READS_MAX),
            // Messages keep their order.
            publishing: pool(1),
            origin,
            config,
            identity,
            id: Mutex::new(new_id()),
        }
    }
}

impl Store for RedisStore {
    type Lane = RedisLane;
    type Feed = RedisFeed;

    fn remember(&self, id: &str) {
        // One of another kind is none for a server.
        if let Some(id) = id.strip_prefix("redis:") {
            id.clone_into(&mut self.id.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    async fn connect(&self) -> Result<(RedisLane, Standing), StoreError> {
        let id = self
            .id
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        RedisLane::open(self.origin.wire().await?, &self.config, self.identity, &id).await
    }

    async fn read(&self, keys: &[Bytes]) -> Result<Reading, StoreError> {
        if keys.len() > READ_KEYS_MAX {
            let message = format!("a read of {} keys, over {READ_KEYS_MAX}", keys.len());
            return Err(self.origin.peer().protocol(&message));
        }
        match self.config.delivery {
            Delivery::ExactlyOnce => self.reads.read(keys).await,
            Delivery::AtLeastOnce => self.reads.read_plain(keys).await,
        }
    }

    async fn publish(&self, message: &[u8]) -> Result<(), StoreError> {
        self.publishing.publish(message).await
    }

    async fn subscribe(&self) -> Result<RedisFeed, StoreError> {
        RedisFeed::open(self.origin.wire().await?, &self.config).await
    }

    async fn follow(&self) {
        self.origin.follow().await;
    }
}

fn new_id() -> String {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system has a source of randomness");
    format!("{:032x}", u128::from_le_bytes(bytes))
}

/// For the fuzzer alone.
#[cfg(fuzzing)]
pub mod fuzzing {
    use super::codec::ReplyBuffer;

    /// The replies in `bytes`, which come in pieces, shown; and whether something malformed ended them.
    pub fn replies(bytes: &[u8], piece: usize) -> (Vec<String>, bool) {
        let mut buffer = ReplyBuffer::new();
        buffer.skip_long();
        let mut replies = Vec::new();
        let mut left = bytes;
        loop {
            match buffer.next_reply() {
                Ok(Some(reply)) => replies.push(format!("{reply:?}")),
                Err(_) => return (replies, true),
                Ok(None) if left.is_empty() => return (replies, false),
                Ok(None) => {
                    let room = buffer.room();
                    let count = room.len().min(piece).min(left.len());
                    room[..count].copy_from_slice(&left[..count]);
                    left = &left[count..];
                    buffer.filled(count);
                }
            }
        }
    }
}
