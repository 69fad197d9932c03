//! A proxy between daemon and Redis that misbehaves on request: it cuts connections at a byte,
//! holds bytes back and delivers them late (even when their sender is long gone), swallows
//! replies, or refuses.
//!
//! Each connection has two pumps, a thread per direction. A fault is looked up under one lock
//! before each write, so that a test which has set a fault knows it to hold for the next byte.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

/// A way through the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the daemon to the store.
    Requests,
    /// From the store to the daemon.
    Replies,
}

#[derive(Debug, Default)]
struct Way {
    /// Bytes that may still pass before the connection is cut; `None`: no cut.
    until_cut: Option<u64>,
    /// Connections with a lower number are held.
    held_below: usize,
    swallow: bool,
    passed: u64,
}

#[derive(Debug, Default)]
struct State {
    requests: Way,
    replies: Way,
    refuse: bool,
    /// Faults concern only connections that have sent this.
    only: Option<Vec<u8>>,
    /// Cuts go on at random: after each cut the next is drawn from `0..range`.
    random: Option<(fastrand::Rng, u64)>,
    cuts: u64,
    /// Pumps that hold bytes at this moment.
    holding: usize,
    connections: Vec<Connection>,
    /// Where new connections lead.
    upstream: Option<SocketAddr>,
    closed: bool,
}

impl State {
    fn way(&mut self, direction: Direction) -> &mut Way {
        match direction {
            Direction::Requests => &mut self.requests,
            Direction::Replies => &mut self.replies,
        }
    }

    fn draw_next_cut(&mut self) {
        if let Some((rng, range)) = &mut self.random {
            let (requests, bytes) = (rng.bool(), rng.u64(0..*range));
            let way = if requests {
                &mut self.requests
            } else {
                &mut self.replies
            };
            way.until_cut = Some(bytes);
        }
    }
}

#[derive(Debug)]
struct Connection {
    daemon: TcpStream,
    store: TcpStream,
    /// Has sent what faults are limited to.
    marked: bool,
}

impl Connection {
    fn cut(&self) {
        // Either may be gone already.
        let _ = self.daemon.shutdown(Shutdown::Both);
        let _ = self.store.shutdown(Shutdown::Both);
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no pump panics while it holds the lock")
    }
}

