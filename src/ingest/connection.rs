//! One connection: read a burst, decode all, apply once, answer once.
//!
//! Bytes are read into a buffer that all connections share and decoded where they lie; only the
//! beginning of a command whose rest has not come is kept. So an idle connection holds almost no
//! memory, and a burst costs one `read` and one `write`.
//!
//! Invariants:
//! 1. A client may write a whole pipeline before it reads a reply, as many libraries do: reading
//!    goes on while answers wait, up to [`UNWRITTEN_BYTES_MAX`]. Beyond that the client is not
//!    served until it reads.
//! 2. After a full read the others have a turn: a client that always has more to say gets no more
//!    than its share.
//! 3. What it holds is charged to its [`account`](super::account) after every burst; nothing more is read
//!    while all clients together hold too much.
//! 4. With `journal.sync = "always"`, no answer to an increment is written before the journal is
//!    on the disk.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;

use super::account::Part;
use super::core::Core;
use super::inbox::Inbox;
use super::session::{Next, Session};
use crate::flush::Command;
use crate::wire::encode;

/// Answers of one client that may wait to be read, in bytes.
pub const UNWRITTEN_BYTES_MAX: usize = 32 << 20;
/// Answers of one client that are written in one piece, and room for them that it may keep, in bytes.
const REST_BYTES: usize = 64 << 10;
/// Room for the shared replies that is kept after a large answer, in bytes.
const REPLIES_BYTES_KEPT: usize = 4 << 20;

/// See the module's documentation.
pub struct Connection {
    core: Rc<Core>,
    session: Session,
    read: OwnedReadHalf,
    write: Rc<OwnedWriteHalf>,
    /// Input that is not done with.
    held: Vec<u8>,
    /// Answers that are not written yet, from `rest_at` on.
    rest: Vec<u8>,
    rest_at: usize,
    /// Whether the last read filled the buffer, so that there is probably more.
    has_more: bool,
    /// What `journal.sync = "always"` must reach before `rest` is written.
    ticket: Option<u64>,
    inbox: Option<Inbox>,
}

impl Connection {
    /// Of a stream just accepted.
    pub fn new(core: Rc<Core>, stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        let write = Rc::new(write);
        let session = Session::new(core.clients.add(&write, &core.accounts));
        Connection {
            core,
            session,
            read,
            write,
            held: Vec::new(),
            rest: Vec::new(),
            rest_at: 0,
            has_more: false,
            ticket: None,
            inbox: None,
        }
    }

    /// Serves the client until it goes, or is told to.
    pub async fn run(mut self) {
        let client = Rc::clone(&self.session.client);
        let served = client.unless_killed(self.serve()).await;
        // An error here is the client's going away in the middle of something.
        if let Some(Err(error)) = served {
            tracing::debug!(client = self.session.client.id, %error, "the connection broke");
        }
    }

    async fn serve(&mut self) -> io::Result<()> {
        loop {
            if std::mem::take(&mut self.has_more) {
                tokio::task::yield_now().await;
            }
            let mut next = std::future::poll_fn(|cx| self.poll_burst(cx)).await?;
            loop {
                self.note_bytes();
                if self.core.accounts.is_over() {
                    self.core.make_room();
                    self.core.accounts.room().await;
                }
                if self.ticket.is_some() || self.unwritten() >= UNWRITTEN_BYTES_MAX {
                    self.write_rest().await?;
                }
                match next {
                    Next::Read => break,
                    // The others have a turn.
                    Next::More => tokio::task::yield_now().await,
                    Next::Close => return self.write_rest().await,
                    Next::Cold => {
                        let mut waits = true;
                        while waits && self.session.is_blocked() {
                            self.core.gate.open().await;
                            waits = self.session.apply_again(&self.core);
                        }
                        if waits {
                            let keys = self.session.cold_keys();
                            self.core.loads.wait(self.session.client.id, &keys).await;
                        }
                        let mut rest = std::mem::take(&mut self.rest);
                        self.session.finish_cold(&self.core, &mut rest);
                        self.rest = rest;
                        self.after_answers();
                    }
                    Next::Large => {
                        let mut rest = std::mem::take(&mut self.rest);
                        self.session.run_large(&self.core, &mut rest).await;
                        self.rest = rest;
                        self.after_answers();
                    }
                    Next::List => {
                        let listing = std::mem::take(&mut self.session.listing);
                        let list = self.core.list_clients(&listing).await;
                        encode::verbatim(&mut self.rest, &list, self.session.version);
                    }
                    Next::Flush(limit) => {
                        // What was asked before should not wait for the store.
                        self.write_rest().await?;
                        self.flush(limit).await;
                    }
                }
                next = self.burst_held();
            }
        }
    }

