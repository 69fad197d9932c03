//! One request and its replies on one connection, both moving at once.
//!
//! A batch may be larger than all buffers between here and the server, in both directions: who
//! writes all of it before reading would wait for a server that waits for its replies to be read.
//!
//! Invariants:
//! 1. Between two exchanges nothing is under way: bytes that arrive then are an error, found
//!    before anything of the next request is written.
//! 2. A failure says whether any of the request may have left ([`Failure::sent`]). An attempted
//!    write counts as a write, as TLS may have sent part of what it then reports an error for.
//! 3. A request is encoded piece by piece as it goes out, so the server works on its beginning
//!    while its end is being encoded, and the buffer stays small whatever the batch.
//! 4. After a failure, or after a future that was dropped, the wire is out of step for good: its
//!    owner drops it.
//! 5. An exchange ends: it may stand still for the wire's limit, and beyond that limit it must move
//!    [`BYTES_PER_MS_MIN`] on average, both directions together. A server that sends a byte now and then
//!    does not hold its client for longer than one that says nothing.
//! 6. What a server says is cleaned by [`Shown`] where it leaves this file.
//! 7. A connection that is left ([`Wire::end_with`]) fails before its next request, and in the middle
//!    of one before another byte of an answer is taken.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::LEFT;
use super::codec::{Malformed, Reply, ReplyBuffer};
use super::shown::{SHOWN_BYTES_MAX, Shown};
use super::stream::Stream;
use crate::store::StoreError;

/// An exchange that is slower on the whole, after the wire's limit, is given up: 64 KB a second.
const BYTES_PER_MS_MIN: u64 = 64;

/// What is to be sent.
pub(super) trait Request {
    /// Appends the next piece to the empty `out`; leaves it empty at the end.
    fn fill(&mut self, out: &mut Vec<u8>);
}

/// A request that is encoded already.
pub(super) struct Encoded(pub(super) Vec<u8>);

impl Request for Encoded {
    fn fill(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.0);
    }
}

/// Who takes the replies.
pub(super) trait Replies {
    /// Takes one piece of a reply; `true` when it was the last.
    ///
    /// # Errors
    /// The reply is not what is due here, in words.
    fn take(&mut self, reply: Reply<'_>) -> Result<bool, String>;
}

/// An exchange that did not end well.
#[derive(Debug)]
pub(super) struct Failure {
    /// Whether the server may have received any of the request.
    pub(super) sent: bool,
    pub(super) error: StoreError,
}

/// Who is at the other end, for what is said of it.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// Without credentials.
    pub(super) address: Arc<str>,
    /// How its words may be shown.
    pub(super) shown: Arc<Shown>,
}

impl Peer {
    /// It answered otherwise than the protocol allows.
    pub(super) fn protocol(&self, message: &str) -> StoreError {
        StoreError::Protocol {
            address: self.address.to_string(),
            message: self.shown.text(message),
        }
    }

    /// It refused.
    pub(super) fn refused(&self, message: &str) -> StoreError {
        StoreError::Refused {
            address: self.address.to_string(),
            message: self.shown.text(message),
        }
    }

    fn io(&self, source: io::Error) -> StoreError {
        StoreError::Io {
            address: self.address.to_string(),
            source,
        }
    }
}

