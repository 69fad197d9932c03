//! Whether the process is alive and ready: one source for systemd's watchdog, `/healthz` and
//! `/readyz`.
//!
//! 1. A beat says that a thread came round to its loop, not that it succeeded: a store that is away
//!    stops no heart.
//! 2. All accesses are relaxed; readers look seconds after writers.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A thread that has not come round for so long is stuck. The longest wait of either between two
/// beats is bounded far below it.
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
    ingest: AtomicU64,
    flush: AtomicU64,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            phase: AtomicU8::new(Phase::Starting as u8),
            // Who has not begun yet is not stuck.
            ingest: AtomicU64::new(u64::MAX),
            flush: AtomicU64::new(u64::MAX),
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

    /// The ingest thread has come round.
    pub fn ingest_beat(&self) {
        self.ingest.store(self.now_ms(), Ordering::Relaxed);
    }

    /// The flush stage has come round.
    pub fn flush_beat(&self) {
        self.flush.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Who has not come round for [`STUCK_AFTER`], if anybody.
    pub fn stuck(&self) -> Option<&'static str> {
        let now = self.now_ms();
        let limit = STUCK_AFTER.as_millis() as u64;
        let late = |beat: &AtomicU64| now.saturating_sub(beat.load(Ordering::Relaxed)) > limit;
        if late(&self.ingest) {
            Some("the ingest thread")
        } else if late(&self.flush) {
            Some("the flush stage")
        } else {
            None
        }
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}
