//! The numbers of this process, one source for `INFO`, `TALLY.STATS` and metrics.
//!
//! Writers add once a burst or once a batch, never once an increment. All accesses are relaxed:
//! each number is right by itself, and nothing is decided by comparing two of them. What a number
//! says here is also its help text among the metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

macro_rules! numbers {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Counters (`_total`) and gauges.
        #[derive(Debug, Default)]
        pub struct Stats {
            $($(#[doc = $doc])+ pub $name: Number,)+
            /// How long things take, and how large they are.
            pub histograms: Histograms,
            store_error: Mutex<String>,
        }

        impl Stats {
            /// Every number with its name.
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)+]
            }

            /// Every number with what it says.
            pub fn described(&self) -> Vec<(&'static str, &'static str, u64)> {
                vec![$((stringify!($name), concat!($($doc),+).trim(), self.$name.get()),)+]
            }
        }
    };
}

numbers! {
    /// Commands answered or silently taken, of every kind.
    commands_total,
    /// Increments and decrements taken.
    increments_total,
    /// Of these: by `INCR`.
    increments_incr_total,
    /// Of these: by `INCRBY`.
    increments_incrby_total,
    /// Of these: by `DECR`.
    increments_decr_total,
    /// Of these: by `DECRBY`.
    increments_decrby_total,
    /// Commands that were answered with an error.
    errors_total,
    /// Connections accepted.
    connections_total,
    /// Connections refused, at a limit or to a stranger.
    connections_refused_total,
    /// Of these: at `listen.max_connections`, or at what the limit of open files leaves for clients.
    connections_refused_limit_total,
    /// Of these: no file descriptor was left.
    connections_refused_descriptors_total,
    /// Of these: the peer may not connect.
    connections_refused_peer_total,
    /// Connections open now.
    connections,
    /// Subscribers cut off because they did not keep up.
    subscribers_dropped_total,
    /// Memory held for clients, in bytes: unfinished commands, unread answers and messages, names.
    client_bytes,
    /// The limit of it.
    client_bytes_max,
    /// Clients cut off because they held most when that limit was reached.
    clients_evicted_total,
    /// Times that the journal was synced because clients waited for it.
    syncs_total,
    /// Keys in memory.
    view_keys,
    /// Memory of the keys, in bytes.
    view_bytes,
    /// The limit of it.
    view_bytes_max,
    /// Entries given up to make room.
    view_evictions_total,
    /// Keys whose value was read from the store because a client asked.
    loads_total,
    /// Reads of keys whose value did not come in time.
    unloaded_reads_total,
    /// Increments whose reply counts only what is pending here, because the value did not come in time.
    unloaded_increments_total,
    /// Reads of the store that failed.
    load_errors_total,
    /// Keys with a delta in the open epoch.
    epoch_keys,
    /// Bytes of the records of the open epoch.
    epoch_bytes,
    /// Epochs sealed.
    seals_total,
    /// Microseconds that this took in all.
    seal_us_total,
    /// Keys in sealed segments that are not yet known to be in the store.
    sealed_keys,
    /// Bytes of the records of sealed segments not yet known to be in the store.
    sealed_bytes,
    /// Sealed segments not yet known to be in the store.
    sealed_segments,
    /// Bytes that deltas that are not in the store may take.
    pending_bytes_max,
    /// Unix time in ms of the oldest delta not yet known to be in the store; 0: there is none. Right
    /// to a flush interval.
    pending_since_ms,
    /// The same of the oldest sealed segment alone.
    sealed_since_ms,
    /// Batches applied by the store.
    batches_total,
    /// Keys sent to the store, that is `INCRBY` commands.
    flushed_keys_total,
    /// Microseconds from sending batches until their answers, in all.
    transaction_us_total,
    /// Batches that the store refused whole.
    batches_refused_total,
    /// Batches that the store refused for the sake of some keys, and was then sent without.
    batches_keys_refused_total,
    /// Batches that did not run because the token had moved.
    batches_aborted_total,
    /// Batches or connections that failed and were tried again.
    retries_total,
    /// Of these: no connection, or it broke.
    retries_io_total,
    /// Of these: no answer in time.
    retries_timeout_total,
    /// Of these: the store refused.
    retries_refused_total,
    /// Of these: the answer made no sense.
    retries_protocol_total,
    /// Of these: the embedded store failed.
    retries_embedded_total,
    /// Of these: not the store's fault, but this host's disk, or another daemon with this node's id.
    retries_local_total,
    /// Unix time in ms of the last of these; 0: there was none.
    last_retry_ms,
    /// Batches whose reply was lost.
    uncertain_total,
    /// Times that a token told whether such a batch had arrived.
    uncertain_resolved_total,
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
    /// Microseconds that publishing took in all, also in vain.
    publish_us_total,
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
    /// Values of messages whose clock was ahead of what the store then showed: read anew.
    disputed_total,
    /// The longest piece of work between two looks at the clients, in units of some 50 ns.
    slice_units_max,
    /// Sum of all amounts taken, with what a former process had left pending. This sum and the next three
    /// wrap at 64 bits.
    amount_taken,
    /// Of these: known to be in the store.
    amount_stored,
    /// Of these: pending.
    amount_pending,
    /// Of these: rejected.
    amount_rejected,
    /// By how much the other three do not make up the first one. Always 0, or increments were lost or counted
    /// twice.
    conservation_difference,
    /// Files that recovery found damaged.
    damaged_files,
    /// Segments retained after they were applied.
    retained_segments,
    /// Bytes of their records.
    retained_bytes,
    /// Of the retained segments: kept only until `flush.replicas` replicas have them.
    replicas_waiting_segments,
}

/// How long things take in seconds, and how large they are. Observed once a flush or once a batch.
#[derive(Debug)]
pub struct Histograms {
    /// From asking for an epoch's end until its segment is sealed.
    pub seal: Histogram,
    /// From sending a batch to the store until its answer.
    pub transaction: Histogram,
    /// Publishing a message.
    pub publish: Histogram,
    /// Distinct keys of a sealed epoch.
    pub flush_keys: Histogram,
    /// Increments between two seals, right to a burst.
    pub flush_increments: Histogram,
}

impl Default for Histograms {
    fn default() -> Self {
        // 100 µs to 26 s.
        let seconds = || Histogram::new(exponential_buckets(1e-4, 4.0, 10));
        // 1 to 10^8.
        let amounts = || Histogram::new(exponential_buckets(1.0, 10.0, 9));
        Histograms {
            seal: seconds(),
            transaction: seconds(),
            publish: seconds(),
            flush_keys: amounts(),
            flush_increments: amounts(),
        }
    }
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
    /// Notes how long something took: in its histogram, and in the number of its sum.
    pub fn took(histogram: &Histogram, sum_us: &Number, time: Duration) {
        histogram.observe(time.as_secs_f64());
        sum_us.add(time.as_micros() as u64);
    }

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
