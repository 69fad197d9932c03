//! Who may connect: `listen.allow_uids` and `listen.allow_gids`, beyond the socket's mode.
//!
//! The kernel tells a peer's user and primary group as they were when it connected (`SO_PEERCRED`).
//! Its other groups are told only by `SO_PEERGROUPS`, which no safe interface offers; so a user is
//! also in the groups that `/etc/group` lists them in. Names are looked up when the daemon starts
//! and when it is told to read its configuration again.
//!
//! Root and the daemon's own user always get in: either can become any other or reach into the
//! daemon, so that a refusal would only get in the way of `tallyd top` and the like.

use std::fs;
use std::io;
use std::path::Path;

use super::listener::ListenError;

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// See the module's documentation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedPeers {
    own_uid: u32,
    uids: Vec<u32>,
    gids: Vec<u32>,
    /// Neither users nor groups are named.
    all: bool,
}

impl AllowedPeers {
    /// By numbers or names; with neither users nor groups: everybody.
    ///
    /// # Errors
    /// A name that the system does not know.
    pub fn find(users: &[String], groups: &[String]) -> Result<Self, ListenError> {
        let own_uid = rustix::process::geteuid().as_raw();
        let all = users.is_empty() && groups.is_empty();
        let read = |path: &str| {
            // Where everybody may, nobody has to be looked up.
            let text = (!all).then(|| fs::read_to_string(path)).transpose();
            text.map(Option::unwrap_or_default)
                .map_err(|source| unreadable(path, source))
        };
        Self::find_in(own_uid, users, groups, &read(PASSWD)?, &read(GROUP)?)
    }

    fn find_in(
        own_uid: u32,
        users: &[String],
        groups: &[String],
        passwd: &str,
        group: &str,
    ) -> Result<Self, ListenError> {
        let mut uids = Vec::new();
        for name in users {
            uids.push(
                number_of(name, passwd).ok_or_else(|| ListenError::User { name: name.clone() })?,
            );
        }
        let mut gids = Vec::new();
        for name in groups {
            let gid = number_of(name, group)
                .ok_or_else(|| ListenError::AllowedGroup { name: name.clone() })?;
            gids.push(gid);
            uids.extend(members(gid, group).filter_map(|member| number_of(member, passwd)));
        }
        Ok(Self {
            own_uid,
            uids,
            gids,
            all: users.is_empty() && groups.is_empty(),
        })
    }

    /// Whether a process of this user and primary group may connect.
    pub fn allow(&self, uid: u32, gid: u32) -> bool {
        self.all
            || uid == 0
            || uid == self.own_uid
            || self.uids.contains(&uid)
            || self.gids.contains(&gid)
    }

    /// Whether nobody is refused.
    pub fn is_all(&self) -> bool {
        self.all
    }
}

/// A group's number, by number or by its name in `/etc/group`.
///
/// # Errors
/// The file cannot be read.
pub fn group_id(name: &str) -> io::Result<Option<u32>> {
    match name.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Ok(number_of(name, &fs::read_to_string(GROUP)?)),
    }
}

fn unreadable(path: &str, source: io::Error) -> ListenError {
    ListenError::Names {
        path: Path::new(path).to_owned(),
        source,
    }
}

/// A number as it is, or the third field of the line that begins with the name, as in both files.
fn number_of(name: &str, file: &str) -> Option<u32> {
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

/// The users that the line of a group lists.
fn members(gid: u32, group: &str) -> impl Iterator<Item = &str> {
    group
        .lines()
        .filter_map(move |line| {
            let mut fields = line.split(':').skip(2);
            let number: u32 = fields.next()?.parse().ok()?;
            (number == gid).then(|| fields.next()).flatten()
        })
        .flat_map(|names| names.split(','))
        .map(str::trim)
        // A user's name that looks like a number is not that number.
        .filter(|name| !name.is_empty() && name.parse::<u32>().is_err())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
                          web:x:33:33::/:/bin/false\n\
                          deploy:x:1000:1000::/home/deploy:/bin/sh\n\
                          ann:x:1001:1001::/home/ann:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nweb:x:33:\ncounters:x:700:ann, deploy,ghost,33\n";

    fn find(users: &[&str], groups: &[&str]) -> Result<AllowedPeers, ListenError> {
        let owned = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        AllowedPeers::find_in(500, &owned(users), &owned(groups), PASSWD, GROUP)
    }

    #[test]
    fn without_names_everybody_is_allowed() {
        let all = find(&[], &[]).unwrap();
        assert!(all.is_all());
        assert!(all.allow(12_345, 12_345));
    }

    #[test]
    fn users_are_allowed_by_name_and_by_number() {
        let peers = find(&["deploy", "33"], &[]).unwrap();
        assert!(!peers.is_all());
        assert!(peers.allow(1000, 9) && peers.allow(33, 9));
        assert!(!peers.allow(1001, 1001));
        assert!(!peers.allow(9, 33), "a group's number is no user's");
        assert!(peers.allow(0, 0), "root");
        assert!(peers.allow(500, 500), "the daemon's own user");
        assert!(!peers.allow(9, 0), "root's group is not root");
    }

    #[test]
    fn a_group_allows_whom_it_is_the_primary_one_of_and_whom_it_lists() {
        for peers in [find(&[], &["counters"]), find(&[], &["700"])] {
            let peers = peers.unwrap();
            assert!(peers.allow(9, 700), "the primary group");
            assert!(peers.allow(1000, 1000) && peers.allow(1001, 1001), "listed");
            assert!(!peers.allow(33, 33), "a member's name is no number");
            assert!(!peers.allow(9, 9));
        }
    }

    #[test]
    fn users_and_groups_add_up() {
        let peers = find(&["web"], &["counters"]).unwrap();
        assert!(peers.allow(33, 9) && peers.allow(9, 700));
        assert!(!peers.allow(9, 33));
    }

    #[test]
    fn names_that_the_system_does_not_know_are_errors_that_name_them() {
        let error = find(&["nobody-here"], &[]).unwrap_err().to_string();
        assert!(error.contains("listen.allow_uids nobody-here"), "{error}");
        let error = find(&[], &["-1"]).unwrap_err().to_string();
        assert!(error.contains("listen.allow_gids -1"), "{error}");
    }
}
