//! What systemd is told of the service's life.
//!
//! 1. Nothing is said out of order: a reload is neither begun nor ended before the service is ready
//!    or once it stops, as the `READY=1` that ends it would undo what was said last.
//! 2. `RELOADING=1` is always followed by `READY=1`, also if the new configuration is wrong: the
//!    service goes on with the old one.
//! 3. A manager that cannot be told is no reason to stop; the log says so, once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

use crate::health::Phase;

/// How much longer a stop may take, each time that it is said that it goes on.
pub(super) const EXTENSION: Duration = Duration::from_secs(10);

/// The service manager, if there is one; clones tell the same one.
#[derive(Debug, Clone, Default)]
pub struct Manager(Option<Arc<Told>>);

#[derive(Debug)]
struct Told {
    /// What was last said of the service's life. Held while something is said, see invariant 1.
    phase: Mutex<Phase>,
    failed: AtomicBool,
}

impl Manager {
    /// The one that has started this process; [`Manager::default`] is nobody.
    pub fn of_process() -> Self {
        Self(std::env::var_os("NOTIFY_SOCKET").map(|_| {
            Arc::new(Told {
                phase: Mutex::new(Phase::Starting),
                failed: AtomicBool::new(false),
            })
        }))
    }

    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.0.is_some()
    }

    /// Clients are accepted.
    pub fn ready(&self) {
        self.moves(Phase::Starting, Phase::Ready, || vec![NotifyState::Ready]);
    }

    /// The configuration is being read again.
    pub fn reloading(&self) {
        self.moves(Phase::Ready, Phase::Ready, || {
            // Without the time, systemd from 253 on would not take a reload for one.
            let begun = NotifyState::monotonic_usec_now();
            [Ok(NotifyState::Reloading), begun]
                .into_iter()
                .flatten()
                .collect()
        });
    }

    /// The reload is over, with the new configuration or the old one.
    pub fn reloaded(&self) {
        self.moves(Phase::Ready, Phase::Ready, || vec![NotifyState::Ready]);
    }

    /// The last flush begins. That it goes on is said by [`super::watch`].
    pub fn stopping(&self) {
        self.moves(Phase::Ready, Phase::Stopping, || {
            vec![NotifyState::Stopping, extension()]
        });
    }

    /// What a person sees in `systemctl status`.
    pub fn status(&self, text: &str) {
        self.tell(&[NotifyState::Status(text)]);
    }

    fn moves(&self, from: Phase, to: Phase, states: impl FnOnce() -> Vec<NotifyState<'static>>) {
        let Some(told) = &self.0 else {
            return;
        };
        let mut phase = told.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase == from {
            *phase = to;
            self.tell(&states());
        }
    }

    pub(super) fn tell(&self, states: &[NotifyState<'_>]) {
        let Some(told) = &self.0 else {
            return;
        };
        if let Err(error) = sd_notify::notify(states)
            && !told.failed.swap(true, Ordering::Relaxed)
        {
            warn!(%error, "systemd cannot be told how the service is ($NOTIFY_SOCKET)");
        }
    }
}

/// Asks for more time to stop.
pub(super) fn extension() -> NotifyState<'static> {
    NotifyState::ExtendTimeoutUsec(EXTENSION.as_micros() as u32)
}
