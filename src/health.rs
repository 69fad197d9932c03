//! Whether the process is alive and ready: one source for systemd's watchdog, `/healthz` and
//! `/readyz`.
//!
//! Alive means that a restart would not help. It helps where a thread or a stage will never come
//! round by itself: a deadlock, a wake-up that was lost, a loop without an end. It does not help
//! against a store that is away or slow, nor against a disk that hangs: a process in the middle of a
//! system call to that disk cannot even be killed, its successor would wait for the same disk, and
//! meanwhile this one still takes increments.
//!
//! 1. Whoever is watched says how soon it is to be heard of again, and is stuck when that has
//!    passed. A beat says that it came round to its loop, not that it succeeded.
//! 2. The ingest thread beats every second. It waits for nobody; what holds it up holds up clients.
//! 3. The flush stage beats while it is idle, between two pauses, and after each step. Before it asks
//!    the store it allows itself far more than all of the store's time-outs together; before it waits
//!    for the disk, any time.
//! 4. All accesses are relaxed; readers look seconds after writers.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Who has beaten and is not heard of again for so long is stuck.
pub const STUCK_AFTER: Duration = Duration::from_secs(15);

/// Where the process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Recovering; clients are not accepted yet.
    Starting,
    /// Clients are accepted.
    Ready,
    /// Told to stop: clients are answered what they have sent, then comes the last flush.
    Stopping,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Health {
    started: Instant,
    phase: AtomicU8,
    /// In ms since `started`: when each is to be heard of again at the latest.
    ingest_due: AtomicU64,
    flush_due: AtomicU64,
    /// See [`Health::gone`].
    gone: OnceLock<String>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            phase: AtomicU8::new(Phase::Starting as u8),
            ingest_due: AtomicU64::new(u64::MAX),
            flush_due: AtomicU64::new(u64::MAX),
            gone: OnceLock::new(),
        }
    }
}

impl Health {
    /// When the process began.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            0 => Phase::Starting,
            1 => Phase::Ready,
            _ => Phase::Stopping,
        }
    }

    /// Moves on.
    pub fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// The state directory is gone, in words. Only a restart mends it, but not one that nobody has
    /// prepared: it does not count as stuck.
    pub fn set_gone(&self, text: String) {
        // It is told once.
        let _ = self.gone.set(text);
    }

    /// Why no increment is taken any more, if so.
    pub fn gone(&self) -> Option<&str> {
        self.gone.get().map(String::as_str)
    }

    /// The ingest thread has come round.
    pub fn ingest_beat(&self) {
        let due = self.due_in(STUCK_AFTER);
        self.ingest_due.store(due, Ordering::Relaxed);
    }

    /// The flush stage has come round.
    pub fn flush_beat(&self) {
        self.flush_may_take(STUCK_AFTER);
    }

    /// The flush stage begins something that may take so long; `Duration::MAX`: however long.
    pub fn flush_may_take(&self, limit: Duration) {
        let due = self.due_in(limit);
        self.flush_due.store(due, Ordering::Relaxed);
    }

    /// Who should have been heard of by now and was not, if anybody.
    pub fn stuck(&self) -> Option<&'static str> {
        self.stuck_at(self.started.elapsed())
    }

    fn stuck_at(&self, since_start: Duration) -> Option<&'static str> {
        let now = since_start.as_millis() as u64;
        let late = |due: &AtomicU64| now > due.load(Ordering::Relaxed);
        if late(&self.ingest_due) {
            Some("the ingest thread")
        } else if late(&self.flush_due) {
            Some("the flush stage")
        } else {
            None
        }
    }

    fn due_in(&self, limit: Duration) -> u64 {
        let due = self.started.elapsed().saturating_add(limit).as_millis();
        u64::try_from(due).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_not_heard_of_in_time_is_stuck_and_who_may_take_its_time_is_not() {
        let health = Health::default();
        let later = STUCK_AFTER * 2;
        assert_eq!(health.stuck_at(later), None, "nobody runs yet");
        health.ingest_beat();
        health.flush_may_take(Duration::MAX);
        assert_eq!(health.stuck(), None);
        assert_eq!(health.stuck_at(later), Some("the ingest thread"));
        health.ingest_due.store(u64::MAX, Ordering::Relaxed);
        assert_eq!(health.stuck_at(Duration::MAX), None);
        health.flush_may_take(STUCK_AFTER * 3);
        assert_eq!(health.stuck_at(later), None);
        health.flush_beat();
        assert_eq!(health.stuck_at(later), Some("the flush stage"));
    }
}
