//! The flush connection: claims the token, applies batches, asks for replicas.
//!
//! Invariants:
//! 1. While no batch is under way the token is watched, and `token` is what it held when the watch
//!    began. So a transaction runs only if the token is still that, whoever sent it and whenever
//!    the server gets to it.
//! 2. One batch at a time. `spent` is set before the first byte goes out, and taken back only
//!    after the whole answer was as it should be, the trailing `WATCH` included: a batch that was
//!    given up half-way leaves a lane that refuses.
//! 3. A key is called refused only if the user may use `INCRBY` at all, which is asked with a
//!    transaction that is discarded.
//! 4. `WAIT` stands between two transactions, never within one; it leaves the watch as it is.

use std::time::Duration;

use super::codec::{put_incrby, put_whole};
use super::exchange::{Encoded, Failure, Request, Wire};
use super::handshake;
use super::replies::{Frame, Frames, OldToken, Pipeline, Transaction, Verdict};
use super::server_error::concerns_all;
use super::{Delivery, RedisConfig};
use crate::store::{
    Claim, Delta, Identity, KeyError, Lane, Outcome, Refusal, RunId, Standing, StoreError, Token,
    clock_key, token_key,
};

/// A request is encoded in pieces of about this size, in bytes.
const PIECE_BYTES: usize = 16 << 10;

/// An exclusive connection to Redis.
pub struct RedisLane {
    wire: Wire,
    run: RunId,
    delivery: Delivery,
    token_key: String,
    /// What the watched key holds.
    token: Option<Token>,
    spent: bool,
}

