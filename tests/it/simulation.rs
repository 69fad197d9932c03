//! The real table, journal and flush code against a simulated wire and store: random increments,
//! lost requests, lost replies, late execution of a dead connection's bytes, refusals, fail-overs
//! to a replica that lags, crashes and restarts. At the end every key's total is exact.
//!
//! Time is virtual. A case is one seed; a failure prints it. `TALLYD_SIMULATIONS` sets the number
//! of cases (millions are a matter of patience), `TALLYD_SEED` runs one.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tallyd::counters::{Answer, Kind, Op, Table, TableLimits};
use tallyd::flush::stage::{Durable, Parts};
use tallyd::flush::{Command, FileWork, Flush, FlushConfig};
use tallyd::ingest::core::{Core, Parts as CoreParts};
use tallyd::ingest::{Access, IngestConfig};
use tallyd::journal::rejected::{self, RejectedFile};
use tallyd::journal::{Directory, JournalError, Recovery, Writer};
use tallyd::stats::Stats;
use tallyd::store::{
    Claim, Delta, Identity, KeyError, Lane, Outcome, Reading, Refusal, Silence, Standing, Store,
    StoreError, Token,
};
use tokio::sync::{Notify, mpsc, oneshot};

const KEYS: u64 = 12;
const MIB: usize = 1 << 20;
/// A new segment's: its header and the records of some forty keys.
const SEGMENT_BYTES: usize = 8192;
const HOUR: Duration = Duration::from_secs(3600);

/// What can be taken out, to see that the simulation notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protection {
    All,
    /// The server executes a dead connection's late bytes whatever it watched.
    NoWatch,
    /// A fail-over goes unnoticed: the token is never compared.
    NoToken,
}

/// A transaction as it stands on a connection.
#[derive(Clone)]
struct Transaction {
    watched: u64,
    token: Token,
    deltas: Vec<(Bytes, i64)>,
}

#[derive(Clone, Default)]
struct Data {
    values: BTreeMap<Bytes, i64>,
    token: Option<Token>,
    clock: u64,
}

struct Server {
    data: Data,
    /// One for each transaction, for a fail-over to go back to.
    history: Vec<Data>,
    /// Changes with every write of the token: what `WATCH` compares.
    token_version: u64,
    wrong_type: HashSet<Bytes>,
    forbidden: HashSet<Bytes>,
    late: Vec<Transaction>,
    generation: u64,
    healthy: bool,
    protection: Protection,
    dice: fastrand::Rng,
}

impl Server {
    fn new(protection: Protection, dice: &mut fastrand::Rng) -> Self {
        Server {
            data: Data::default(),
            history: Vec::new(),
            token_version: 0,
            wrong_type: HashSet::new(),
            forbidden: HashSet::new(),
            late: Vec::new(),
            generation: 0,
            healthy: false,
            protection,
            dice: fastrand::Rng::with_seed(dice.u64(..)),
        }
    }

    fn chance(&mut self, percent: u32) -> bool {
        !self.healthy && self.dice.u32(0..100) < percent
    }

    /// Bytes of dead connections arrive when they like.
    fn execute_late(&mut self) {
        while !self.late.is_empty() && (self.healthy || self.dice.u32(0..100) < 40) {
            let at = self.dice.usize(0..self.late.len());
            let transaction = self.late.swap_remove(at);
            self.execute(&transaction);
        }
    }

    /// `None`: aborted by the watch.
    fn execute(&mut self, transaction: &Transaction) -> Option<(Vec<Result<i64, KeyError>>, u64)> {
        if transaction.watched != self.token_version && self.protection != Protection::NoWatch {
            return None;
        }
        self.history.push(self.data.clone());
        let mut values = Vec::new();
        for (key, amount) in &transaction.deltas {
            values.push(if self.wrong_type.contains(&key[..]) {
                Err(KeyError::WrongType)
            } else {
                let value = self.data.values.entry(key.clone()).or_default();
                match value.checked_add(*amount) {
                    Some(sum) => {
                        *value = sum;
                        Ok(sum)
                    }
                    None => Err(KeyError::Overflow),
                }
            });
        }
        self.data.clock += 1;
        self.data.token = Some(transaction.token);
        self.token_version += 1;
        Some((values, self.data.clock))
    }

    /// A replica that lags by some transactions takes over; open connections are gone.
    fn fail_over(&mut self) {
        let back = self.dice.usize(0..=3).min(self.history.len());
        for _ in 0..back {
            self.data = self.history.pop().unwrap();
        }
        self.late.clear();
        // Other nodes have come back before this one.
        self.data.clock += self.dice.u64(0..=6);
        self.generation += 1;
        self.token_version += 1;
    }
}

