//! A new connection to the store: what its token tells, and what follows from that.

use std::collections::btree_map::Entry;
use std::io;
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::super::link::{Settled, ToCounters};
use super::super::resolve::{Known, Verdict, resolve};
use super::send::is_rejected;
use super::{Flush, FlushError, Pause, READ_KEYS_MAX, on_disk, within};
use crate::counters::Sent;
use crate::journal::{JournalError, Kept, Sealed};
use crate::store::{Claim, Delta, KeyError, Lane, Store};
use crate::time::unix_ms;

impl<S: Store> Flush<S> {
    /// A new lane, and what its token tells.
    pub(super) async fn connect(&mut self) -> Result<Result<(), Pause>, FlushError> {
        if let Some((id, _)) = &self.store_known {
            self.store.remember(id);
        }
        let connecting = self.store.connect();
        let connected = within(&self.health, Self::STORE_PATIENCE, connecting).await;
        let (lane, standing) = match connected {
            Ok(connected) => connected,
            Err(error) => return Ok(Err(Pause::Trouble(error))),
        };
        for warning in &standing.warnings {
            if self.warned.insert(warning.clone()) {
                warn!("{warning}");
            }
        }
        self.token = None;
        self.has_written = false;
        if self.config.exactly_once {
            // A former process may have got further than any segment that could be read.
            let sealed = self
                .queue
                .back()
                .map_or(self.applied, |last| last.last_batch())
                .max(self.numbered);
            let known = Known {
                applied: self.applied,
                sealed,
                numbered: self.numbered,
                uncertain: self.uncertain && !self.queue.is_empty(),
                runs: &self.runs,
                run: self.run,
                claimed: self.claimed,
                ever_claimed: self.ever_claimed,
                server: self.server.as_deref(),
                former: self.former_store(),
                floor: self.floor,
                clock: self.clock,
                whole: self.is_whole(),
            };
            let verdict = resolve(known, &standing);
            if let Verdict::Conflict(reason) = verdict {
                self.stats.store_conflict.set(1);
                return Ok(Err(Pause::Own(format!(
                    "another daemon uses this node's id, flushing is stopped: {reason}; a copied \
                     state directory needs a node.json of its own"
                ))));
            }
            self.stats.store_conflict.set(0);
            let store = standing.store.as_ref().map(|store| &*store.id);
            let another = (verdict == Verdict::Elsewhere).then_some(self.applied);
            if let Err(pause) = self.act(verdict, &standing.server, store).await? {
                return Ok(Err(pause));
            }
            // Before anything is sent there.
            if let Err(error) = self.note_store(store, another) {
                return Ok(Err(Pause::Own(error.to_string())));
            }
            if standing.token.is_some_and(|token| token.run == self.run) {
                self.token = standing.token.map(|token| token.batch);
            }
        }
        if std::mem::take(&mut self.uncertain) && self.config.exactly_once {
            self.stats.uncertain_resolved_total.add(1);
        }
        self.server_is_noted &= self.server.as_deref() == Some(&standing.server);
        self.server = Some(standing.server);
        self.clock = standing.clock;
        self.lane = Some(lane);
        self.has_moved = false;
        self.stats.store_up.set(1);
        Ok(Ok(()))
    }

    /// Whether the journal still has everything that this node ever flushed.
    fn is_whole(&self) -> bool {
        let retained = self.retained.front().map(|(_, kept)| kept.first_batch());
        let queued = || self.queue.front().map(|segment| segment.first_batch());
        let oldest = retained.or_else(queued);
        oldest.map_or(self.applied == 0, |first_batch| first_batch == 1)
    }

