//! Where counters live for good: the trait, and what its answers mean.
//!
//! A store applies numbered batches of deltas exactly once, reads values together with the clock
//! that orders them, and publishes messages. It knows nothing of epochs, files or clients.
//!
//! Invariants:
//! 1. A batch is applied as a whole together with the token and the clock, or not at all.
//! 2. An answer that did not arrive is [`Outcome::Unknown`]: only the token can tell what became of it.
//! 3. After anything but `Applied` a lane is dropped, never used again.

pub mod embedded;
pub mod redis;

use std::fmt;
use std::future::Future;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

/// The key that every transaction increments: its value orders all batches of all nodes.
pub fn clock_key() -> &'static str {
    "tallyd:clock"
}

/// The key that holds the number of `node`'s last applied batch, and who applied it.
pub fn token_key(node: NodeId) -> String {
    format!("tallyd:token:{node}")
}

/// The key that tells one store from another: a random id, made by whoever comes first.
pub fn store_key() -> &'static str {
    "tallyd:store"
}

/// A signed amount for one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delta<'a> {
    /// The counter's key, as the client sent it.
    pub key: &'a [u8],
    /// What to add.
    pub amount: i64,
}

/// The random id of one run of the process; it is part of the token, so that a copied state
/// directory is noticed. Printed as 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RunId(pub u64);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The random id made with a state directory. Printed as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub u128);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Who writes: names the token key and signs its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Of the state directory.
    pub node: NodeId,
    /// Of this process.
    pub run: RunId,
}

/// The token's value in the store, text form `"<batch> <run>"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Number of the last batch that was applied for this node.
    pub batch: u64,
    /// The run that applied or claimed it.
    pub run: RunId,
}

impl Token {
    /// Whether batch number `batch` is the one that comes after what `seen` names. Where there is
    /// no token, any number may come: only the caller knows how far its node had counted.
    fn precedes(seen: Option<Self>, batch: u64) -> bool {
        seen.is_none_or(|token| token.batch.checked_add(1) == Some(batch))
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.batch, self.run)
    }
}

/// A text that is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not of the form \"<batch> <run>\"")]
pub struct NotAToken;

impl FromStr for Token {
    type Err = NotAToken;

    /// Takes only what [`Display`](fmt::Display) writes, so that a token somebody edited is
    /// noticed instead of being read as something near it.
    fn from_str(text: &str) -> Result<Self, NotAToken> {
        let (batch, run) = text.split_once(' ').ok_or(NotAToken)?;
        let token = Self {
            batch: batch.parse().map_err(|_| NotAToken)?,
            run: RunId(u64::from_str_radix(run, 16).map_err(|_| NotAToken)?),
        };
        if token.to_string() == text {
            Ok(token)
        } else {
            Err(NotAToken)
        }
    }
}

/// What a new lane finds in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// `None`: there is no token key.
    pub token: Option<Token>,
    /// The clock's value; 0 when there is none.
    pub clock: u64,
    /// Changes when the server process, or the history it holds, is another one
    /// (Redis: `run_id` and `master_replid`).
    pub server: String,
    /// Which store it is; `None`: it does not tell (at-least-once delivery).
    pub store: Option<StoreId>,
    /// What an operator should hear once (an eviction policy that may drop the token ...).
    pub warnings: Vec<String>,
}

/// Which store it is, whatever its address and its process are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreId {
    /// `"redis:<id>"` or `"embedded:<id>"`.
    pub id: String,
    /// Whether nothing was ever written to it: then it may be one that has lost its data.
    pub is_new: bool,
}

impl StoreId {
    /// Whether this is another store than the one that is known, and not the same without its data.
    pub fn is_other(&self, known: Option<&str>) -> bool {
        let kind = |id: &str| id.split(':').next().map(str::to_owned);
        known.is_some_and(|known| {
            known != self.id && (!self.is_new || kind(known) != kind(&self.id))
        })
    }
}

/// Values read in one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// In the order of the keys asked for; `Ok(None)`: the key does not exist.
    pub values: Vec<Result<Option<i64>, KeyError>>,
    /// The clock at that moment.
    pub clock: u64,
}