#[derive(Clone)]
struct SimStore {
    server: Arc<Mutex<Server>>,
    identity: Identity,
}

struct SimLane {
    store: SimStore,
    generation: u64,
    watched: u64,
}

fn broken() -> StoreError {
    StoreError::Timeout {
        address: "simulated".to_owned(),
        seconds: 0,
    }
}

/// A round trip: others run meanwhile.
async fn wire(server: &Mutex<Server>) {
    let micros = server.lock().unwrap().dice.u64(50..3_000);
    tokio::time::sleep(Duration::from_micros(micros)).await;
}

impl Store for SimStore {
    type Lane = SimLane;
    type Feed = Silence;

    async fn connect(&self) -> Result<(SimLane, Standing), StoreError> {
        wire(&self.server).await;
        let mut server = self.server.lock().unwrap();
        server.execute_late();
        if server.chance(10) {
            return Err(broken());
        }
        let token = match server.protection {
            Protection::NoToken => None,
            _ => server.data.token,
        };
        let standing = Standing {
            token,
            clock: server.data.clock,
            server: format!("server {}", server.generation),
            store: None,
            warnings: Vec::new(),
        };
        let (generation, watched) = (server.generation, server.token_version);
        Ok((
            SimLane {
                store: self.clone(),
                generation,
                watched,
            },
            standing,
        ))
    }

    async fn read(&self, keys: &[Bytes]) -> Result<Reading, StoreError> {
        wire(&self.server).await;
        let mut server = self.server.lock().unwrap();
        if server.chance(10) {
            return Err(broken());
        }
        let value = |key: &Bytes| {
            if server.wrong_type.contains(&key[..]) {
                Err(KeyError::WrongType)
            } else {
                Ok(server.data.values.get(&key[..]).copied())
            }
        };
        let values = keys.iter().map(value).collect();
        Ok(Reading {
            values,
            clock: server.data.clock,
        })
    }

    async fn publish(&self, _message: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }

    async fn subscribe(&self) -> Result<Silence, StoreError> {
        Ok(Silence)
    }
}

impl SimLane {
    /// What the network makes of a request: `Ok` if it is executed and answered.
    async fn send(&mut self, transaction: Transaction) -> Result<Option<Executed>, StoreError> {
        wire(&self.store.server).await;
        let mut server = self.store.server.lock().unwrap();
        server.execute_late();
        if self.generation != server.generation || server.chance(8) {
            return Err(broken()); // Never arrives.
        }
        if server.chance(8) {
            server.late.push(transaction);
            return Err(broken());
        }
        let done = server.execute(&transaction);
        if server.chance(8) {
            return Err(broken()); // The reply is lost.
        }
        self.watched = server.token_version;
        Ok(done)
    }
}

type Executed = (Vec<Result<i64, KeyError>>, u64);

impl Lane for SimLane {
    async fn claim(&mut self, batch: u64) -> Claim {
        let token = Token {
            batch,
            run: self.store.identity.run,
        };
        let claim = Transaction {
            watched: self.watched,
            token,
            deltas: Vec::new(),
        };
        match self.send(claim).await {
            Ok(Some(_)) => Claim::Claimed,
            Ok(None) => Claim::TokenMoved,
            Err(error) => Claim::Failed(error),
        }
    }

    async fn apply(&mut self, batch: u64, deltas: &[Delta<'_>]) -> Outcome {
        let token = Token {
            batch,
            run: self.store.identity.run,
        };
        {
            let mut server = self.store.server.lock().unwrap();
            if server.chance(4) {
                return Outcome::NotApplied(Refusal::Whole(broken()));
            }
            let refused: Vec<(usize, KeyError)> = deltas
                .iter()
                .enumerate()
                .filter(|(_, delta)| server.forbidden.contains(delta.key))
                .map(|(index, _)| (index, KeyError::NoPermission("NOPERM".to_owned())))
                .collect();
            if !refused.is_empty() {
                return Outcome::NotApplied(Refusal::Keys(refused));
            }
        }
        let deltas = deltas
            .iter()
            .map(|delta| (Bytes::copy_from_slice(delta.key), delta.amount))
            .collect();
        match self
            .send(Transaction {
                watched: self.watched,
                token,
                deltas,
            })
            .await
        {
            Ok(Some((values, clock))) => Outcome::Applied { values, clock },
            Ok(None) => Outcome::NotApplied(Refusal::TokenMoved),
            Err(error) => Outcome::Unknown(error),
        }
    }
}

/// What was acknowledged, by key.
type Totals = BTreeMap<Bytes, i64>;
type Oracle = Rc<RefCell<Totals>>;

/// What one life of a daemon meets.
struct Life<'a> {
    dir: &'a Path,
    server: &'a Arc<Mutex<Server>>,
    oracle: &'a Oracle,
    retain: Duration,
    /// Whether amounts may be negative, and fail-overs happen.
    wild: bool,
    /// Ends when all is flushed, not in a crash.
    last: bool,
    /// Called at one moment of it.
    moment: Option<&'a mut dyn FnMut()>,
}