    pub(super) async fn act(
        &mut self,
        verdict: Verdict,
        server: &str,
        store: Option<&str>,
    ) -> Result<Result<(), Pause>, FlushError> {
        match verdict {
            Verdict::Continue | Verdict::Conflict(_) => {}
            Verdict::Applied(upto) => {
                while self.applied < upto {
                    if self.queue.is_empty() {
                        // Set aside as damaged, or lost in a power cut.
                        warn!(
                            batches = upto - self.applied,
                            "the store has batches that the journal does not know any more"
                        );
                        self.applied = upto;
                        // Of which keys, nobody knows.
                        self.tell(ToCounters::ForgetClocks).await?;
                        break;
                    }
                    if let Err(pause) = self.read_back(upto).await? {
                        return Ok(Err(pause));
                    }
                }
            }
            Verdict::RolledBack(to) => {
                // Before anything is told: where it cannot be had now, it may be the next time.
                let lost = match on_disk(&Arc::clone(&self.health), || self.reopen(to)) {
                    Ok(lost) => lost,
                    Err(error) => return Ok(Err(Pause::Own(error))),
                };
                self.roll_back(to, lost, server).await?;
            }
            Verdict::Elsewhere => self.move_to(store.unwrap_or_default()).await?,
            Verdict::Emptied => {
                warn!(
                    "the store was emptied: counters begin anew with what is pending; batches up \
                     to {} are not brought back",
                    self.applied
                );
                self.tell(ToCounters::ForgetClocks).await?;
            }
            Verdict::TokenLost => {
                error!(
                    "the token is gone from the store but the counters are not: it was deleted or \
                     evicted; keep it out of eviction's reach (maxmemory-policy)"
                );
                if self.uncertain
                    && let Some(segment) = self.queue.front().cloned()
                {
                    let batch = self.applied.max(segment.first_batch() - 1) + 1;
                    let deltas: Vec<Delta<'_>> = segment.batch(batch).collect();
                    let reason = "uncertain: sent without a reply, and then the token was lost";
                    let refused = (0..deltas.len())
                        .map(|index| (index, KeyError::Other(reason.to_owned())))
                        .collect();
                    self.reject(batch, &deltas, refused).await;
                }
            }
        }
        Ok(Ok(()))
    }

    /// The batch after `applied`, which is not beyond `upto`, is in the store, its reply is not
    /// here: values and refusals are read from the keys.
    pub(super) async fn read_back(&mut self, upto: u64) -> Result<Result<(), Pause>, FlushError> {
        let Some(segment) = self.queue.front().cloned() else {
            return Ok(Ok(())); // `resolve` allows nothing beyond what was sealed.
        };
        if self.applied < segment.first_batch() - 1 {
            self.applied = segment.first_batch() - 1;
            // The store may have batches whose keys nobody knows.
            self.tell(ToCounters::ForgetClocks).await?;
        }
        if self.applied >= upto {
            // The token names a batch of a segment that was set aside as damaged; this one was
            // never sent.
            return Ok(Ok(()));
        }
        let batch = self.applied + 1;
        if batch > segment.last_batch() {
            self.finish().await?;
            return Ok(Ok(()));
        }
        let deltas: Vec<Delta<'_>> = segment.batch(batch).collect();
        let keys: Vec<Bytes> = deltas
            .iter()
            .map(|delta| Bytes::copy_from_slice(delta.key))
            .collect();
        let mut values = Vec::with_capacity(keys.len());
        let mut clock = u64::MAX;
        for keys in keys.chunks(READ_KEYS_MAX) {
            match within(&self.health, Self::STORE_PATIENCE, self.store.read(keys)).await {
                Ok(reading) => {
                    values.extend(reading.values);
                    clock = clock.min(reading.clock);
                }
                Err(error) => return Ok(Err(Pause::Trouble(error))),
            }
        }
        let mut refused = Vec::new();
        for (index, (delta, value)) in deltas.iter().zip(values).enumerate() {
            let stored = match judge(delta.amount, value) {
                Ok(stored) => stored,
                Err(error) => {
                    if self
                        .done
                        .get(&batch)
                        .is_none_or(|done| !done.contains_key(&index))
                    {
                        refused.push((index, error));
                    }
                    continue;
                }
            };
            let done = self.done.entry(batch).or_default();
            if let Entry::Vacant(vacant) = done.entry(index) {
                vacant.insert(Settled::Stored(stored));
                let sums = self.sums.entry(batch).or_default();
                sums.stored = sums.stored.wrapping_add(delta.amount);
            }
        }
        self.reject(batch, &deltas, refused).await;
        let settled = self.take_settled(batch, deltas.len());
        self.settle(&segment, batch, settled, clock).await?;
        Ok(Ok(()))
    }

