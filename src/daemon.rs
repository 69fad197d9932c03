//! The assembly: builds every room, owns every task, and ends them in order.
//!
//! Two threads: *ingest*, which owns the counters and serves the clients, and *stages* (the
//! caller's), which flushes, publishes and loads. They speak through bounded queues only.
//!
//! The end has phases, all within `shutdown.timeout`: the listener closes; each client is answered
//! what it has sent; the epoch is sealed and flushed; what was flushed is published. What is not
//! done by then is in the journal.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::net::UnixListener as TokioListener;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::{JoinSet, LocalSet};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::config::{Cold, Config, Delivery, SyncPolicy};
use crate::counters::{Table, TableLimits};
use crate::flush::stage::{Durable, Parts as FlushParts, RETAINED_SEGMENTS_MAX};
use crate::flush::{Command, Flush, FlushConfig, FlushError, Heard, ToCounters};
use crate::health::{Health, Phase};
use crate::ingest::core::{Core, Parts as CoreParts};
use crate::ingest::listener::{self, ListenError};
use crate::ingest::{Access, IngestConfig};
use crate::journal::rejected::RejectedFile;
use crate::journal::{Directory, JournalError, Recovery, Writer};
use crate::stats::Stats;
use crate::store::embedded::EmbeddedStore;
use crate::store::redis::{self, RedisConfig, RedisStore};
use crate::store::{Identity, Store, StoreError};
use crate::sync::loader::Loader;
use crate::sync::publisher::Publisher;
use crate::sync::subscriber::Subscriber;
use crate::systemd::Manager;
use crate::systemd::watch::Watch;

/// Messages to the counters that may wait; a settled batch is the largest of them.
const TO_COUNTERS: usize = 64;
/// Batches that may wait for the publisher; beyond it receivers see a gap.
const ANNOUNCEMENTS: usize = 256;
/// Requests for values that may wait.
const WANTED: usize = 1024;
/// Commands to the flush stage that may wait.
const COMMANDS: usize = 1024;
/// Values age, and gauges are set, so often.
const TICK: Duration = Duration::from_secs(1);

/// What the world tells the daemon.
#[derive(Debug)]
pub enum Event {
    /// Finish and end.
    Stop,
    /// Flush now.
    Flush,
    /// A configuration whose changeable part is to be taken over.
    Reload(Box<Config>),
}

/// What whoever started the process has handed over.
#[derive(Debug, Default)]
pub struct Surroundings {
    /// A listening socket that outlives the process.
    pub socket: Option<UnixListener>,
    /// Who wants to know how the daemon is.
    pub manager: Manager,
}

