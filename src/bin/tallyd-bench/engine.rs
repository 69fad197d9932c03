//! Drives all connections from one thread.
//!
//! Each connection has one burst in flight: `pipeline` requests written at once, then their replies read as they come. The
//! loop is closed: a server that stalls is sent less meanwhile, so percentiles describe the requests that were sent, not
//! those that a steady crowd would have sent.
//!
//! Invariants:
//!
//! 1. Bursts are taken from one cursor over the load, in order: fast connections take more, none waits for a share.
//! 2. A connection is registered for writing only while the kernel has not taken its whole burst, so the
//!    common path makes no `epoll_ctl`. It reads all the same: a server that waits for its replies to be read
//!    would otherwise never read our rest.
//! 3. A connection's next burst starts only after its last reply; when `run` returns, nothing is in flight.

use std::fmt;
use std::io;
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::{Errno, ioctl_fionbio};
use rustix::process::{Resource, getrlimit, setrlimit};
use thiserror::Error;

use crate::load::Load;
use crate::reply::{Replies, WrongReply};

/// Silence on all connections after which the server counts as stuck.
const STALL_SECONDS: i64 = 30;
const READ_BUFFER_BYTES: usize = 64 << 10;
/// Requests between two reports of progress.
const PROGRESS_STEP: u64 = 1 << 14;
/// Latencies are kept to three significant digits, and beyond an hour as an hour.
const LATENCY_DIGITS: u8 = 3;
const LATENCY_MAX_NS: u64 = 3_600_000_000_000;

/// Where the server listens.
#[derive(Debug, Clone)]
pub enum Target {
    /// A Unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(addr) => addr.fmt(f),
        }
    }
}

/// Why a run ended early.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The server could not be reached.
    #[error("cannot connect to {target}: {source}")]
    Connect {
        /// Where it should have listened.
        target: String,
        /// What the system said.
        source: io::Error,
    },
    /// Reading or writing failed.
    #[error("connection {index} broke: {source}")]
    Broken {
        /// Which connection, from 0.
        index: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The server ended the connection.
    #[error("the server closed connection {0}")]
    Closed(usize),
    /// The server answered something else than an integer.
    #[error("wrong reply on connection {index}: {reply}")]
    WrongReply {
        /// Which connection, from 0.
        index: usize,
        /// What it said.
        reply: WrongReply,
    },
    /// The server answered what it was not asked.
    #[error("connection {0} got more replies than it sent requests")]
    Unasked(usize),
    /// The server neither answered nor closed.
    #[error("no reply on any connection for {STALL_SECONDS} s")]
    Stalled,
    /// The event queue failed, which no server can cause.
    #[error("epoll failed: {0}")]
    Epoll(#[from] Errno),
}

/// Opens `count` connections.
///
/// # Errors
///
/// The first connection that fails.
pub fn connect(target: &Target, count: u32) -> Result<Vec<OwnedFd>, EngineError> {
    // The usual soft limit of 1024 files is for programs that use select(2). If it cannot be raised and was needed, connecting
    // fails with the reason.
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    let _ = setrlimit(Resource::Nofile, files);

    let open = || -> io::Result<OwnedFd> {
        let socket: OwnedFd = match target {
            Target::Unix(path) => UnixStream::connect(path)?.into(),
            Target::Tcp(addr) => {
                let stream = TcpStream::connect(addr)?;
                stream.set_nodelay(true)?;
                stream.into()
            }
        };
        ioctl_fionbio(&socket, true)?;
        Ok(socket)
    };
    let refused = |source| EngineError::Connect {
        target: target.to_string(),
        source,
    };
    (0..count).map(|_| open().map_err(refused)).collect()
}

/// What a run took.
#[derive(Debug)]
pub struct Measured {
    /// From the first write to the last reply.
    pub elapsed: Duration,
    /// Nanoseconds from a burst's write to its last reply.
    pub latency_ns: Histogram<u64>,
}

/// The connections and the load they carry.
#[derive(Debug)]
pub struct Engine<'a> {
    epoll: OwnedFd,
    connections: Vec<Connection>,
    load: &'a Load,
    pipeline: usize,
    /// The next request of the load.
    cursor: usize,
}

#[derive(Debug)]
struct Connection {
    index: usize,
    socket: OwnedFd,
    replies: Replies,
    /// Bytes of the burst that the kernel has not taken yet.
    unwritten: Range<usize>,
    /// Registered for writing too.
    blocked: bool,
    /// Requests of the burst that are not answered yet.
    awaited: usize,
    began: Instant,
}

