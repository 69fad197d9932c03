//! The assembly: builds every room, owns every task, and ends them in order.
//!
//! Two threads: *ingest*, which owns the counters and serves the clients, and *stages* (the
//! caller's), which flushes, publishes and loads. They speak through bounded queues only. A third
//! is the *admin* server's, where one is asked for: it only reads shared numbers.
//!
//! The end has phases, all within `shutdown.timeout`: the listener closes; each client is answered
//! what it has sent; the epoch is sealed and flushed; what was flushed is published. What is not
//! done by then is in the journal. The admin server tells of all this, and ends last.

mod attend;
mod descriptors;
mod ingest_thread;
mod lookout;
mod rooms;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::admin::{self, AdminError};
use crate::config::Config;
use crate::counters::{Table, TableLimits};
use crate::flush::stage::Parts as FlushParts;
use crate::flush::{Flush, FlushError, Heard, Sending};
use crate::health::{Health, Phase};
use crate::hot::Hot;
use crate::ingest::core::Parts as CoreParts;
use crate::ingest::loads::READS_MAX;
use crate::journal::format::record_bytes;
use crate::journal::rejected::RejectedFile;
use crate::journal::{Directory, JournalError, Recovery, Writer};
use crate::private::Narrowed;
use crate::socket::{self, ListenError};
use crate::stats::Stats;
use crate::store::embedded::EmbeddedStore;
use crate::store::redis::RedisStore;
use crate::store::{Identity, Store, StoreError};
use crate::sync::loader::Loader;
use crate::sync::message::Head;
use crate::sync::publisher::Publisher;
use crate::sync::subscriber::Subscriber;
use crate::systemd::Manager;
use crate::systemd::watch::Watch;
use attend::{Ended, Stages, Told, Watched, attend, finish};
use descriptors::Connections;
use ingest_thread::IngestThread;
use lookout::Lookout;

/// Messages to the counters that may wait; a settled batch is the largest of them.
const TO_COUNTERS: usize = 64;
/// Batches that may wait for the publisher; beyond it receivers see a gap.
const ANNOUNCEMENTS: usize = 256;
/// Commands to the flush stage that may wait.
const COMMANDS: usize = 1024;

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
    /// The admin server.
    #[error(transparent)]
    Admin(#[from] AdminError),
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
    let connections = descriptors::divide(&config);
    let shared = Shared::default();
    // Before the journal is recovered, which may take a while: it says so.
    let admin = rooms::admin(&config, &shared, connections)?;
    let bytes_max = config.limits.max_pending_bytes as usize;
    let (directory, recovery, writer) = Directory::open(
        &config.node.state_dir,
        config.flush.batch_keys as u32,
        bytes_max,
    )?;
    let identity = directory.identity();
    if let Some(admin) = &admin {
        admin.node_is(identity.node.to_string());
    }
    let daemon = Daemon {
        config,
        directory,
        recovery,
        writer,
        shared,
        admin,
        connections,
    };
    match rooms::redis(&daemon.config) {
        None => {
            let path = daemon.config.node.state_dir.join("store.redb");
            let store = EmbeddedStore::open(&path, identity)?;
            daemon.run(store, surroundings, events, ready).await
        }
        Some(redis) => {
            let store = RedisStore::new(redis, identity);
            daemon.run(store, surroundings, events, ready).await
        }
    }
}

struct Daemon {
    config: Config,
    directory: Directory,
    recovery: Recovery,
    writer: Writer,
    shared: Shared,
    admin: Option<admin::Server>,
    connections: Connections,
}

/// What every thread may write to or read.
#[derive(Default)]
struct Shared {
    stats: Arc<Stats>,
    health: Arc<Health>,
    hot: Arc<Hot>,
}