/// What became of a batch.
#[derive(Debug)]
pub enum Outcome {
    /// Token, clock and all keys without an error of their own moved together.
    Applied {
        /// In the order of the deltas: the value after it, or why this key alone was refused.
        values: Vec<Result<i64, KeyError>>,
        /// The clock that this batch was given; 0 where the server refused to move the clock
        /// though it took the keys, which only at-least-once delivery can meet.
        clock: u64,
    },
    /// Nothing of it is in the store, for certain.
    NotApplied(Refusal),
    /// It may or may not be in the store.
    Unknown(StoreError),
}

/// Why a batch was not applied.
#[derive(Debug)]
pub enum Refusal {
    /// The token is not what the lane last saw: connect anew and look.
    TokenMoved,
    /// These deltas (by index) keep the transaction from running; without them it may.
    Keys(Vec<(usize, KeyError)>),
    /// The store takes no such transaction now (OOM, READONLY, LOADING ...): retry later.
    Whole(StoreError),
}

/// What became of a claim of the token.
#[derive(Debug)]
pub enum Claim {
    /// The token now carries this run.
    Claimed,
    /// Not claimed: connect anew and look.
    TokenMoved,
    /// Refused or unknown: connect anew, later.
    Failed(StoreError),
}

/// Why one key was refused while others were taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The key holds another type.
    #[error("WRONGTYPE Operation against a key holding the wrong kind of value")]
    WrongType,
    /// The key holds a string that is no 64-bit integer.
    #[error("ERR value is not an integer or out of range")]
    NotInteger,
    /// The sum would leave 64 bits.
    #[error("ERR increment or decrement would overflow")]
    Overflow,
    /// The user may not touch this key.
    #[error("{0}")]
    NoPermission(String),
    /// This key was not taken for a reason that may pass (OOM ...). With exactly-once such a
    /// reason stops the whole transaction instead ([`Refusal::Whole`]).
    #[error("{0}")]
    Retry(String),
    /// Anything else that concerns this key alone, in the server's words.
    #[error("{0}")]
    Other(String),
}

/// Why the store could not be asked. Texts carry no secret.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No connection, or it broke.
    #[error("{address}: {source}")]
    Io {
        /// Where, without credentials.
        address: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("{address}: no answer within {seconds} s")]
    Timeout {
        /// Where, without credentials.
        address: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The server refuses, for now or until its configuration changes.
    #[error("{address}: {message}")]
    Refused {
        /// Where, without credentials.
        address: String,
        /// The server's words, beginning with its error code.
        message: String,
    },
    /// The answer was not what the protocol allows here.
    #[error("{address}: unexpected answer: {message}")]
    Protocol {
        /// Where, without credentials.
        address: String,
        /// What was seen and what was due.
        message: String,
    },
    /// No Sentinel names a master that is one.
    #[error("no master {name:?}: {said}")]
    NoMaster {
        /// What the Sentinels were asked for.
        name: String,
        /// What each said, and what became of it.
        said: String,
    },
    /// The embedded database failed.
    #[error("embedded store {path}: {source}")]
    Embedded {
        /// The database's file.
        path: String,
        /// What the database said.
        #[source]
        source: Arc<redb::Error>,
    },
}

/// The most keys that one [`Store::read`] may ask for; beyond it `read` fails.
pub const READ_KEYS_MAX: usize = 1_000;

