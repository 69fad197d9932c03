//! What is applied is kept for a while, in case that the store goes back, and then removed. Meanwhile it
//! is a file, neither open nor mapped.

use std::time::Instant;

use tracing::warn;

use super::{Flush, FlushError, RETAINED_SEGMENTS_MAX, on_disk};
use crate::fail_point::fail_point;
use crate::journal::Kept;
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
        let mut segments = self.retained.len();
        let mut bytes: usize = self
            .retained
            .iter()
            .map(|(_, segment)| segment.bytes())
            .sum();
        while let Some((since, _)) = self.retained.front() {
            let due = *since + self.config.retain;
            let may_go = if self.config.exactly_once {
                self.confirmed >= Some(due)
            } else {
                due <= Instant::now()
            };
            let bounded =
                bytes <= self.config.pending_bytes_max && segments <= RETAINED_SEGMENTS_MAX;
            if !may_go && bounded {
                break;
            }
            let Some((_, segment)) = self.retained.pop_front() else {
                break;
            };
            segments -= 1;
            bytes -= segment.bytes();
            self.remove(&segment);
        }
        self.gauge_retained();
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
