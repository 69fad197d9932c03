//! What is applied is kept for a while, in case that the store goes back, and then removed. Meanwhile it
//! is a file, neither open nor mapped.

use tokio::time::Instant;
use tracing::{info, warn};

use super::{Flush, FlushError, RETAINED_SEGMENTS_MAX, on_disk};
use crate::fail_point::fail_point;
use crate::journal::Kept;
use crate::repeats::REMIND;
use crate::store::Store;

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

    /// Removes retained segments that are old enough, or too many.
    pub(super) fn release(&mut self) {
        let bytes = self.retained.iter().map(|(_, kept)| kept.file_bytes());
        let mut bytes: usize = bytes.sum();
        let mut is_crowded = false;
        while let Some((since, _)) = self.retained.front() {
            let due = *since + self.config.retain;
            let is_due = if self.config.exactly_once {
                self.confirmed >= Some(due)
            } else {
                due <= Instant::now()
            };
            let has_room = bytes <= self.config.retained_bytes_max;
            if !is_due && has_room && self.retained.len() <= RETAINED_SEGMENTS_MAX {
                break;
            }
            is_crowded |= !is_due && !has_room;
            let Some((_, segment)) = self.retained.pop_front() else {
                break;
            };
            bytes -= segment.file_bytes();
            self.remove(&segment);
        }
        self.tell_crowded(is_crowded);
        self.gauge_retained();
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
