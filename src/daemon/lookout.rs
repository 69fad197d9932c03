//! Looks whether the state directory is still there. When it is not, everyone is told, once: nothing
//! more is acknowledged, what was is flushed, and only a restart begins anew. A directory that comes
//! back may lack what was written meanwhile, so nobody looks again.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::flush::ToCounters;
use crate::health::Health;
use crate::journal::Place;

/// It is looked for so often.
const LOOK: Duration = Duration::from_secs(1);

/// See the module's documentation.
pub(super) struct Lookout {
    pub place: Place,
    pub health: Arc<Health>,
    pub counters: mpsc::Sender<ToCounters>,
    pub stop: CancellationToken,
}

impl Lookout {
    /// Runs until it is told to stop.
    pub(super) async fn run(self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => return,
            () = self.look() => {}
        }
        stop.cancelled().await;
    }

    /// Until it is gone and everyone knows.
    async fn look(self) {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            let place = self.place.clone();
            // A disk that hangs holds up a thread of its own.
            let gone = tokio::task::spawn_blocking(move || place.is_gone()).await;
            if gone.unwrap_or(false) {
                break;
            }
        }
        let path = self.place.path().display();
        let text = format!(
            "the state directory {path} is gone: no increment is taken any more; restore it, or make \
             another, and restart the daemon"
        );
        error!("{text}; what was acknowledged is flushed if the store takes it now");
        // Before the counters, so that their end of an epoch needs no file.
        self.health.set_gone(text.clone());
        // Without counters there is nobody left to refuse anything.
        let _ = self.counters.send(ToCounters::Gone(text)).await;
    }
}
