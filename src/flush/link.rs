//! What the stages say to the counters, which live on the ingest thread and are never waited for
//! by a client.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::counters::{Announced, Sent};
use crate::journal::{Sealed, Writer};
use crate::store::{KeyError, NodeId, Reading, StoreError};

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

/// What became of a batch's amounts, as the flush stage has it from what it sent. Wrapping.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sums {
    /// In the store.
    pub stored: i64,
    /// In the rejected file.
    pub rejected: i64,
}

/// The answer to [`ToCounters::Seal`].
pub enum Closed {
    /// The closed epoch's segment.
    Epoch(Writer),
    /// No record in it: the epoch stays open, and this segment is not needed, the new one or (where
    /// that had no room) the open one.
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
        /// The same in amounts.
        sums: Sums,
    },
    /// The store has lost this batch; `skip` of its deltas stay settled.
    Restore {
        /// Its segment.
        segment: Arc<Sealed>,
        /// Its number.
        batch: u64,
        /// Indices of deltas that are in the rejected file.
        skip: Vec<usize>,
        /// What it had of this batch, in amounts.
        lost: i64,
    },
    /// The store went back in time, or has what nobody here knows of: no value is sure any more. The
    /// log has been told.
    ForgetClocks,
    /// Values that were asked for.
    Loaded {
        /// The keys.
        keys: Vec<Bytes>,
        /// Their values, or why there are none.
        reading: Result<Reading, StoreError>,
        /// What [`Heard`] said when the store was asked.
        asked: Asked,
        /// What [`Sending`] said when the answer was there.
        sent: Sent,
    },
    /// So many bytes of records may the open segment take.
    Budget {
        /// In bytes.
        bytes_max: usize,
    },
    /// Values that another node's batch left behind, by that node's message.
    Announced {
        /// Who sent it, as it says.
        node: NodeId,
        /// The values.
        values: Announced,
    },
    /// Messages were lost, or may have been: every value held is to be read anew.
    Stale,
    /// All that was pending when this was asked for has been settled, by the messages before.
    Flushed(oneshot::Sender<()>),
    /// The state directory is gone, in words: nothing is to be acknowledged any more.
    Gone(String),
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

/// How far the flush stage has sent what is sealed, for those who read the store: what had not been
/// sent when a reading came is no part of it.
#[derive(Debug)]
pub struct Sending(AtomicU64);

impl Default for Sending {
    fn default() -> Self {
        Sending(AtomicU64::new(Sent::ANY.bits()))
    }
}

impl Sending {
    /// What may have been sent up to now.
    pub fn now(&self) -> Sent {
        Sent::from_bits(self.0.load(Ordering::SeqCst))
    }

    /// So much may be sent from now on.
    pub fn set(&self, sent: Sent) {
        self.0.store(sent.bits(), Ordering::SeqCst);
    }
}

/// What the counters had heard at a moment.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// The highest clock.
    pub clock: u64,
    /// How often values had been marked stale.
    pub losses: u64,
}

/// What the counters have heard so far, for those who read the store: a reading that begins later
/// and has a lower clock comes from a store that went back.
#[derive(Debug, Default)]
pub struct Heard {
    clock: AtomicU64,
    losses: AtomicU64,
}

impl Heard {
    /// What has been heard up to now.
    pub fn now(&self) -> Asked {
        Asked {
            clock: self.clock.load(Ordering::Acquire),
            losses: self.losses.load(Ordering::Acquire),
        }
    }

    /// A value with this clock was seen.
    pub fn clock(&self, clock: u64) {
        self.clock.fetch_max(clock, Ordering::AcqRel);
    }

    /// Values were marked stale.
    pub fn loss(&self) {
        self.losses.fetch_add(1, Ordering::AcqRel);
    }

    /// The store went back: its clock counts from here.
    pub fn restart(&self, clock: u64) {
        self.clock.store(clock, Ordering::Release);
    }
}
