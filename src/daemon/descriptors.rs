//! Who may have how many descriptors: what the daemon itself opens comes first, then the admin server,
//! then clients.
//!
//! A descriptor that is not to be had stops what needs it: the flush stage could not connect, nor open
//! the next segment. So clients are refused before that, at a limit of their own, in words.

use rustix::process::{Resource, getrlimit, setrlimit};
use tracing::warn;

use crate::admin::PLACES_MAX as ADMIN_MAX;
use crate::config::Config;

/// Open when the process begins, as far as the system does not tell: standard input, output and error,
/// the signals' pair, and the stages' runtime.
const OPEN_AT_START: usize = 8;
/// A runtime: two of its poll, one to wake it. Of ingest and admin.
const RUNTIMES: usize = 2 * 3;
/// `listen.socket` and `admin.listen`.
const LISTENERS: usize = 2;
/// `lock` and `rejected.jsonl`.
const STATE: usize = 2;
/// Open, next, being sealed; closed ones that are on their way to the disk (with `journal.sync =
/// "always"` for clients as well); one that is looked at again. Others are neither open nor mapped.
const SEGMENTS: usize = 8;
/// Redis: a lane, four for reads, one to publish, one for the subscription; each may hold another while
/// a name is looked up or a certificate read. The embedded store has one.
const STORE: usize = 2 * 7;
/// For a moment: `node.json` and its directory, a directory's sync, the configuration read anew, a
/// message to systemd.
const PASSING: usize = 6;
/// One client too many of each listener, which is to be told so.
const REFUSED: usize = 2;
/// What the daemon opens itself after its start.
const OWN: usize = RUNTIMES + LISTENERS + STATE + SEGMENTS + STORE + PASSING + REFUSED;

/// Of what is left for connections, the admin server gets so much at most.
const ADMIN_PART: usize = 4;

/// Connections at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Connections {
    /// Of clients.
    pub clients: usize,
    /// To the admin server.
    pub admin: usize,
}

/// Raises the limit of open files as far as that is needed and allowed, and divides it.
pub(super) fn divide(config: &Config) -> Connections {
    let wanted = config.listen.max_connections;
    let has_admin = config.admin.listen.is_some();
    let open = open_now().unwrap_or(OPEN_AT_START);
    let needed = open + OWN + wanted + if has_admin { ADMIN_MAX } else { 0 };
    let files_max = raise(needed);
    let connections = share(files_max, open, wanted, has_admin);
    if connections.clients < wanted {
        warn!(
            "listen.max_connections is {wanted}, but the system lets this process open {files_max} files: \
             no more than {} clients are served at a time, as the journal, the store and the admin \
             server need theirs; allow {needed} files (LimitNOFILE= under systemd, else ulimit -n), or \
             lower listen.max_connections",
            connections.clients
        );
    }
    connections
}

/// So many files may be open from now on.
fn raise(needed: usize) -> usize {
    let mut limit = getrlimit(Resource::Nofile);
    let needed = needed as u64;
    if limit.current.is_some_and(|current| current < needed) {
        let before = limit.current;
        limit.current = Some(limit.maximum.map_or(needed, |hard| hard.min(needed)));
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            warn!(%error, "cannot raise the limit of open files");
            limit.current = before;
        }
    }
    let files_max = limit.current.unwrap_or(u64::MAX);
    usize::try_from(files_max).unwrap_or(usize::MAX)
}

/// Somebody is always let in: where the limit is that low, the rest is luck, and the log says so.
fn share(files_max: usize, open: usize, wanted: usize, has_admin: bool) -> Connections {
    let left = files_max.saturating_sub(open + OWN);
    let admin = if has_admin {
        let spare = left.saturating_sub(wanted).max(left / ADMIN_PART);
        spare.clamp(1, ADMIN_MAX)
    } else {
        0
    };
    let clients = left.saturating_sub(admin).clamp(1, wanted.max(1));
    Connections { clients, admin }
}

/// Counts the open files; also those that whoever started the process has left open.
fn open_now() -> Option<usize> {
    let listed = std::fs::read_dir("/proc/self/fd").ok()?.count();
    // The listing's own.
    Some(listed.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clients(files_max: usize, wanted: usize, has_admin: bool) -> (usize, usize) {
        let Connections { clients, admin } = share(files_max, 8, wanted, has_admin);
        (clients, admin)
    }

    #[test]
    fn clients_get_what_the_daemon_and_the_admin_server_leave() {
        let own = 8 + OWN;
        assert_eq!(clients(65_536, 10_000, true), (10_000, 80));
        assert_eq!(clients(usize::MAX, 10_000, false), (10_000, 0));
        assert_eq!(clients(own + 10_080, 10_000, true), (10_000, 80));
        assert_eq!(clients(own + 10_010, 10_000, true), (9_930, 80));
        assert_eq!(clients(own + 16, 10_000, true), (12, 4));
        assert_eq!(clients(own + 16, 14, true), (12, 4));
        assert_eq!(clients(own + 16, 10, true), (10, 6));
        assert_eq!(clients(own + 16, 10_000, false), (16, 0));
    }

    #[test]
    fn a_limit_that_is_much_too_low_still_lets_somebody_in() {
        for files_max in [0, 8, OWN, OWN + 8] {
            assert_eq!(clients(files_max, 10, false), (1, 0));
            assert_eq!(clients(files_max, 10, true), (1, 1));
        }
    }
}
