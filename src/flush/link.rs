//! What the stages say to the counters, which live on the ingest thread and are never waited for
//! by a client.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::counters::Announced;
use crate::journal::{Sealed, Writer};
use crate::store::{KeyError, Reading, StoreError};

/// What became of one delta of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// It is in the store. The value after it, if it is known.
    Stored(Option<i64>),
    /// It is in the rejected file.
    Rejected(KeyError),
    /// It was settled when the batch was first looked at; nothing changes.
    Before,
}

/// The answer to [`ToCounters::Seal`].
pub enum Closed {
    /// The closed epoch's segment.
    Epoch(Writer),
    /// No record in it: the epoch stays open, and the new segment was not needed.
    Empty(Writer),
}

/// A message to the ingest thread.
pub enum ToCounters {
    /// Close the epoch: records go to `next` from now on; the old segment comes back.
    Seal {
        /// The segment of the next epoch.
        next: Writer,
        /// Gets the segment of the closed one, or `next` back when nothing was pending in it.
        closed: oneshot::Sender<Closed>,
    },
    /// A batch is done with.
    Settle {
        /// Its segment.
        segment: Arc<Sealed>,
        /// Its number.
        batch: u64,
        /// In the order of the batch's deltas.
        settled: Arc<[Settled]>,
        /// The store's clock of those values.
        clock: u64,
    },
    /// The store has lost this batch; `skip` of its deltas stay settled.
    Restore {
        /// Its segment.
        segment: Arc<Sealed>,
        /// Its number.
        batch: u64,
        /// Indices of deltas that are in the rejected file.
        skip: Vec<usize>,
    },
    /// The store went back in time.
    ForgetClocks,
    /// Values that were asked for.
    Loaded {
        /// The keys.
        keys: Vec<Bytes>,
        /// Their values, or why there are none.
        reading: Result<Reading, StoreError>,
    },
    /// So many bytes of records may the open segment take.
    Budget {
        /// In bytes.
        bytes_max: usize,
    },
    /// Values that another node's batch left behind.
    Announced(Announced),
    /// Messages were lost, or may have been: every value held is to be read anew.
    Stale,
    /// All that was pending when this was asked for has been settled, by the messages before.
    Flushed(oneshot::Sender<()>),
    /// A message of the channel of deltas, for local subscribers.
    Message(Bytes),
}

/// An applied batch, for the publisher.
pub struct Announcement {
    /// Its segment.
    pub segment: Arc<Sealed>,
    /// Its number.
    pub batch: u64,
    /// In the order of the batch's deltas.
    pub settled: Arc<[Settled]>,
    /// The store's clock of those values.
    pub clock: u64,
}
