//! What is sealed goes to the store, batch by batch; what the store refuses is set aside.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::super::link::{Announcement, Settled, ToCounters};
use super::{Flush, FlushError, PAUSE_MAX, Pause, on_disk, within};
use crate::counters::Sent;
use crate::fail_point::{fail_point, loses};
use crate::journal::rejected::Rejected;
use crate::journal::{JournalError, Sealed};
use crate::stats::Stats;
use crate::store::{Claim, Delta, KeyError, Lane, Outcome, Refusal, Store};
use crate::time::unix_ms;

impl<S: Store> Flush<S> {
    /// Sends everything sealed, however long it takes.
    pub(super) async fn drain(&mut self) -> Result<(), FlushError> {
        while !self.queue.is_empty() || self.unseen {
            self.health.flush_beat();
            let pause = match self.step().await? {
                ControlFlow::Continue(()) => continue,
                ControlFlow::Break(pause) => pause,
            };
            let wait = self.complain(&pause);
            if wait.is_zero() {
                continue;
            }
            let sleep = tokio::time::sleep(wait);
            tokio::pin!(sleep);
            loop {
                tokio::select! {
                    biased;
                    command = self.commands.recv(), if !self.stopping => self.take(command),
                    () = &mut sleep => break,
                }
            }
        }
        Ok(())
    }

    /// One batch further, or why not.
    pub(super) async fn step(&mut self) -> Result<ControlFlow<Pause>, FlushError> {
        if self.lane.is_none()
            && let Err(pause) = self.connect().await?
        {
            return Ok(ControlFlow::Break(pause));
        }
        self.unseen = false;
        let Some(segment) = self.queue.front().cloned() else {
            return Ok(ControlFlow::Continue(())); // Reading back has finished the last one.
        };
        // Numbers below the segment's first belong to one that was set aside as damaged.
        self.applied = self.applied.max(segment.first_batch() - 1);
        let batch = self.applied + 1;
        if batch > segment.last_batch() {
            self.finish().await?;
            return Ok(ControlFlow::Continue(()));
        }
        let must_claim = self.config.exactly_once && self.token != Some(batch - 1);
        // Where the directory is gone, nobody will read the note.
        if must_claim && !self.ever_claimed && self.health.gone().is_none() {
            if let Err(error) = self.note_server() {
                return Ok(ControlFlow::Break(Pause::Own(error.to_string())));
            }
            self.ever_claimed = true;
        }
        let Some(lane) = self.lane.as_mut() else {
            return Ok(ControlFlow::Break(Pause::None));
        };
        if must_claim {
            match within(&self.health, Self::STORE_PATIENCE, lane.claim(batch - 1)).await {
                Claim::Claimed => {
                    fail_point("claim.done");
                    self.token = Some(batch - 1);
                    self.has_written = true;
                    self.claimed = true;
                }
                Claim::TokenMoved => return Ok(self.drop_lane(Pause::None)),
                Claim::Failed(error) => return Ok(self.drop_lane(Pause::Trouble(error))),
            }
        }
        let deltas: Vec<Delta<'_>> = segment.batch(batch).collect();
        // Where some are done with already: which ones are not.
        let done = self.done.get(&batch).filter(|done| !done.is_empty());
        let left: Option<Vec<usize>> = done.map(|done| {
            let all = 0..deltas.len();
            all.filter(|index| !done.contains_key(index)).collect()
        });
        fail_point("batch.ready");
        let some: Vec<Delta<'_>>;
        let wanted = match &left {
            None => &deltas,
            Some(left) => {
                some = left.iter().map(|&index| deltas[index]).collect();
                &some
            }
        };
        let nothing: Vec<Delta<'_>>;
        let wanted = if loses("batch.amounts") {
            let without = wanted.iter().map(|delta| Delta {
                amount: 0,
                key: delta.key,
            });
            nothing = without.collect();
            &nothing
        } else {
            wanted
        };
        self.sending.set(match self.queue.len() {
            1 => Sent::before(segment.epoch(), segment.batch_end(batch)),
            // Sent again after a roll-back, or by a former process: no epoch of which the counters know.
            _ => Sent::ANY,
        });
        let begin = Instant::now();
        let applying = lane.apply(batch, wanted);
        let outcome = within(&self.health, Self::STORE_PATIENCE, applying).await;
        Stats::took(
            &self.stats.histograms.transaction,
            &self.stats.transaction_us_total,
            begin.elapsed(),
        );
        match outcome {
            Outcome::Applied { values, clock } => {
                self.stats.flushed_keys_total.add(values.len() as u64);
                let sent = wanted
                    .iter()
                    .zip(&values)
                    .filter(|(_, value)| value.is_ok());
                let stored = sent.fold(0, |sum: i64, (delta, _)| sum.wrapping_add(delta.amount));
                let sums = self.sums.entry(batch).or_default();
                sums.stored = sums.stored.wrapping_add(stored);
                fail_point("batch.answered");
                self.token = Some(batch);
                self.has_written = true;
                self.confirmed = Some(Instant::now());
                self.recovered();
                if self.config.exactly_once
                    && !self.server_is_noted
                    && self.health.gone().is_none()
                    && let Err(error) = self.note_server()
                    && let Some(told) = self.lines.files.again()
                {
                    // Only a later process misses it, and takes an emptied store for one that lost
                    // its data.
                    warn!(count = told.count, %error, "cannot note which server has the token");
                }
                let settled = if left.is_none() && values.iter().all(Result::is_ok) {
                    let stored = |value: Result<i64, KeyError>| Settled::Stored(value.ok());
                    values.into_iter().map(stored).collect()
                } else {
                    let left = left.unwrap_or_else(|| (0..deltas.len()).collect());
                    let again = self.sort_out(&segment, batch, &deltas, &left, values).await;
                    if let Some(reason) = again {
                        return Ok(ControlFlow::Break(Pause::Own(reason)));
                    }
                    self.take_settled(batch, deltas.len())
                };
                self.settle(&segment, batch, settled, clock).await?;
                Ok(ControlFlow::Continue(()))
            }
            Outcome::NotApplied(Refusal::TokenMoved) => {
                self.stats.batches_aborted_total.add(1);
                Ok(self.drop_lane(Pause::None))
            }
            Outcome::NotApplied(Refusal::Keys(keys)) => {
                self.stats.batches_keys_refused_total.add(1);
                let refused = keys
                    .into_iter()
                    .filter_map(|(index, error)| match &left {
                        None => Some((index, error)),
                        Some(left) => Some((*left.get(index)?, error)),
                    })
                    .collect();
                self.reject(batch, &deltas, refused).await;
                Ok(self.drop_lane(Pause::None))
            }
            Outcome::NotApplied(Refusal::Whole(error)) => {
                self.stats.batches_refused_total.add(1);
                Ok(self.drop_lane(Pause::Trouble(error)))
            }
            Outcome::Unknown(error) => {
                self.uncertain = true;
                self.stats.uncertain_total.add(1);
                Ok(self.drop_lane(Pause::Trouble(error)))
            }
        }
    }

