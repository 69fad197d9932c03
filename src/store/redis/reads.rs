//! What may be asked by many at once: reads, and publishing, on connections that are kept.
//!
//! Own code on the lane's wire: replies are bounded by what was asked for, whatever a server sends, and
//! a value that is too long for a counter is passed over without being held.
//!
//! Invariants:
//! 1. A connection on which a request did not end as it should is never used again.
//! 2. A read may be sent twice, a message never.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::codec::{Reply, put_whole};
use super::exchange::{Encoded, Failure, Replies, Wire};
use super::origin::Origin;
use super::replies::{text, unexpected};
use super::{RedisConfig, handshake, server_error};
use crate::store::{KeyError, Reading, StoreError, clock_key};

/// A longer value is no counter, in bytes: the lowest has 20.
const VALUE_BYTES_MAX: usize = 64;

/// Connections that are opened when they are needed, and kept.
#[derive(Debug)]
pub(super) struct Pool {
    config: Arc<RedisConfig>,
    origin: Arc<Origin>,
    idle: Mutex<Vec<Wire>>,
    /// How many may be in use at a time.
    room: Semaphore,
}

impl Pool {
    pub(super) fn new(config: Arc<RedisConfig>, origin: Arc<Origin>, connections: usize) -> Self {
        Self {
            config,
            origin,
            idle: Mutex::default(),
            room: Semaphore::new(connections),
        }
    }

