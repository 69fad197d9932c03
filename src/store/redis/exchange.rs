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

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, sleep_until};

use super::codec::{Malformed, Reply, ReplyBuffer};
use super::stream::Stream;
use crate::store::StoreError;

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

/// A connection, with its buffers.
pub(super) struct Wire {
    stream: Stream,
    address: Arc<str>,
    limit: Duration,
    out: Vec<u8>,
    input: ReplyBuffer,
}

impl Wire {
    /// `limit`: how long an exchange may stand still.
    pub(super) fn new(stream: Stream, address: Arc<str>, limit: Duration) -> Self {
        Self {
            stream,
            address,
            limit,
            out: Vec::new(),
            input: ReplyBuffer::new(),
        }
    }

    /// Changes how long an exchange may stand still.
    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// The byte stream, for another protocol machine to go on with.
    pub(super) fn into_stream(self) -> Stream {
        self.stream
    }

    pub(super) fn protocol(&self, message: impl Into<String>) -> StoreError {
        StoreError::Protocol {
            address: self.address.to_string(),
            message: message.into(),
        }
    }

    pub(super) fn refused(&self, message: impl Into<String>) -> StoreError {
        StoreError::Refused {
            address: self.address.to_string(),
            message: message.into(),
        }
    }

    fn io(&self, source: io::Error) -> StoreError {
        StoreError::Io {
            address: self.address.to_string(),
            source,
        }
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
            moved: false,
            broken_write: None,
        };
        self.out.clear();
        let mut deadline = pin!(sleep_until(Instant::now() + self.limit));
        let mut last_moved = Instant::now();
        let result = poll_fn(|cx| {
            let result = self.poll(cx, &mut state, request, replies);
            if result.is_ready() {
                return result;
            }
            if state.moved {
                state.moved = false;
                last_moved = Instant::now();
            }
            // The timer is moved only when it fires, not for every piece that arrives.
            while deadline.as_mut().poll(cx).is_ready() {
                let due = last_moved + self.limit;
                if due <= Instant::now() {
                    return Poll::Ready(Err(StoreError::Timeout {
                        address: self.address.to_string(),
                        seconds: self.limit.as_secs(),
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
                        Ok(Some(reply)) => match replies.take(reply) {
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
                    Ok(Some(reply)) => match replies.take(reply) {
                        Ok(true) => return Poll::Ready(Ok(())),
                        Ok(false) => {}
                        Err(message) => return Poll::Ready(Err(self.protocol(message))),
                    },
                    Ok(None) => break,
                    Err(malformed) => return Poll::Ready(Err(self.malformed(&malformed))),
                }
            }
            match self.poll_fill(cx) {
                Poll::Ready(Ok(())) => state.moved = true,
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
                    state.moved = true;
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

    /// Reads once.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StoreError>> {
        let mut buffer = ReadBuf::new(self.input.room());
        match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer)) {
            Ok(()) if buffer.filled().is_empty() => {
                Poll::Ready(Err(self.io(io::ErrorKind::UnexpectedEof.into())))
            }
            Ok(()) => {
                let count = buffer.filled().len();
                self.input.filled(count);
                Poll::Ready(Ok(()))
            }
            Err(error) => Poll::Ready(Err(self.io(error))),
        }
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
    /// Whether any byte went either way since this was last looked at.
    moved: bool,
    broken_write: Option<StoreError>,
}
