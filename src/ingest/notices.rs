//! What the log is told of the edge: clients refused, and limits that are met. No client can make
//! it longer than the lines of [`crate::repeats`].

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::time::Duration;

use tracing::{info, warn};

use crate::counters::{Answer, Op, RecordError};
use crate::repeats::Repeats;
use crate::store::NodeId;

/// A limit that nobody has met for so long may be left: that is all that can be told.
const QUIET: Duration = Duration::from_secs(5);

/// A peer that `listen.allow_uids` and `listen.allow_gids` do not let in. Shown: what it is told,
/// worded as Redis words what an ACL refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stranger {
    /// Its user and primary group; `None`: the system does not tell.
    pub credentials: Option<(u32, u32)>,
}

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NOPERM this user has no permissions to connect: ")?;
        match self.credentials {
            Some((uid, gid)) => write!(f, "uid {uid}, gid {gid} is")?,
            None => f.write_str("who it is cannot be told, so it is")?,
        }
        f.write_str(" not in listen.allow_uids or listen.allow_gids")
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Notices(RefCell<Lines>);

#[derive(Debug, Default)]
struct Lines {
    strangers: Repeats,
    /// The last one of them.
    stranger: Option<Stranger>,
    connections: Repeats,
    accept: Repeats,
    pending: Repeats,
    disk: Repeats,
    subscribers: Repeats,
    evictions: Repeats,
    claims: Repeats,
}

impl Notices {
    /// A peer was refused.
    pub fn stranger(&self, stranger: Stranger) {
        let lines = &mut *self.0.borrow_mut();
        lines.stranger = Some(stranger);
        let told = lines.strangers.again();
        tell_strangers(told.map(|told| told.count), lines.stranger);
    }

    /// As many are connected as may be, and one more was refused.
    pub fn connection_too_many(&self, max: usize, wanted: usize) {
        let Some(told) = self.0.borrow_mut().connections.again() else {
            return;
        };
        if max < wanted {
            warn!(
                refused = told.count,
                "the limit of open files allows {max} connections, fewer than listen.max_connections \
                 ({wanted}): more are refused"
            );
        } else {
            warn!(
                refused = told.count,
                "listen.max_connections ({max}) is reached: connections are refused"
            );
        }
    }

    /// The system gave no connection.
    pub fn cannot_accept(&self, error: &io::Error) {
        if let Some(told) = self.0.borrow_mut().accept.again() {
            warn!(tries = told.count, %error, "cannot accept connections; trying on");
        }
    }

    /// A subscriber did not keep up.
    pub fn slow_subscriber(&self, client: u64) {
        if let Some(told) = self.0.borrow_mut().subscribers.again() {
            warn!(
                count = told.count,
                client, "a subscriber did not keep up and is cut off"
            );
        }
    }

    /// `limits.max_client_bytes` is reached: the client that held most is cut off.
    pub fn client_evicted(&self, client: u64, held: usize, limit: usize) {
        if let Some(told) = self.0.borrow_mut().evictions.again() {
            warn!(
                count = told.count,
                client,
                held,
                "limits.max_client_bytes ({limit}) is reached: the client that held most is cut off"
            );
        }
    }

    /// A message's clock was far ahead of what the store then showed.
    pub fn false_claim(&self, node: NodeId, claimed: u64, store: u64) {
        if let Some(told) = self.0.borrow_mut().claims.again() {
            warn!(
                count = told.count,
                %node,
                claimed,
                store,
                "a message of this node is ahead of the store's clock: it is forged, or the store went \
                 back; its values are read anew"
            );
        }
    }

    /// Some of these operations were refused.
    #[cold]
    pub fn refused(&self, ops: &[Op]) {
        let lines = &mut *self.0.borrow_mut();
        for op in ops {
            let (repeats, what) = match op.answer {
                Answer::Record(RecordError::Limit) => (
                    &mut lines.pending,
                    "limits.max_pending_bytes is reached: increments that need a further record are \
                     refused until the store takes what is pending",
                ),
                Answer::Record(RecordError::Disk) => (
                    &mut lines.disk,
                    "the journal cannot grow, the disk may be full: increments that need a further \
                     record are refused",
                ),
                _ => continue,
            };
            if let Some(told) = repeats.again() {
                warn!(refused = told.count, "{what}");
            }
        }
    }

    /// Now and then: what was left, and what is still to be told.
    pub fn tick(&self) {
        let lines = &mut *self.0.borrow_mut();
        let told = lines.strangers.due();
        tell_strangers(told.map(|told| told.count), lines.stranger);
        for (repeats, what) in [
            (&mut lines.connections, "connections"),
            (&mut lines.accept, "connections"),
            (&mut lines.pending, "increments"),
            (&mut lines.disk, "increments"),
        ] {
            match repeats.over_after(QUIET) {
                None => {}
                Some(Ok(told)) => warn!(refused = told.count, "{what} are still refused"),
                Some(Err(told)) => info!(
                    refused = told.count,
                    seconds = told.seconds(),
                    "no {what} were refused in the last {} s",
                    QUIET.as_secs()
                ),
            }
        }
        if let Some(told) = lines.subscribers.due() {
            warn!(
                count = told.count,
                "subscribers did not keep up and were cut off"
            );
        }
        if let Some(told) = lines.evictions.due() {
            warn!(
                count = told.count,
                "limits.max_client_bytes was reached: clients that held most were cut off"
            );
        }
    }
}

fn tell_strangers(count: Option<u64>, last: Option<Stranger>) {
    if let (Some(count), Some(last)) = (count, last) {
        let (uid, gid) = last.credentials.unzip();
        warn!(
            count,
            uid,
            gid,
            "refused connections of users who are not in listen.allow_uids or listen.allow_gids"
        );
    }
}