/// A connection, with its buffers.
pub(super) struct Wire {
    stream: Stream,
    peer: Peer,
    limit: Duration,
    out: Vec<u8>,
    input: ReplyBuffer,
    left: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl Wire {
    /// `limit`: how long an exchange may stand still.
    pub(super) fn new(stream: Stream, peer: Peer, limit: Duration) -> Self {
        Self {
            stream,
            peer,
            limit,
            out: Vec::new(),
            input: ReplyBuffer::new(),
            left: None,
        }
    }

    /// Fails from the moment on that `left` is cancelled, also in the middle of an exchange.
    pub(super) fn end_with(&mut self, left: CancellationToken) {
        self.left = Some(Box::pin(left.cancelled_owned()));
    }

    /// Resolves when the connection is left.
    pub(super) async fn left(&mut self) {
        match &mut self.left {
            Some(left) => left.await,
            None => std::future::pending().await,
        }
    }

    /// Changes how long an exchange may stand still.
    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// See [`Peer::protocol`].
    pub(super) fn protocol(&self, message: impl AsRef<str>) -> StoreError {
        self.peer.protocol(message.as_ref())
    }

    /// See [`Peer::refused`].
    pub(super) fn refused(&self, message: impl AsRef<str>) -> StoreError {
        self.peer.refused(message.as_ref())
    }

    fn io(&self, source: io::Error) -> StoreError {
        self.peer.io(source)
    }

    /// Sends `request` and hands the replies to `replies` until it has the last one.
    ///
    /// # Errors
    /// The connection broke, stood still for too long, or said what it should not.
    ///
    /// # Cancel safety
    /// None: see invariant 4.
    pub(super) async fn exchange(
        &mut self,
        request: &mut impl Request,
        replies: &mut impl Replies,
    ) -> Result<(), Failure> {
        let mut state = Exchange {
            written: 0,
            stage: Stage::Writing,
            sent: false,
            moved: 0,
            broken_write: None,
        };
        self.out.clear();
        let begin = Instant::now();
        let mut deadline = pin!(sleep_until(begin + self.limit));
        let mut last = (begin, 0);
        let result = poll_fn(|cx| {
            let result = self.poll(cx, &mut state, request, replies);
            if result.is_ready() {
                return result;
            }
            if state.moved > last.1 {
                last = (Instant::now(), state.moved);
            }
            // The timer is moved only when it fires, not for every piece that arrives.
            while deadline.as_mut().poll(cx).is_ready() {
                let enough = Duration::from_millis(state.moved / BYTES_PER_MS_MIN);
                let due = (last.0 + self.limit).min(begin + self.limit + enough);
                let now = Instant::now();
                if due <= now {
                    return Poll::Ready(Err(StoreError::Timeout {
                        address: self.peer.address.to_string(),
                        seconds: (now - begin).as_secs(),
                    }));
                }
                deadline.as_mut().reset(due);
            }
            Poll::Pending
        })
        .await;
        result.map_err(|error| Failure {
            sent: state.sent,
            error,
        })
    }

    /// How long a string in a reply may be.
    pub(super) fn set_reply_limit(&mut self, bytes: usize) {
        self.input.set_limit(bytes);
    }

    /// Longer strings are passed over, and only told of, from now on.
    pub(super) fn skip_long(&mut self) {
        self.input.skip_long();
    }

    /// Hands what comes unasked to `replies` until it has the last piece.
    ///
    /// # Errors
    /// The connection broke, or said what it should not.
    ///
    /// # Cancel safety
    /// What was taken is in `replies`; the rest is in the buffer.
    pub(super) async fn listen(&mut self, replies: &mut impl Replies) -> Result<(), StoreError> {
        poll_fn(|cx| {
            loop {
                loop {
                    match self.input.next_reply() {
                        Ok(Some(reply)) => match take(&self.peer, replies, reply) {
                            Ok(true) => return Poll::Ready(Ok(())),
                            Ok(false) => {}
                            Err(message) => return Poll::Ready(Err(self.protocol(message))),
                        },
                        Ok(None) => break,
                        Err(malformed) => return Poll::Ready(Err(self.malformed(&malformed))),
                    }
                }
                ready!(self.poll_fill(cx))?;
            }
        })
        .await
    }

    /// Moves both directions as far as they go.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        state: &mut Exchange,
        request: &mut impl Request,
        replies: &mut impl Replies,
    ) -> Poll<Result<(), StoreError>> {
        if !state.sent {
            // Before the first byte, because a connection that the server has closed meanwhile is
            // then found while it is still certain that nothing was applied.
            if !self.input.is_empty() || self.poll_fill(cx)?.is_ready() {
                return Poll::Ready(Err(self.unasked()));
            }
        }
        if state.broken_write.is_none()
            && let Poll::Ready(Err(error)) = self.poll_send(cx, state, request)
        {
            // Not reported yet: a server that refuses a connection says why before it closes it,
            // and what it said may still be here to be read.
            state.broken_write = Some(error);
        }
        loop {
            loop {
                match self.input.next_reply() {
                    Ok(Some(reply)) => match take(&self.peer, replies, reply) {
                        Ok(true) => return Poll::Ready(Ok(())),
                        Ok(false) => {}
                        Err(message) => return Poll::Ready(Err(self.protocol(message))),
                    },
                    Ok(None) => break,
                    Err(malformed) => return Poll::Ready(Err(self.malformed(&malformed))),
                }
            }
            match self.poll_fill(cx) {
                Poll::Ready(Ok(count)) => state.moved += count as u64,
                Poll::Ready(Err(error)) => {
                    return Poll::Ready(Err(state.broken_write.take().unwrap_or(error)));
                }
                Poll::Pending => break,
            }
        }
        // Where the other side has closed, the end of what it said is near, though the runtime may
        // not have heard of it yet.
        match state.broken_write.take() {
            Some(error) if !is_closed(&error) => Poll::Ready(Err(error)),
            broken => {
                state.broken_write = broken;
                Poll::Pending
            }
        }
    }