fn key(number: u64) -> Bytes {
    format!("key:{number}").into()
}

fn acknowledge_some(core: &Core, dice: &mut fastrand::Rng, oracle: &Oracle, amounts: Range<i64>) {
    let mut input = Vec::new();
    let mut ops = Vec::new();
    for _ in 0..dice.usize(1..20) {
        let key = key(dice.u64(0..KEYS));
        let amount = dice.i64(amounts.clone());
        ops.push(Op::new(Kind::Add, input.len(), key.len(), amount));
        input.extend_from_slice(&key);
    }
    core.apply(&input, &mut ops);
    for op in ops {
        if let Answer::Value(_) | Answer::Cold(_) = op.answer {
            let mut oracle = oracle.borrow_mut();
            match oracle.get_mut(op.key(&input)) {
                Some(total) => *total += op.amount,
                None => {
                    oracle.insert(Bytes::copy_from_slice(op.key(&input)), op.amount);
                }
            }
        }
    }
}

/// In memory where that is to be had: what is simulated is a crash, and how a disk would look after it.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

/// Other tests of this process start servers: between their fork and exec, a child holds the lock
/// of the life before.
fn open(dir: &Path) -> (Directory, Recovery, Writer) {
    loop {
        match Directory::open_sized(dir, 3, 64 * MIB, SEGMENT_BYTES) {
            Err(JournalError::Locked { .. }) => std::thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
}

/// One life of a daemon, from recovery to crash, or until all is flushed.
fn live(life: Life<'_>, dice: &mut fastrand::Rng) {
    let Life {
        dir,
        server,
        oracle,
        retain,
        wild,
        last,
        mut moment,
    } = life;
    // A runtime for each life: each begins at its own clock's zero, and leaves no task behind.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    let (directory, recovery, writer) = open(dir);
    if wild {
        assert_eq!(recovery.damage, [""; 0]);
    }
    let mut table = Table::new(TableLimits {
        bytes_max: MIB,
        pending_keys_max: 0,
    });
    for segment in &recovery.segments {
        for batch in segment.first_batch().max(recovery.applied + 1)..=segment.last_batch() {
            segment
                .batch(batch)
                .for_each(|delta| table.restore(delta.key, delta.amount));
        }
    }
    let stats = Arc::new(Stats::default());
    let (to_counters, messages) = mpsc::channel(64);
    let (publisher, _announcements) = mpsc::channel(1);
    let (command, commands) = mpsc::channel(64);
    let (wanted, _) = mpsc::channel(1);
    let seal_wanted = Arc::new(Notify::new());
    let store = SimStore {
        server: Arc::clone(server),
        identity: directory.identity(),
    };
    let stuck = writer.stuck();
    let core = Core::new(CoreParts {
        config: IngestConfig {
            key_bytes_max: 1024,
            epoch_keys_max: 10,
            load: false,
            load_timeout: Duration::ZERO,
            unloaded_is_error: true,
            view_age_max: Duration::from_secs(60),
            sync_always: false,
            connections_max: 1,
            connections_wanted: 1,
            client_bytes_max: MIB,
            transaction_bytes_max: MIB,
            channel: String::new(),
        },
        access: Access::find(&[], &[], &[]).unwrap(),
        table,
        writer,
        stats: Arc::clone(&stats),
        wanted,
        heard: Arc::default(),
        flush: command.clone(),
        seal_wanted: Arc::clone(&seal_wanted),
        hot: Arc::default(),
    });
    let flush = Flush::new(
        FlushConfig {
            interval: Duration::from_millis(20),
            store_url: String::new(),
            exactly_once: true,
            retain,
            retained_bytes_max: 64 * MIB,
            replicas: 0,
            replicas_timeout: Duration::ZERO,
            durable: Durable::Nothing,
            file_work: FileWork::Here,
            pending_bytes_max: 64 * MIB,
        },
        Parts {
            store: Arc::new(store),
            rejected: RejectedFile::open(directory.path()).unwrap(),
            directory,
            segments: recovery.segments,
            applied: recovery.applied,
            stuck,
            counters: to_counters,
            publisher,
            unannounced: Arc::new(AtomicU64::new(0)),
            commands,
            seal_wanted,
            stats: Arc::clone(&stats),
            hot: Arc::default(),
            sending: Arc::default(),
            health: Arc::default(),
        },
    );
    let driver = async {
        let steps = if last { 5 } else { dice.usize(1..40) };
        let at = dice.usize(0..steps);
        for step in 0..steps {
            acknowledge_some(&core, dice, oracle, if wild { -5..20 } else { 1..20 });
            tokio::time::sleep(Duration::from_micros(dice.u64(1..30_000))).await;
            if step == at
                && let Some(moment) = &mut moment
            {
                moment();
            }
            if wild && !last && dice.u32(0..100) < 6 {
                server.lock().unwrap().fail_over();
            }
        }
        if last {
            server.lock().unwrap().healthy = true;
            let (done, flushed) = oneshot::channel();
            command.send(Command::Flush(done)).await.unwrap();
            let flushed = tokio::time::timeout(HOUR, flushed).await;
            flushed.expect("flushing goes on").unwrap();
            core.refresh_gauges();
            assert_eq!(stats.conservation_difference.get(), 0, "the books balance");
            for number in 0..KEYS {
                let key = key(number);
                let view = core.state.borrow().table.view(&key);
                let stored = server.lock().unwrap().data.values.get(&key).copied();
                if let Some(view) = view
                    && view.known
                {
                    assert_eq!(view.pending, 0, "{number}: all is flushed");
                    assert_eq!(
                        Some(view.value),
                        stored,
                        "{number}: the view is the store's"
                    );
                }
            }
        }
    };
    runtime.block_on(async {
        tokio::select! {
            biased;
            () = Rc::clone(&core).listen(messages) => panic!("the stages ended"),
            ended = flush.run() => panic!("the flush stage ended: {ended:?}"),
            () = driver => {}
        }
    });
}

/// Tells which case it was that panicked.
struct Case(u64);

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to repeat: TALLYD_SEED={}", self.0);
        }
    }
}