impl<'a> Engine<'a> {
    /// Takes connected, non-blocking sockets.
    ///
    /// # Errors
    ///
    /// When the event queue cannot be made.
    pub fn new(sockets: Vec<OwnedFd>, load: &'a Load, pipeline: u32) -> Result<Self, EngineError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut connections = Vec::with_capacity(sockets.len());
        for (index, socket) in sockets.into_iter().enumerate() {
            let data = epoll::EventData::new_u64(index as u64);
            epoll::add(&epoll, &socket, data, epoll::EventFlags::IN)?;
            connections.push(Connection {
                index,
                socket,
                replies: Replies::default(),
                unwritten: 0..0,
                blocked: false,
                awaited: 0,
                began: Instant::now(),
            });
        }
        Ok(Self {
            epoll,
            connections,
            load,
            pipeline: pipeline as usize,
            cursor: 0,
        })
    }

    /// Sends `ops` requests and waits for all replies. A further run goes on in the load where this one ended.
    ///
    /// # Errors
    ///
    /// A broken connection, a wrong reply or a server that is stuck; the engine is then of no more use.
    pub fn run(
        &mut self,
        ops: u64,
        mut on_progress: impl FnMut(u64),
    ) -> Result<Measured, EngineError> {
        let mut latency_ns = Histogram::new_with_bounds(1, LATENCY_MAX_NS, LATENCY_DIGITS)
            .expect("the bounds are constant and valid");
        let mut buffer = vec![0; READ_BUFFER_BYTES];
        let mut events = Vec::with_capacity(self.connections.len().min(1024));
        let stall = Timespec {
            tv_sec: STALL_SECONDS,
            tv_nsec: 0,
        };
        let (mut unsent, mut done, mut reported) = (ops, 0, 0);

        let started = Instant::now();
        for index in 0..self.connections.len() {
            self.begin_burst(index, &mut unsent, Instant::now())?;
        }
        while done < ops {
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&stall)) {
                Ok(0) => return Err(EngineError::Stalled),
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            for event in events.drain(..) {
                let (index, flags) = (event.data.u64() as usize, event.flags);
                let connection = &mut self.connections[index];
                if flags.contains(epoll::EventFlags::OUT) {
                    connection.write(self.load.bytes(), &self.epoll)?;
                }
                // Anything but OUT is a reply, an end or an error: reading tells which.
                if flags == epoll::EventFlags::OUT {
                    continue;
                }
                let count = connection.read(&mut buffer)?;
                done += count as u64;
                if count > 0 && connection.awaited == 0 {
                    // One look at the clock ends this burst and begins the next.
                    let now = Instant::now();
                    let took = now.duration_since(connection.began).as_nanos() as u64;
                    latency_ns.saturating_record(took);
                    self.begin_burst(index, &mut unsent, now)?;
                }
            }
            if done - reported >= PROGRESS_STEP {
                reported = done;
                on_progress(done);
            }
        }
        Ok(Measured {
            elapsed: started.elapsed(),
            latency_ns,
        })
    }

    /// Sends the next burst, if any is left. It is shorter at the end of the run, and where the ring ends.
    fn begin_burst(
        &mut self,
        index: usize,
        unsent: &mut u64,
        now: Instant,
    ) -> Result<(), EngineError> {
        if *unsent == 0 {
            return Ok(());
        }
        let left = usize::try_from(*unsent).unwrap_or(usize::MAX);
        let count = self.pipeline.min(left).min(self.load.len() - self.cursor);
        let requests = self.cursor..self.cursor + count;
        self.cursor = requests.end % self.load.len();
        *unsent -= count as u64;

        let connection = &mut self.connections[index];
        connection.unwritten = self.load.span(requests);
        connection.awaited = count;
        connection.began = now;
        connection.write(self.load.bytes(), &self.epoll)
    }
}

impl Connection {
    /// Writes what the kernel takes of the burst.
    fn write(&mut self, bytes: &[u8], epoll: &OwnedFd) -> Result<(), EngineError> {
        while !self.unwritten.is_empty() {
            match rustix::io::write(&self.socket, &bytes[self.unwritten.clone()]) {
                Ok(count) => self.unwritten.start += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => {
                    // A server that refuses a client says why before it closes: that is the better message.
                    self.read(&mut [0; 512])?;
                    return Err(self.broken(error));
                }
            }
        }
        let blocked = !self.unwritten.is_empty();
        if blocked != self.blocked {
            self.blocked = blocked;
            let mut flags = epoll::EventFlags::IN;
            flags.set(epoll::EventFlags::OUT, blocked);
            let data = epoll::EventData::new_u64(self.index as u64);
            epoll::modify(epoll, &self.socket, data, flags)?;
        }
        Ok(())
    }

