//! tallyd: a local daemon that takes high-write counters off Redis.
//!
//! Applications send their `INCR`s to a Unix socket, in the Redis protocol. The daemon adds them up
//! in memory and in a journal that survives `kill -9`, and on a timer sends the store one `INCRBY`
//! for each distinct key. This page is the map: the way of an increment, then the rooms in the
//! order in which to read them.
//!
//! ```text
//!   clients    INCR likes:42 │      ▲ :1204113
//! ┌ ingest thread ───────────▼──────┴────────────────────────────────────────────────────┐
//! │ ingest     read a burst, wire: decode it, apply it as a group, wire: encode, write   │
//! │ counters   key ─▶ last known value + pending delta                                   │
//! │ journal    one record for each key and epoch, written before the reply               │
//! └───────────────┬───────────────────────────────────────────────────────▲──────────────┘
//!                 │ seal: the epoch's segment            settled, loaded  │
//! ┌ stages ───────▼───────────────────────────────────────────────────────┴──────────────┐
//! │ flush      batches of the segment, in order, each exactly once                       │
//! │ sync       publisher: one message for each batch;  loader: values clients ask for    │
//! └───────────────┬───────────────────────────────────────────────────────▲──────────────┘
//!                 ▼ MULTI INCRBY … EXEC, PUBLISH                      GET │
//!   store      Redis, Valkey, or the embedded one: counters, token, clock
//! ```
//!
//! Two threads (and one for admin), and bounded queues between them. The ingest thread owns the counters and never
//! waits for the store; the stages own the store's connections and never make a client wait.
//!
//! # The rooms, in reading order
//!
//! - [`time`]: the wall clock.
//! - [`stats`]: the numbers of this process, one source for `INFO`, `TALLY.STATS` and metrics.
//! - [`health`]: whether the process is alive and ready.
//! - [`hot`]: which keys change the most, counted from sealed epochs; pure.
//! - [`repeats`]: when the log is told of what happens again and again.
//! - [`fail_point`]: named points at which a test may have the process die; nothing in a release.
//! - [`socket`]: binding a Unix socket.
//! - [`small_file`]: reading a file that is meant to be small.
//! - [`private`]: files that only their owner may read.
//! - [`wire`]: bytes to commands and replies to bytes; pure.
//! - [`counters`]: the table, which applies commands in groups to entries of last known value and
//!   pending delta; pure.
//! - [`journal`]: the files, one memory-mapped segment for each epoch, recovered at the next start.
//! - [`store`]: where counters live for good; the trait, and its two implementations.
//! - [`flush`]: when to seal, and how a sealed segment gets to the store exactly once.
//! - [`sync`]: the message that is published for each batch, and the loading of values.
//! - [`ingest`]: the socket, the connections, and what each command does.
//! - [`admin`]: the HTTP server for health, metrics and the live page.
//! - [`systemd`]: the socket that it holds, and what it is told.
//! - [`config`]: defaults, file, environment and flags, merged, checked, with the origin of each.
//! - [`log`]: lines on stderr.
//! - [`daemon`]: builds all of the above, owns every task, and ends them in order.
//! - [`cli`]: the command line; `run`, `check`, `demo`, `journal`, `top`, and the exit codes.
//!
//! A room uses only rooms that come before it in this list. One exception: the journal names nodes
//! and deltas as the store does.
//!
//! # Words
//!
//! A *delta* is an amount for one key. *Pending* is what was acknowledged and is not yet known to
//! be in the store. An *epoch* is the time between two *seals*; its deltas are one *segment* of the
//! journal, which goes to the store in numbered *batches*. The *token* is the key in the store that
//! holds the number of this node's last batch; the *clock* is the key that every batch increments.
//! The *view* of a key is its last known value and what is pending.

pub mod admin;
pub mod cli;
pub mod config;
pub mod counters;
pub mod daemon;
pub mod fail_point;
pub mod flush;
pub mod health;
pub mod hot;
pub mod ingest;
pub mod journal;
pub mod log;
pub mod private;
pub mod repeats;
pub mod small_file;
pub mod socket;
pub mod stats;
pub mod store;
pub mod sync;
pub mod systemd;
pub mod time;
pub mod wire;
