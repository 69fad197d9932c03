//! What is applied is kept for a while, and until enough replicas have it, in case that the store goes
//! back; and then removed. Meanwhile it is a file, neither open nor mapped.

use tokio::time::Instant;
use tracing::{info, warn};

use super::{COUNT_INTERVAL, Flush, FlushError, Pause, RETAINED_SEGMENTS_MAX, on_disk, within};
use crate::fail_point::fail_point;
use crate::journal::Kept;
use crate::repeats::REMIND;
use crate::store::{Lane, Store, StoreError};

impl<S: Store> Flush<S> {
    /// The first segment of the queue is wholly applied: it is retained.
    pub(super) async fn finish(&mut self) -> Result<(), FlushError> {
        if let Some(segment) = self.queue.pop_front() {
            self.since.remove(&segment.first_batch());
            self.retained.push_back((Instant::now(), segment.keep()));
            self.release();
        }
        self.gauge_bytes();
        self.budget().await
    }

    /// What a former process has applied only waits; whether the store has it is still to be asked.
    pub(super) fn keep_applied(&mut self) {
        while let Some(segment) = self.queue.front()
            && segment.last_batch() <= self.applied
        {
            self.retained.push_back((Instant::now(), segment.keep()));
            self.queue.pop_front();
            self.unseen = true;
        }
    }

    /// Removes retained segments that are old enough and that replicas have, or that are too many.
    pub(super) fn release(&mut self) {
        let bytes = self.retained.iter().map(|(_, kept)| kept.file_bytes());
        let mut bytes: usize = bytes.sum();
        let mut is_crowded = false;
        while let Some((since, kept)) = self.retained.front() {
            let due = *since + self.config.retain;
            let is_replicated = self.is_replicated(kept);
            let is_old = if self.config.exactly_once {
                self.confirmed >= Some(due)
            } else {
                due <= Instant::now()
            };
            let is_due = is_old && is_replicated;
            let has_room = bytes <= self.config.retained_bytes_max;
            if !is_due && has_room && self.retained.len() <= RETAINED_SEGMENTS_MAX {
                break;
            }
            is_crowded |= !is_old && !has_room;
            if !is_replicated && let Some(told) = self.lines.unreplicated.again() {
                warn!(
                    segments = told.count,
                    "the journal has no more room for what too few replicas have (flush.replicas): \
                     the oldest of it is let go, and stays lost if the store fails over now"
                );
            }
            let Some((_, segment)) = self.retained.pop_front() else {
                break;
            };
            bytes -= segment.file_bytes();
            self.remove(&segment);
        }
        self.tell_crowded(is_crowded);
        self.gauge_retained();
    }

    /// Whether enough replicas are known to have the whole segment.
    pub(super) fn is_replicated(&self, segment: &Kept) -> bool {
        !self.config.exactly_once
            || self.config.replicas == 0
            || segment.last_batch() <= self.replicated
    }

    /// How many segments are kept only until replicas have them.
    pub(super) fn waiting_for_replicas(&self) -> usize {
        let now = Instant::now();
        let waits = |(since, segment): &&(Instant, Kept)| {
            *since + self.config.retain <= now && !self.is_replicated(segment)
        };
        self.retained.iter().filter(waits).count()
    }

    /// Counts the replicas that have all that is applied. On this lane something must have been
    /// written: the count is for that and what came before.
    pub(super) async fn count_replicas(&mut self) {
        let Some(lane) = self.lane.as_mut() else {
            return;
        };
        let wanted = self.config.replicas;
        let counting = lane.replicas(wanted, self.config.replicas_timeout);
        let few = match within(&self.health, Self::STORE_PATIENCE, counting).await {
            Ok(count) if count >= wanted => {
                self.replicated = self.applied;
                self.are_few = false;
                let _ = self.lines.unreplicated.over();
                if let Some(told) = self.lines.replicas.over() {
                    info!(
                        seconds = told.seconds(),
                        "{wanted} replicas have all of it again"
                    );
                }
                return;
            }
            Ok(count) => format!("{count} of {wanted} replicas have it"),
            Err(error @ StoreError::Refused { .. }) => error.to_string(),
            Err(error) => {
                let pause = Pause::Trouble(error);
                self.complain(&pause);
                let _ = self.drop_lane(pause);
                return;
            }
        };
        self.count_due = Instant::now() + COUNT_INTERVAL;
        // Once is no more than a replica that took a moment.
        if std::mem::replace(&mut self.are_few, true)
            && let Some(told) = self.lines.replicas.again()
        {
            warn!(
                count = told.count,
                segments = self.waiting_for_replicas(),
                "what was flushed is kept until {wanted} replicas have it (flush.replicas): {few}"
            );
        }
    }

    /// Logs that what is retained is released early, and when it no longer is.
    fn tell_crowded(&mut self, is_crowded: bool) {
        let crowded = &mut self.lines.crowded;
        let due = if is_crowded {
            crowded.again().map(Ok)
        } else {
            // Not over with the first epoch that is smaller.
            crowded.over_after(REMIND)
        };
        match due {
            None => {}
            Some(Ok(told)) => warn!(
                count = told.count,
                "flush.max_retained_bytes ({} bytes) is reached: what was flushed is kept for less than \
                 flush.retain, and older batches could not be sent again after a fail-over",
                self.config.retained_bytes_max
            ),
            Some(Err(told)) => info!(
                seconds = told.seconds(),
                "what was flushed is kept for flush.retain again"
            ),
        }
    }

    pub(super) fn remove(&mut self, segment: &Kept) {
        for batch in segment.first_batch()..=segment.last_batch() {
            self.done.remove(&batch);
        }
        if let Err(error) = on_disk(&self.health, || segment.remove())
            && let Some(told) = self.lines.files.again()
        {
            warn!(count = told.count, %error, "cannot remove {}", segment.path().display());
        }
        fail_point("segment.removed");
    }
}
