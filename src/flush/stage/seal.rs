//! The end of an epoch: its segment is sealed and made durable, and the next one is there before.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;

use super::super::link::{Closed, ToCounters};
use super::{DISK_PATIENCE, Durable, Flush, FlushError, Pause, within};
use crate::fail_point::fail_point;
use crate::journal::{JournalError, Writer};
use crate::stats::Stats;
use crate::store::Store;
use crate::time::unix_ms;

impl<S: Store> Flush<S> {
    /// Closes the epoch if it has records. `false`: no new segment can be had, so it stays open.
    pub(super) async fn seal(&mut self) -> Result<bool, FlushError> {
        self.synced().await;
        let Some(next) = self.take_standby().await else {
            return Ok(false);
        };
        let begin = Instant::now();
        let since = std::mem::replace(&mut self.attempted_ms, unix_ms());
        let (closed, answer) = oneshot::channel();
        let message = ToCounters::Seal { next, closed };
        self.counters
            .send(message)
            .await
            .map_err(|_| FlushError::Counters)?;
        let writer = match answer.await.map_err(|_| FlushError::Counters)? {
            Closed::Epoch(writer) => writer,
            Closed::Empty(writer) => {
                self.standby = Some(writer);
                self.hot.add_epoch(Instant::now(), std::iter::empty());
                return Ok(true);
            }
        };
        fail_point("seal.closed");
        let hot = Arc::clone(&self.hot);
        // File I/O waits where it holds up no other stage.
        let sealing = tokio::task::spawn_blocking(move || {
            let sealed = writer.seal()?;
            let epoch = sealed.deltas().map(|delta| (delta.key, delta.amount));
            hot.add_epoch(Instant::now(), epoch);
            Ok(sealed)
        });
        let sealed = within(&self.health, DISK_PATIENCE, sealing)
            .await
            .map_err(|_| FlushError::Counters)?;
        let sealed = Arc::new(sealed.map_err(FlushError::Seal)?);
        if self.config.durable != Durable::Nothing {
            let (segment, names) = (Arc::clone(&sealed), self.names.clone());
            // Also the name of the segment that was opened for it.
            self.syncing = Some(tokio::task::spawn_blocking(move || {
                segment.sync().map_err(|error| error.to_string())?;
                names.sync().map_err(|error| error.to_string())
            }));
        }
        fail_point("seal.done");
        self.stats.seals_total.add(1);
        let histograms = &self.stats.histograms;
        Stats::took(&histograms.seal, &self.stats.seal_us_total, begin.elapsed());
        histograms.flush_keys.observe(f64::from(sealed.records()));
        let increments = self.stats.increments_total.get();
        let new = increments - std::mem::replace(&mut self.increments, increments);
        histograms.flush_increments.observe(new as f64);
        self.since.insert(sealed.first_batch(), since);
        self.stats.sealed_keys.add(u64::from(sealed.records()));
        self.expected_bytes = sealed.bytes();
        self.queue.push_back(sealed);
        self.gauge_bytes();
        self.budget().await?;
        Ok(true)
    }

    /// Waits until the last sealed segment is on the disk.
    pub(super) async fn synced(&mut self) {
        let Some(syncing) = self.syncing.take() else {
            return;
        };
        if let Ok(synced) = within(&self.health, DISK_PATIENCE, syncing).await {
            self.tell_synced(synced);
        }
    }

    pub(super) async fn take_standby(&mut self) -> Option<Writer> {
        if let Some(standby) = self.standby.take() {
            return Some(standby);
        }
        let directory = Arc::clone(&self.directory);
        let bytes_max = self.config.pending_bytes_max;
        let expected = self.expected_bytes;
        let named = (self.config.durable == Durable::Records).then(|| self.names.clone());
        let made = tokio::task::spawn_blocking(move || {
            let mut directory = directory.lock().unwrap_or_else(PoisonError::into_inner);
            let mut writer = directory.create_segment(bytes_max)?;
            // Without it the segment grows when it must.
            let _ = writer.expect(expected);
            if let Some(names) = named {
                names.sync()?;
            }
            Ok::<_, JournalError>(writer)
        });
        match within(&self.health, DISK_PATIENCE, made).await {
            Ok(Ok(writer)) => Some(writer),
            Ok(Err(error)) => {
                self.complain(&Pause::Own(error.to_string()));
                // Room may be had from what is kept only in case.
                if error.is_disk_full()
                    && let Some((_, segment)) = self.retained.pop_front()
                {
                    self.remove(&segment);
                }
                None
            }
            Err(_) => None,
        }
    }

    pub(super) async fn budget(&mut self) -> Result<(), FlushError> {
        let sealed: usize = self.queue.iter().map(|segment| segment.bytes()).sum();
        let bytes_max = self.config.pending_bytes_max.saturating_sub(sealed);
        self.tell(ToCounters::Budget { bytes_max }).await
    }
}
