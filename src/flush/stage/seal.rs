//! The end of an epoch: its segment is sealed and made durable, and the next one is there before.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;
use tracing::debug;

use super::super::link::{Closed, ToCounters};
use super::{DISK_PATIENCE, Durable, Flush, FlushError, Pause, on_disk, within};
use crate::fail_point::fail_point;
use crate::journal::{Directory, JournalError, Writer};
use crate::stats::Stats;
use crate::store::Store;
use crate::time::unix_ms;

impl<S: Store> Flush<S> {
    /// Closes the epoch if it has records. `false`: no new segment can be had, so it stays open; if it
    /// is `wanted`, one that has no room yet will do.
    pub(super) async fn seal(&mut self, wanted: bool) -> Result<bool, FlushError> {
        self.synced().await;
        let Some(next) = self.take_standby(wanted).await else {
            // Without a record there is nothing to close.
            return Ok(self.stuck.is_empty());
        };
        let (next_number, next_stuck) = (next.number(), next.stuck());
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
                if writer.number() != next_number {
                    self.stuck = next_stuck;
                }
                self.put_back(writer).await?;
                self.hot.add_epoch(Instant::now(), std::iter::empty());
                return Ok(true);
            }
        };
        self.stuck = next_stuck;
        fail_point("seal.closed");
        let hot = Arc::clone(&self.hot);
        // File I/O waits where it holds up no other stage.
        let sealing = self.config.file_work.run(move || {
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

    /// A segment was not needed: it is the next one, if it has room.
    async fn put_back(&mut self, writer: Writer) -> Result<(), FlushError> {
        if !writer.is_cramped() {
            self.standby = Some(writer);
            return Ok(());
        }
        if let Err(error) = on_disk(&self.health, || writer.discard()) {
            // It takes one page, and goes at the next start.
            debug!(%error, "cannot remove an empty segment");
        }
        self.budget().await
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

    pub(super) async fn take_standby(&mut self, wanted: bool) -> Option<Writer> {
        if let Some(standby) = self.standby.take() {
            return Some(standby);
        }
        let bytes_max = self.config.pending_bytes_max;
        if self.health.gone().is_some() {
            return self.make_nowhere(bytes_max);
        }
        let expected = self.expected_bytes;
        let made = self.make(move |directory| {
            let mut writer = directory.create_segment(bytes_max)?;
            // Without it the segment grows when it must.
            let _ = writer.expect(expected);
            Ok(Some(writer))
        });
        let error = match made.await {
            Ok(writer) => return writer,
            Err(error) => error,
        };
        self.complain(&Pause::Own(error.to_string()));
        if !error.is_disk_full() {
            return None;
        }
        // Room may be had from what is kept only in case.
        if let Some((_, segment)) = self.retained.pop_front() {
            self.remove(&segment);
            return None;
        }
        if self.stuck.is_empty() || !(wanted || self.stuck.get()) {
            return None;
        }
        let made = self.make(move |directory| directory.create_cramped(bytes_max));
        made.await.ok().flatten()
    }

    /// Only so that what was acknowledged can be flushed: nothing is acknowledged any more.
    fn make_nowhere(&mut self, bytes_max: usize) -> Option<Writer> {
        if self.stuck.is_empty() {
            return None;
        }
        let lock = self.directory.lock();
        let mut directory = lock.unwrap_or_else(PoisonError::into_inner);
        let made = directory.create_nowhere(bytes_max);
        drop(directory);
        made.map_err(|error| self.complain(&Pause::Own(error.to_string())))
            .ok()
    }

    /// A segment, made where it holds up no other stage, with a name as durable as it must be.
    async fn make(
        &mut self,
        make: impl FnOnce(&mut Directory) -> Result<Option<Writer>, JournalError> + Send + 'static,
    ) -> Result<Option<Writer>, JournalError> {
        let directory = Arc::clone(&self.directory);
        let named = (self.config.durable == Durable::Records).then(|| self.names.clone());
        let made = self.config.file_work.run(move || {
            let mut directory = directory.lock().unwrap_or_else(PoisonError::into_inner);
            let made = make(&mut directory)?;
            if let Some(names) = named {
                names.sync()?;
            }
            Ok(made)
        });
        // A panic of its own has been told by the hook.
        let made = within(&self.health, DISK_PATIENCE, made).await;
        made.unwrap_or(Ok(None))
    }

    pub(super) async fn budget(&mut self) -> Result<(), FlushError> {
        let sealed: usize = self.queue.iter().map(|segment| segment.bytes()).sum();
        let bytes_max = self.config.pending_bytes_max.saturating_sub(sealed);
        self.tell(ToCounters::Budget { bytes_max }).await
    }
}