impl Daemon {
    async fn run<S: Store>(
        self,
        store: S,
        surroundings: Surroundings,
        events: mpsc::Receiver<Event>,
        ready: impl FnOnce(&Arc<Stats>),
    ) -> Result<(), DaemonError> {
        let Daemon {
            mut config,
            directory,
            recovery,
            writer,
            shared: Shared { stats, health, hot },
            mut admin,
            connections,
        } = self;
        stats.pending_bytes_max.set(config.limits.max_pending_bytes);
        stats.view_bytes_max.set(config.limits.max_view_bytes);
        let Surroundings {
            socket: held,
            manager,
        } = surroundings;
        let identity = directory.identity();
        let place = directory.place()?;
        tell_narrowed(&recovery.narrowed);
        let rejected = open_rejected(directory.path())?;
        let table = recovered_table(&config, &recovery, &stats);
        // Before the socket, so that a wrong name leaves none behind.
        let access = rooms::access(&config)?;
        let is_held = held.is_some();
        let listener = match held {
            Some(held) => held,
            None => socket::bind(
                "listen.socket",
                &config.listen.socket,
                config.listen.mode,
                config.listen.group.as_deref(),
            )?,
        };
        let address = address_of(&listener);

        let stuck = writer.stuck();
        let (to_counters, counters) = mpsc::channel(TO_COUNTERS);
        let (announce, announcements) = mpsc::channel(ANNOUNCEMENTS);
        let (want, wanted) = mpsc::channel(READS_MAX);
        let (flush_commands, commands) = mpsc::channel(COMMANDS);
        let seal_wanted = Arc::new(Notify::new());
        let unannounced = Arc::new(AtomicU64::new(0));
        let heard = Arc::new(Heard::default());
        let sending = Arc::new(Sending::default());
        let store = Arc::new(store);
        let stop = CancellationToken::new();
        let unwanted = CancellationToken::new();

        let (access_changed, access_changes) = watch::channel(access.clone());
        let ingest = IngestThread {
            access: access_changes,
            parts: CoreParts {
                config: rooms::ingest(&config, connections),
                access,
                table,
                writer,
                stats: Arc::clone(&stats),
                wanted: want,
                heard: Arc::clone(&heard),
                flush: flush_commands.clone(),
                seal_wanted: Arc::clone(&seal_wanted),
                hot: Arc::clone(&hot),
            },
            listener,
            messages: counters,
            stop: stop.clone(),
            health: Arc::clone(&health),
        };
        let flush = Flush::new(
            rooms::flush(&config),
            FlushParts {
                store: Arc::clone(&store),
                directory,
                segments: recovery.segments,
                applied: recovery.applied,
                stuck,
                rejected,
                counters: to_counters.clone(),
                publisher: announce,
                unannounced: Arc::clone(&unannounced),
                commands,
                seal_wanted,
                stats: Arc::clone(&stats),
                hot,
                sending: Arc::clone(&sending),
                health: Arc::clone(&health),
            },
        );
        let head = Head::new(identity, &config.node.name);
        let publisher = Publisher {
            store: Arc::clone(&store),
            head: head.clone(),
            enabled: config.publish.enabled,
            heartbeat: config.publish.heartbeat,
            announcements,
            unannounced,
            counters: to_counters.clone(),
            stats: Arc::clone(&stats),
        };
        let subscriber = Subscriber {
            store: Arc::clone(&store),
            head,
            heartbeat: config.publish.enabled.then_some(config.publish.heartbeat),
            counters: to_counters.clone(),
            stop: unwanted.clone(),
            stats: Arc::clone(&stats),
        };
        let from_lookout = to_counters.clone();
        let followed = Arc::clone(&store);
        let followed_until = unwanted.clone();
        let loader = Loader {
            store,
            wanted,
            counters: to_counters,
            stop: unwanted.clone(),
            heard,
            sending,
            stats: Arc::clone(&stats),
        };

        let lookout = Lookout {
            place,
            health: Arc::clone(&health),
            counters: from_lookout,
            stop: unwanted.clone(),
        };

        let (drained, ended) = ingest.start()?;
        let mut stages = Stages::new();
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
        stages.spawn(async move {
            lookout.run().await;
            Ok("lookout")
        });
        stages.spawn(async move {
            followed_until.run_until_cancelled(followed.follow()).await;
            Ok("follower of the store")
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
        let told = Told {
            flush: &flush_commands,
            access: &access_changed,
            manager: &manager,
        };
        let watched = Watched {
            stages: &mut stages,
            ingest: &mut ended,
            admin: &mut admin,
        };
        attend(&mut config, events, told, watched).await?;
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
        if let Some(admin) = admin {
            admin.stop().await;
        }
        info!("stopped");
        Ok(())
    }
}

/// A table that knows what is pending.
fn recovered_table(config: &Config, recovery: &Recovery, stats: &Stats) -> Table {
    let mut table = Table::new(TableLimits {
        bytes_max: config.limits.max_view_bytes as usize,
        pending_keys_max: config.limits.max_pending_bytes as usize / record_bytes(1),
    });
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
    if let Some(error) = &recovery.cramped {
        warn!(
            "the disk is full: increments are refused until there is room, which what is pending \
             gives back once it is flushed ({error})"
        );
    }
    table
}

fn tell_narrowed(narrowed: &Narrowed) {
    if let Some((path, mode)) = &narrowed.first {
        warn!(
            files = narrowed.count,
            "the state directory was open to other users, and is no longer: {} had mode {mode:o}",
            path.display()
        );
    }
    if let Some((path, mode)) = &narrowed.left {
        warn!(
            "other users may reach into the state directory: {} has mode {mode:o} and belongs to \
             another user, so it cannot be narrowed here",
            path.display()
        );
    }
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