/// The proxy. Ends, and cuts all, with its value.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens on a free port; forwards to `upstream` without faults.
    pub fn start(upstream: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port on loopback");
        let address = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared::default());
        shared.lock().upstream = Some(upstream);
        thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared)
        });
        Self { address, shared }
    }

    /// The URL to give to the daemon.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Leads new connections elsewhere. Those that there are stay until they break.
    pub fn reroute(&self, upstream: SocketAddr) {
        self.change(|s| s.upstream = Some(upstream));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.lock());
        self.shared.changed.notify_all();
    }

    /// Faults concern only connections that have sent `bytes` (a command that only one of the
    /// daemon's connections uses).
    pub fn only(&self, bytes: &[u8]) {
        self.change(|s| s.only = Some(bytes.to_vec()));
    }

    /// Cuts the connection that carries the byte after the next `bytes` ones; once.
    pub fn cut_after(&self, direction: Direction, bytes: u64) {
        self.change(|s| s.way(direction).until_cut = Some(bytes));
    }

    /// Cuts again and again, each time after a random number of bytes below `range`.
    pub fn cut_at_random(&self, seed: u64, range: u64) {
        self.change(|s| {
            s.random = Some((fastrand::Rng::with_seed(seed), range));
            s.draw_next_cut();
        });
    }

    /// Keeps the bytes of a direction, for the connections that there are now.
    pub fn hold(&self, direction: Direction) {
        self.change(|s| s.way(direction).held_below = s.connections.len());
    }

    /// How many connections hold bytes back at this moment.
    pub fn holding(&self) -> usize {
        self.shared.lock().holding
    }

    /// Delivers what is held, in order, also of connections whose sender is gone.
    pub fn release(&self, direction: Direction) {
        self.change(|s| s.way(direction).held_below = 0);
    }

    /// Takes the bytes of a direction and lets them disappear.
    pub fn swallow(&self, direction: Direction) {
        self.change(|s| s.way(direction).swallow = true);
    }

    /// Closes new connections at once.
    pub fn refuse(&self) {
        self.change(|s| s.refuse = true);
    }

    /// Breaks the daemon's end of every connection. What is held for the store stays held.
    pub fn cut_daemon_side(&self) {
        self.change(|s| {
            for connection in &s.connections {
                let _ = connection.daemon.shutdown(Shutdown::Both);
            }
        });
    }

    /// Breaks every connection.
    pub fn cut_all(&self) {
        self.change(|s| s.connections.iter().for_each(Connection::cut));
    }

    /// Ends all faults. What is held is delivered.
    pub fn heal(&self) {
        self.change(|s| {
            s.random = None;
            s.refuse = false;
            s.only = None;
            for direction in [Direction::Requests, Direction::Replies] {
                let way = s.way(direction);
                way.until_cut = None;
                way.held_below = 0;
                way.swallow = false;
            }
        });
    }

    /// Bytes that went through so far.
    pub fn passed(&self, direction: Direction) -> u64 {
        self.shared.lock().way(direction).passed
    }

    /// Connections that were cut at a byte so far.
    pub fn cuts(&self) -> u64 {
        self.shared.lock().cuts
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.change(|s| s.closed = true);
        self.cut_all();
        // Wakes the listener, which then sees that it is over.
        let _ = TcpStream::connect(self.address);
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((daemon, _)) = listener.accept() {
        let mut state = shared.lock();
        if state.closed {
            return;
        }
        if state.refuse {
            continue;
        }
        // While Redis is down the daemon sees its connection close, as it would see a refusal.
        let upstream = state.upstream.expect("set before the first connection");
        let Ok(store) = TcpStream::connect(upstream) else {
            continue;
        };
        let same = |s: &TcpStream| {
            s.set_nodelay(true).expect("a TCP socket");
            s.try_clone().expect("a descriptor")
        };
        let index = state.connections.len();
        state.connections.push(Connection {
            daemon: same(&daemon),
            store: same(&store),
            marked: false,
        });
        let (daemon_too, store_too) = (same(&daemon), same(&store));
        let (one, two) = (Arc::clone(shared), Arc::clone(shared));
        thread::spawn(move || pump(&one, index, Direction::Requests, daemon, &store));
        thread::spawn(move || pump(&two, index, Direction::Replies, store_too, &daemon_too));
    }
}

/// Moves the bytes of one direction of one connection until its end.
fn pump(shared: &Shared, index: usize, direction: Direction, mut from: TcpStream, to: &TcpStream) {
    let mut chunk = vec![0; 64 * 1024];
    let mut tail = Vec::new();
    loop {
        let got = match from.read(&mut chunk) {
            // A process that was stopped for a moment comes back with this.
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            read => read.unwrap_or(0),
        };
        if got == 0 {
            let _ = to.shutdown(Shutdown::Write);
            return;
        }
        let bytes = &chunk[..got];
        let mut state = shared.lock();
        if direction == Direction::Requests {
            mark(&mut state, index, &mut tail, bytes);
        }
        let concerned = |s: &State| s.only.is_none() || s.connections[index].marked;
        state.holding += 1;
        while index < state.way(direction).held_below && concerned(&state) && !state.closed {
            state = shared
                .changed
                .wait(state)
                .expect("no pump panics while it holds the lock");
        }
        state.holding -= 1;
        let faulty = concerned(&state);
        let way = state.way(direction);
        let mut pass = got;
        let mut cut = false;
        if let Some(left) = way.until_cut.filter(|_| faulty) {
            if left < got as u64 {
                (pass, cut) = (left as usize, true);
                way.until_cut = None;
            } else {
                way.until_cut = Some(left - got as u64);
            }
        }
        way.passed += pass as u64;
        let swallow = way.swallow && faulty;
        if cut {
            state.cuts += 1;
            state.draw_next_cut();
        }
        // Not under the lock: the peer may take its time.
        drop(state);
        if !swallow {
            let mut to = to;
            // A receiver that is gone: the bytes go nowhere, the other direction goes on.
            let _ = to.write_all(&bytes[..pass]);
        }
        if cut {
            shared.lock().connections[index].cut();
        }
    }
}

