//! The flush stage: seals epochs, sends batches, finds out what became of them.
//!
//! Invariants:
//! 1. One batch is in flight at most, on a lane that nothing else uses.
//! 2. An epoch is sealed only when nothing sealed waits to be sent. While the store is away the
//!    open epoch goes on adding up, so what is pending is bounded by distinct keys, not by time.
//! 3. `applied` moves one batch at a time, and only when the store said so: by a reply, or by the
//!    token.
//! 4. A delta leaves the batch that it was sealed in only into the rejected file, and that is
//!    durable first.
//! 5. A segment's file is removed only after its last batch is applied, `retain` has passed, and
//!    `replicas` have it; or where a limit of the journal leaves no choice.
//! 6. On a full disk the epoch stays open for want of the next segment, unless its own cannot grow either
//!    or somebody waits for the flush: then the next one may begin without room, as the end of this one
//!    gives room back. What is kept only in case goes first.
//! 7. A sealed segment is made durable while it is sent, and the next one is sealed only after that:
//!    a power cut takes no more than what came since the last flush began. The store may then have
//!    batches of which the journal does not tell: recovery begins far above them.
//!
//! - [`seal`]: the end of an epoch
//! - [`send`]: batch by batch to the store
//! - [`standing`]: a new connection, and what its token tells
//! - [`retain`]: kept for a while, then removed
//! - [`tell`]: numbers and log
//!
//! Dropping the stage at any await is safe: what was not seen to be applied is recovered.

mod retain;
mod seal;
mod send;
mod standing;
mod tell;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{JoinError, JoinHandle, spawn_blocking, yield_now};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::link::{Announcement, Sending, Settled, Sums, ToCounters};
use crate::health::Health;
use crate::hot::Hot;
use crate::journal::rejected::RejectedFile;
use crate::journal::{Directory, Kept, Names, Sealed, Stuck, Writer};
use crate::repeats::Repeats;
use crate::stats::Stats;
use crate::store::{KeyError, Lane, RunId, Store, StoreError};
use crate::time::unix_ms;

/// First pause after a failure; it doubles with each further one, up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Segments retained at most: each is a file, all of which the next start reads. Epochs that end faster
/// than one in 30 ms are retained for less than 30 s.
const RETAINED_SEGMENTS_MAX: usize = 1000;
/// Between two counts of replicas that are too few: each may hold up flushing for the time-out.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);
/// Keys of one read.
const READ_KEYS_MAX: usize = 1000;
/// How often an idle stage shows that it is alive.
const BEAT: Duration = Duration::from_secs(1);
/// The longest that one request to the store may take without the stage being stuck. The store has
/// time-outs of its own, but a server that sends a byte now and then keeps to all of them for long.
const STORE_PATIENCE: Duration = Duration::from_secs(300);
/// The disk has no time-out, and no restart mends it; see [`Health`].
const DISK_PATIENCE: Duration = Duration::MAX;

/// What the stage is told.
#[derive(Debug)]
pub enum Command {
    /// Seal now; answer once all that was pending is in the store.
    Flush(oneshot::Sender<()>),
    /// Seal now, and end once all is in the store.
    Stop,
    /// A new interval between two flushes.
    SetInterval(Duration),
}

/// What of the journal is made durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durable {
    /// Nothing: the kernel writes when it likes.
    Nothing,
    /// Sealed segments.
    Sealed,
    /// Records too, before they are acknowledged: the segment must have a durable name by then.
    Records,
}

/// Where file work is done that takes its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileWork {
    /// On other threads, where it holds up no other stage.
    Apart,
    /// On the stage's own: for a simulation, in which no time passes meanwhile, and to wake another thread
    /// takes longer than the work.
    Here,
}

impl FileWork {
    /// Does it.
    ///
    /// # Errors
    /// It panicked.
    async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        match self {
            Self::Apart => spawn_blocking(work).await,
            Self::Here => {
                // Others have their turn before it is done, as they have with threads.
                yield_now().await;
                Ok(work())
            }
        }
    }
}

