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
//! 4. A file that failed (a full disk) is opened again, and the token tells how far it has come.
//!
//! - [`file`]: one transaction each
//! - [`reopen`]: the file, whether it is open or failed

mod file;
mod reopen;

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::spawn_blocking;

use self::file::{Entries, File};
use self::reopen::Reopened;
use super::{
    Claim, Delta, Identity, Lane, Outcome, READ_KEYS_MAX, Reading, Refusal, Silence, Standing,
    Store, StoreError, StoreId, Token, clock_key, token_key,
};

/// A store in one file.
#[derive(Debug)]
pub struct EmbeddedStore {
    file: Arc<Reopened>,
    identity: Identity,
}

impl EmbeddedStore {
    /// Opens the database at `path`, or makes it. Blocks.
    ///
    /// # Errors
    /// [`StoreError::Embedded`]: the file cannot be opened, is no database, or is in use.
    pub fn open(path: &Path, identity: Identity) -> Result<Self, StoreError> {
        Ok(Self {
            file: Arc::new(Reopened::open(path)?),
            identity,
        })
    }

    fn standing(&self, entries: Entries) -> Result<Standing, StoreError> {
        let token_key = token_key(self.identity.node);
        let is_empty = entries.clock.is_none();
        Ok(Standing {
            token: entries
                .token
                .map(|text| text.parse())
                .transpose()
                .map_err(|_| protocol(&self.file, format!("key {token_key} holds no token")))?,
            clock: entries
                .clock
                .map_or(Ok(0), |text| text.parse())
                .map_err(|_| protocol(&self.file, format!("key {} holds no clock", clock_key())))?,
            store: Some(StoreId {
                id: format!("embedded:{}", entries.id),
                is_new: is_empty,
            }),
            server: entries.id,
            warnings: Vec::new(),
        })
    }
}

fn protocol(file: &Reopened, message: String) -> StoreError {
    StoreError::Protocol {
        address: file.path().display().to_string(),
        message,
    }
}

/// Runs `work` where it may block.
async fn blocking<T: Send + 'static>(
    file: &Arc<Reopened>,
    work: impl FnOnce(&File) -> Result<T, redb::Error> + Send + 'static,
) -> Result<T, StoreError> {
    let own = Arc::clone(file);
    spawn_blocking(move || own.with(work))
        .await
        .unwrap_or_else(|stopped| Err(file.failed(redb::Error::Io(std::io::Error::other(stopped)))))
}

impl Store for EmbeddedStore {
    const IS_LOCAL: bool = true;

    type Lane = EmbeddedLane;
    type Feed = Silence;

    async fn connect(&self) -> Result<(EmbeddedLane, Standing), StoreError> {
        let identity = self.identity;
        let entries = blocking(&self.file, move |file| file.entries(identity.node)).await?;
        let standing = self.standing(entries)?;
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
            return Err(protocol(&self.file, message));
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
    file: Arc<Reopened>,
    identity: Identity,
    /// What the token must still be.
    token: Option<Token>,
    spent: bool,
}

impl EmbeddedLane {
    fn spent_error(&self) -> StoreError {
        let message = "this lane is spent: connect a new one and read the token";
        protocol(&self.file, message.to_owned())
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
                self.file.works();
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
            return Outcome::NotApplied(Refusal::Whole(protocol(&self.file, message)));
        }
        let own: Vec<_> = deltas
            .iter()
            .map(|delta| (delta.key.to_vec(), delta.amount))
            .collect();
        let (node, seen, next) = (self.identity.node, self.token, self.next(batch));
        match blocking(&self.file, move |file| file.apply(node, seen, next, &own)).await {
            Ok(Some(applied)) => {
                self.file.works();
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
