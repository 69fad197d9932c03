//! Between ready and ended: who is told what the world says, and who must not end before.

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::{DaemonError, Event, rooms};
use crate::admin;
use crate::config::Config;
use crate::flush::{Command, FlushError};
use crate::ingest::Access;
use crate::systemd::Manager;

/// The tasks of the stages; each returns its name.
pub(super) type Stages = JoinSet<Result<&'static str, FlushError>>;

/// Resolves when the ingest thread is gone.
pub(super) struct Ended(pub(super) oneshot::Receiver<()>);

/// Whom the world's events are passed on to.
pub(super) struct Told<'a> {
    pub flush: &'a mpsc::Sender<Command>,
    pub access: &'a watch::Sender<Access>,
    pub manager: &'a Manager,
}

/// Who must not end unasked.
pub(super) struct Watched<'a> {
    pub stages: &'a mut Stages,
    pub ingest: &'a mut Ended,
    pub admin: &'a mut Option<admin::Server>,
}

/// Until told to stop: passes on what the world says, and watches over the tasks.
pub(super) async fn attend(
    config: &mut Config,
    mut events: mpsc::Receiver<Event>,
    told: Told<'_>,
    watched: Watched<'_>,
) -> Result<(), DaemonError> {
    let Watched {
        stages,
        ingest,
        admin,
    } = watched;
    let admin_ended = async {
        match admin {
            Some(admin) => admin.ended().await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(admin_ended);
    loop {
        tokio::select! {
            event = events.recv() => match event {
                None | Some(Event::Stop) => return Ok(()),
                Some(Event::Flush) => {
                    let (done, _) = oneshot::channel();
                    // A full queue means that flushing is what it is at.
                    let _ = told.flush.try_send(Command::Flush(done));
                }
                Some(Event::Reload(new)) => {
                    let interval = new.flush.interval;
                    config.reload_from(&new);
                    let _ = told.flush.try_send(Command::SetInterval(interval));
                    // Names are looked up anew, also if the configuration says the same.
                    match rooms::access(config) {
                        Ok(access) => drop(told.access.send_replace(access)),
                        Err(error) => error!(
                            "who may connect and which keys are allowed stay as they were: {error}"
                        ),
                    }
                    told.manager.reloaded();
                }
            },
            ended = stages.join_next() => {
                return Err(match ended {
                    Some(Ok(Ok(name))) => DaemonError::Ended(name),
                    Some(Ok(Err(error))) => error.into(),
                    Some(Err(_)) | None => DaemonError::Ended("stages"),
                });
            }
            _ = &mut ingest.0 => return Err(DaemonError::Ended("ingest thread")),
            () = &mut admin_ended => return Err(DaemonError::Ended("admin server")),
        }
    }
}

/// The end, in its phases.
pub(super) async fn finish(
    drained: impl Future,
    unwanted: CancellationToken,
    flush: mpsc::Sender<Command>,
    stages: &mut Stages,
    ingest: Ended,
) {
    // Every client is answered before the last epoch is sealed.
    drained.await;
    unwanted.cancel();
    let _ = flush.send(Command::Stop).await;
    drop(flush);
    while let Some(ended) = stages.join_next().await {
        if let Ok(Err(error)) = ended {
            error!(%error, "the last flush failed; what is pending is in the journal");
        }
    }
    let _ = ingest.0.await;
}
