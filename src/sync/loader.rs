//! The loader: reads from the store what clients wait for, all keys of a moment in one round trip.
//!
//! While one read is under way the next keys gather, so that a slow store gets larger reads, not
//! more of them.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::flush::{Heard, Sending, ToCounters};
use crate::repeats::Repeats;
use crate::stats::Stats;
use crate::store::Store;

/// Keys of one read.
const KEYS_MAX: usize = 1000;

/// What the loader is built from.
pub struct Loader<S> {
    /// Where values are read.
    pub store: Arc<S>,
    /// Keys that are wanted.
    pub wanted: mpsc::Receiver<Vec<Bytes>>,
    /// To the ingest thread.
    pub counters: mpsc::Sender<ToCounters>,
    /// Cancelled when no client is left that could wait.
    pub stop: CancellationToken,
    /// What had been heard when a read begins.
    pub heard: Arc<Heard>,
    /// What had been sent when its answer comes.
    pub sending: Arc<Sending>,
    /// Numbers.
    pub stats: Arc<Stats>,
}

impl<S: Store> Loader<S> {
    /// Runs until nobody can want anything any more.
    pub async fn run(mut self) {
        let stop = self.stop.clone();
        let mut failing = Repeats::default();
        while let Some(Some(mut keys)) = stop.run_until_cancelled(self.wanted.recv()).await {
            while keys.len() < KEYS_MAX
                && let Ok(more) = self.wanted.try_recv()
            {
                keys.extend(more);
            }
            while !keys.is_empty() {
                let rest = keys.split_off(keys.len().min(KEYS_MAX));
                let asked = self.heard.now();
                let reading = self.store.read(&keys).await;
                let sent = self.sending.now();
                match &reading {
                    Ok(_) => {
                        self.stats.loads_total.add(keys.len() as u64);
                        if let Some(told) = failing.over() {
                            info!(
                                failed = told.count,
                                seconds = told.seconds(),
                                "reading values again"
                            );
                        }
                    }
                    Err(error) => {
                        self.stats.load_errors_total.add(1);
                        if let Some(told) = failing.again() {
                            warn!(
                                failed = told.count,
                                %error,
                                "cannot read values: replies count from what is known here"
                            );
                        }
                    }
                }
                if self
                    .counters
                    .send(ToCounters::Loaded {
                        keys,
                        reading,
                        asked,
                        sent,
                    })
                    .await
                    .is_err()
                {
                    return;
                }
                keys = rest;
            }
        }
    }
}