    /// What to make of bytes that came before anything was sent. A server that takes no more
    /// clients says so unasked.
    fn unasked(&mut self) -> StoreError {
        let said = match self.input.next_reply() {
            Ok(Some(Reply::Error(message))) => String::from_utf8_lossy(message).into_owned(),
            _ => return self.protocol("bytes that nothing asked for"),
        };
        self.refused(said)
    }

    fn malformed(&self, malformed: &Malformed) -> StoreError {
        self.protocol(malformed.to_string())
    }

    /// Writes until the stream takes no more, or all is written.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        state: &mut Exchange,
        request: &mut impl Request,
    ) -> Poll<Result<(), StoreError>> {
        while state.stage == Stage::Writing {
            if state.written == self.out.len() {
                state.written = 0;
                self.out.clear();
                request.fill(&mut self.out);
                if self.out.is_empty() {
                    state.stage = Stage::Flushing;
                    break;
                }
            }
            let rest = self.out.get(state.written..).unwrap_or_default();
            state.sent = true;
            match ready!(Pin::new(&mut self.stream).poll_write(cx, rest)) {
                Ok(0) => return Poll::Ready(Err(self.io(io::ErrorKind::WriteZero.into()))),
                Ok(count) => {
                    state.written += count;
                    state.moved += count as u64;
                }
                Err(error) => return Poll::Ready(Err(self.io(error))),
            }
        }
        if state.stage == Stage::Flushing {
            // TLS holds back what it took until it is flushed.
            match ready!(Pin::new(&mut self.stream).poll_flush(cx)) {
                Ok(()) => state.stage = Stage::Sent,
                Err(error) => return Poll::Ready(Err(self.io(error))),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once; how many bytes.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, StoreError>> {
        // Here, because whoever waits for anything waits for bytes.
        if let Some(left) = &mut self.left
            && left.as_mut().poll(cx).is_ready()
        {
            let source = io::Error::new(io::ErrorKind::ConnectionAborted, LEFT);
            return Poll::Ready(Err(self.io(source)));
        }
        let mut buffer = ReadBuf::new(self.input.room());
        match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer)) {
            Ok(()) if buffer.filled().is_empty() => {
                Poll::Ready(Err(self.io(io::ErrorKind::UnexpectedEof.into())))
            }
            Ok(()) => {
                let count = buffer.filled().len();
                self.input.filled(count);
                Poll::Ready(Ok(count))
            }
            Err(error) => Poll::Ready(Err(self.io(error))),
        }
    }
}

/// Hands a reply on; an error as it may be shown, wherever it ends.
fn take(peer: &Peer, replies: &mut impl Replies, reply: Reply<'_>) -> Result<bool, String> {
    match reply {
        Reply::Error(line) => replies.take(Reply::Error(&peer.shown.line(line))),
        Reply::Status(line) if line.len() > SHOWN_BYTES_MAX => {
            replies.take(Reply::Status(&peer.shown.line(line)))
        }
        reply => replies.take(reply),
    }
}

/// Whether the other side has closed the connection.
fn is_closed(error: &StoreError) -> bool {
    let StoreError::Io { source, .. } = error else {
        return false;
    };
    matches!(
        source.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// What is left to do for the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Writing,
    Flushing,
    Sent,
}

/// How far an exchange has come.
struct Exchange {
    /// Of the piece in the buffer.
    written: usize,
    stage: Stage,
    /// Whether anything may have left.
    sent: bool,
    /// Bytes that went either way.
    moved: u64,
    broken_write: Option<StoreError>,
}
