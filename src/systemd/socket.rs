//! The listening socket that systemd holds (socket activation), so that a restart of the daemon
//! refuses no connection: clients wait in the backlog for the next process.
//!
//! Descriptors come with names, in an order that is not stable. Ours is called [`NAME`]; a single one
//! without a name of its own is taken too. Path, mode and group of such a socket are its unit's
//! affair: the daemon neither makes nor removes it.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use rustix::net::{AddressFamily, SocketType, sockopt};
use tracing::warn;

/// The socket's `FileDescriptorName=`.
pub const NAME: &str = "tallyd";

/// Why what systemd passed cannot be used. The socket unit is to be corrected.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Variables that contradict each other, or a descriptor that is not open.
    #[error("the sockets that systemd passed cannot be taken ($LISTEN_FDS, $LISTEN_FDNAMES)")]
    Variables(#[source] std::io::Error),
    /// None of them is ours, or it cannot be told which.
    #[error(
        "systemd passed {found}; one is needed, with FileDescriptorName={NAME} and one ListenStream="
    )]
    Which {
        /// Their names.
        found: String,
    },
    /// Not what the daemon serves.
    #[error("systemd passed {name}, which is no listening Unix stream socket")]
    Kind {
        /// Its name.
        name: String,
        /// What it is, or what the system said.
        #[source]
        source: std::io::Error,
    },
}

/// The listening socket that systemd passed to this process, if it passed any. Call it once, as the
/// descriptors are taken over.
///
/// # Errors
/// See [`SocketError`].
pub fn inherited() -> Result<Option<UnixListener>, SocketError> {
    // Names may be here without descriptors: variables that were meant for another process.
    if sd_notify::listen_fds()
        .map_err(SocketError::Variables)?
        .len()
        == 0
    {
        return Ok(None);
    }
    let passed: Vec<(RawFd, String)> = sd_notify::listen_fds_with_names()
        .map_err(SocketError::Variables)?
        .collect();
    let names: Vec<&str> = passed.iter().map(|(_, name)| name.as_str()).collect();
    let Some(ours) = choose(&names)? else {
        return Ok(None);
    };
    for (index, name) in names.iter().enumerate() {
        if index != ours {
            warn!("systemd passed a descriptor {name}, which tallyd has no use for");
        }
    }
    let (descriptor, name) = &passed[ours];
    let listener = UnixListener::from(own(*descriptor));
    match check(&listener) {
        Ok(()) => Ok(Some(listener)),
        Err(source) => Err(SocketError::Kind {
            name: name.clone(),
            source,
        }),
    }
}

/// Which of them is ours, by their names.
fn choose(names: &[&str]) -> Result<Option<usize>, SocketError> {
    let named: Vec<usize> = (0..names.len()).filter(|&at| names[at] == NAME).collect();
    match (names, &named[..]) {
        ([], _) => Ok(None),
        (_, [ours]) => Ok(Some(*ours)),
        // systemd calls it by its unit when nothing else is set; "unknown" is what has no name.
        ([one], []) if one.is_empty() || *one == "unknown" || one.ends_with(".socket") => {
            Ok(Some(0))
        }
        _ => Err(SocketError::Which {
            found: match names {
                [one] => format!("a descriptor named {one}"),
                _ => format!("{} descriptors named {}", names.len(), names.join(", ")),
            },
        }),
    }
}

/// Takes a descriptor over.
#[allow(unsafe_code)]
fn own(descriptor: RawFd) -> OwnedFd {
    // SAFETY: `$LISTEN_PID` names this process, so the descriptor was opened for it to own; it is
    // open, as its flags have just been set; and nobody else takes it, as this is called once.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

fn check(listener: &UnixListener) -> std::io::Result<()> {
    let wrong = |what: &str| Err(std::io::Error::other(what.to_owned()));
    if sockopt::socket_domain(listener)? != AddressFamily::UNIX {
        return wrong("it is of another address family");
    }
    if sockopt::socket_type(listener)? != SocketType::STREAM {
        return wrong("it is of another type");
    }
    if !sockopt::socket_acceptconn(listener)? {
        return wrong("it does not listen");
    }
    listener.set_nonblocking(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_is_the_one_of_our_name_or_a_single_one_without_a_name() {
        for (names, ours) in [
            (&[][..], None),
            (&["tallyd"], Some(0)),
            (&["tallyd-admin", "tallyd"], Some(1)),
            (&["tallyd", "unknown"], Some(0)),
            (&["unknown"], Some(0)),
            (&[""], Some(0)),
            (&["counters.socket"], Some(0)),
        ] {
            assert_eq!(choose(names).unwrap(), ours, "{names:?}");
        }
    }

    #[test]
    fn where_it_cannot_be_told_which_is_ours_the_names_are_shown() {
        for (names, found) in [
            (&["tallyd-admin"][..], "a descriptor named tallyd-admin;"),
            (&["a", "b"], "2 descriptors named a, b;"),
            (&["tallyd", "tallyd"], "2 descriptors named tallyd, tallyd;"),
        ] {
            let text = choose(names).unwrap_err().to_string();
            assert!(text.contains(found), "{text}");
        }
    }

    #[test]
    fn only_a_listening_unix_stream_socket_will_do() {
        use std::net::TcpListener;
        use std::os::unix::net::{UnixDatagram, UnixStream};

        let is = |socket: OwnedFd| check(&UnixListener::from(socket)).map_err(|e| e.to_string());
        let dir = tempfile::tempdir().unwrap();
        let listening = UnixListener::bind(dir.path().join("s")).unwrap();
        assert_eq!(is(listening.into()), Ok(()));
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(is(tcp.into()).unwrap_err().contains("family"));
        let datagram = UnixDatagram::unbound().unwrap();
        assert!(is(datagram.into()).unwrap_err().contains("type"));
        let (connected, _other) = UnixStream::pair().unwrap();
        assert!(is(connected.into()).unwrap_err().contains("not listen"));
        let file = tempfile::tempfile().unwrap();
        assert!(is(file.into()).is_err());
    }
}
