//! The store for those who have no Redis: a `redb` database in the state directory.
//!
//! The same token, the same clock, the same answers, in one write transaction per batch. What
//! `WATCH` is to Redis is a comparison here: a batch is applied only if the token is still what
//! its lane last saw.
//!
//! The database's calls block, on the disk's sync above all, and the caller's runtime has a single
//! thread that answers clients meanwhile (where `block_in_place` is not to be had): so they run on
//! the blocking pool, with a copy of the batch, as such a call outlives a caller that gives up.
//!
//! Invariants:
//! 1. Counters, token and clock move in one transaction, synced to the disk before `Applied`.
//! 2. A caller that gives up leaves a spent lane; what became of the batch, the token tells.
//! 3. One process at a time: the database's file is locked while it is open.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, Table, TableDefinition};
use tokio::task::spawn_blocking;

use super::{
    Claim, Delta, Identity, KeyError, Lane, NodeId, Outcome, READ_KEYS_MAX, Reading, Refusal,
    Silence, Standing, Store, StoreError, Token, clock_key, token_key,
};
use crate::private;

/// Key to value.
const COUNTERS: TableDefinition<'_, &[u8], i64> = TableDefinition::new("counters");
/// Token, clock and the database's id, as text, under the names that Redis would have.
const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
/// The database's id: 32 hexadecimal digits, made with it.
const ID_KEY: &str = "tallyd:id";

/// A store in one file.
#[derive(Debug)]
pub struct EmbeddedStore {
    file: Arc<File>,
    identity: Identity,
}

/// The database and what is known of it.
#[derive(Debug)]
struct File {
    /// `None` after an error of the disk, until it is opened anew.
    database: RwLock<Option<Database>>,
    path: PathBuf,
    id: String,
}

impl EmbeddedStore {
    /// Opens the database at `path`, or makes it. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Embedded`]: the file cannot be opened, is no database, or is in use.
    pub fn open(path: &Path, identity: Identity) -> Result<Self, StoreError> {
        let file = File::open(path).map_err(|source| embedded(path, source))?;
        Ok(Self {
            file: Arc::new(file),
            identity,
        })
    }
}

impl File {
    fn open(path: &Path) -> Result<Self, redb::Error> {
        // The database would be readable by whom the umask lets.
        private::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let database = Database::create(path)?;
        // A database that is whole is opened without a write: there may be no room for one.
        if let Some(id) = known_id(&database)? {
            return Ok(Self {
                database: RwLock::new(Some(database)),
                path: path.to_owned(),
                id,
            });
        }
        let write = database.begin_write()?;
        let id = {
            // Both tables, so that whoever reads later finds them.
            write.open_table(COUNTERS)?;
            let mut meta = write.open_table(META)?;
            let found = meta.get(ID_KEY)?.map(|value| value.value().to_owned());
            if let Some(id) = found {
                id
            } else {
                let id = random_id()?;
                meta.insert(ID_KEY, id.as_str())?;
                id
            }
        };
        write.commit()?;
        Ok(Self {
            database: RwLock::new(Some(database)),
            path: path.to_owned(),
            id,
        })
    }