    /// Writes what can be written, waits for input, and does what it says.
    fn poll_burst(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Next>> {
        while self.unwritten() > 0 {
            let stream: &UnixStream = (*self.write).as_ref();
            match stream.poll_write_ready(cx)? {
                Poll::Pending => break,
                Poll::Ready(()) => self.try_write_rest()?,
            }
        }
        if self.unwritten() >= UNWRITTEN_BYTES_MAX {
            return Poll::Pending; // Woken when the client has read.
        }
        // A subscriber's messages wait in its bounded queue while it does not read.
        if let Some(inbox) = self.inbox.as_mut().filter(|_| self.rest.is_empty()) {
            while let Poll::Ready(Some(frame)) = inbox.poll(cx) {
                self.rest.extend_from_slice(&frame);
                if self.rest.len() >= REST_BYTES {
                    break;
                }
            }
            if !self.rest.is_empty() {
                return Poll::Ready(Ok(Next::More));
            }
        }
        if self.core.accounts.is_over() {
            return Poll::Ready(Ok(Next::More)); // There is to be room before more is read.
        }
        let core = Rc::clone(&self.core);
        let mut input = core.input.borrow_mut();
        let mut buffer = ReadBuf::new(&mut input);
        ready!(Pin::new(&mut self.read).poll_read(cx, &mut buffer))?;
        let new = buffer.filled();
        if new.is_empty() {
            return Poll::Ready(Ok(Next::Close));
        }
        self.has_more = buffer.remaining() == 0;
        let new = buffer.filled();
        let mut replies = core.replies.borrow_mut();
        replies.clear();
        let next = if self.held.is_empty() {
            let (done, next) = self.session.burst(&core, new, &mut replies);
            self.held.extend_from_slice(&new[done..]);
            next
        } else {
            self.held.extend_from_slice(new);
            self.burst_into(&mut replies)
        };
        self.after_answers();
        let mut written = 0;
        if !replies.is_empty() && self.ticket.is_none() && self.rest.is_empty() {
            written = match self.write.try_write(&replies) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Poll::Ready(Err(error)),
            };
        }
        self.rest.extend_from_slice(&replies[written..]);
        if replies.capacity() > REPLIES_BYTES_KEPT {
            *replies = Vec::new(); // One large answer is no reason to keep the memory.
        }
        Poll::Ready(Ok(next))
    }

    fn unwritten(&self) -> usize {
        self.rest.len() - self.rest_at
    }

    /// Keeps the client's account current.
    fn note_bytes(&self) {
        let account = &self.session.client.account;
        let input = self.held.capacity() + self.session.decoder_bytes();
        account.set(Part::Input, input);
        account.set(Part::Commands, self.session.command_bytes());
        account.set(Part::Answers, self.rest.capacity());
        self.session.client.active.set(self.core.seconds());
        self.session.note();
    }

    /// Goes on with the input that was left when something had to be waited for.
    fn burst_held(&mut self) -> Next {
        let mut rest = std::mem::take(&mut self.rest);
        let next = self.burst_into(&mut rest);
        self.rest = rest;
        self.after_answers();
        next
    }

    fn burst_into(&mut self, replies: &mut Vec<u8>) -> Next {
        let mut held = std::mem::take(&mut self.held);
        let (done, next) = self.session.burst(&self.core, &held, replies);
        held.drain(..done);
        if held.is_empty() {
            held = Vec::new(); // An idle connection holds no memory.
        }
        self.held = held;
        next
    }

    /// What an encoded answer promises is seen to before it can be written.
    fn after_answers(&mut self) {
        if std::mem::take(&mut self.session.took) && self.core.config.sync_always {
            self.ticket = Some(self.core.durable.ask());
        }
        if self.session.subscriptions > 0 && self.inbox.is_none() {
            self.inbox = self.session.inbox.take();
        }
    }

    async fn write_rest(&mut self) -> io::Result<()> {
        if let Some(ticket) = self.ticket.take()
            && let Err(failure) = self.core.durable.wait(ticket).await
        {
            // The increments are in the journal, but not as durable as promised: no answer at all
            // is the honest one.
            return Err(io::Error::other(failure.to_string()));
        }
        while self.unwritten() > 0 {
            self.write.writable().await?;
            self.try_write_rest()?;
        }
        Ok(())
    }

    fn try_write_rest(&mut self) -> io::Result<()> {
        match self.write.try_write(&self.rest[self.rest_at..]) {
            Ok(bytes) => self.rest_at += bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        if self.unwritten() == 0 {
            self.rest.clear();
            self.rest.shrink_to(REST_BYTES);
            self.rest_at = 0;
        } else if self.rest_at > self.rest.len() / 2 {
            // Moved once for as many bytes as were written since.
            self.rest.drain(..self.rest_at);
            self.rest_at = 0;
        }
        Ok(())
    }

    async fn flush(&mut self, limit: Option<Duration>) {
        let (done, flushed) = oneshot::channel();
        let flush = async {
            self.core.flush.send(Command::Flush(done)).await.is_ok() && flushed.await.is_ok()
        };
        let outcome = match limit {
            None => Ok(flush.await),
            Some(limit) => tokio::time::timeout(limit, flush).await,
        };
        let stats = &self.core.stats;
        match outcome {
            Ok(true) => encode::simple(&mut self.rest, "OK"),
            Ok(false) => encode::error(
                &mut self.rest,
                "ERR the daemon is stopping; what is pending is in the journal",
            ),
            Err(_) => {
                stats.errors_total.add(1);
                self.core.refresh_gauges();
                let error = match stats.store_error() {
                    error if !error.is_empty() => error,
                    _ if stats.store_up.get() == 0 => {
                        "none; the store has not answered yet".to_owned()
                    }
                    _ => "none".to_owned(),
                };
                let text = format!(
                    "TIMEOUT not all is in the store yet: {} keys wait sealed, {} in the open epoch; last error: {error}",
                    stats.sealed_keys.get(),
                    stats.epoch_keys.get(),
                );
                encode::error(&mut self.rest, text);
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let id = self.session.client.id;
        // The memory goes with this, and its account at the same moment.
        self.core.clients.remove(id);
        self.core.loads.leave(id);
        self.core.hub.borrow_mut().remove(id);
        self.core
            .stats
            .connections
            .set(self.core.clients.len() as u64);
    }
}
