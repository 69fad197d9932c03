//! The publisher: one message for each applied batch, and a heartbeat in quiet times.
//!
//! A message that cannot be published is not tried again: its number is used up, so that receivers
//! see the gap and read the values from the store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

use super::message::Head;
use crate::flush::{Announcement, Settled, ToCounters};
use crate::repeats::Repeats;
use crate::stats::Stats;
use crate::store::Store;
use crate::time::unix_ms;

/// What the publisher is built from.
pub struct Publisher<S> {
    /// Where messages go.
    pub store: Arc<S>,
    /// What messages begin with.
    pub head: Head,
    /// Whether messages go to the store; local subscribers get them always.
    pub enabled: bool,
    /// Between two messages at most.
    pub heartbeat: Duration,
    /// From the flush stage.
    pub announcements: mpsc::Receiver<Announcement>,
    /// Announcements that found no room.
    pub unannounced: Arc<AtomicU64>,
    /// To local subscribers.
    pub counters: mpsc::Sender<ToCounters>,
    /// Numbers.
    pub stats: Arc<Stats>,
}

impl<S: Store> Publisher<S> {
    /// Runs until the flush stage has ended and all it announced is published.
    pub async fn run(mut self) {
        let mut seq = 0;
        let mut clock = 0;
        let mut failing = Repeats::default();
        let mut due = Instant::now() + self.heartbeat;
        loop {
            let text = match timeout_at(due, self.announcements.recv()).await {
                Ok(None) => return,
                Ok(Some(announcement)) => {
                    seq += 1 + self.unannounced.swap(0, Ordering::Relaxed);
                    clock = announcement.clock;
                    self.message(seq, clock, Some(&announcement))
                }
                Err(_) => self.message(seq, clock, None),
            };
            due = Instant::now() + self.heartbeat;
            let text = Bytes::from(text);
            if self.enabled {
                let begin = Instant::now();
                let published = self.store.publish(&text).await;
                Stats::took(
                    &self.stats.histograms.publish,
                    &self.stats.publish_us_total,
                    begin.elapsed(),
                );
                match published {
                    Ok(()) => {
                        self.stats.published_total.add(1);
                        if let Some(told) = failing.over() {
                            info!(
                                failed = told.count,
                                seconds = told.seconds(),
                                "publishing again"
                            );
                        }
                    }
                    Err(error) => {
                        self.stats.publish_errors_total.add(1);
                        if let Some(told) = failing.again() {
                            warn!(
                                failed = told.count,
                                %error,
                                "cannot publish; receivers will read what they missed"
                            );
                        }
                    }
                }
            }
            if self.counters.send(ToCounters::Message(text)).await.is_err() {
                return;
            }
        }
    }

    fn message(&self, seq: u64, clock: u64, announcement: Option<&Announcement>) -> Vec<u8> {
        let Some(batch) = announcement else {
            return self.head.message(seq, clock, unix_ms(), std::iter::empty());
        };
        let deltas = batch.segment.batch(batch.batch).zip(&*batch.settled);
        let stored = deltas.filter_map(|(delta, settled)| match settled {
            Settled::Stored(Some(value)) => Some((delta.key, delta.amount, *value)),
            _ => None,
        });
        self.head.message(seq, clock, unix_ms(), stored)
    }
}
