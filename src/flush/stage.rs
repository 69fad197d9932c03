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
//! 5. A segment's file is removed only after its last batch is applied and `retain` has passed.
//! 6. A sealed segment is made durable while it is sent, and the next one is sealed only after that:
//!    a power cut takes no more than what came since the last flush began. The store may then have
//!    batches of which the journal does not tell: recovery begins far above them.
//!
//! Dropping the stage at any await is safe: what was not seen to be applied is recovered.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Interval, MissedTickBehavior, interval_at};
use tracing::{error, info, warn};

use super::link::{Announcement, Closed, Settled, ToCounters};
use super::resolve::{Known, Verdict, resolve};
use crate::fail_point::fail_point;
use crate::health::Health;
use crate::hot::Hot;
use crate::journal::rejected::{Rejected, RejectedFile};
use crate::journal::{Directory, JournalError, Names, Sealed, Writer};
use crate::repeats::Repeats;
use crate::stats::{Number, Stats};
use crate::store::{Claim, Delta, KeyError, Lane, Outcome, Refusal, RunId, Store, StoreError};

/// First pause after a failure; it doubles with each further one, up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Segments retained at most: each holds a descriptor and a map. Epochs that end faster than one in
/// 30 ms are retained for less than 30 s.
pub const RETAINED_SEGMENTS_MAX: usize = 1000;
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