/// What the stage needs to know.
#[derive(Debug, Clone)]
pub struct FlushConfig {
    /// Between two flushes.
    pub interval: Duration,
    /// Where the store is, without its password: only to see whether that has changed.
    pub store_url: String,
    /// Whether tokens are used.
    pub exactly_once: bool,
    /// How long an applied segment is kept.
    pub retain: Duration,
    /// Bound on the bytes that such segments take on the disk.
    pub retained_bytes_max: usize,
    /// So many replicas must have it before it is let go.
    pub replicas: u32,
    /// How long they are waited for at a time.
    pub replicas_timeout: Duration,
    /// What a power cut may take.
    pub durable: Durable,
    /// Where it seals and makes segments.
    pub file_work: FileWork,
    /// Bound on the bytes of records that are not in the store.
    pub pending_bytes_max: usize,
}

/// Why the stage ended unasked.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// A segment cannot be sealed; everything in it is safe and is recovered at the next start.
    #[error("cannot seal a segment: {0}")]
    Seal(#[source] std::io::Error),
    /// The ingest thread is gone.
    #[error("the counters are gone")]
    Counters,
}

/// Everything the stage is built from.
pub struct Parts<S> {
    /// Where batches go.
    pub store: Arc<S>,
    /// Where segments come from.
    pub directory: Directory,
    /// Sealed by a former process, in order.
    pub segments: Vec<Sealed>,
    /// The last batch known to be in the store.
    pub applied: u64,
    /// Whether the open segment can grow.
    pub stuck: Stuck,
    /// For what the store refuses.
    pub rejected: RejectedFile,
    /// To the ingest thread.
    pub counters: mpsc::Sender<ToCounters>,
    /// To the publisher.
    pub publisher: mpsc::Sender<Announcement>,
    /// Announcements that the publisher had no room for.
    pub unannounced: Arc<AtomicU64>,
    /// From the daemon and from clients.
    pub commands: mpsc::Receiver<Command>,
    /// Rung when the open epoch has many keys.
    pub seal_wanted: Arc<Notify>,
    /// Numbers.
    pub stats: Arc<Stats>,
    /// Which keys change.
    pub hot: Arc<Hot>,
    /// How far the sealed epoch is sent.
    pub sending: Arc<Sending>,
    /// Where the stage shows that it comes round.
    pub health: Arc<Health>,
}

/// See the module's documentation.
pub struct Flush<S: Store> {
    config: FlushConfig,
    store: Arc<S>,
    directory: Arc<Mutex<Directory>>,
    names: Names,
    runs: Vec<RunId>,
    run: RunId,
    rejected: RejectedFile,
    counters: mpsc::Sender<ToCounters>,
    publisher: mpsc::Sender<Announcement>,
    unannounced: Arc<AtomicU64>,
    commands: mpsc::Receiver<Command>,
    seal_wanted: Arc<Notify>,
    stats: Arc<Stats>,
    hot: Arc<Hot>,
    sending: Arc<Sending>,
    health: Arc<Health>,

    /// By a segment's first batch, the Unix time in ms since which it may hold a delta: that of the
    /// attempt to seal before its own.
    since: BTreeMap<u64, u64>,
    /// When the stage was built: how old what a former process left is at least.
    begun_ms: u64,
    /// The last attempt to seal, in the same.
    attempted_ms: u64,
    /// Increments taken when an epoch was last sealed.
    increments: u64,
    /// Sealed, not wholly applied, in order.
    queue: VecDeque<Arc<Sealed>>,
    /// Wholly applied, kept in case that the store goes back, oldest first.
    retained: VecDeque<(Instant, Kept)>,
    /// Whether the store is still to be asked for what a former process has applied.
    unseen: bool,
    /// The next epoch's segment.
    standby: Option<Writer>,
    /// Whether the open segment can grow.
    stuck: Stuck,
    /// What the last epoch's records took.
    expected_bytes: usize,
    /// The last sealed segment, on its way to the disk.
    syncing: Option<JoinHandle<Result<(), String>>>,
    lane: Option<S::Lane>,
    /// What the lane's token names, once this run has signed it.
    token: Option<u64>,
    /// Whether something was written on the lane: replicas are counted for that and all before it.
    has_written: bool,
    /// When the store was last seen to have all that is `applied`.
    confirmed: Option<Instant>,
    /// Whether the store has moved since it was last connected to.
    has_moved: bool,
    /// The last batch that enough replicas are known to have.
    replicated: u64,
    /// Whether the replicas that have it were too few, and when they are counted again.
    are_few: bool,
    count_due: Instant,
    applied: u64,
    uncertain: bool,
    claimed: bool,
    ever_claimed: bool,
    /// No former process has used a higher batch number.
    numbered: u64,
    /// As last seen, by a former process if this one has not seen it.
    server: Option<String>,
    /// The store that has what was applied, and where it was.
    store_known: Option<(String, String)>,
    /// Batches up to this one went to another store.
    floor: u64,
    /// Whether the directory tells this server.
    server_is_noted: bool,
    clock: u64,
    /// By batch and index: deltas that are in the rejected file, or (at-least-once) already taken.
    done: HashMap<u64, BTreeMap<usize, Settled>>,
    /// By batch: the amounts of those of its deltas that are in the store, or rejected, but not settled yet.
    sums: HashMap<u64, Sums>,
    warned: HashSet<String>,
    /// The next pause while the store is in trouble.
    pause: Duration,
    lines: Lines,
    arrivals: Vec<oneshot::Sender<()>>,
    stopping: bool,
}