    /// Works on the database. After an error of the disk it does nothing more until it is opened anew,
    /// and then has all of the last transaction or nothing.
    fn on<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        let read = || self.database.read().unwrap_or_else(PoisonError::into_inner);
        let write = || {
            let database = self.database.write();
            database.unwrap_or_else(PoisonError::into_inner)
        };
        let mut open = read();
        if open.is_none() {
            drop(open);
            let mut closed = write();
            if closed.is_none() {
                *closed = Some(Database::create(&self.path)?);
            }
            drop(closed);
            open = read();
        }
        // `None`: another call has failed meanwhile.
        let done = open.as_ref().map_or(Err(redb::Error::PreviousIo), work);
        drop(open);
        if matches!(done, Err(redb::Error::Io(_) | redb::Error::PreviousIo)) {
            *write() = None;
        }
        done
    }

    fn error(&self, source: redb::Error) -> StoreError {
        embedded(&self.path, source)
    }

    fn protocol(&self, message: String) -> StoreError {
        StoreError::Protocol {
            address: self.path.display().to_string(),
            message,
        }
    }

    fn standing(&self, node: NodeId) -> Result<Standing, StoreError> {
        let entries = self.on(|database| {
            let meta = database.begin_read()?.open_table(META)?;
            Ok((text(&meta, &token_key(node))?, text(&meta, clock_key())?))
        });
        let (token, clock) = entries.map_err(|e| self.error(e))?;
        Ok(Standing {
            token: token
                .map(|text| text.parse())
                .transpose()
                .map_err(|_| self.protocol(format!("key {} holds no token", token_key(node))))?,
            clock: clock
                .map_or(Ok(0), |text| text.parse())
                .map_err(|_| self.protocol(format!("key {} holds no clock", clock_key())))?,
            server: self.id.clone(),
            warnings: Vec::new(),
        })
    }

    fn read(&self, keys: &[Bytes]) -> Result<Reading, redb::Error> {
        self.on(|database| {
            // One read transaction is one moment.
            let read = database.begin_read()?;
            let counters = read.open_table(COUNTERS)?;
            let mut values = Vec::with_capacity(keys.len());
            for key in keys {
                values.push(Ok(counters.get(key.as_ref())?.map(|value| value.value())));
            }
            let clock = clock(&read.open_table(META)?)?;
            Ok(Reading { values, clock })
        })
    }

    /// `None`: the token is not `seen`. An error: unknown, as a failed commit may have reached
    /// the disk.
    fn apply(
        &self,
        node: NodeId,
        seen: Option<Token>,
        next: Token,
        deltas: &[(Vec<u8>, i64)],
    ) -> Result<Option<Applied>, redb::Error> {
        self.on(|database| {
            let mut write = database.begin_write()?;
            write.set_durability(Durability::Immediate)?;
            let mut values = Vec::with_capacity(deltas.len());
            let clock = {
                let mut meta = write.open_table(META)?;
                if !move_token(&mut meta, node, seen, next)? {
                    return Ok(None);
                }
                let clock = clock(&meta)? + 1;
                meta.insert(clock_key(), clock.to_string().as_str())?;
                let mut counters = write.open_table(COUNTERS)?;
                for (key, amount) in deltas {
                    let old = counters
                        .get(key.as_slice())?
                        .map_or(0, |value| value.value());
                    match old.checked_add(*amount) {
                        Some(new) => {
                            counters.insert(key.as_slice(), new)?;
                            values.push(Ok(new));
                        }
                        None => values.push(Err(KeyError::Overflow)),
                    }
                }
                clock
            };
            write.commit()?;
            Ok(Some(Applied { values, clock }))
        })
    }

    fn claim(&self, node: NodeId, seen: Option<Token>, next: Token) -> Result<bool, redb::Error> {
        self.on(|database| {
            let mut write = database.begin_write()?;
            write.set_durability(Durability::Immediate)?;
            if !move_token(&mut write.open_table(META)?, node, seen, next)? {
                return Ok(false);
            }
            write.commit()?;
            Ok(true)
        })
    }
}

/// The id of a database that has all its tables.
fn known_id(database: &Database) -> Result<Option<String>, redb::Error> {
    let read = database.begin_read()?;
    let tables = (read.open_table(COUNTERS), read.open_table(META));
    let (Ok(_), Ok(meta)) = tables else {
        // Those that are missing are made, and what else is wrong is said then.
        return Ok(None);
    };
    text(&meta, ID_KEY)
}

/// What a batch gave.
struct Applied {
    values: Vec<Result<i64, KeyError>>,
    clock: u64,
}

/// Sets the token, if it still is what its lane last saw.
fn move_token(
    meta: &mut Table<'_, &str, &str>,
    node: NodeId,
    seen: Option<Token>,
    next: Token,
) -> Result<bool, redb::Error> {
    let key = token_key(node);
    if text(meta, &key)? != seen.map(|token| token.to_string()) {
        return Ok(false);
    }
    meta.insert(key.as_str(), next.to_string().as_str())?;
    Ok(true)
}

fn text(
    meta: &impl ReadableTable<&'static str, &'static str>,
    key: &str,
) -> Result<Option<String>, redb::Error> {
    Ok(meta.get(key)?.map(|value| value.value().to_owned()))
}

fn clock(meta: &impl ReadableTable<&'static str, &'static str>) -> Result<u64, redb::Error> {
    text(meta, clock_key())?.map_or(Ok(0), |text| {
        text.parse()
            .map_err(|_| redb::Error::Corrupted(format!("key {} holds no clock", clock_key())))
    })
}