/// Runs one case. `Err`: what is wrong with the totals.
fn simulate(seed: u64, protection: Protection) -> Result<(), String> {
    let _case = Case(seed);
    let mut dice = fastrand::Rng::with_seed(seed);
    fastrand::seed(seed); // The stage's jitter.
    let dir = scratch();
    let mut server = Server::new(protection, &mut dice);
    if dice.bool() {
        server.wrong_type.insert(key(0));
        server.forbidden.insert(key(1));
    }
    let server = Arc::new(Mutex::new(server));
    let oracle = Oracle::default();
    let lives = dice.usize(1..6);
    for life in 1..=lives {
        let life = Life {
            dir: dir.path(),
            server: &server,
            oracle: &oracle,
            retain: HOUR,
            wild: true,
            last: life == lives,
            moment: None,
        };
        live(life, &mut dice);
    }

    let mut totals = server.lock().unwrap().data.values.clone();
    let mut seen = HashSet::new();
    for line in rejected::read(dir.path()).unwrap() {
        let line = line.unwrap();
        let key = Bytes::from(line.key_bytes().unwrap());
        if seen.insert((line.batch, key.clone())) {
            *totals.entry(key).or_default() += line.delta;
        }
    }
    for (key, expected) in oracle.borrow().iter() {
        let found = totals.get(key).copied().unwrap_or(0);
        if found != *expected {
            let key = String::from_utf8_lossy(key);
            let rejected = std::fs::read_to_string(dir.path().join(rejected::REJECTED_FILE));
            return Err(format!(
                "seed {seed}: {key}: acknowledged {expected}, found {found}; rejected:\n{}",
                rejected.unwrap_or_default()
            ));
        }
    }
    Ok(())
}

