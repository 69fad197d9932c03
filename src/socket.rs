//! Binding a Unix socket, of the applications and of the admin server, and the names of users and
//! groups that go with it.
//!
//! A socket file that nobody listens on is what a killed daemon leaves: it is replaced. One that
//! answers belongs to a living daemon and is refused.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The file system says no.
    #[error("{key} {}: cannot {action}: {source}", path.display())]
    Io {
        /// The configuration's name of it.
        key: &'static str,
        /// The socket.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A living daemon.
    #[error("{key} {}: another process is listening on it", path.display())]
    InUse {
        /// The configuration's name of it.
        key: &'static str,
        /// The socket.
        path: PathBuf,
    },
    /// No socket is in the way.
    #[error("{key} {}: there is a file that is no socket; move it away", path.display())]
    NotASocket {
        /// The configuration's name of it.
        key: &'static str,
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
    /// A pattern of keys that cannot be taken.
    #[error("limits.allow_keys, pattern {}: {source}", place + 1)]
    Pattern {
        /// In the list, from 0.
        place: usize,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
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

/// Binds the socket that the configuration calls `key`, with its mode and group.
///
/// # Errors
/// See [`ListenError`].
pub fn bind(
    key: &'static str,
    path: &Path,
    mode: u32,
    group: Option<&str>,
) -> Result<UnixListener, ListenError> {
    let error = |action| {
        move |source: io::Error| ListenError::Io {
            key,
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
                key,
                path: path.to_owned(),
            });
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(dead) if dead.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(error("remove the dead socket"))?;
            }
            Ok(_) => {
                return Err(ListenError::InUse {
                    key,
                    path: path.to_owned(),
                });
            }
            Err(other) => return Err(error("look who is listening")(other)),
        },
    }
    // Nobody gets in between binding and setting the mode.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o777));
    let bound = UnixListener::bind(path);
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

/// A group's number, by number or by its name in `/etc/group`.
fn group_id(name: &str) -> io::Result<Option<u32>> {
    match name.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Ok(number_of(name, &std::fs::read_to_string("/etc/group")?)),
    }
}

/// A number as it is, or the third field of the line that begins with the name, as in `/etc/passwd`
/// and `/etc/group`.
pub fn number_of(name: &str, file: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    file.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name))
            .then(|| fields.nth(1)?.parse().ok())
            .flatten()
    })
}
