//! One connection: read a burst, decode all, apply once, answer once.
//!
//! Bytes are read into a buffer that all connections share and decoded where they lie; only the
//! beginning of a command whose rest has not come is kept. So an idle connection holds almost no
//! memory, and a burst costs one `read` and one `write`.
//!
//! Invariants:
//! 1. Nothing more is read while answers wait to be written: a client that does not read stops
//!    being served, and costs one burst's answers at most.
//! 2. With `journal.sync = "always"`, no answer to an increment is written before the journal is
//!    on the disk.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::core::Core;
use super::hub::Frame;
use super::session::{Next, Session};
use crate::flush::Command;
use crate::wire::encode;

/// See the module's documentation.
pub struct Connection {
    core: Rc<Core>,
    session: Session,
    read: OwnedReadHalf,
    write: Rc<OwnedWriteHalf>,
    /// Input that is not done with.
    held: Vec<u8>,
    /// Answers that are not written yet.
    rest: Vec<u8>,
    /// What `journal.sync = "always"` must reach before `rest` is written.
    ticket: Option<u64>,
    inbox: Option<mpsc::Receiver<Frame>>,
}

impl Connection {
    /// Of a stream just accepted.
    pub fn new(core: Rc<Core>, stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        let write = Rc::new(write);
        let session = Session::new(core.clients.add(&write));
        Connection {
            core,
            session,
            read,
            write,
            held: Vec::new(),
            rest: Vec::new(),
            ticket: None,
            inbox: None,
        }
    }

    /// Serves the client until it goes, or is told to.
    pub async fn run(mut self) {
        // An error here is the client's going away in the middle of something.
        if let Err(error) = self.serve().await {
            tracing::debug!(client = self.session.client.id, %error, "the connection broke");
        }
    }

    async fn serve(&mut self) -> io::Result<()> {
        loop {
            let mut next = std::future::poll_fn(|cx| self.poll_burst(cx)).await?;
            loop {
                if !self.rest.is_empty() {
                    self.write_rest().await?;
                }
                match next {
                    Next::Read => break,
                    Next::More => {}
                    Next::Close => return Ok(()),
                    Next::Cold => {
                        self.core.loads.wait(&self.session.cold_keys()).await;
                        let mut rest = std::mem::take(&mut self.rest);
                        self.session.finish_cold(&self.core, &mut rest);
                        self.rest = rest;
                        self.after_answers();
                    }
                    Next::Flush(limit) => self.flush(limit).await,
                }
                next = self.burst_held();
            }
        }
    }

    /// Waits for input, does what it says, and writes what can be written at once.
    fn poll_burst(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Next>> {
        if let Some(inbox) = &mut self.inbox {
            let mut news = false;
            while let Poll::Ready(Some(frame)) = inbox.poll_recv(cx) {
                self.rest.extend_from_slice(&frame);
                news = true;
                if self.rest.len() > 1 << 20 {
                    break;
                }
            }
            if news {
                return Poll::Ready(Ok(Next::More));
            }
        }
        let core = Rc::clone(&self.core);
        let mut input = core.input.borrow_mut();
        let mut buffer = ReadBuf::new(&mut input);
        ready!(Pin::new(&mut self.read).poll_read(cx, &mut buffer))?;
        let new = buffer.filled();
        if new.is_empty() {
            return Poll::Ready(Ok(Next::Close));
        }
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
        if self.ticket.is_some() {
            self.rest.extend_from_slice(&replies);
            return Poll::Ready(Ok(next));
        }
        if !replies.is_empty() {
            let written = match self.write.try_write(&replies) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Poll::Ready(Err(error)),
            };
            self.rest.extend_from_slice(&replies[written..]);
        }
        if replies.capacity() > 4 << 20 {
            *replies = Vec::new(); // One large answer is no reason to keep the memory.
        }
        Poll::Ready(Ok(next))
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
        let mut written = 0;
        while written < self.rest.len() {
            self.write.writable().await?;
            match self.write.try_write(&self.rest[written..]) {
                Ok(bytes) => written += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        self.rest.clear();
        self.rest.shrink_to(64 * 1024);
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
                let text = format!(
                    "TIMEOUT not all is in the store yet: {} keys wait sealed, {} in the open epoch; last error: {}",
                    stats.sealed_keys.get(),
                    stats.epoch_keys.get(),
                    stats.store_error()
                );
                encode::error(&mut self.rest, &text);
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let id = self.session.client.id;
        self.core.clients.remove(id);
        self.core.hub.borrow_mut().remove(id);
        self.core
            .stats
            .connections
            .set(self.core.clients.len() as u64);
    }
}