    /// What is retained of the batches after `to`, in order.
    ///
    /// # Errors
    /// In words, what cannot be opened now.
    fn reopen(&self, to: u64) -> Result<Vec<Arc<Sealed>>, String> {
        let after = self.retained.iter().map(|(_, kept)| kept);
        let after = after.skip_while(|kept| kept.last_batch() <= to);
        let mut segments = Vec::new();
        for kept in after {
            let path = kept.path().display();
            match kept.open() {
                Ok(segment) => segments.push(Arc::new(segment)),
                // It does not come back by being waited for.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::InvalidData
                    ) =>
                {
                    error!(%error, "{path} is not what it was, so what it had stays lost");
                }
                Err(error) => return Err(format!("{path}: cannot open it again: {error}")),
            }
        }
        Ok(segments)
    }

    /// The store has lost everything after batch `to`: what is retained of it, `lost`, is sent again.
    pub(super) async fn roll_back(
        &mut self,
        to: u64,
        lost: Vec<Arc<Sealed>>,
        server: &str,
    ) -> Result<(), FlushError> {
        let applied = self.applied;
        if applied > to {
            warn!(
                "the store went back from batch {applied} to batch {to} (it is now {server}): a \
                 fail-over, or an older data set; what is retained of them is sent again"
            );
        }
        self.sending.set(Sent::ANY);
        self.replicated = self.replicated.min(to);
        self.tell(ToCounters::ForgetClocks).await?;
        self.retained.retain(|(_, kept)| kept.last_batch() <= to);
        for segment in lost.into_iter().rev() {
            // Pending anew.
            self.since.insert(segment.first_batch(), unix_ms());
            self.queue.push_front(segment);
        }
        let Some(first) = self.queue.front().map(|segment| segment.first_batch()) else {
            error!(
                "nothing of batches {} to {applied} is retained any more: it stays lost \
                 (flush.retain)",
                to + 1
            );
            return Ok(());
        };
        if to + 1 < first {
            error!(
                "nothing of batches {} to {} is retained any more: it stays lost (flush.retain)",
                to + 1,
                first - 1
            );
        }
        self.applied = to.max(first - 1);
        for segment in self.queue.clone() {
            let last = segment.last_batch().min(applied);
            for batch in segment.first_batch().max(to + 1)..=last {
                self.stats.replayed_total.add(1);
                // What was rejected stays so: it may be replayed from its file by hand.
                let done = self.done.entry(batch).or_default();
                done.retain(|_, settled| is_rejected(settled));
                done.values_mut()
                    .for_each(|settled| *settled = Settled::Before);
                let skip: Vec<usize> = done.keys().copied().collect();
                let kept = segment.batch(batch).enumerate();
                let kept = kept.filter(|(index, _)| !done.contains_key(index));
                let lost = kept.fold(0, |sum: i64, (_, delta)| sum.wrapping_add(delta.amount));
                self.sums.remove(&batch);
                let segment = Arc::clone(&segment);
                self.tell(ToCounters::Restore {
                    segment,
                    batch,
                    skip,
                    lost,
                })
                .await?;
            }
            if segment.first_batch() <= applied {
                self.note_applied(&segment, to.max(segment.first_batch() - 1));
            }
        }
        self.gauge();
        Ok(())
    }

    /// The store that has what was applied, if it was somewhere else than the one now is.
    fn former_store(&self) -> Option<&str> {
        let known = self.store_known.as_ref();
        known.and_then(|(id, url)| (*url != self.config.store_url).then_some(id.as_str()))
    }

    /// This is another store: nothing of what the former one has is sent there.
    async fn move_to(&mut self, store: &str) -> Result<(), FlushError> {
        let left = self.former_store().unwrap_or_default();
        info!(
            "this is another store ({store}) than the one that was flushed to before ({left}): what is \
             pending goes to it, nothing is sent again"
        );
        self.sending.set(Sent::ANY);
        self.uncertain = false;
        self.claimed = false;
        self.ever_claimed = false;
        self.server_is_noted = false;
        self.clock = 0;
        let retained = self.retained.drain(..).map(|(_, segment)| segment);
        let mut done: Vec<Kept> = retained.collect();
        while let Some(segment) = self.queue.front()
            && segment.last_batch() <= self.applied
        {
            done.extend(self.queue.pop_front().map(|segment| segment.keep()));
        }
        for segment in &done {
            self.remove(segment);
        }
        self.gauge_retained();
        // What is known is of the other one.
        self.tell(ToCounters::ForgetClocks).await?;
        self.tell(ToCounters::Stale).await
    }

    /// Notes which store gets what is flushed from now on.
    fn note_store(
        &mut self,
        store: Option<&str>,
        another: Option<u64>,
    ) -> Result<(), JournalError> {
        let url = &self.config.store_url;
        if let Some(store) = store
            && self
                .store_known
                .as_ref()
                .is_none_or(|known| known.0 != store || known.1 != *url)
        {
            let lock = self.directory.lock();
            let mut directory = lock.unwrap_or_else(PoisonError::into_inner);
            on_disk(&self.health, || directory.note_store(store, url, another))?;
            self.store_known = Some((store.to_owned(), url.clone()));
            self.floor = another.unwrap_or(self.floor);
        }
        Ok(())
    }

    /// Before a segment that is old enough is removed, the store must have been seen to have it:
    /// a quiet node would otherwise not notice a fail-over until it is too late to replay. The same
    /// where the store has moved, and before replicas are asked whether they have it, too.
    pub(super) async fn confirm(&mut self) -> Result<(), FlushError> {
        let Some((since, segment)) = self.retained.front() else {
            return Ok(());
        };
        let due = *since + self.config.retain;
        let now = Instant::now();
        let is_due = self.config.exactly_once && due <= now;
        let must_look = self.has_moved || (is_due && self.confirmed < Some(due));
        let must_count = is_due && !self.is_replicated(segment) && self.count_due <= now;
        if !must_look && !must_count {
            return Ok(());
        }
        if self.lane.is_none()
            && let Err(pause) = self.connect().await?
        {
            self.complain(&pause);
            return Ok(());
        }
        if !must_look && self.has_written {
            self.count_replicas().await;
            return Ok(());
        }
        let Some(lane) = self.lane.as_mut() else {
            return Ok(());
        };
        // Signing the token anew runs only if it is what it was.
        let claiming = lane.claim(self.applied);
        let pause = match within(&self.health, Self::STORE_PATIENCE, claiming).await {
            Claim::Claimed => {
                self.token = Some(self.applied);
                self.has_written = true;
                self.claimed = true;
                self.confirmed = Some(Instant::now());
                self.recovered();
                if must_count {
                    self.count_replicas().await;
                }
                return Ok(());
            }
            Claim::TokenMoved => Pause::None,
            Claim::Failed(error) => Pause::Trouble(error),
        };
        self.complain(&pause);
        let _ = self.drop_lane(pause);
        Ok(())
    }
}

/// Whether a delta of a batch that was applied without a reply is in the value now there.
fn judge(amount: i64, value: Result<Option<i64>, KeyError>) -> Result<Option<i64>, KeyError> {
    match value {
        Err(error @ (KeyError::WrongType | KeyError::NotInteger)) => Err(error),
        // Not readable: what the key holds cannot be told.
        Err(_) => Ok(None),
        Ok(Some(value)) if value.checked_sub(amount).is_none() => Err(KeyError::Overflow),
        // At the end of the range the two cases look alike. If it was taken after all, a replay
        // overflows and does no harm.
        Ok(Some(value)) if amount != 0 && value.checked_add(amount).is_none() => {
            Err(KeyError::Overflow)
        }
        Ok(value) => Ok(value),
    }
}