/// A store of counters.
pub trait Store: Send + Sync + 'static {
    /// Whether it answers from this host's disk, which has no time-out.
    const IS_LOCAL: bool = false;

    /// Its exclusive connection for batches.
    type Lane: Lane;
    /// Its subscription to the channel of deltas.
    type Feed: Feed;

    /// The store that this node knows ([`StoreId::id`]): one that has lost its data gets this id again, so
    /// that the other nodes know it, too.
    fn remember(&self, _id: &str) {}

    /// Opens a new connection that nothing else uses, makes sure that exactly-once is possible on
    /// it, watches the token and reads it.
    ///
    /// # Errors
    /// Any [`StoreError`]; the caller retries with back-off.
    fn connect(&self) -> impl Future<Output = Result<(Self::Lane, Standing), StoreError>> + Send;

    /// Reads values and the clock in one moment. At most [`READ_KEYS_MAX`] keys: more would hold
    /// up everybody else's commands for the length of the transaction.
    ///
    /// # Errors
    /// Any [`StoreError`]; an error of one key is in the reading.
    fn read(&self, keys: &[Bytes]) -> impl Future<Output = Result<Reading, StoreError>> + Send;

    /// Publishes one message on the channel of deltas.
    ///
    /// # Errors
    /// Any [`StoreError`]: the message may or may not have gone out, and is not sent again.
    fn publish(&self, message: &[u8]) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Subscribes to the channel of deltas.
    ///
    /// # Errors
    /// Any [`StoreError`]; the caller retries with back-off.
    fn subscribe(&self) -> impl Future<Output = Result<Self::Feed, StoreError>> + Send;

    /// Follows where the store moves to, for as long as this is polled: it does not end. Only a store
    /// that moves has something to do here; it is used in the same manner meanwhile.
    ///
    /// # Cancel safety
    /// May be dropped at any time: each new connection finds the store by itself.
    fn follow(&self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

/// A subscription.
pub trait Feed: Send + 'static {
    /// The next message, as it was published.
    ///
    /// # Errors
    /// Any [`StoreError`]: messages may have been lost; subscribe anew.
    ///
    /// # Cancel safety
    /// No message is lost when the future is dropped.
    fn next(&mut self) -> impl Future<Output = Result<Bytes, StoreError>> + Send;
}

/// The subscription to a store that has one daemon only: nothing ever comes.
#[derive(Debug)]
pub struct Silence;

impl Feed for Silence {
    async fn next(&mut self) -> Result<Bytes, StoreError> {
        std::future::pending().await
    }
}

/// One exclusive connection with one batch in flight at most.
///
/// Anything but [`Outcome::Applied`] and [`Claim::Claimed`] spends the lane: it is dropped, and a
/// new one is connected. A spent lane refuses everything without touching the store.
///
/// # Cancel safety
/// None: a future of `claim`, `apply` or `replicas` that is dropped before its end leaves the lane
/// spent, and the batch is [`Outcome::Unknown`].
pub trait Lane: Send + 'static {
    /// Signs the token with this run, leaving its batch number at `batch` (creating it if absent).
    /// Fences off whatever an earlier connection of this node may still have under way.
    /// At-least-once delivery has no token: there it is always `Claimed`, and nothing is sent.
    fn claim(&mut self, batch: u64) -> impl Future<Output = Claim> + Send;

    /// Applies batch number `batch`, whose predecessor the token must name (a number that does
    /// not follow is refused as a whole, with [`StoreError::Protocol`]: a mistake of the caller).
    /// A batch that names one key twice is applied twice, as one would expect.
    fn apply(&mut self, batch: u64, deltas: &[Delta<'_>]) -> impl Future<Output = Outcome> + Send;

    /// Waits until `wanted` replicas have all that the store had when this lane last claimed or
    /// applied something, but not for longer than `limit`; how many have it. To be asked only on a lane
    /// that has claimed or applied: before that there is nothing that replicas could lack. A store
    /// without replicas answers for any number.
    ///
    /// # Errors
    /// [`StoreError::Refused`] leaves the lane as it was; any other spends it.
    fn replicas(
        &mut self,
        wanted: u32,
        limit: Duration,
    ) -> impl Future<Output = Result<u32, StoreError>> + Send {
        let _ = limit;
        std::future::ready(Ok(wanted))
    }

    /// Resolves when the store is known to have moved away from where this lane leads: it is then of
    /// no more use.
    ///
    /// # Cancel safety
    /// May be dropped at any time, unlike the others.
    fn left(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_as_it_was_written_and_nothing_else_does() {
        let token = Token {
            batch: u64::MAX,
            run: RunId(0xa91e),
        };
        assert_eq!(token.to_string(), "18446744073709551615 000000000000a91e");
        assert_eq!(token.to_string().parse(), Ok(token));
        for text in [
            "",
            "1",
            "1 a91e",
            "+1 000000000000a91e",
            "1 000000000000A91E",
            "1  a",
        ] {
            assert_eq!(text.parse::<Token>(), Err(NotAToken), "{text}");
        }
    }
}