impl RedisLane {
    /// Makes a lane of a fresh connection.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) async fn open(
        mut wire: Wire,
        config: &RedisConfig,
        identity: Identity,
        store_id: &str,
    ) -> Result<(Self, Standing), StoreError> {
        let login = &config.login;
        let token_key = token_key(identity.node);
        let standing = match config.delivery {
            Delivery::ExactlyOnce => {
                handshake::open_exactly_once(&mut wire, login, &token_key, store_id).await?
            }
            Delivery::AtLeastOnce => handshake::open_at_least_once(&mut wire, login).await?,
        };
        wire.set_limit(config.timeouts.progress);
        let lane = Self {
            wire,
            run: identity.run,
            delivery: config.delivery,
            token_key,
            token: standing.token,
            spent: false,
        };
        Ok((lane, standing))
    }

    fn spent_error(&self) -> StoreError {
        self.wire
            .protocol("this lane is spent: connect a new one and read the token")
    }

    async fn apply_exactly_once(&mut self, batch: u64, deltas: &[Delta<'_>]) -> Outcome {
        let next = Token {
            batch,
            run: self.run,
        };
        let mut tail = Vec::new();
        put_whole(&mut tail, &[b"INCR", clock_key().as_bytes()]);
        put_seal(&mut tail, &self.token_key, next);
        let mut request = BatchRequest {
            head: b"*1\r\n$5\r\nMULTI\r\n",
            deltas,
            tail,
        };
        let mut replies = Transaction::batch(deltas.len());
        if let Err(failure) = self.wire.exchange(&mut request, &mut replies).await {
            return failed(failure);
        }
        match replies.verdict() {
            Verdict::Ran { values, clock, old } => self.ran(next, values, clock, &old),
            Verdict::Aborted => Outcome::NotApplied(Refusal::TokenMoved),
            Verdict::Keys(errors) => Outcome::NotApplied(match self.may_incrby().await {
                Ok(()) => Refusal::Keys(errors),
                Err(error) => Refusal::Whole(error),
            }),
            Verdict::Refused(message) => {
                Outcome::NotApplied(Refusal::Whole(self.wire.refused(message)))
            }
            Verdict::Broken(message) => Outcome::Unknown(self.wire.protocol(message)),
        }
    }

    /// Whether this user may use `INCRBY`: the clock's key is one that it may surely touch, as its
    /// `INCR` was queued. Nothing is executed.
    async fn may_incrby(&mut self) -> Result<(), StoreError> {
        let mut request = Vec::new();
        put_whole(&mut request, &[b"MULTI"]);
        put_incrby(&mut request, clock_key().as_bytes(), 0);
        put_whole(&mut request, &[b"DISCARD"]);
        let mut frames = Frames::new(3);
        let asked = self.wire.exchange(&mut Encoded(request), &mut frames).await;
        asked.map_err(|failure| failure.error)?;
        match frames.seen.get(1) {
            Some(Frame::Error(message)) => Err(self.wire.refused(message)),
            _ => Ok(()),
        }
    }

    /// A transaction ran. All that is left to check is what `WATCH` has promised.
    fn ran(
        &mut self,
        next: Token,
        values: Vec<Result<i64, KeyError>>,
        clock: Result<i64, String>,
        old: &OldToken,
    ) -> Outcome {
        if let Err(message) = self.check_old(old) {
            return Outcome::Unknown(self.wire.protocol(message));
        }
        // The keys and the token moved, but nothing orders their values: the next connection says
        // what is wrong with the clock's key, and the token that this batch was applied.
        let clock = match clock.map(u64::try_from) {
            Ok(Ok(clock)) => clock,
            Ok(Err(_)) => {
                let message = format!("key {} is negative", clock_key());
                return Outcome::Unknown(self.wire.protocol(message));
            }
            Err(message) => {
                let message = format!("key {}: {message}", clock_key());
                return Outcome::Unknown(self.wire.protocol(message));
            }
        };
        self.token = Some(next);
        self.spent = false;
        Outcome::Applied { values, clock }
    }

    /// What the token held when it was set must be what this lane had seen.
    fn check_old(&self, old: &OldToken) -> Result<(), String> {
        let seen = match old {
            OldToken::Absent => "absent".to_owned(),
            OldToken::Text(text) => text.escape_ascii().to_string(),
            OldToken::Failed(message) => {
                return Err(format!(
                    "the transaction ran, but SET {} failed in it ({message}): this batch may count \
                     twice",
                    self.token_key
                ));
            }
        };
        let due = self
            .token
            .map_or_else(|| "absent".to_owned(), |token| token.to_string());
        if seen == due {
            return Ok(());
        }
        Err(format!(
            "the transaction ran though its watched key {} had changed from \"{due}\" to \"{seen}\": \
             WATCH does not work here, and batches may count twice",
            self.token_key
        ))
    }

    async fn apply_at_least_once(&mut self, deltas: &[Delta<'_>]) -> Outcome {
        let mut tail = Vec::new();
        put_whole(&mut tail, &[b"INCR", clock_key().as_bytes()]);
        let mut request = BatchRequest {
            head: b"",
            deltas,
            tail,
        };
        let mut replies = Pipeline::new(deltas.len());
        if let Err(failure) = self.wire.exchange(&mut request, &mut replies).await {
            return failed(failure);
        }
        let clock = match replies.clock {
            Some(Ok(clock)) => u64::try_from(clock).unwrap_or(0),
            Some(Err(message))
                if concerns_all(&message)
                    && replies
                        .values
                        .iter()
                        .all(|value| matches!(value, Err(KeyError::Retry(_)))) =>
            {
                return Outcome::NotApplied(Refusal::Whole(self.wire.refused(message)));
            }
            _ => 0,
        };
        self.spent = false;
        Outcome::Applied {
            values: replies.values,
            clock,
        }
    }

    async fn claim_token(&mut self, batch: u64) -> Claim {
        let next = Token {
            batch,
            run: self.run,
        };
        let mut request = Vec::new();
        put_whole(&mut request, &[b"MULTI"]);
        put_seal(&mut request, &self.token_key, next);
        let mut replies = Transaction::claim();
        if let Err(failure) = self
            .wire
            .exchange(&mut Encoded(request), &mut replies)
            .await
        {
            return Claim::Failed(failure.error);
        }
        match replies.verdict() {
            Verdict::Ran { old, .. } => match self.check_old(&old) {
                Ok(()) => {
                    self.token = Some(next);
                    self.spent = false;
                    Claim::Claimed
                }
                Err(message) => Claim::Failed(self.wire.protocol(message)),
            },
            Verdict::Aborted => Claim::TokenMoved,
            Verdict::Refused(message) => Claim::Failed(self.wire.refused(message)),
            Verdict::Broken(message) => Claim::Failed(self.wire.protocol(message)),
            Verdict::Keys(_) => Claim::Failed(self.wire.protocol("a claim has no keys")),
        }
    }
}

impl Lane for RedisLane {
    async fn claim(&mut self, batch: u64) -> Claim {
        if self.spent {
            return Claim::Failed(self.spent_error());
        }
        match self.delivery {
            Delivery::ExactlyOnce => {
                self.spent = true;
                self.claim_token(batch).await
            }
            Delivery::AtLeastOnce => Claim::Claimed,
        }
    }

    async fn apply(&mut self, batch: u64, deltas: &[Delta<'_>]) -> Outcome {
        if self.spent {
            return Outcome::NotApplied(Refusal::Whole(self.spent_error()));
        }
        self.spent = true;
        match self.delivery {
            Delivery::ExactlyOnce if !Token::precedes(self.token, batch) => {
                let message = format!(
                    "batch {batch} does not follow token {:?}",
                    self.token.map(|token| token.batch)
                );
                Outcome::NotApplied(Refusal::Whole(self.wire.protocol(message)))
            }
            Delivery::ExactlyOnce => self.apply_exactly_once(batch, deltas).await,
            Delivery::AtLeastOnce => self.apply_at_least_once(deltas).await,
        }
    }

    async fn replicas(&mut self, wanted: u32, limit: Duration) -> Result<u32, StoreError> {
        if self.spent {
            return Err(self.spent_error());
        }
        self.spent = true;
        let mut request = Vec::new();
        let (wanted, limit) = (wanted.to_string(), limit.as_millis().to_string());
        put_whole(
            &mut request,
            &[b"WAIT", wanted.as_bytes(), limit.as_bytes()],
        );
        let mut frames = Frames::new(1);
        let asked = self.wire.exchange(&mut Encoded(request), &mut frames).await;
        asked.map_err(|failure| failure.error)?;
        match frames.seen.first() {
            Some(Frame::Integer(count)) => {
                self.spent = false;
                Ok(u32::try_from(*count).unwrap_or(0))
            }
            Some(Frame::Error(message)) => {
                self.spent = false;
                Err(self.wire.refused(format!("{message} (WAIT)")))
            }
            other => Err(self.wire.protocol(format!("WAIT gave {other:?}"))),
        }
    }

    async fn left(&mut self) {
        self.wire.left().await;
    }
}

fn failed(failure: Failure) -> Outcome {
    if failure.sent {
        Outcome::Unknown(failure.error)
    } else {
        Outcome::NotApplied(Refusal::Whole(failure.error))
    }
}

/// Appends what ends a transaction: the token set, the run of it all, and the next watch.
fn put_seal(out: &mut Vec<u8>, token_key: &str, next: Token) {
    let key = token_key.as_bytes();
    put_whole(out, &[b"SET", key, next.to_string().as_bytes(), b"GET"]);
    put_whole(out, &[b"EXEC"]);
    // In the same write, because nothing can come in between on this connection, and a round trip
    // of its own would cost as much as a small batch. After an EXEC that did not run it arms a
    // lane that is spent.
    put_whole(out, &[b"WATCH", key]);
}

/// Encodes a batch as it goes out.
struct BatchRequest<'b> {
    head: &'static [u8],
    /// What is not encoded yet.
    deltas: &'b [Delta<'b>],
    tail: Vec<u8>,
}

impl Request for BatchRequest<'_> {
    fn fill(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(std::mem::take(&mut self.head));
        while let Some((delta, rest)) = self.deltas.split_first() {
            if out.len() >= PIECE_BYTES {
                return;
            }
            put_incrby(out, delta.key, delta.amount);
            self.deltas = rest;
        }
        out.append(&mut self.tail);
    }
}