    /// Reads once, and returns how many replies came. More to read shows in the next wait.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, EngineError> {
        let index = self.index;
        let wrong = |reply| EngineError::WrongReply { index, reply };
        match rustix::io::read(&self.socket, &mut *buffer) {
            Ok(0) => Err(self
                .replies
                .cut_short()
                .map_or(EngineError::Closed(index), wrong)),
            Ok(length) => {
                let count = self.replies.count(&buffer[..length]).map_err(wrong)?;
                // The last request cannot be answered before it is sent whole.
                let answerable = self.awaited - usize::from(!self.unwritten.is_empty());
                if count > answerable {
                    return Err(EngineError::Unasked(index));
                }
                self.awaited -= count;
                Ok(count)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(error) => Err(self.broken(error)),
        }
    }

    fn broken(&self, error: Errno) -> EngineError {
        EngineError::Broken {
            index: self.index,
            source: error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::LoadSpec;
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::thread;

    /// A server that takes `connections`, and answers each line that names the command with `reply`, a few bytes at a time.
    /// Returns its address and, at the end of all connections, the requests it counted.
    fn server(connections: usize, reply: &'static [u8]) -> (Target, thread::JoinHandle<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = Target::Tcp(listener.local_addr().unwrap().to_string());
        let serve = move |mut stream: TcpStream| {
            let (mut buffer, mut requests) = ([0; 4096], 0);
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                // One `*` a request, since no key has any.
                let count = buffer[..length].split(|&b| b == b'*').count() - 1;
                requests += count;
                for part in reply.repeat(count).chunks(7) {
                    if stream.write_all(part).is_err() {
                        return requests;
                    }
                }
            }
            requests
        };
        let served = thread::spawn(move || {
            let clients: Vec<_> = (0..connections)
                .map(|_| listener.accept().unwrap().0)
                .map(|stream| thread::spawn(move || serve(stream)))
                .collect();
            clients.into_iter().map(|c| c.join().unwrap()).sum()
        });
        (target, served)
    }

    fn load(ops: u64) -> Load {
        Load::encode(&LoadSpec {
            ops,
            keys: 100,
            zipf: 1.0,
            prefix: "likes:",
            seed: 1,
        })
    }

    #[test]
    fn every_request_is_sent_once_and_every_burst_is_measured() {
        let (target, served) = server(3, b":1\r\n");
        let load = load(1_010);
        let mut engine = Engine::new(connect(&target, 3).unwrap(), &load, 16).unwrap();
        engine.run(10, |_| {}).unwrap();
        let measured = engine.run(1_000, |_| {}).unwrap();
        assert_eq!(
            measured.latency_ns.len(),
            63,
            "62 bursts of 16, and the rest"
        );
        // Some connection's bursts fill the whole run, one after the other.
        let (max, elapsed) = (
            measured.latency_ns.max(),
            measured.elapsed.as_nanos() as u64,
        );
        assert!(max <= elapsed * 101 / 100, "{max} of {elapsed}");
        assert!(max * 63 >= elapsed / 2, "{max} of {elapsed}");
        drop(engine);
        assert_eq!(served.join().unwrap(), 1_010);
    }

    #[test]
    fn bursts_beyond_the_buffers_of_the_kernel_are_written_in_parts() {
        let (target, served) = server(2, b":1\r\n");
        let load = load(300_000);
        let mut engine = Engine::new(connect(&target, 2).unwrap(), &load, 100_000).unwrap();
        let measured = engine.run(400_000, |_| {}).unwrap();
        // 100,000 three times until the ring ends, and once more from its beginning.
        assert_eq!(measured.latency_ns.len(), 4);
        drop(engine);
        assert_eq!(served.join().unwrap(), 400_000);
    }

    #[test]
    fn an_error_reply_ends_the_run_and_is_shown() {
        let (target, _served) = server(1, b"-ERR full\r\n");
        let load = load(100);
        let mut engine = Engine::new(connect(&target, 1).unwrap(), &load, 8).unwrap();
        let error = engine.run(100, |_| {}).unwrap_err();
        assert_eq!(
            error.to_string(),
            "wrong reply on connection 0: \"-ERR full\""
        );
    }

    #[test]
    fn a_reply_to_nothing_ends_the_run() {
        let (target, _served) = server(1, b":1\r\n:1\r\n");
        let load = load(100);
        let mut engine = Engine::new(connect(&target, 1).unwrap(), &load, 8).unwrap();
        let error = engine.run(100, |_| {}).unwrap_err();
        assert!(matches!(error, EngineError::Unasked(0)), "{error}");
    }

    #[test]
    fn a_server_that_closes_or_is_not_there_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = Target::Tcp(listener.local_addr().unwrap().to_string());
        let load = load(10);
        let mut engine = Engine::new(connect(&target, 1).unwrap(), &load, 1).unwrap();
        drop(listener.accept().unwrap());
        assert!(engine.run(10, |_| {}).is_err());
        drop(listener);
        let error = connect(&target, 1).unwrap_err();
        assert!(matches!(error, EngineError::Connect { .. }), "{error}");
    }
}