/// Files of the segments, by name.
fn segments(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fs::read_dir(dir.join("segments"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

/// What a power cut leaves: each file as it was when last known to be on the disk, as it was at the
/// end, with each page the one or the other, or (a new one) not at all or blank; a removed one may
/// be back.
fn cut_power(dir: &Path, durable: &BTreeMap<PathBuf, Vec<u8>>, dice: &mut fastrand::Rng) {
    const PAGE: usize = 4096;
    let last = segments(dir);
    for path in durable.keys().chain(last.keys()) {
        let (old, new) = (durable.get(path), last.get(path));
        let bytes = match (old, new, dice.u8(0..4)) {
            (None, None, _) => continue,
            (Some(old), _, 0) | (Some(old), None, _) => Some(old.clone()),
            (None, Some(_), 0) => None,
            (None, Some(new), 1) => Some(vec![0; new.len()]),
            (_, Some(new), 2) => Some(new.clone()),
            (old, Some(new), _) => {
                let mut bytes = new.clone();
                for (page, bytes) in bytes.chunks_mut(PAGE).enumerate() {
                    if dice.bool() {
                        let from = old.and_then(|old| old.get(page * PAGE..));
                        for (at, byte) in bytes.iter_mut().enumerate() {
                            *byte = from.and_then(|from| from.get(at)).copied().unwrap_or(0);
                        }
                    }
                }
                Some(bytes)
            }
        };
        match bytes {
            Some(bytes) => fs::write(path, bytes).unwrap(),
            None => fs::remove_file(path).unwrap(),
        }
    }
    // The next life is another boot of this host.
    let node = dir.join("node.json");
    let mut facts: serde_json::Value = serde_json::from_slice(&fs::read(&node).unwrap()).unwrap();
    facts["last"]["boot"] = "an earlier one".into();
    fs::write(&node, facts.to_string()).unwrap();
}

/// One case: a crash, a power cut, and a last life. The store may not have more than was
/// acknowledged, nor less than what was durable, and nobody stops flushing.
fn simulate_power_cut(seed: u64) -> Result<(), String> {
    let _case = Case(seed);
    let mut dice = fastrand::Rng::with_seed(seed);
    fastrand::seed(seed);
    let dir = scratch();
    let server = Server::new(Protection::All, &mut dice);
    let server = Arc::new(Mutex::new(server));
    let oracle = Oracle::default();
    let retain = Duration::from_millis(dice.u64(0..200));
    let life = || Life {
        dir: dir.path(),
        server: &server,
        oracle: &oracle,
        retain,
        wild: false,
        last: false,
        moment: None,
    };
    for _ in 0..dice.usize(0..3) {
        live(life(), &mut dice);
    }
    let mut durable = (BTreeMap::new(), Totals::new());
    let mut moment = || durable = (segments(dir.path()), oracle.borrow().clone());
    live(
        Life {
            moment: Some(&mut moment),
            ..life()
        },
        &mut dice,
    );
    let (files, at_least) = durable;
    let before = oracle.borrow().clone();
    cut_power(dir.path(), &files, &mut dice);
    live(
        Life {
            last: true,
            ..life()
        },
        &mut dice,
    );
    for (key, acknowledged) in oracle.borrow().iter() {
        let of = |totals: &Totals| totals.get(key).copied().unwrap_or(0);
        let least = of(&at_least) + acknowledged - of(&before);
        let found = of(&server.lock().unwrap().data.values);
        if !(least..=*acknowledged).contains(&found) {
            let key = String::from_utf8_lossy(key);
            return Err(format!(
                "seed {seed}: {key}: acknowledged {acknowledged}, durable {least}, found {found}"
            ));
        }
    }
    Ok(())
}

/// Fails, by a conflict that nobody mends, when recovery does not look for a power cut, and by a value
/// that stays behind when the keys of batches that the journal lost are not read anew.
#[test]
fn a_power_cut_loses_only_what_was_not_durable_and_counts_nothing_twice() {
    if let Some(seed) = setting("TALLYD_SEED") {
        return simulate_power_cut(seed).unwrap();
    }
    for seed in 0..setting("TALLYD_SIMULATIONS").unwrap_or(1_000) {
        simulate_power_cut(seed).unwrap();
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Fails without the watch and without the token: see the tests below. It has also failed when
/// recovery took the progress noted in a later segment for that of an earlier one, which a fail-over
/// had undone.
#[test]
fn totals_are_exact_whatever_the_network_the_store_and_the_process_do() {
    if let Some(seed) = setting("TALLYD_SEED") {
        return simulate(seed, Protection::All).unwrap();
    }
    for seed in 0..setting("TALLYD_SIMULATIONS").unwrap_or(2_000) {
        simulate(seed, Protection::All).unwrap();
    }
}

fn is_noticed(protection: Protection) -> bool {
    (0..300).any(|seed| {
        std::panic::catch_unwind(|| simulate(seed, protection).is_err()).unwrap_or(true)
    })
}

#[test]
fn late_bytes_that_nothing_guards_are_noticed() {
    assert!(is_noticed(Protection::NoWatch));
}

#[test]
fn a_fail_over_that_goes_unnoticed_is_noticed_here() {
    assert!(is_noticed(Protection::NoToken));
}