/// What the log is told of that may happen with every batch.
#[derive(Default)]
struct Lines {
    trouble: Repeats,
    refused: Repeats,
    unwritten: Repeats,
    unsynced: Repeats,
    files: Repeats,
    crowded: Repeats,
    replicas: Repeats,
    unreplicated: Repeats,
}

/// Why a step was not finished; it is tried again.
enum Pause {
    /// At once, on a new connection.
    None,
    /// After a while.
    Trouble(StoreError),
    /// As above; not the store's fault.
    Own(String),
}

impl<S: Store> Flush<S> {
    const STORE_PATIENCE: Duration = if S::IS_LOCAL {
        DISK_PATIENCE
    } else {
        STORE_PATIENCE
    };

    /// Builds the stage; nothing runs yet.
    pub fn new(config: FlushConfig, parts: Parts<S>) -> Self {
        let identity = parts.directory.identity();
        let server = parts.directory.server().map(str::to_owned);
        let floor = parts.directory.floor();
        let store_known = parts.directory.store();
        let store_known = store_known.map(|(id, url)| (id.to_owned(), url.to_owned()));
        Flush {
            config,
            store: parts.store,
            runs: parts.directory.runs().to_vec(),
            run: identity.run,
            ever_claimed: parts.directory.ever_claimed(),
            numbered: parts.directory.numbered(),
            names: parts.directory.names(),
            directory: Arc::new(Mutex::new(parts.directory)),
            rejected: parts.rejected,
            counters: parts.counters,
            publisher: parts.publisher,
            unannounced: parts.unannounced,
            commands: parts.commands,
            seal_wanted: parts.seal_wanted,
            stats: parts.stats,
            hot: parts.hot,
            sending: parts.sending,
            health: parts.health,
            // A former process may have sent the next batch without living to see the reply.
            uncertain: parts
                .segments
                .last()
                .is_some_and(|last| last.last_batch() > parts.applied),
            since: BTreeMap::new(),
            attempted_ms: unix_ms(),
            begun_ms: unix_ms(),
            increments: 0,
            queue: parts.segments.into_iter().map(Arc::new).collect(),
            retained: VecDeque::new(),
            unseen: false,
            standby: None,
            stuck: parts.stuck,
            expected_bytes: 0,
            syncing: None,
            lane: None,
            token: None,
            has_written: false,
            confirmed: None,
            has_moved: false,
            replicated: 0,
            are_few: false,
            count_due: Instant::now(),
            applied: parts.applied,
            claimed: false,
            server,
            store_known,
            floor,
            server_is_noted: false,
            clock: 0,
            done: HashMap::new(),
            sums: HashMap::new(),
            warned: HashSet::new(),
            pause: PAUSE_MIN,
            lines: Lines::default(),
            arrivals: Vec::new(),
            stopping: false,
        }
    }

    /// Runs until told to stop, and until then all is in the store.
    ///
    /// # Errors
    /// See [`FlushError`].
    ///
    /// # Cancel safety
    /// May be dropped at any time; nothing acknowledged is lost or counted twice.
    pub async fn run(mut self) -> Result<(), FlushError> {
        let ended = self.work().await;
        // Nothing more is to be heard from here.
        self.health.flush_may_take(Duration::MAX);
        ended
    }