    /// Values and clock in one transaction. Where that is refused, be it for `MULTI` or for one of
    /// the keys, one by one.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) async fn read(&self, keys: &[Bytes]) -> Result<Reading, StoreError> {
        let mut request = Vec::new();
        put_whole(&mut request, &[b"MULTI"]);
        put_gets(&mut request, keys);
        put_whole(&mut request, &[b"GET", clock_key().as_bytes()]);
        put_whole(&mut request, &[b"EXEC"]);
        let anew = || Read::atomic(keys.len());
        let mut values = self.ask(request, true, anew).await?;
        match values.refused.take() {
            None => self.reading(values),
            Some(message) if is_passing(&message) => Err(self.origin.peer().refused(&message)),
            Some(_) => self.read_plain(keys).await,
        }
    }

    /// The clock, then the values, without a transaction. The values are then of that moment or a
    /// later one, so a message with a higher clock still replaces them.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) async fn read_plain(&self, keys: &[Bytes]) -> Result<Reading, StoreError> {
        let mut request = Vec::new();
        put_whole(&mut request, &[b"GET", clock_key().as_bytes()]);
        put_gets(&mut request, keys);
        let values = self.ask(request, true, || Read::plain(keys.len())).await?;
        self.reading(values)
    }

    /// Publishes on the configured channel.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) async fn publish(&self, message: &[u8]) -> Result<(), StoreError> {
        let mut request = Vec::new();
        put_whole(
            &mut request,
            &[b"PUBLISH", self.config.channel.as_bytes(), message],
        );
        let published = self.ask(request, false, Published::default).await?;
        match published.0 {
            None => Ok(()),
            Some(message) => Err(self.origin.peer().refused(&message)),
        }
    }

    fn reading(&self, values: Read) -> Result<Reading, StoreError> {
        let clock = match values.clock {
            Ok(clock) => u64::try_from(clock.unwrap_or(0)).ok(),
            Err(error) => {
                let message = format!("{error} (GET {})", clock_key());
                return Err(self.origin.peer().refused(&message));
            }
        };
        let negative = || {
            self.origin
                .peer()
                .protocol(&format!("key {} is negative", clock_key()))
        };
        let clock = clock.ok_or_else(negative)?;
        // A server that refuses everything for now has said so for each key.
        if let Some(Err(KeyError::Retry(message))) = values.values.first() {
            return Err(self.origin.peer().refused(message));
        }
        Ok(Reading {
            values: values.values,
            clock,
        })
    }

    /// Asks; once more, on a new connection, if the one at hand turns out to be dead and the request may
    /// be sent `twice`, or was not sent at all.
    async fn ask<R: Replies>(
        &self,
        request: Vec<u8>,
        twice: bool,
        anew: impl Fn() -> R,
    ) -> Result<R, StoreError> {
        // Never closed.
        let _room = self.room.acquire().await.ok();
        let kept = self.idle().pop();
        if let Some(wire) = kept {
            match self.ask_on(wire, request.clone(), anew()).await {
                Err(Failure {
                    sent,
                    error: StoreError::Io { .. },
                }) if twice || !sent => {
                    // Those of its time are likely to be dead too.
                    self.idle().clear();
                }
                asked => return asked.map_err(|failure| failure.error),
            }
        }
        let wire = self.connect().await?;
        let asked = self.ask_on(wire, request, anew()).await;
        asked.map_err(|failure| failure.error)
    }

    async fn ask_on<R: Replies>(
        &self,
        mut wire: Wire,
        request: Vec<u8>,
        mut replies: R,
    ) -> Result<R, Failure> {
        wire.exchange(&mut Encoded(request), &mut replies).await?;
        self.idle().push(wire);
        Ok(replies)
    }

    async fn connect(&self) -> Result<Wire, StoreError> {
        let mut wire = self.origin.wire().await?;
        handshake::log_in(&mut wire, &self.config.login).await?;
        wire.set_limit(self.config.timeouts.response);
        wire.set_reply_limit(VALUE_BYTES_MAX);
        wire.skip_long();
        Ok(wire)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Wire>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn put_gets(request: &mut Vec<u8>, keys: &[Bytes]) {
    for key in keys {
        put_whole(request, &[b"GET", key]);
    }
}

/// Whether asking one by one would be refused just the same.
fn is_passing(message: &str) -> bool {
    server_error::concerns_all(message) && server_error::code(message) != "EXECABORT"
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Multi,
    /// Acknowledgements still to come.
    Queued(usize),
    Exec,
    /// Results still to come.
    Results(usize),
}

/// Follows the replies to a read.
struct Read {
    /// Results of the whole read.
    results: usize,
    due: Due,
    /// Whether the clock comes first; else last.
    clock_first: bool,
    values: Vec<Result<Option<i64>, KeyError>>,
    clock: Result<Option<i64>, KeyError>,
    refused: Option<String>,
}

impl Read {
    /// Of `MULTI · GET key … · GET clock · EXEC`.
    fn atomic(keys: usize) -> Self {
        Self::new(keys, Due::Multi, false)
    }

    /// Of `GET clock · GET key …`.
    fn plain(keys: usize) -> Self {
        Self::new(keys, Due::Results(keys + 1), true)
    }

    fn new(keys: usize, due: Due, clock_first: bool) -> Self {
        Self {
            results: keys + 1,
            due,
            clock_first,
            values: Vec::with_capacity(keys),
            clock: Ok(None),
            refused: None,
        }
    }
}

impl Replies for Read {
    fn take(&mut self, reply: Reply<'_>) -> Result<bool, String> {
        self.due = match (self.due, reply) {
            (Due::Multi, Reply::Status(b"OK")) => Due::Queued(self.results),
            // The rest of the request is answered plainly: by results, and an error for `EXEC`.
            (Due::Multi, Reply::Error(message)) => {
                self.refused = Some(text(message));
                Due::Results(self.results + 1)
            }
            (Due::Queued(left), reply) => {
                match reply {
                    Reply::Status(b"QUEUED") => {}
                    Reply::Error(message) => self.refused = Some(text(message)),
                    other => return Err(unexpected("QUEUED", other)),
                }
                match left {
                    1 => Due::Exec,
                    left => Due::Queued(left - 1),
                }
            }
            (Due::Exec, Reply::Array(length)) if length == self.results => {
                Due::Results(self.results)
            }
            (Due::Exec, Reply::Error(message)) => {
                // The reason was told before; without one, it is told here.
                self.refused.get_or_insert_with(|| text(message));
                return Ok(true);
            }
            (Due::Results(left), reply) => {
                if self.refused.is_none() {
                    let is_clock = left == if self.clock_first { self.results } else { 1 };
                    let value = value(reply)?;
                    if is_clock {
                        self.clock = value;
                    } else {
                        self.values.push(value);
                    }
                }
                Due::Results(left - 1)
            }
            (due, reply) => return Err(unexpected(&format!("{due:?}"), reply)),
        };
        Ok(self.due == Due::Results(0))
    }
}

/// What `GET` gave, as a counter.
fn value(reply: Reply<'_>) -> Result<Result<Option<i64>, KeyError>, String> {
    Ok(match reply {
        Reply::Nil => Ok(None),
        Reply::Bulk(digits) => std::str::from_utf8(digits)
            .ok()
            .and_then(|digits| digits.parse().ok())
            .map(Some)
            .ok_or(KeyError::NotInteger),
        Reply::Long(_) => Err(KeyError::NotInteger),
        Reply::Error(message) => Err(server_error::of_key(&text(message))),
        other => return Err(unexpected("a value", other)),
    })
}

/// The reply to `PUBLISH`: nothing, or why it was refused.
#[derive(Default)]
struct Published(Option<String>);

impl Replies for Published {
    fn take(&mut self, reply: Reply<'_>) -> Result<bool, String> {
        match reply {
            Reply::Integer(_) => {}
            Reply::Error(message) => self.0 = Some(text(message)),
            other => return Err(unexpected("the number of receivers", other)),
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(mut values: Read, replies: &[Reply<'_>]) -> Read {
        for (at, &reply) in replies.iter().enumerate() {
            assert_eq!(
                values.take(reply),
                Ok(at + 1 == replies.len()),
                "reply {at}"
            );
        }
        values
    }

    const OK: Reply<'static> = Reply::Status(b"OK");
    const QUEUED: Reply<'static> = Reply::Status(b"QUEUED");
    const DENIED: Reply<'static> = Reply::Error(b"NOPERM key");
    const ABORT: Reply<'static> = Reply::Error(b"EXECABORT because of previous errors");

    #[test]
    fn values_and_clock_are_taken_in_their_places() {
        let (seven, nine) = (Reply::Bulk(b"7"), Reply::Bulk(b"9"));
        let all = [
            OK,
            QUEUED,
            QUEUED,
            QUEUED,
            Reply::Array(3),
            seven,
            Reply::Long(1 << 24),
            nine,
        ];
        let atomic = taken(Read::atomic(2), &all);
        assert_eq!(atomic.values, [Ok(Some(7)), Err(KeyError::NotInteger)]);
        assert_eq!((atomic.clock, atomic.refused), (Ok(Some(9)), None));
        let plain = taken(Read::plain(2), &[nine, seven, Reply::Nil]);
        assert_eq!(
            (plain.values, plain.clock),
            (vec![Ok(Some(7)), Ok(None)], Ok(Some(9)))
        );
    }

    #[test]
    fn a_refusal_is_followed_to_its_end() {
        let refused = taken(Read::atomic(1), &[OK, DENIED, QUEUED, ABORT]);
        assert_eq!(refused.refused.as_deref(), Some("NOPERM key"));
        let no_multi = [
            DENIED,
            Reply::Nil,
            Reply::Nil,
            Reply::Error(b"ERR EXEC without MULTI"),
        ];
        let refused = taken(Read::atomic(1), &no_multi);
        assert_eq!(refused.refused.as_deref(), Some("NOPERM key"));
        assert!(Read::plain(1).take(OK).is_err());
    }
}
