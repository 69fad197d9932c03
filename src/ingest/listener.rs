//! The listening socket and the list of clients.
//!
//! A socket file that nobody listens on is what a killed daemon leaves: it is replaced. One that
//! answers belongs to a living daemon and is refused.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::Connection;
use super::core::Core;
use super::notices::Stranger;
use super::peers::group_id;

/// Pause after the system refused to give a connection (no descriptor is left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The file system says no.
    #[error("listen.socket {}: cannot {action}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A living daemon.
    #[error("listen.socket {}: another process is listening on it", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// No socket is in the way.
    #[error("listen.socket {}: there is a file that is no socket; move it away", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// No such group.
    #[error("listen.group {name}: there is no such group in /etc/group")]
    Group {
        /// As configured.
        name: String,
    },
    /// No such user.
    #[error("listen.allow_uids {name}: there is no such user in /etc/passwd")]
    User {
        /// As configured.
        name: String,
    },
    /// No such group.
    #[error("listen.allow_gids {name}: there is no such group in /etc/group")]
    AllowedGroup {
        /// As configured.
        name: String,
    },
    /// Names cannot be looked up.
    #[error("cannot look names up in {}: {source}", path.display())]
    Names {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Binds the socket with its mode and group.
///
/// # Errors
/// See [`ListenError`].
pub fn bind(path: &Path, mode: u32, group: Option<&str>) -> Result<StdListener, ListenError> {
    let error = |action| {
        move |source: io::Error| ListenError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(error("create its directory"))?;
    }
    match std::fs::symlink_metadata(path) {
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => {}
        Err(other) => return Err(error("look at it")(other)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => match StdStream::connect(path) {
            Err(dead) if dead.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(error("remove the dead socket"))?;
            }
            Ok(_) => {
                return Err(ListenError::InUse {
                    path: path.to_owned(),
                });
            }
            Err(other) => return Err(error("look who is listening")(other)),
        },
    }
    // Nobody gets in between binding and setting the mode.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o777));
    let bound = StdListener::bind(path);
    rustix::process::umask(before);
    let listener = bound.map_err(error("bind"))?;
    if let Some(name) = group {
        let group = group_id(name)
            .map_err(error("look listen.group up"))?
            .ok_or_else(|| ListenError::Group {
                name: name.to_owned(),
            })?;
        rustix::fs::chown(path, None, Some(rustix::process::Gid::from_raw(group)))
            .map_err(io::Error::from)
            .map_err(error("give it to listen.group"))?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(error("set its mode"))?;
    listener.set_nonblocking(true).map_err(error("prepare"))?;
    Ok(listener)
}

/// What others may know of a client.
pub struct Client {
    /// Counts connections, from 1.
    pub id: u64,
    /// `CLIENT SETNAME`.
    pub name: RefCell<String>,
    /// `CLIENT SETINFO LIB-NAME` and `LIB-VER`.
    pub library: RefCell<(String, String)>,
    write: Weak<OwnedWriteHalf>,
}

impl Client {
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
    last: std::cell::Cell<u64>,
}

impl Clients {
    /// A new client.
    pub fn add(&self, write: &Rc<OwnedWriteHalf>) -> Rc<Client> {
        let id = self.last.get() + 1;
        self.last.set(id);
        let client = Rc::new(Client {
            id,
            name: RefCell::default(),
            library: RefCell::default(),
            write: Rc::downgrade(write),
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
            core.notices
                .connection_too_many(core.config.connections_max);
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