/// What the stage needs to know.
#[derive(Debug, Clone)]
pub struct FlushConfig {
    /// Between two flushes.
    pub interval: Duration,
    /// Whether tokens are used.
    pub exactly_once: bool,
    /// How long an applied segment is kept.
    pub retain: Duration,
    /// What a power cut may take.
    pub durable: Durable,
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
    /// Where somebody may look at it: which keys change.
    pub hot: Option<Arc<Hot>>,
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
    hot: Option<Arc<Hot>>,
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
    retained: VecDeque<(Instant, Arc<Sealed>)>,
    /// The next epoch's segment.
    standby: Option<Writer>,
    /// What the last epoch's records took.
    expected_bytes: usize,
    /// The last sealed segment, on its way to the disk.
    syncing: Option<JoinHandle<Result<(), String>>>,
    lane: Option<S::Lane>,
    /// What the lane's token names, once this run has signed it.
    token: Option<u64>,
    /// When the store was last seen to have all that is `applied`.
    confirmed: Option<Instant>,
    applied: u64,
    uncertain: bool,
    claimed: bool,
    ever_claimed: bool,
    /// No former process has used a higher batch number.
    numbered: u64,
    server: Option<String>,
    clock: u64,
    /// By batch and index: deltas that are in the rejected file, or (at-least-once) already taken.
    done: HashMap<u64, BTreeMap<usize, Settled>>,
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
            standby: None,
            expected_bytes: 0,
            syncing: None,
            lane: None,
            token: None,
            confirmed: None,
            applied: parts.applied,
            claimed: false,
            server: None,
            clock: 0,
            done: HashMap::new(),
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
        let mut tick = ticks(self.config.interval);
        self.gauge();
        loop {
            self.health.flush_beat();
            // What a former process left comes first; later rounds find the queue empty here.
            self.drain().await?;
            if self.arrivals.is_empty() && !self.stopping {
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
            let sealed = self.seal().await?;
            self.drain().await?;
            self.confirm().await?;
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
                () = tokio::time::sleep(BEAT) => self.health.flush_beat(),
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
                        self.done.entry(batch).or_default().insert(index, settled);
                    }
                }
            }
        }
    }

    /// Closes the epoch if it has records. `false`: no new segment can be had, so it stays open.
    async fn seal(&mut self) -> Result<bool, FlushError> {
        self.synced().await;
        let Some(next) = self.take_standby().await else {
            return Ok(false);
        };
        let begin = Instant::now();
        let since = std::mem::replace(&mut self.attempted_ms, unix_ms());
        let (closed, answer) = oneshot::channel();
        let message = ToCounters::Seal { next, closed };
        self.counters
            .send(message)
            .await
            .map_err(|_| FlushError::Counters)?;
        let writer = match answer.await.map_err(|_| FlushError::Counters)? {
            Closed::Epoch(writer) => writer,
            Closed::Empty(writer) => {
                self.standby = Some(writer);
                if let Some(hot) = &self.hot {
                    hot.add_epoch(Instant::now(), std::iter::empty());
                }
                return Ok(true);
            }
        };
        fail_point("seal.closed");
        let hot = self.hot.clone();
        // File I/O waits where it holds up no other stage.
        let sealing = tokio::task::spawn_blocking(move || {
            let sealed = writer.seal()?;
            if let Some(hot) = hot {
                let epoch = sealed.deltas().map(|delta| (delta.key, delta.amount));
                hot.add_epoch(Instant::now(), epoch);
            }
            Ok(sealed)
        });
        let sealed = within(&self.health, DISK_PATIENCE, sealing)
            .await
            .map_err(|_| FlushError::Counters)?;
        let sealed = Arc::new(sealed.map_err(FlushError::Seal)?);
        if self.config.durable != Durable::Nothing {
            let (segment, names) = (Arc::clone(&sealed), self.names.clone());
            // Also the name of the segment that was opened for it.
            self.syncing = Some(tokio::task::spawn_blocking(move || {
                segment.sync().map_err(|error| error.to_string())?;
                names.sync().map_err(|error| error.to_string())
            }));
        }
        fail_point("seal.done");
        self.stats.seals_total.add(1);
        let histograms = &self.stats.histograms;
        Stats::took(&histograms.seal, &self.stats.seal_us_total, begin.elapsed());
        histograms.flush_keys.observe(f64::from(sealed.records()));
        let increments = self.stats.increments_total.get();
        let new = increments - std::mem::replace(&mut self.increments, increments);
        histograms.flush_increments.observe(new as f64);
        self.since.insert(sealed.first_batch(), since);
        self.stats.sealed_keys.add(u64::from(sealed.records()));
        self.expected_bytes = sealed.bytes();
        self.queue.push_back(sealed);
        self.gauge_bytes();
        self.budget().await?;
        Ok(true)
    }

    /// Waits until the last sealed segment is on the disk.
    async fn synced(&mut self) {
        let Some(syncing) = self.syncing.take() else {
            return;
        };
        if let Ok(synced) = within(&self.health, DISK_PATIENCE, syncing).await {
            self.tell_synced(synced);
        }
    }

    async fn take_standby(&mut self) -> Option<Writer> {
        if let Some(standby) = self.standby.take() {
            return Some(standby);
        }
        let directory = Arc::clone(&self.directory);
        let bytes_max = self.config.pending_bytes_max;
        let expected = self.expected_bytes;
        let named = (self.config.durable == Durable::Records).then(|| self.names.clone());
        let made = tokio::task::spawn_blocking(move || {
            let mut directory = directory.lock().unwrap_or_else(PoisonError::into_inner);
            let mut writer = directory.create_segment(bytes_max)?;
            // Without it the segment grows when it must.
            let _ = writer.expect(expected);
            if let Some(names) = named {
                names.sync()?;
            }
            Ok::<_, JournalError>(writer)
        });
        match within(&self.health, DISK_PATIENCE, made).await {
            Ok(Ok(writer)) => Some(writer),
            Ok(Err(error)) => {
                self.complain(&Pause::Own(error.to_string()));
                // Room may be had from what is kept only in case.
                if error.is_disk_full()
                    && let Some((_, segment)) = self.retained.pop_front()
                {
                    self.remove(&segment);
                }
                None
            }
            Err(_) => None,
        }
    }

    /// Sends everything sealed, however long it takes.
    async fn drain(&mut self) -> Result<(), FlushError> {
        while !self.queue.is_empty() {
            self.health.flush_beat();
            let pause = match self.step().await? {
                ControlFlow::Continue(()) => continue,
                ControlFlow::Break(pause) => pause,
            };
            let wait = self.complain(&pause);
            if wait.is_zero() {
                continue;
            }
            let sleep = tokio::time::sleep(wait);
            tokio::pin!(sleep);
            loop {
                tokio::select! {
                    biased;
                    command = self.commands.recv(), if !self.stopping => self.take(command),
                    () = &mut sleep => break,
                }
            }
        }
        Ok(())
    }

    /// One batch further, or why not.
    async fn step(&mut self) -> Result<ControlFlow<Pause>, FlushError> {
        if self.lane.is_none()
            && let Err(pause) = self.connect().await?
        {
            return Ok(ControlFlow::Break(pause));
        }
        let Some(segment) = self.queue.front().cloned() else {
            return Ok(ControlFlow::Continue(())); // Reading back has finished the last one.
        };
        // Numbers below the segment's first belong to one that was set aside as damaged.
        self.applied = self.applied.max(segment.first_batch() - 1);
        let batch = self.applied + 1;
        if batch > segment.last_batch() {
            self.finish().await?;
            return Ok(ControlFlow::Continue(()));
        }
        let Some(lane) = self.lane.as_mut() else {
            return Ok(ControlFlow::Break(Pause::None));
        };
        if self.config.exactly_once && self.token != Some(batch - 1) {
            if !self.ever_claimed {
                let mut directory = self
                    .directory
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                if let Err(error) = on_disk(&self.health, || directory.note_claim()) {
                    return Ok(ControlFlow::Break(Pause::Own(error.to_string())));
                }
                self.ever_claimed = true;
            }
            match within(&self.health, Self::STORE_PATIENCE, lane.claim(batch - 1)).await {
                Claim::Claimed => {
                    fail_point("claim.done");
                    self.token = Some(batch - 1);
                    self.claimed = true;
                }
                Claim::TokenMoved => return Ok(self.drop_lane(Pause::None)),
                Claim::Failed(error) => return Ok(self.drop_lane(Pause::Trouble(error))),
            }
        }
        let deltas: Vec<Delta<'_>> = segment.batch(batch).collect();
        let done = self.done.get(&batch);
        let sent: Vec<usize> = (0..deltas.len())
            .filter(|index| done.is_none_or(|d| !d.contains_key(index)))
            .collect();
        fail_point("batch.ready");
        let some: Vec<Delta<'_>>;
        let wanted = if sent.len() == deltas.len() {
            &deltas
        } else {
            some = sent.iter().map(|&index| deltas[index]).collect();
            &some
        };
        let begin = Instant::now();
        let applying = lane.apply(batch, wanted);
        let outcome = within(&self.health, Self::STORE_PATIENCE, applying).await;
        Stats::took(
            &self.stats.histograms.transaction,
            &self.stats.transaction_us_total,
            begin.elapsed(),
        );
        match outcome {
            Outcome::Applied { values, clock } => {
                self.stats.flushed_keys_total.add(sent.len() as u64);
                fail_point("batch.answered");
                self.token = Some(batch);
                self.confirmed = Some(Instant::now());
                self.recovered();
                let again = self.sort_out(&segment, batch, &deltas, &sent, values).await;
                if let Some(reason) = again {
                    return Ok(ControlFlow::Break(Pause::Own(reason)));
                }
                self.settle(&segment, batch, deltas.len(), clock).await?;
                Ok(ControlFlow::Continue(()))
            }
            Outcome::NotApplied(Refusal::TokenMoved) => {
                self.stats.batches_aborted_total.add(1);
                Ok(self.drop_lane(Pause::None))
            }
            Outcome::NotApplied(Refusal::Keys(keys)) => {
                self.stats.batches_keys_refused_total.add(1);
                let refused = keys
                    .into_iter()
                    .filter_map(|(index, error)| Some((*sent.get(index)?, error)))
                    .collect();
                self.reject(batch, &deltas, refused).await;
                Ok(self.drop_lane(Pause::None))
            }
            Outcome::NotApplied(Refusal::Whole(error)) => {
                self.stats.batches_refused_total.add(1);
                Ok(self.drop_lane(Pause::Trouble(error)))
            }
            Outcome::Unknown(error) => {
                self.uncertain = true;
                self.stats.uncertain_total.add(1);
                Ok(self.drop_lane(Pause::Trouble(error)))
            }
        }
    }

    fn drop_lane(&mut self, pause: Pause) -> ControlFlow<Pause> {
        self.lane = None;
        self.token = None;
        self.stats.store_up.set(0);
        ControlFlow::Break(pause)
    }

    /// A new lane, and what its token tells.
    async fn connect(&mut self) -> Result<Result<(), Pause>, FlushError> {
        let connecting = self.store.connect();
        let connected = within(&self.health, Self::STORE_PATIENCE, connecting).await;
        let (lane, standing) = match connected {
            Ok(connected) => connected,
            Err(error) => return Ok(Err(Pause::Trouble(error))),
        };
        for warning in &standing.warnings {
            if self.warned.insert(warning.clone()) {
                warn!("{warning}");
            }
        }
        self.token = None;
        if self.config.exactly_once {
            // A former process may have got further than any segment that could be read.
            let sealed = self
                .queue
                .back()
                .map_or(self.applied, |last| last.last_batch())
                .max(self.numbered);
            let known = Known {
                applied: self.applied,
                sealed,
                numbered: self.numbered,
                uncertain: self.uncertain && !self.queue.is_empty(),
                runs: &self.runs,
                run: self.run,
                claimed: self.claimed,
                ever_claimed: self.ever_claimed,
                server: self.server.as_deref(),
                clock: self.clock,
            };
            let verdict = resolve(known, &standing);
            if let Verdict::Conflict(reason) = verdict {
                self.stats.store_conflict.set(1);
                return Ok(Err(Pause::Own(format!(
                    "another daemon uses this node's id, flushing is stopped: {reason}; a copied \
                     state directory needs a node.json of its own"
                ))));
            }
            self.stats.store_conflict.set(0);
            if let Err(pause) = self.act(verdict, &standing.server).await? {
                return Ok(Err(pause));
            }
            if standing.token.is_some_and(|token| token.run == self.run) {
                self.token = standing.token.map(|token| token.batch);
            }
        }
        if std::mem::take(&mut self.uncertain) && self.config.exactly_once {
            self.stats.uncertain_resolved_total.add(1);
        }
        self.server = Some(standing.server);
        self.clock = standing.clock;
        self.lane = Some(lane);
        self.stats.store_up.set(1);
        Ok(Ok(()))
    }

    async fn act(
        &mut self,
        verdict: Verdict,
        server: &str,
    ) -> Result<Result<(), Pause>, FlushError> {
        match verdict {
            Verdict::Continue | Verdict::Conflict(_) => {}
            Verdict::Applied(upto) => {
                while self.applied < upto {
                    if self.queue.is_empty() {
                        // Set aside as damaged, or lost in a power cut.
                        warn!(
                            batches = upto - self.applied,
                            "the store has batches that the journal does not know any more"
                        );
                        self.applied = upto;
                        break;
                    }
                    if let Err(pause) = self.read_back(upto).await? {
                        return Ok(Err(pause));
                    }
                }
            }
            Verdict::RolledBack(to) => self.roll_back(to, server).await?,
            Verdict::Emptied => {
                warn!(
                    "the store was emptied: counters begin anew with what is pending; batches up \
                     to {} are not brought back",
                    self.applied
                );
                self.tell(ToCounters::ForgetClocks).await?;
            }
            Verdict::TokenLost => {
                error!(
                    "the token is gone from the store but the counters are not: it was deleted or \
                     evicted; keep it out of eviction's reach (maxmemory-policy)"
                );
                if self.uncertain
                    && let Some(segment) = self.queue.front().cloned()
                {
                    let batch = self.applied.max(segment.first_batch() - 1) + 1;
                    let deltas: Vec<Delta<'_>> = segment.batch(batch).collect();
                    let reason = "uncertain: sent without a reply, and then the token was lost";
                    let refused = (0..deltas.len())
                        .map(|index| (index, KeyError::Other(reason.to_owned())))
                        .collect();
                    self.reject(batch, &deltas, refused).await;
                }
            }
        }
        Ok(Ok(()))
    }

    /// The batch after `applied`, which is not beyond `upto`, is in the store, its reply is not
    /// here: values and refusals are read from the keys.
    async fn read_back(&mut self, upto: u64) -> Result<Result<(), Pause>, FlushError> {
        let Some(segment) = self.queue.front().cloned() else {
            return Ok(Ok(())); // `resolve` allows nothing beyond what was sealed.
        };
        self.applied = self.applied.max(segment.first_batch() - 1);
        if self.applied >= upto {
            // The token names a batch of a segment that was set aside as damaged; this one was
            // never sent.
            return Ok(Ok(()));
        }
        let batch = self.applied + 1;
        if batch > segment.last_batch() {
            self.finish().await?;
            return Ok(Ok(()));
        }
        let deltas: Vec<Delta<'_>> = segment.batch(batch).collect();
        let keys: Vec<Bytes> = deltas
            .iter()
            .map(|delta| Bytes::copy_from_slice(delta.key))
            .collect();
        let mut values = Vec::with_capacity(keys.len());
        let mut clock = u64::MAX;
        for keys in keys.chunks(READ_KEYS_MAX) {
            match within(&self.health, Self::STORE_PATIENCE, self.store.read(keys)).await {
                Ok(reading) => {
                    values.extend(reading.values);
                    clock = clock.min(reading.clock);
                }
                Err(error) => return Ok(Err(Pause::Trouble(error))),
            }
        }
        let mut refused = Vec::new();
        for (index, (delta, value)) in deltas.iter().zip(values).enumerate() {
            let stored = match judge(delta.amount, value) {
                Ok(stored) => stored,
                Err(error) => {
                    if self
                        .done
                        .get(&batch)
                        .is_none_or(|done| !done.contains_key(&index))
                    {
                        refused.push((index, error));
                    }
                    continue;
                }
            };
            let done = self.done.entry(batch).or_default();
            done.entry(index).or_insert(Settled::Stored(stored));
        }
        self.reject(batch, &deltas, refused).await;
        self.settle(&segment, batch, deltas.len(), clock).await?;
        Ok(Ok(()))
    }

    /// The store has lost everything after batch `to`: what is retained is sent again.
    async fn roll_back(&mut self, to: u64, server: &str) -> Result<(), FlushError> {
        let applied = self.applied;
        warn!(
            "the store went back from batch {applied} to batch {to} (it is now {server}): a \
             fail-over, or an older data set; what is retained of them is sent again"
        );
        self.tell(ToCounters::ForgetClocks).await?;
        while let Some((_, segment)) = self.retained.pop_back() {
            if segment.last_batch() <= to {
                self.retained.push_back((Instant::now(), segment));
                break;
            }
            // Pending anew.
            self.since.insert(segment.first_batch(), unix_ms());
            self.queue.push_front(segment);
        }
        let Some(first) = self.queue.front().map(|segment| segment.first_batch()) else {
            error!(
                "nothing of batches {} to {applied} is retained any more: it stays lost \
                 (flush.retain)",
                to + 1
            );
            return Ok(());
        };
        if to + 1 < first {
            error!(
                "nothing of batches {} to {} is retained any more: it stays lost (flush.retain)",
                to + 1,
                first - 1
            );
        }
        self.applied = to.max(first - 1);
        for segment in self.queue.clone() {
            let last = segment.last_batch().min(applied);
            for batch in segment.first_batch().max(to + 1)..=last {
                self.stats.replayed_total.add(1);
                // What was rejected stays so: it may be replayed from its file by hand.
                let done = self.done.entry(batch).or_default();
                done.retain(|_, settled| is_rejected(settled));
                done.values_mut()
                    .for_each(|settled| *settled = Settled::Before);
                let skip = done.keys().copied().collect();
                let segment = Arc::clone(&segment);
                self.tell(ToCounters::Restore {
                    segment,
                    batch,
                    skip,
                })
                .await?;
            }
            if segment.first_batch() <= applied {
                self.note_applied(&segment, to.max(segment.first_batch() - 1));
            }
        }
        self.gauge();
        Ok(())
    }

    /// Sorts the values of an applied batch. `Some`: parts of it must be sent again
    /// (at-least-once only), for this reason.
    async fn sort_out(
        &mut self,
        segment: &Sealed,
        batch: u64,
        deltas: &[Delta<'_>],
        sent: &[usize],
        values: Vec<Result<i64, KeyError>>,
    ) -> Option<String> {
        debug_assert!(batch <= segment.last_batch());
        let mut refused = Vec::new();
        let mut again = None;
        let done = self.done.entry(batch).or_default();
        for (&index, value) in sent.iter().zip(values) {
            match value {
                Ok(value) => {
                    done.insert(index, Settled::Stored(Some(value)));
                }
                Err(KeyError::Retry(reason)) => again = Some(reason),
                Err(error) => refused.push((index, error)),
            }
        }
        self.reject(batch, deltas, refused).await;
        again
    }

    /// Writes refused deltas to the rejected file, however long it takes, and notes them as done.
    async fn reject(&mut self, batch: u64, deltas: &[Delta<'_>], refused: Vec<(usize, KeyError)>) {
        if refused.is_empty() {
            return;
        }
        let at = unix_ms();
        let lines: Vec<Rejected> = refused
            .iter()
            // A sum of zero changes nothing, whatever the key holds.
            .filter(|(index, _)| deltas[*index].amount != 0)
            .map(|(index, error)| {
                let delta = deltas[*index];
                Rejected::new(delta.key, delta.amount, error.to_string(), batch, at)
            })
            .collect();
        while !lines.is_empty() {
            match on_disk(&self.health, || self.rejected.append(&lines)) {
                Ok(()) => break,
                Err(error) => {
                    let path = self.rejected.path().display();
                    if let Some(told) = self.lines.unwritten.again() {
                        error!(tries = told.count, %error, "{path} cannot be written; flushing waits for it");
                    }
                    tokio::time::sleep(PAUSE_MAX).await;
                }
            }
        }
        if self.lines.unwritten.over().is_some() {
            info!("{} can be written again", self.rejected.path().display());
        }
        fail_point("reject.written");
        self.stats.rejected_total.add(lines.len() as u64);
        if let Some(first) = lines.first()
            && let Some(told) = self.lines.refused.again()
        {
            warn!(
                batch,
                deltas = lines.len(),
                batches = told.count,
                reason = first.reason,
                key = first
                    .key
                    .as_deref()
                    .map(|key| key.escape_debug().to_string()),
                "the store refused deltas; they are in {}",
                self.rejected.path().display()
            );
        }
        let done = self.done.entry(batch).or_default();
        for (index, error) in refused {
            done.insert(index, Settled::Rejected(error));
        }
    }

    /// The batch is in the store and its refused deltas are on file: tells everyone.
    async fn settle(
        &mut self,
        segment: &Arc<Sealed>,
        batch: u64,
        deltas: usize,
        clock: u64,
    ) -> Result<(), FlushError> {
        let done = self.done.remove(&batch).unwrap_or_default();
        let rejected: BTreeMap<usize, Settled> = done
            .iter()
            .filter(|(_, settled)| is_rejected(settled))
            .map(|(&index, settled)| (index, settled.clone()))
            .collect();
        let settled: Arc<[Settled]> = (0..deltas)
            .map(|index| done.get(&index).cloned().unwrap_or(Settled::Stored(None)))
            .collect();
        if !rejected.is_empty() {
            // Remembered until the segment is released, in case that the store goes back.
            self.done.insert(batch, rejected);
        }
        self.applied = batch;
        self.clock = self.clock.max(clock);
        self.note_applied(segment, batch);
        fail_point("batch.noted");
        self.stats.batches_total.add(1);
        self.stats
            .sealed_keys
            .sub((deltas as u64).min(self.stats.sealed_keys.get()));
        let announcement = Announcement {
            segment: Arc::clone(segment),
            batch,
            settled: Arc::clone(&settled),
            clock,
        };
        let segment = Arc::clone(segment);
        self.tell(ToCounters::Settle {
            segment,
            batch,
            settled,
            clock,
        })
        .await?;
        if self.publisher.try_send(announcement).is_err() {
            // Publishing never holds up flushing; receivers see the gap and read the values.
            self.unannounced.fetch_add(1, Ordering::Relaxed);
        }
        if self
            .queue
            .front()
            .is_some_and(|segment| segment.last_batch() == batch)
        {
            self.finish().await?;
        }
        Ok(())
    }

    /// The first segment of the queue is wholly applied: it is retained.
    async fn finish(&mut self) -> Result<(), FlushError> {
        if let Some(segment) = self.queue.pop_front() {
            self.since.remove(&segment.first_batch());
            self.retained.push_back((Instant::now(), segment));
            self.release();
        }
        self.gauge_bytes();
        self.budget().await
    }

    /// Before a segment that is old enough is removed, the store must have been seen to have it:
    /// a quiet node would otherwise not notice a fail-over until it is too late to replay.
    async fn confirm(&mut self) -> Result<(), FlushError> {
        let Some((since, _)) = self.retained.front() else {
            return Ok(());
        };
        let due = *since + self.config.retain;
        if !self.config.exactly_once || due > Instant::now() || self.confirmed >= Some(due) {
            return Ok(());
        }
        if self.lane.is_none()
            && let Err(pause) = self.connect().await?
        {
            self.complain(&pause);
            return Ok(());
        }
        let Some(lane) = self.lane.as_mut() else {
            return Ok(());
        };
        // Signing the token anew runs only if it is what it was.
        let claiming = lane.claim(self.applied);
        let pause = match within(&self.health, Self::STORE_PATIENCE, claiming).await {
            Claim::Claimed => {
                self.token = Some(self.applied);
                self.claimed = true;
                self.confirmed = Some(Instant::now());
                self.recovered();
                return Ok(());
            }
            Claim::TokenMoved => Pause::None,
            Claim::Failed(error) => Pause::Trouble(error),
        };
        self.complain(&pause);
        let _ = self.drop_lane(pause);
        Ok(())
    }

    /// Removes retained segments that are old enough, or too many.
    fn release(&mut self) {
        let mut segments = self.retained.len();
        let mut bytes: usize = self
            .retained
            .iter()
            .map(|(_, segment)| segment.bytes())
            .sum();
        while let Some((since, segment)) = self.retained.front() {
            let due = *since + self.config.retain;
            let may_go = if self.config.exactly_once {
                self.confirmed >= Some(due)
            } else {
                due <= Instant::now()
            };
            let bounded =
                bytes <= self.config.pending_bytes_max && segments <= RETAINED_SEGMENTS_MAX;
            if !may_go && bounded {
                break;
            }
            segments -= 1;
            bytes -= segment.bytes();
            let segment = Arc::clone(segment);
            self.remove(&segment);
            self.retained.pop_front();
        }
        self.gauge_retained();
    }

    fn remove(&mut self, segment: &Sealed) {
        for batch in segment.first_batch()..=segment.last_batch() {
            self.done.remove(&batch);
        }
        if let Err(error) = on_disk(&self.health, || segment.remove())
            && let Some(told) = self.lines.files.again()
        {
            warn!(count = told.count, %error, "cannot remove {}", segment.path().display());
        }
        fail_point("segment.removed");
    }

    async fn budget(&mut self) -> Result<(), FlushError> {
        let sealed: usize = self.queue.iter().map(|segment| segment.bytes()).sum();
        let bytes_max = self.config.pending_bytes_max.saturating_sub(sealed);
        self.tell(ToCounters::Budget { bytes_max }).await
    }

    async fn tell(&mut self, message: ToCounters) -> Result<(), FlushError> {
        self.counters
            .send(message)
            .await
            .map_err(|_| FlushError::Counters)?;
        self.health.flush_beat();
        Ok(())
    }

    /// Counts anew what waits, record by record: at the start, and after the store went back.
    fn gauge(&self) {
        let unapplied = |segment: &Sealed| -> usize {
            (segment.first_batch().max(self.applied + 1)..=segment.last_batch())
                .map(|batch| segment.batch(batch).count())
                .sum()
        };
        let keys: usize = self.queue.iter().map(|segment| unapplied(segment)).sum();
        self.stats.sealed_keys.set(keys as u64);
        self.gauge_bytes();
    }

    fn gauge_bytes(&self) {
        let bytes: usize = self.queue.iter().map(|segment| segment.bytes()).sum();
        self.stats.sealed_bytes.set(bytes as u64);
        self.stats.sealed_segments.set(self.queue.len() as u64);
        let since = self.queue.front().map_or(0, |oldest| {
            let known = self.since.get(&oldest.first_batch());
            *known.unwrap_or(&self.begun_ms)
        });
        self.stats.sealed_since_ms.set(since);
        self.gauge_retained();
    }

    fn gauge_retained(&self) {
        let bytes: usize = self.retained.iter().map(|(_, s)| s.bytes()).sum();
        self.stats.retained_segments.set(self.retained.len() as u64);
        self.stats.retained_bytes.set(bytes as u64);
    }

    /// Logs a failure once per change and once a minute; returns how long to wait.
    fn complain(&mut self, pause: &Pause) -> Duration {
        let reason = match pause {
            Pause::None => return Duration::ZERO,
            Pause::Trouble(error) => {
                use std::error::Error;
                error
                    .source()
                    .map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
            }
            Pause::Own(reason) => reason.clone(),
        };
        self.stats.retries_total.add(1);
        self.stats.last_retry_ms.set(unix_ms());
        kind_of(pause, &self.stats).add(1);
        self.stats.set_store_error(reason.clone());
        match self.lines.trouble.again() {
            None => {}
            Some(told) if told.first => {
                warn!(
                    "cannot flush: {reason}; increments are taken and kept in the journal meanwhile"
                );
            }
            Some(told) => warn!(
                tries = told.count,
                seconds = told.seconds(),
                "still cannot flush: {reason}"
            ),
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(PAUSE_MAX);
        // Jitter, so that daemons that lost one store together do not come back together.
        pause.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    fn recovered(&mut self) {
        self.pause = PAUSE_MIN;
        // Also of what was not told, because it comes and goes all the time.
        if self.lines.trouble.is_on() {
            self.stats.set_store_error(String::new());
        }
        if let Some(told) = self.lines.trouble.over() {
            info!(
                tries = told.count,
                seconds = told.seconds(),
                "flushing again"
            );
        }
    }

    fn tell_synced(&mut self, synced: Result<(), String>) {
        match synced {
            Ok(()) => {
                if self.lines.unsynced.over().is_some() {
                    info!("the journal can be synced again");
                }
            }
            Err(error) => {
                if let Some(told) = self.lines.unsynced.again() {
                    error!(
                        count = told.count,
                        %error,
                        "the journal cannot be synced: a power cut now may lose what is pending"
                    );
                }
            }
        }
    }

    fn note_applied(&mut self, segment: &Sealed, batch: u64) {
        // Only a hint: the token says the same.
        if let Err(error) = segment.set_applied(batch)
            && let Some(told) = self.lines.files.again()
        {
            warn!(
                count = told.count,
                %error,
                "cannot note progress in {}",
                segment.path().display()
            );
        }
    }
}

/// The number of failures of this kind.
fn kind_of<'a>(pause: &Pause, stats: &'a Stats) -> &'a Number {
    match pause {
        Pause::Trouble(StoreError::Io { .. }) => &stats.retries_io_total,
        Pause::Trouble(StoreError::Timeout { .. }) => &stats.retries_timeout_total,
        Pause::Trouble(StoreError::Refused { .. }) => &stats.retries_refused_total,
        Pause::Trouble(StoreError::Protocol { .. }) => &stats.retries_protocol_total,
        Pause::Trouble(StoreError::Embedded { .. }) => &stats.retries_embedded_total,
        Pause::None | Pause::Own(_) => &stats.retries_local_total,
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

/// Whether a delta of a batch that was applied without a reply is in the value now there.
fn judge(amount: i64, value: Result<Option<i64>, KeyError>) -> Result<Option<i64>, KeyError> {
    match value {
        Err(error @ (KeyError::WrongType | KeyError::NotInteger)) => Err(error),
        // Not readable: what the key holds cannot be told.
        Err(_) => Ok(None),
        Ok(Some(value)) if value.checked_sub(amount).is_none() => Err(KeyError::Overflow),
        // At the end of the range the two cases look alike. If it was taken after all, a replay
        // overflows and does no harm.
        Ok(Some(value)) if amount != 0 && value.checked_add(amount).is_none() => {
            Err(KeyError::Overflow)
        }
        Ok(value) => Ok(value),
    }
}

/// Whether the delta is in the rejected file, since now or before.
fn is_rejected(settled: &Settled) -> bool {
    matches!(settled, Settled::Rejected(_) | Settled::Before)
}

/// The first tick comes after one period, as what a former process left has been flushed by then.
fn ticks(period: Duration) -> Interval {
    let mut ticks = interval_at(tokio::time::Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}