    /// Not before the token is there: that it is absent elsewhere must go on to mean something.
    fn note_server(&mut self) -> Result<(), JournalError> {
        let server = self.server.as_deref().unwrap_or_default();
        let lock = self.directory.lock();
        let mut directory = lock.unwrap_or_else(PoisonError::into_inner);
        if directory.server() != Some(server) {
            on_disk(&self.health, || directory.note_server(server))?;
        }
        self.server_is_noted = true;
        Ok(())
    }

    pub(super) fn drop_lane(&mut self, pause: Pause) -> ControlFlow<Pause> {
        self.lane = None;
        self.token = None;
        self.has_written = false;
        self.stats.store_up.set(0);
        ControlFlow::Break(pause)
    }

    /// Sorts the values of an applied batch. `Some`: parts of it must be sent again
    /// (at-least-once only), for this reason.
    pub(super) async fn sort_out(
        &mut self,
        segment: &Sealed,
        batch: u64,
        deltas: &[Delta<'_>],
        left: &[usize],
        values: Vec<Result<i64, KeyError>>,
    ) -> Option<String> {
        debug_assert!(batch <= segment.last_batch());
        let mut refused = Vec::new();
        let mut again = None;
        let done = self.done.entry(batch).or_default();
        for (&index, value) in left.iter().zip(values) {
            match value {
                Ok(value) => {
                    done.insert(index, Settled::Stored(Some(value)));
                }
                Err(KeyError::Retry(reason)) => again = Some(reason),
                Err(error) => refused.push((index, error)),
            }
        }
        self.reject(batch, deltas, refused).await;
        again
    }

    /// Writes refused deltas to the rejected file, however long it takes, and notes them as done.
    pub(super) async fn reject(
        &mut self,
        batch: u64,
        deltas: &[Delta<'_>],
        refused: Vec<(usize, KeyError)>,
    ) {
        if refused.is_empty() {
            return;
        }
        let at = unix_ms();
        let lines: Vec<Rejected> = refused
            .iter()
            // A sum of zero changes nothing, whatever the key holds.
            .filter(|(index, _)| deltas[*index].amount != 0)
            .map(|(index, error)| {
                let delta = deltas[*index];
                Rejected::new(delta.key, delta.amount, error.to_string(), batch, at)
            })
            .collect();
        while !lines.is_empty() {
            match on_disk(&self.health, || self.rejected.append(&lines)) {
                Ok(()) => break,
                Err(error) => {
                    let path = self.rejected.path().display();
                    if let Some(told) = self.lines.unwritten.again() {
                        error!(tries = told.count, %error, "{path} cannot be written; flushing waits for it");
                    }
                    tokio::time::sleep(PAUSE_MAX).await;
                }
            }
        }
        if self.lines.unwritten.over().is_some() {
            info!("{} can be written again", self.rejected.path().display());
        }
        fail_point("reject.written");
        self.stats.rejected_total.add(lines.len() as u64);
        if let Some(first) = lines.first()
            && let Some(told) = self.lines.refused.again()
        {
            warn!(
                batch,
                deltas = lines.len(),
                batches = told.count,
                reason = first.reason,
                key = first
                    .key
                    .as_deref()
                    .map(|key| key.escape_debug().to_string()),
                "the store refused deltas; they are in {}",
                self.rejected.path().display()
            );
        }
        let done = self.done.entry(batch).or_default();
        let sums = self.sums.entry(batch).or_default();
        for (index, error) in refused {
            sums.rejected = sums.rejected.wrapping_add(deltas[index].amount);
            done.insert(index, Settled::Rejected(error));
        }
    }

    /// What became of each delta of a batch that is sorted out.
    pub(super) fn take_settled(&mut self, batch: u64, deltas: usize) -> Arc<[Settled]> {
        let done = self.done.remove(&batch).unwrap_or_default();
        let rejected: BTreeMap<usize, Settled> = done
            .iter()
            .filter(|(_, settled)| is_rejected(settled))
            .map(|(&index, settled)| (index, settled.clone()))
            .collect();
        if !rejected.is_empty() {
            // Remembered until the segment is released, in case that the store goes back.
            self.done.insert(batch, rejected);
        }
        (0..deltas)
            .map(|index| done.get(&index).cloned().unwrap_or(Settled::Stored(None)))
            .collect()
    }

    /// The batch is in the store and its refused deltas are on file: tells everyone.
    pub(super) async fn settle(
        &mut self,
        segment: &Arc<Sealed>,
        batch: u64,
        settled: Arc<[Settled]>,
        clock: u64,
    ) -> Result<(), FlushError> {
        self.applied = batch;
        self.clock = self.clock.max(clock);
        self.note_applied(segment, batch);
        fail_point("batch.noted");
        self.stats.batches_total.add(1);
        self.stats
            .sealed_keys
            .sub((settled.len() as u64).min(self.stats.sealed_keys.get()));
        let announcement = Announcement {
            segment: Arc::clone(segment),
            batch,
            settled: Arc::clone(&settled),
            clock,
        };
        let segment = Arc::clone(segment);
        let sums = self.sums.remove(&batch).unwrap_or_default();
        self.tell(ToCounters::Settle {
            segment,
            batch,
            settled,
            clock,
            sums,
        })
        .await?;
        if self.publisher.try_send(announcement).is_err() {
            // Publishing never holds up flushing; receivers see the gap and read the values.
            self.unannounced.fetch_add(1, Ordering::Relaxed);
        }
        if self
            .queue
            .front()
            .is_some_and(|segment| segment.last_batch() == batch)
        {
            self.finish().await?;
        }
        Ok(())
    }
}

/// Whether the delta is in the rejected file, since now or before.
pub(super) fn is_rejected(settled: &Settled) -> bool {
    matches!(settled, Settled::Rejected(_) | Settled::Before)
}