/// Why the daemon did not start, or ended unasked.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The state directory.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The embedded store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The rejected file.
    #[error("{path}: {source}")]
    Rejected {
        /// Which file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A thread or a runtime could not be had.
    #[error("cannot start: {0}")]
    Runtime(#[source] io::Error),
    /// The flush stage ended; the journal keeps what is pending.
    #[error("the flush stage ended: {0}")]
    Flush(#[from] FlushError),
    /// A task ended that should not.
    #[error("the {0} ended unasked; what is pending is in the journal")]
    Ended(&'static str),
}

/// Runs a daemon until it is told to stop. `ready` is called once clients can connect.
///
/// # Errors
/// See [`DaemonError`].
pub async fn run(
    config: Config,
    surroundings: Surroundings,
    events: mpsc::Receiver<Event>,
    ready: impl FnOnce(&Arc<Stats>),
) -> Result<(), DaemonError> {
    surroundings.manager.status("recovering");
    raise_descriptor_limit(config.listen.max_connections);
    let bytes_max = config.limits.max_pending_bytes as usize;
    let (directory, recovery, writer) = Directory::open(
        &config.node.state_dir,
        config.flush.batch_keys as u32,
        bytes_max,
    )?;
    let identity = directory.identity();
    match config.store.url.connection_info() {
        None => {
            let store = EmbeddedStore::open(&config.node.state_dir.join("store.redb"), identity)?;
            Daemon {
                config,
                directory,
                recovery,
                writer,
                store,
            }
            .run(surroundings, events, ready)
            .await
        }
        Some(info) => {
            let store = RedisStore::new(
                RedisConfig {
                    info: info.clone(),
                    delivery: match config.flush.delivery {
                        Delivery::ExactlyOnce => redis::Delivery::ExactlyOnce,
                        Delivery::AtLeastOnce => redis::Delivery::AtLeastOnce,
                    },
                    channel: config.publish.channel.clone(),
                    timeouts: redis::Timeouts::default(),
                },
                identity,
            );
            Daemon {
                config,
                directory,
                recovery,
                writer,
                store,
            }
            .run(surroundings, events, ready)
            .await
        }
    }
}

struct Daemon<S> {
    config: Config,
    directory: Directory,
    recovery: Recovery,
    writer: Writer,
    store: S,
}

impl<S: Store> Daemon<S> {
    async fn run(
        self,
        surroundings: Surroundings,
        events: mpsc::Receiver<Event>,
        ready: impl FnOnce(&Arc<Stats>),
    ) -> Result<(), DaemonError> {
        let Daemon {
            mut config,
            directory,
            recovery,
            writer,
            store,
        } = self;
        let Surroundings { socket, manager } = surroundings;
        let stats = Arc::new(Stats::default());
        let health = Arc::new(Health::default());
        let identity = directory.identity();
        let rejected = open_rejected(directory.path())?;
        let table = recovered_table(&config, &recovery, &stats);
        // Before the socket, so that a wrong name leaves none behind.
        let access = access(&config)?;
        let is_held = socket.is_some();
        let listener = match socket {
            Some(held) => held,
            None => listener::bind(
                &config.listen.socket,
                config.listen.mode,
                config.listen.group.as_deref(),
            )?,
        };
        let address = address_of(&listener);

        let (to_counters, counters) = mpsc::channel(TO_COUNTERS);
        let (announce, announcements) = mpsc::channel(ANNOUNCEMENTS);
        let (want, wanted) = mpsc::channel(WANTED);
        let (flush_commands, commands) = mpsc::channel(COMMANDS);
        let seal_wanted = Arc::new(Notify::new());
        let unannounced = Arc::new(AtomicU64::new(0));
        let heard = Arc::new(Heard::default());
        let store = Arc::new(store);
        let stop = CancellationToken::new();
        let unwanted = CancellationToken::new();

        let (access_changed, access_changes) = watch::channel(access.clone());
        let ingest = IngestThread {
            access: access_changes,
            parts: CoreParts {
                config: ingest_config(&config),
                access,
                table,
                writer,
                stats: Arc::clone(&stats),
                wanted: want,
                heard: Arc::clone(&heard),
                flush: flush_commands.clone(),
                seal_wanted: Arc::clone(&seal_wanted),
            },
            listener,
            messages: counters,
            stop: stop.clone(),
            health: Arc::clone(&health),
        };
        let flush = Flush::new(
            flush_config(&config),
            FlushParts {
                store: Arc::clone(&store),
                directory,
                segments: recovery.segments,
                applied: recovery.applied,
                rejected,
                counters: to_counters.clone(),
                publisher: announce,
                unannounced: Arc::clone(&unannounced),
                commands,
                seal_wanted,
                stats: Arc::clone(&stats),
                health: Arc::clone(&health),
            },
        );
        let publisher = Publisher {
            store: Arc::clone(&store),
            identity,
            name: config.node.name.clone(),
            enabled: config.publish.enabled,
            heartbeat: config.publish.heartbeat,
            announcements,
            unannounced,
            counters: to_counters.clone(),
            stats: Arc::clone(&stats),
        };
        let subscriber = Subscriber {
            store: Arc::clone(&store),
            identity,
            heartbeat: config.publish.enabled.then_some(config.publish.heartbeat),
            counters: to_counters.clone(),
            stop: unwanted.clone(),
            stats: Arc::clone(&stats),
        };
        let loader = Loader {
            store,
            wanted,
            counters: to_counters,
            stop: unwanted.clone(),
            heard,
            stats: Arc::clone(&stats),
        };

        let (drained, ended) = ingest.start()?;
        let mut stages = JoinSet::new();
        stages.spawn(async move { flush.run().await.map(|()| "flush stage") });
        stages.spawn(async move {
            publisher.run().await;
            Ok("publisher")
        });
        stages.spawn(async move {
            subscriber.run().await;
            Ok("subscriber")
        });
        stages.spawn(async move {
            loader.run().await;
            Ok("loader")
        });
        // From here on both must be heard of.
        health.ingest_beat();
        health.flush_beat();
        health.set_phase(Phase::Ready);
        let watch = Watch::start(&manager, Arc::clone(&stats), Arc::clone(&health))
            .map_err(DaemonError::Runtime)?;
        tell_ready(&config, identity, &address, is_held);
        ready(&stats);
        manager.ready();

        let mut ended = Ended(ended);
        attend(
            &mut config,
            events,
            &flush_commands,
            &access_changed,
            &mut stages,
            &mut ended,
            &manager,
        )
        .await?;
        health.set_phase(Phase::Stopping);
        manager.stopping();
        info!("stopping: no more connections, then a last flush");
        stop.cancel();
        // A client that does not read its answers must not keep the rest from being flushed.
        let drained = tokio::time::timeout(config.shutdown.timeout / 2, drained);
        let end = finish(drained, unwanted, flush_commands, &mut stages, ended);
        let ended = tokio::time::timeout(config.shutdown.timeout, end).await;
        drop(watch);
        if ended.is_ok() {
            manager.status("stopped");
        } else {
            manager.status("stopped; what is pending is in the journal");
            warn!(
                seconds = config.shutdown.timeout.as_secs_f32(),
                keys = stats.sealed_keys.get() + stats.epoch_keys.get(),
                "shutdown.timeout has passed; what is pending stays in the journal"
            );
        }
        if !is_held {
            // It may have been replaced by a successor's: the path is all that can be compared.
            let _ = std::fs::remove_file(&config.listen.socket);
        }
        info!("stopped");
        Ok(())
    }
}

/// Resolves when the ingest thread is gone.
struct Ended(oneshot::Receiver<()>);

/// Until told to stop: passes on what the world says, and watches over the tasks.
async fn attend(
    config: &mut Config,
    mut events: mpsc::Receiver<Event>,
    flush: &mpsc::Sender<Command>,
    access_changed: &watch::Sender<Access>,
    stages: &mut JoinSet<Result<&'static str, FlushError>>,
    ingest: &mut Ended,
    manager: &Manager,
) -> Result<(), DaemonError> {
    loop {
        tokio::select! {
            event = events.recv() => match event {
                None | Some(Event::Stop) => return Ok(()),
                Some(Event::Flush) => {
                    let (done, _) = oneshot::channel();
                    // A full queue means that flushing is what it is at.
                    let _ = flush.try_send(Command::Flush(done));
                }
                Some(Event::Reload(new)) => {
                    let interval = new.flush.interval;
                    config.reload_from(&new);
                    let _ = flush.try_send(Command::SetInterval(interval));
                    // Names are looked up anew, also if the configuration says the same.
                    match access(config) {
                        Ok(access) => drop(access_changed.send_replace(access)),
                        Err(error) => error!("who may connect and which keys are allowed stay as they were: {error}"),
                    }
                    manager.reloaded();
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
        }
    }
}

async fn finish(
    drained: impl Future,
    unwanted: CancellationToken,
    flush: mpsc::Sender<Command>,
    stages: &mut JoinSet<Result<&'static str, FlushError>>,
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

/// What moves to the ingest thread.
struct IngestThread {
    access: watch::Receiver<Access>,
    parts: CoreParts,
    listener: UnixListener,
    messages: mpsc::Receiver<ToCounters>,
    stop: CancellationToken,
    health: Arc<Health>,
}

impl IngestThread {
    /// Starts it. The first receiver hears when all clients are answered after a stop, the second
    /// when the thread ends.
    fn start(self) -> Result<(oneshot::Receiver<()>, oneshot::Receiver<()>), DaemonError> {
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
                    core.tick();
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

/// A table that knows what is pending.
fn recovered_table(config: &Config, recovery: &Recovery, stats: &Stats) -> Table {
    let bytes_max = config.limits.max_view_bytes as usize;
    let mut table = Table::new(TableLimits { bytes_max });
    let mut keys = 0;
    for segment in &recovery.segments {
        for batch in segment.first_batch().max(recovery.applied + 1)..=segment.last_batch() {
            for delta in segment.batch(batch) {
                table.restore(delta.key, delta.amount);
                keys += 1;
            }
        }
    }
    for damage in &recovery.damage {
        error!("damaged: {damage}");
    }
    stats.damaged_files.set(recovery.damage.len() as u64);
    if keys > 0 {
        info!(keys, "recovered what a former process had not flushed");
    }
    table
}

fn open_rejected(state_dir: &Path) -> Result<RejectedFile, DaemonError> {
    RejectedFile::open(state_dir).map_err(|source| DaemonError::Rejected {
        path: state_dir
            .join(crate::journal::rejected::REJECTED_FILE)
            .display()
            .to_string(),
        source,
    })
}

fn access(config: &Config) -> Result<Access, ListenError> {
    Access::find(
        &config.listen.allow_uids,
        &config.listen.allow_gids,
        &config.limits.allow_keys,
    )
}

fn ingest_config(config: &Config) -> IngestConfig {
    IngestConfig {
        key_bytes_max: config.limits.max_key_bytes,
        epoch_keys_max: config.flush.max_keys,
        load: config.reply.cold == Cold::Load,
        load_timeout: config.reply.load_timeout,
        view_age_max: config.view.max_age,
        sync_always: config.journal.sync == SyncPolicy::Always,
        connections_max: config.listen.max_connections,
        channel: config.publish.channel.clone(),
    }
}

fn flush_config(config: &Config) -> FlushConfig {
    FlushConfig {
        interval: config.flush.interval,
        exactly_once: config.flush.delivery == Delivery::ExactlyOnce
            || config.store.url.connection_info().is_none(),
        retain: config.flush.retain,
        durable: match config.journal.sync {
            SyncPolicy::Never => Durable::Nothing,
            SyncPolicy::Interval => Durable::Sealed,
            SyncPolicy::Always => Durable::Records,
        },
        pending_bytes_max: config.limits.max_pending_bytes as usize,
    }
}

/// Where a socket listens; empty when it has no name.
fn address_of(listener: &UnixListener) -> PathBuf {
    listener
        .local_addr()
        .ok()
        .and_then(|address| Some(address.as_pathname()?.to_owned()))
        .unwrap_or_default()
}

fn tell_ready(config: &Config, identity: Identity, address: &Path, is_held: bool) {
    if is_held {
        info!(
            "systemd holds the socket: its unit sets path, mode and group, in place of \
             listen.socket, listen.mode and listen.group"
        );
        if address != config.listen.socket {
            warn!(
                "listen.socket is {}, where tallyd's own clients would look in vain",
                config.listen.socket.display()
            );
        }
    }
    info!(
        socket = %address.display(),
        store = %config.store.url,
        node = %identity.node,
        "ready"
    );
}

/// Room for the connections that are allowed and the segments that are retained; the system's hard limit may still be lower, and is
/// then met when accepting.
fn raise_descriptor_limit(connections: usize) {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = (connections + RETAINED_SEGMENTS_MAX) as u64 + 128;
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = Some(limit.maximum.map_or(wanted, |hard| hard.min(wanted)));
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            warn!(%error, "cannot raise the limit of open files");
        }
    }
}