    async fn work(&mut self) -> Result<(), FlushError> {
        on_disk(&Arc::clone(&self.health), || self.adopt_rejected());
        self.keep_applied();
        let mut tick = ticks(self.config.interval);
        self.gauge();
        loop {
            self.health.flush_beat();
            // What a former process left comes first; later rounds find the queue empty here.
            self.drain().await?;
            // Room is to be had at once where something is kept only in case.
            let makes_room = self.stuck.get() && !self.retained.is_empty();
            if self.arrivals.is_empty() && !self.stopping && !makes_room {
                self.idle(&mut tick).await;
            }
            while let Ok(command) = self.commands.try_recv() {
                self.take(Some(command));
            }
            if tick.period() != self.config.interval {
                tick = ticks(self.config.interval);
            }
            let waiting = std::mem::take(&mut self.arrivals);
            let stopping = self.stopping;
            let sealed = self.seal(stopping || !waiting.is_empty()).await?;
            self.drain().await?;
            self.confirm().await?;
            // It may have found out that the store went back: then not all is there.
            self.drain().await?;
            self.release();
            if !sealed {
                // The disk is full, or so: what is pending is safe, but not in the store.
                self.arrivals.extend(waiting);
                tokio::time::sleep(PAUSE_MIN).await;
                continue;
            }
            for done in waiting {
                // Behind the messages that settle, so that whoever asked finds nothing pending.
                self.tell(ToCounters::Flushed(done)).await?;
            }
            if stopping {
                self.synced().await;
                return Ok(());
            }
        }
    }

    /// Until there is something to do.
    async fn idle(&mut self, tick: &mut Interval) {
        loop {
            tokio::select! {
                biased;
                command = self.commands.recv() => return self.take(command),
                () = self.seal_wanted.notified() => return,
                _ = tick.tick() => return,
                () = left(&mut self.lane) => {
                    // What the store lost by moving is sent again now, not with the next increment.
                    self.has_moved = self.config.exactly_once;
                    let _ = self.drop_lane(Pause::None);
                    return;
                }
                () = tokio::time::sleep(BEAT) => {
                    self.health.flush_beat();
                    // It could not be reached where it has moved; or others may have made room, and clients
                    // wait for it.
                    if self.stuck.get() || self.has_moved && !self.retained.is_empty() {
                        return;
                    }
                }
            }
        }
    }

    fn take(&mut self, command: Option<Command>) {
        match command {
            Some(Command::Flush(done)) => self.arrivals.push(done),
            Some(Command::SetInterval(interval)) => self.config.interval = interval,
            Some(Command::Stop) | None => self.stopping = true,
        }
    }

    /// Deltas of unapplied batches that a former process has already rejected stay out of them.
    fn adopt_rejected(&mut self) {
        let lock = self
            .directory
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let lines = crate::journal::rejected::read(lock.path()).unwrap_or_default();
        drop(lock);
        let mut keys: HashMap<u64, HashMap<Vec<u8>, String>> = HashMap::new();
        for line in lines.into_iter().flatten() {
            if let Some(key) = line.key_bytes() {
                keys.entry(line.batch).or_default().insert(key, line.reason);
            }
        }
        for segment in &self.queue {
            for batch in segment.first_batch()..=segment.last_batch() {
                let Some(keys) = keys.get(&batch) else {
                    continue;
                };
                for (index, delta) in segment.batch(batch).enumerate() {
                    if let Some(reason) = keys.get(delta.key) {
                        let settled = Settled::Rejected(KeyError::Other(reason.clone()));
                        let sums = self.sums.entry(batch).or_default();
                        sums.rejected = sums.rejected.wrapping_add(delta.amount);
                        self.done.entry(batch).or_default().insert(index, settled);
                    }
                }
            }
        }
    }

    async fn tell(&mut self, message: ToCounters) -> Result<(), FlushError> {
        self.counters
            .send(message)
            .await
            .map_err(|_| FlushError::Counters)?;
        self.health.flush_beat();
        Ok(())
    }
}

/// Until the lane, if there is one, is of no more use.
async fn left<L: Lane>(lane: &mut Option<L>) {
    match lane {
        Some(lane) => lane.left().await,
        None => std::future::pending().await,
    }
}

/// Waits for something that may take so long.
async fn within<T>(health: &Health, limit: Duration, work: impl Future<Output = T>) -> T {
    health.flush_may_take(limit);
    let done = work.await;
    health.flush_beat();
    done
}

/// File work that is too small to be handed to another thread.
fn on_disk<T>(health: &Health, work: impl FnOnce() -> T) -> T {
    health.flush_may_take(DISK_PATIENCE);
    let done = work();
    health.flush_beat();
    done
}

/// The first tick comes after one period, as what a former process left has been flushed by then.
fn ticks(period: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
