//! What the numbers and the log say of the stage.

use std::time::Duration;

use tracing::{error, info, warn};

use super::{Flush, PAUSE_MAX, PAUSE_MIN, Pause};
use crate::journal::Sealed;
use crate::stats::{Number, Stats};
use crate::store::{Store, StoreError};
use crate::time::unix_ms;

impl<S: Store> Flush<S> {
    /// Counts anew what waits, record by record: at the start, and after the store went back.
    pub(super) fn gauge(&self) {
        let unapplied = |segment: &Sealed| -> usize {
            (segment.first_batch().max(self.applied + 1)..=segment.last_batch())
                .map(|batch| segment.batch(batch).count())
                .sum()
        };
        let keys: usize = self.queue.iter().map(|segment| unapplied(segment)).sum();
        self.stats.sealed_keys.set(keys as u64);
        self.gauge_bytes();
    }

    pub(super) fn gauge_bytes(&self) {
        let bytes: usize = self.queue.iter().map(|segment| segment.bytes()).sum();
        self.stats.sealed_bytes.set(bytes as u64);
        self.stats.sealed_segments.set(self.queue.len() as u64);
        let since = self.queue.front().map_or(0, |oldest| {
            let known = self.since.get(&oldest.first_batch());
            *known.unwrap_or(&self.begun_ms)
        });
        self.stats.sealed_since_ms.set(since);
        self.gauge_retained();
    }

    pub(super) fn gauge_retained(&self) {
        let bytes: usize = self.retained.iter().map(|(_, s)| s.bytes()).sum();
        self.stats.retained_segments.set(self.retained.len() as u64);
        self.stats.retained_bytes.set(bytes as u64);
        let waiting = self.waiting_for_replicas() as u64;
        self.stats.replicas_waiting_segments.set(waiting);
    }

    /// Logs a failure once per change and once a minute; returns how long to wait.
    pub(super) fn complain(&mut self, pause: &Pause) -> Duration {
        let reason = match pause {
            Pause::None => return Duration::ZERO,
            Pause::Trouble(error) => error.to_string(),
            Pause::Own(reason) => reason.clone(),
        };
        self.stats.retries_total.add(1);
        self.stats.last_retry_ms.set(unix_ms());
        kind_of(pause, &self.stats).add(1);
        self.stats.set_store_error(reason.clone());
        match self.lines.trouble.again() {
            None => {}
            Some(told) if told.first => {
                let meanwhile = if self.stuck.get() {
                    "increments are refused until there is room"
                } else {
                    "increments are taken and kept in the journal meanwhile"
                };
                warn!("cannot flush: {reason}; {meanwhile}");
            }
            Some(told) => warn!(
                tries = told.count,
                seconds = told.seconds(),
                "still cannot flush: {reason}"
            ),
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(PAUSE_MAX);
        // Jitter, so that daemons that lost one store together do not come back together.
        pause.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    pub(super) fn recovered(&mut self) {
        self.pause = PAUSE_MIN;
        // Also of what was not told, because it comes and goes all the time.
        if self.lines.trouble.is_on() {
            self.stats.set_store_error(String::new());
        }
        if let Some(told) = self.lines.trouble.over() {
            info!(
                tries = told.count,
                seconds = told.seconds(),
                "flushing again"
            );
        }
    }

    pub(super) fn tell_synced(&mut self, synced: Result<(), String>) {
        match synced {
            Ok(()) => {
                if self.lines.unsynced.over().is_some() {
                    info!("the journal can be synced again");
                }
            }
            Err(error) => {
                if let Some(told) = self.lines.unsynced.again() {
                    error!(
                        count = told.count,
                        %error,
                        "the journal cannot be synced: a power cut now may lose what is pending"
                    );
                }
            }
        }
    }

    pub(super) fn note_applied(&mut self, segment: &Sealed, batch: u64) {
        // Only a hint: the token says the same.
        if let Err(error) = segment.set_applied(batch)
            && let Some(told) = self.lines.files.again()
        {
            warn!(
                count = told.count,
                %error,
                "cannot note progress in {}",
                segment.path().display()
            );
        }
    }
}

/// The number of failures of this kind.
fn kind_of<'a>(pause: &Pause, stats: &'a Stats) -> &'a Number {
    match pause {
        Pause::Trouble(StoreError::Io { .. } | StoreError::NoMaster { .. }) => {
            &stats.retries_io_total
        }
        Pause::Trouble(StoreError::Timeout { .. }) => &stats.retries_timeout_total,
        Pause::Trouble(StoreError::Refused { .. }) => &stats.retries_refused_total,
        Pause::Trouble(StoreError::Protocol { .. }) => &stats.retries_protocol_total,
        Pause::Trouble(StoreError::Embedded { .. }) => &stats.retries_embedded_total,
        Pause::None | Pause::Own(_) => &stats.retries_local_total,
    }
}