/// Notes whether the connection has now sent what faults are limited to.
fn mark(state: &mut State, index: usize, tail: &mut Vec<u8>, bytes: &[u8]) {
    let Some(pattern) = state.only.clone() else {
        return;
    };
    tail.extend_from_slice(bytes);
    if tail.windows(pattern.len()).any(|window| window == pattern) {
        state.connections[index].marked = true;
    }
    let keep = tail.len().min(pattern.len() - 1);
    tail.drain(..tail.len() - keep);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::redis::RedisServer;
    use crate::support::resp::{Client, Value, encode};
    use crate::support::wait_until;

    fn through(proxy: &Proxy) -> Client {
        Client::tcp(proxy.address).unwrap()
    }

    #[test]
    fn the_proxy_cuts_requests_and_replies_at_the_byte_asked_for() {
        let redis = RedisServer::start(&[]);
        let proxy = Proxy::start(redis.address());
        let request = encode(&["INCR", "k"]);

        proxy.cut_after(Direction::Requests, request.len() as u64 - 1);
        assert!(through(&proxy).try_command(&["INCR", "k"]).is_err());
        assert_eq!(
            redis.counter("k"),
            0,
            "a request without its last byte does nothing"
        );

        proxy.cut_after(Direction::Replies, 2);
        let mut client = through(&proxy);
        client.send_raw(&request).unwrap();
        assert_eq!(
            client.read_to_end().unwrap(),
            b":1",
            "of the reply only two bytes pass"
        );
        assert_eq!(redis.counter("k"), 1, "the request itself was whole");
        assert_eq!(proxy.cuts(), 2);

        assert_eq!(
            through(&proxy).number(&["INCR", "k"]),
            2,
            "a cut happens once"
        );
    }

    #[test]
    fn the_proxy_delivers_held_bytes_after_their_sender_is_gone() {
        let redis = RedisServer::start(&[]);
        let proxy = Proxy::start(redis.address());
        proxy.only(b"INCR");
        let (mut client, mut other) = (through(&proxy), through(&proxy));
        other.command(&["PING"]);
        client.command(&["PING"]);
        proxy.hold(Direction::Requests);
        client.send(&["INCR", "late"]).unwrap();
        wait_until("the bytes are held", || proxy.holding() == 1);
        assert_eq!(other.command(&["PING"]), Value::Status("PONG".into()));
        assert_eq!(
            through(&proxy).number(&["INCR", "new"]),
            1,
            "a new connection is not held"
        );
        drop(client);
        assert_eq!(redis.counter("late"), 0);
        proxy.release(Direction::Requests);
        wait_until("the held bytes arrive", || redis.counter("late") == 1);
    }

    #[test]
    fn the_proxy_swallows_replies_and_refuses_connections() {
        let redis = RedisServer::start(&[]);
        let proxy = Proxy::start(redis.address());
        let mut client = through(&proxy);
        proxy.swallow(Direction::Replies);
        client.send(&["INCR", "k"]).unwrap();
        wait_until("Redis has answered", || {
            proxy.passed(Direction::Replies) > 0
        });
        assert_eq!(redis.counter("k"), 1);
        proxy.cut_daemon_side();
        assert!(client.read().is_err());
        proxy.heal();
        proxy.refuse();
        assert!(through(&proxy).try_command(&["PING"]).is_err());
        proxy.heal();
        assert!(through(&proxy).try_command(&["PING"]).is_ok());
    }
}
