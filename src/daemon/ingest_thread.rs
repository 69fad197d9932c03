//! The thread that owns the counters and serves the clients.

use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener as TokioListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::error;

use super::DaemonError;
use crate::flush::ToCounters;
use crate::health::Health;
use crate::ingest::Access;
use crate::ingest::core::{Core, Parts as CoreParts};
use crate::ingest::listener;

/// Values age, gauges are set, and the thread shows that it is alive, so often.
const TICK: Duration = Duration::from_secs(1);

/// What moves to the ingest thread.
pub(super) struct IngestThread {
    pub access: watch::Receiver<Access>,
    pub parts: CoreParts,
    pub listener: UnixListener,
    pub messages: mpsc::Receiver<ToCounters>,
    pub stop: CancellationToken,
    pub health: Arc<Health>,
}

impl IngestThread {
    /// Starts it. The first receiver hears when all clients are answered after a stop, the second
    /// when the thread ends.
    pub(super) fn start(
        self,
    ) -> Result<(oneshot::Receiver<()>, oneshot::Receiver<()>), DaemonError> {
        let (drained, on_drained) = oneshot::channel();
        let (ended, on_ended) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(DaemonError::Runtime)?;
        std::thread::Builder::new()
            .name("tallyd-ingest".to_owned())
            .spawn(move || {
                LocalSet::new().block_on(&runtime, self.run(drained));
                // Whether anyone still listens does not matter.
                let _ = ended.send(());
            })
            .map_err(DaemonError::Runtime)?;
        Ok((on_drained, on_ended))
    }

    async fn run(self, drained: oneshot::Sender<()>) {
        let listener = match TokioListener::from_std(self.listener) {
            Ok(listener) => listener,
            Err(error) => {
                error!(%error, "cannot listen");
                return;
            }
        };
        let core = Core::new(self.parts);
        let serving = {
            let core = Rc::clone(&core);
            async move {
                listener::serve(core, listener, self.stop, TaskTracker::new()).await;
                let _ = drained.send(());
            }
        };
        let ticks = {
            let (core, health) = (Rc::clone(&core), self.health);
            async move {
                let mut tick = tokio::time::interval(TICK);
                loop {
                    tick.tick().await;
                    health.ingest_beat();
                    core.tick().await;
                }
            }
        };
        let reloads = {
            let core = Rc::clone(&core);
            let mut access = self.access;
            async move {
                while access.changed().await.is_ok() {
                    *core.access.borrow_mut() = access.borrow_and_update().clone();
                }
                // Nothing is reloaded any more: the daemon is stopping.
                std::future::pending::<()>().await;
            }
        };
        let durable = {
            let core = Rc::clone(&core);
            async move {
                let open = || core.state.borrow().writer.sync_handle();
                core.durable.run(&core.stats, open).await;
            }
        };
        // Ends when the stages are gone; until then batches may settle, also after the last client.
        let listening = core.listen(self.messages);
        tokio::pin!(serving, ticks, reloads, durable, listening);
        let mut served = false;
        loop {
            tokio::select! {
                () = &mut serving, if !served => served = true,
                () = &mut listening => return,
                () = &mut ticks => {}
                () = &mut reloads => {}
                () = &mut durable => return,
            }
        }
    }
}
