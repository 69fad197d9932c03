//! The numbers of this process, one source for `INFO`, `TALLY.STATS` and metrics.
//!
//! Writers add once a burst or once a batch, never once an increment. All accesses are relaxed:
//! each number is right by itself, and nothing is decided by comparing two of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

macro_rules! numbers {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Counters (`_total`) and gauges.
        #[derive(Debug, Default)]
        pub struct Stats {
            $($(#[doc = $doc])+ pub $name: Number,)+
            store_error: Mutex<String>,
        }

        impl Stats {
            /// Every number with its name.
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)+]
            }
        }
    };
}

numbers! {
    /// Commands answered or silently taken, of every kind.
    commands_total,
    /// Increments and decrements taken.
    increments_total,
    /// Commands that were answered with an error.
    errors_total,
    /// Connections accepted.
    connections_total,
    /// Connections refused: at a limit, or for their user.
    connections_refused_total,
    /// Those of them whose user is not allowed.
    connections_refused_peer_total,
    /// Connections open now.
    connections,
    /// Subscribers cut off because they did not keep up.
    subscribers_dropped_total,
    /// Times that the journal was synced because clients waited for it.
    syncs_total,
    /// Keys in memory.
    view_keys,
    /// Memory of the keys, in bytes.
    view_bytes,
    /// Entries given up to make room.
    view_evictions_total,
    /// Keys whose value was read from the store because a client asked.
    loads_total,
    /// Reads of the store that failed.
    load_errors_total,
    /// Keys with a delta in the open epoch.
    epoch_keys,
    /// Epochs sealed.
    seals_total,
    /// Keys in sealed segments that are not yet known to be in the store.
    sealed_keys,
    /// Bytes of the records of sealed segments not yet known to be in the store.
    sealed_bytes,
    /// Unix time in ms since which something has been pending without a break; 0: nothing is.
    pending_since_ms,
    /// Batches applied by the store.
    batches_total,
    /// Keys sent to the store, that is `INCRBY` commands.
    flushed_keys_total,
    /// Batches or connections that failed and were tried again.
    retries_total,
    /// Batches whose reply was lost.
    uncertain_total,
    /// Batches sent again because the store had lost them.
    replayed_total,
    /// Deltas that the store refused for good.
    rejected_total,
    /// 1 while the flush connection stands.
    store_up,
    /// 1 while flushing is stopped because another daemon writes with this node id.
    store_conflict,
    /// Messages published.
    published_total,
    /// Messages that could not be published.
    publish_errors_total,
    /// 1 while the subscription to the channel of deltas stands.
    subscribed,
    /// Other nodes heard of late.
    peers,
    /// Messages of other nodes received.
    messages_total,
    /// Values in them.
    announced_total,
    /// Milliseconds between the sending of the last message and its arrival, by the two clocks.
    lag_ms,
    /// Times that messages were found missing.
    gaps_total,
    /// Keys read anew because messages may have been lost.
    rereads_total,
    /// Messages that were not understood.
    malformed_total,
    /// Files that recovery found damaged.
    damaged_files,
    /// Segments retained after they were applied.
    retained_segments,
}

/// One number.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    /// Adds to a counter.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Takes from a gauge.
    pub fn sub(&self, amount: u64) {
        self.0.fetch_sub(amount, Ordering::Relaxed);
    }

    /// Sets a gauge.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Reads it.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Stats {
    /// The last error of the store, empty while it is well.
    pub fn store_error(&self) -> String {
        self.store_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Sets [`Stats::store_error`].
    pub fn set_store_error(&self, text: String) {
        *self
            .store_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = text;
    }
}
