//! The accept loop and the list of clients.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::account::{Account, Accounts, Part};
use super::connection::Connection;
use super::core::Core;
use super::notices::Stranger;

/// Pause after the system refused to give a connection (no descriptor is left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What others may know of a client.
pub struct Client {
    /// Counts connections, from 1.
    pub id: u64,
    /// `CLIENT SETNAME`.
    pub name: RefCell<String>,
    /// `CLIENT SETINFO LIB-NAME` and `LIB-VER`.
    pub library: RefCell<(String, String)>,
    /// What it holds in memory.
    pub account: Account,
    /// Process and user of its other end; `None`: the system does not tell.
    pub peer: Option<(i32, u32)>,
    /// When it connected.
    pub since: Instant,
    /// When it was last heard, in seconds of [`Core::seconds`].
    pub active: Cell<u64>,
    /// Commands queued since `MULTI`; `None`: there was none.
    pub queued: Cell<Option<u32>>,
    /// Whether it is spoken to in RESP3.
    pub resp3: Cell<bool>,
    write: Weak<OwnedWriteHalf>,
    killed: Cell<bool>,
    /// Of the task that serves it.
    waker: RefCell<Option<Waker>>,
}

impl Client {
    /// Ends the connection at once, whatever it waits for, and gives back what it holds.
    pub fn kill(&self) {
        self.killed.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Serves it until that ends, or until [`kill`](Self::kill): `None`. Costs a look at a flag each time that
    /// the task is woken, which a `select!` does not.
    pub async fn unless_killed<T>(&self, serve: impl Future<Output = T>) -> Option<T> {
        let mut serve = std::pin::pin!(serve);
        std::future::poll_fn(|cx| {
            if self.killed.get() {
                return Poll::Ready(None);
            }
            let mut waker = self.waker.borrow_mut();
            if waker
                .as_ref()
                .is_none_or(|known| !known.will_wake(cx.waker()))
            {
                *waker = Some(cx.waker().clone());
            }
            drop(waker);
            serve.as_mut().poll(cx).map(Some)
        })
        .await
    }

    /// By which `CLIENT KILL` finds it: Unix sockets have no addresses that differ.
    pub fn address(&self) -> String {
        format!("unix:{}", self.id)
    }

    /// Charges what it called itself.
    pub fn note_names(&self) {
        let library = self.library.borrow();
        let bytes = self.name.borrow().capacity() + library.0.capacity() + library.1.capacity();
        self.account.set(Part::Names, bytes);
    }

    /// Ends its reading side: what it has sent is still answered, then the connection ends.
    pub fn finish(&self) {
        self.shutdown(Shutdown::Read);
    }

    /// Ends the connection at once.
    pub fn cut_off(&self) {
        self.shutdown(Shutdown::Both);
    }

    fn shutdown(&self, how: Shutdown) {
        if let Some(write) = self.write.upgrade() {
            let how = match how {
                Shutdown::Read => rustix::net::Shutdown::Read,
                Shutdown::Write => rustix::net::Shutdown::Write,
                Shutdown::Both => rustix::net::Shutdown::Both,
            };
            let stream: &tokio::net::UnixStream = (*write).as_ref();
            // It may have ended by itself.
            let _ = rustix::net::shutdown(stream, how);
        }
    }
}

/// The connected clients.
#[derive(Default)]
pub struct Clients {
    list: RefCell<BTreeMap<u64, Rc<Client>>>,
    last: Cell<u64>,
}

impl Clients {
    /// A new client, whose memory is charged to `accounts`.
    pub fn add(&self, write: &Rc<OwnedWriteHalf>, accounts: &Rc<Accounts>) -> Rc<Client> {
        let stream: &UnixStream = (**write).as_ref();
        let peer = stream.peer_cred().ok();
        let peer = peer.and_then(|peer| Some((peer.pid()?, peer.uid())));
        let id = self.last.get() + 1;
        self.last.set(id);
        let client = Rc::new(Client {
            id,
            name: RefCell::default(),
            library: RefCell::default(),
            account: Account::new(accounts),
            write: Rc::downgrade(write),
            peer,
            since: Instant::now(),
            active: Cell::default(),
            queued: Cell::default(),
            resp3: Cell::default(),
            killed: Cell::new(false),
            waker: RefCell::default(),
        });
        self.list.borrow_mut().insert(id, Rc::clone(&client));
        client
    }

    /// Forgets a client.
    pub fn remove(&self, id: u64) {
        self.list.borrow_mut().remove(&id);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.borrow().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.borrow().is_empty()
    }

    /// Of those that are not cut off already, the one that holds most.
    pub fn largest(&self) -> Option<Rc<Client>> {
        let list = self.list.borrow();
        let stay = list.values().filter(|client| !client.killed.get());
        stay.max_by_key(|client| client.account.held()).cloned()
    }

    /// What those hold that are cut off and not gone yet, in bytes.
    pub fn leaving_bytes(&self) -> usize {
        let list = self.list.borrow();
        let leaving = list.values().filter(|client| client.killed.get());
        leaving.map(|client| client.account.held()).sum()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Rc<Client>> {
        self.list.borrow().values().cloned().collect()
    }
}

/// Accepts connections until told to stop; then each is answered what it has sent, and ends.
pub async fn serve(
    core: Rc<Core>,
    listener: UnixListener,
    stop: CancellationToken,
    connections: TaskTracker,
) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                core.notices.cannot_accept(&error);
                core.stats.connections_refused_total.add(1);
                core.stats.connections_refused_descriptors_total.add(1);
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(stranger) = admit(&core, &stream) {
            core.stats.connections_refused_total.add(1);
            core.stats.connections_refused_peer_total.add(1);
            core.notices.stranger(stranger);
            // The socket's buffer is empty, so this does not wait.
            let _ = stream.try_write(format!("-{stranger}\r\n").as_bytes());
            continue;
        }
        if core.clients.len() >= core.config.connections_max {
            core.stats.connections_refused_total.add(1);
            core.stats.connections_refused_limit_total.add(1);
            core.notices
                .connection_too_many(core.config.connections_max, core.config.connections_wanted);
            // As Redis says it. The socket's buffer is empty, so this does not wait.
            let _ = stream.try_write(b"-ERR max number of clients reached\r\n");
            continue;
        }
        core.stats.connections_total.add(1);
        let connection = Connection::new(Rc::clone(&core), stream);
        core.stats.connections.set(core.clients.len() as u64);
        connections.spawn_local(connection.run());
    }
    drop(listener);
    for client in core.clients.all() {
        client.finish();
    }
    connections.close();
    connections.wait().await;
}

/// Whether a peer may come in.
fn admit(core: &Core, stream: &UnixStream) -> Result<(), Stranger> {
    let peers = &core.access.borrow().peers;
    if peers.is_all() {
        return Ok(());
    }
    // Who cannot be told stays out.
    let credentials = stream.peer_cred().ok().map(|peer| (peer.uid(), peer.gid()));
    match credentials {
        Some((uid, gid)) if peers.allow(uid, gid) => Ok(()),
        _ => Err(Stranger { credentials }),
    }
}