fn random_id() -> Result<String, redb::Error> {
    let id = getrandom::u64()
        .and_then(|high| Ok((high, getrandom::u64()?)))
        .map_err(|error| redb::Error::Io(std::io::Error::other(error)))?;
    Ok(format!("{:016x}{:016x}", id.0, id.1))
}

fn embedded(path: &Path, source: redb::Error) -> StoreError {
    StoreError::Embedded {
        path: path.display().to_string(),
        source: Box::new(source),
    }
}

/// Runs `work` where it may block.
async fn blocking<T: Send + 'static>(
    file: &Arc<File>,
    work: impl FnOnce(&File) -> Result<T, redb::Error> + Send + 'static,
) -> Result<T, StoreError> {
    let own = file.clone();
    let result = spawn_blocking(move || work(&own)).await;
    result
        .unwrap_or_else(|stopped| Err(redb::Error::Io(std::io::Error::other(stopped))))
        .map_err(|source| file.error(source))
}

impl Store for EmbeddedStore {
    const IS_LOCAL: bool = true;

    type Lane = EmbeddedLane;
    type Feed = Silence;

    async fn connect(&self) -> Result<(EmbeddedLane, Standing), StoreError> {
        let identity = self.identity;
        let standing = blocking(&self.file, move |file| Ok(file.standing(identity.node))).await??;
        let lane = EmbeddedLane {
            file: self.file.clone(),
            identity,
            token: standing.token,
            spent: false,
        };
        Ok((lane, standing))
    }

    async fn read(&self, keys: &[Bytes]) -> Result<Reading, StoreError> {
        if keys.len() > READ_KEYS_MAX {
            let message = format!("a read of {} keys, over {READ_KEYS_MAX}", keys.len());
            return Err(self.file.protocol(message));
        }
        let keys = keys.to_vec();
        blocking(&self.file, move |file| file.read(&keys)).await
    }

    /// Does nothing: there are no other hosts to tell.
    async fn publish(&self, _message: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }

    async fn subscribe(&self) -> Result<Silence, StoreError> {
        Ok(Silence)
    }
}

/// One writer's view of the database's token.
#[derive(Debug)]
pub struct EmbeddedLane {
    file: Arc<File>,
    identity: Identity,
    /// What the token must still be.
    token: Option<Token>,
    spent: bool,
}

impl EmbeddedLane {
    fn spent_error(&self) -> StoreError {
        self.file
            .protocol("this lane is spent: connect a new one and read the token".to_owned())
    }

    fn next(&self, batch: u64) -> Token {
        Token {
            batch,
            run: self.identity.run,
        }
    }
}

impl Lane for EmbeddedLane {
    async fn claim(&mut self, batch: u64) -> Claim {
        if self.spent {
            return Claim::Failed(self.spent_error());
        }
        self.spent = true;
        let (node, seen, next) = (self.identity.node, self.token, self.next(batch));
        match blocking(&self.file, move |file| file.claim(node, seen, next)).await {
            Ok(true) => {
                self.token = Some(next);
                self.spent = false;
                Claim::Claimed
            }
            Ok(false) => Claim::TokenMoved,
            Err(error) => Claim::Failed(error),
        }
    }

    async fn apply(&mut self, batch: u64, deltas: &[Delta<'_>]) -> Outcome {
        if self.spent {
            return Outcome::NotApplied(Refusal::Whole(self.spent_error()));
        }
        self.spent = true;
        if !Token::precedes(self.token, batch) {
            let message = format!(
                "batch {batch} does not follow token {:?}",
                self.token.map(|token| token.batch)
            );
            return Outcome::NotApplied(Refusal::Whole(self.file.protocol(message)));
        }
        let own: Vec<_> = deltas
            .iter()
            .map(|delta| (delta.key.to_vec(), delta.amount))
            .collect();
        let (node, seen, next) = (self.identity.node, self.token, self.next(batch));
        match blocking(&self.file, move |file| file.apply(node, seen, next, &own)).await {
            Ok(Some(applied)) => {
                self.token = Some(next);
                self.spent = false;
                Outcome::Applied {
                    values: applied.values,
                    clock: applied.clock,
                }
            }
            Ok(None) => Outcome::NotApplied(Refusal::TokenMoved),
            Err(error) => Outcome::Unknown(error),
        }
    }
}
