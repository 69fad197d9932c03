//! The thread that feeds systemd's watchdog, tells the status, and asks for time while a last flush
//! runs.
//!
//! 1. It is a thread of its own, which does nothing else: neither the ingest thread nor the stages
//!    can feed the watchdog by accident, nor starve it by being busy for a moment.
//! 2. The watchdog is fed only while [`Health`] knows of nobody who is stuck; what that means is
//!    written there. The same goes for the time to stop.
//! 3. The status is sent when it has changed, at most once in [`STATUS_EVERY`] while the phase stays.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tracing::{error, info};

use super::notify::{Manager, extension};
use crate::health::{Health, Phase};
use crate::stats::Stats;

/// The process is looked at so often.
const LOOK: Duration = Duration::from_secs(1);
/// Numbers change all the time; people look now and then.
const STATUS_EVERY: Duration = Duration::from_secs(5);

/// The running thread; dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts it, if there is a manager to be told.
    ///
    /// # Errors
    /// No thread is to be had.
    pub fn start(
        manager: &Manager,
        stats: Arc<Stats>,
        health: Arc<Health>,
    ) -> std::io::Result<Option<Self>> {
        if !manager.is_there() {
            return Ok(None);
        }
        let watcher = Watcher {
            manager: manager.clone(),
            stats,
            health,
            // Half of the time after which systemd would act.
            ping: sd_notify::watchdog_enabled().map(|limit| limit / 2),
            stuck: None,
            told: None,
        };
        let (stop, stopped) = sync_channel(0);
        let thread = std::thread::Builder::new()
            .name("tallyd-systemd".to_owned())
            .spawn(move || watcher.run(&stopped))?;
        Ok(Some(Self {
            stop: Some(stop),
            thread: Some(thread),
        }))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of its own has been told by the hook.
            let _ = thread.join();
        }
    }
}

struct Watcher {
    manager: Manager,
    stats: Arc<Stats>,
    health: Arc<Health>,
    ping: Option<Duration>,
    stuck: Option<&'static str>,
    told: Option<(Phase, String, Instant)>,
}

impl Watcher {
    fn run(mut self, stopped: &Receiver<()>) {
        let mut look_due = Instant::now();
        let mut ping_due = self.ping.map(|_| look_due);
        loop {
            let now = Instant::now();
            if now >= look_due {
                look_due = now + LOOK;
                self.look(now);
            }
            if let (Some(due), Some(period)) = (ping_due, self.ping)
                && now >= due
            {
                ping_due = Some(now + period);
                if self.note_stuck().is_none() {
                    self.manager.tell(&[NotifyState::Watchdog]);
                }
            }
            let due = ping_due.map_or(look_due, |ping| ping.min(look_due));
            match stopped.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn look(&mut self, now: Instant) {
        let stuck = self.note_stuck();
        let phase = self.health.phase();
        if phase == Phase::Stopping && stuck.is_none() {
            self.manager.tell(&[extension()]);
        }
        let text = status(&self.stats, phase, stuck);
        let due = match &self.told {
            Some((of, told, at)) => {
                *told != text && (*of != phase || stuck.is_some() || now - *at >= STATUS_EVERY)
            }
            None => true,
        };
        if due {
            self.manager.status(&text);
            self.told = Some((phase, text, now));
        }
    }

    /// Who is stuck; the log is told when that changes.
    fn note_stuck(&mut self) -> Option<&'static str> {
        let stuck = self.health.stuck();
        if stuck != self.stuck {
            self.stuck = stuck;
            if let Some(who) = stuck {
                error!("{who} is stuck: the watchdog is not fed any more");
            } else {
                info!("nobody is stuck any more");
            }
        }
        stuck
    }
}

/// One line for people: who is stuck, what is pending, how the store is.
fn status(stats: &Stats, phase: Phase, stuck: Option<&'static str>) -> String {
    let keys = stats.epoch_keys.get() + stats.sealed_keys.get();
    let pending = match keys {
        0 => "nothing pending".to_owned(),
        1 => "1 key pending".to_owned(),
        keys => format!("{keys} keys pending"),
    };
    let error = stats.store_error();
    let store = if stats.store_conflict.get() > 0 {
        "the store is used by another daemon with this node's id".to_owned()
    } else if !error.is_empty() {
        // Whatever the store said is one line here.
        let error: String = error.chars().filter(|c| !c.is_control()).collect();
        format!("the store is away: {error}")
    } else if stats.store_up.get() > 0 {
        "the store is up".to_owned()
    } else {
        "the store was not needed yet".to_owned()
    };
    match (stuck, phase) {
        (Some(who), _) => format!("stuck: {who}; {pending}; {store}"),
        (None, Phase::Starting) => "recovering".to_owned(),
        (None, Phase::Ready) => format!("{pending}; {store}"),
        (None, Phase::Stopping) => format!("stopping, last flush: {pending}; {store}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_one_line_that_says_what_is_pending_and_how_the_store_is() {
        let stats = Stats::default();
        let ready = |stats: &Stats| status(stats, Phase::Ready, None);
        assert_eq!(
            ready(&stats),
            "nothing pending; the store was not needed yet"
        );
        stats.epoch_keys.set(1);
        stats.store_up.set(1);
        assert_eq!(ready(&stats), "1 key pending; the store is up");
        stats.sealed_keys.set(41);
        stats.set_store_error("h:6379: LOADING\r\nREADY=1".to_owned());
        assert_eq!(
            ready(&stats),
            "42 keys pending; the store is away: h:6379: LOADINGREADY=1"
        );
        assert_eq!(
            status(&stats, Phase::Stopping, Some("the flush stage")),
            "stuck: the flush stage; 42 keys pending; the store is away: h:6379: LOADINGREADY=1"
        );
    }
}
