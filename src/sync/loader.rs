//! The loader: reads from the store what clients wait for. Whoever asks decides what is read together,
//! and how many reads are under way at a time.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::flush::{Heard, Sending, ToCounters};
use crate::repeats::Repeats;
use crate::stats::Stats;
use crate::store::Store;

/// What the loader is built from.
pub struct Loader<S> {
    /// Where values are read.
    pub store: Arc<S>,
    /// The keys of each read.
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
        let mut reads = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                keys = self.wanted.recv() => match keys {
                    None => return,
                    Some(keys) => {
                        reads.spawn(self.read(keys));
                    }
                },
                Some(read) = reads.join_next() => match read {
                    Ok((keys, error)) => self.note(&mut failing, keys, error.as_deref()),
                    // It panicked: so does this.
                    Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                    Err(_) => {}
                },
            }
        }
    }

    /// Reads the keys and tells their values. Returns how many there were, and what failed.
    fn read(
        &self,
        keys: Vec<Bytes>,
    ) -> impl Future<Output = (usize, Option<String>)> + Send + 'static {
        let (store, counters) = (Arc::clone(&self.store), self.counters.clone());
        let (heard, sending) = (Arc::clone(&self.heard), Arc::clone(&self.sending));
        async move {
            let asked = heard.now();
            let reading = store.read(&keys).await;
            let sent = sending.now();
            let outcome = (keys.len(), reading.as_ref().err().map(ToString::to_string));
            let told = counters.send(ToCounters::Loaded {
                keys,
                reading,
                asked,
                sent,
            });
            // If nobody hears it, nobody waits for it.
            let _ = told.await;
            outcome
        }
    }

    fn note(&self, failing: &mut Repeats, keys: usize, error: Option<&str>) {
        let Some(error) = error else {
            self.stats.loads_total.add(keys as u64);
            if let Some(told) = failing.over() {
                info!(
                    failed = told.count,
                    seconds = told.seconds(),
                    "reading values again"
                );
            }
            return;
        };
        self.stats.load_errors_total.add(1);
        if let Some(told) = failing.again() {
            warn!(
                failed = told.count,
                error, "cannot read values: replies count from what is known here"
            );
        }
    }
}
