//! Channels and patterns.

use std::rc::Rc;

use super::super::core::Core;
use super::super::glob::Glob;
use super::super::hub::{By, NAMES_BYTES_MAX};
use super::super::session::{Next, Session};
use super::{help, unknown_subcommand, wrong_arity};
use crate::wire::decode::Args;
use crate::wire::encode::{self, Out};

/// Channels and patterns of one client.
const SUBSCRIPTIONS_MAX: usize = 10_000;

/// As Redis words what an ACL refuses. A pattern is taken whatever it says: its subscribers get
/// the channels that they may.
const NO_CHANNEL: &str = "NOPERM this user has no permissions to access one of the channels used as arguments (limits.allow_keys)";

/// `SUBSCRIBE channel ...`, `PSUBSCRIBE pattern ...`
pub fn subscribe(
    core: &Core,
    session: &mut Session,
    by: By,
    args: Args<'_>,
    out: &mut Out,
) -> Option<Next> {
    let access = core.access.borrow();
    if by == By::Channel && !args.from(1).all(|name| access.keys.allow_channel(name)) {
        encode::error(out, NO_CHANNEL);
        return None;
    }
    let mut hub = core.hub.borrow_mut();
    let id = session.client.id;
    if !hub.knows(id) {
        session.inbox = Some(hub.add(Rc::clone(&session.client)));
    }
    for name in args.from(1) {
        if session.subscriptions >= SUBSCRIPTIONS_MAX {
            let text = format!("ERR a client may have {SUBSCRIPTIONS_MAX} subscriptions");
            encode::error(out, text);
            break;
        }
        match hub.subscribe(id, by, name, session.version) {
            Ok(count) => session.subscriptions = count,
            Err(text) => {
                encode::error(out, text);
                break;
            }
        }
        let kind: &[u8] = if by == By::Channel {
            b"subscribe"
        } else {
            b"psubscribe"
        };
        confirm(session, kind, Some(name), out);
    }
    None
}

/// `UNSUBSCRIBE [channel ...]`, `PUNSUBSCRIBE [pattern ...]`
pub fn unsubscribe(
    core: &Core,
    session: &mut Session,
    by: By,
    args: Args<'_>,
    out: &mut Out,
) -> Option<Next> {
    let mut hub = core.hub.borrow_mut();
    let kind: &[u8] = if by == By::Channel {
        b"unsubscribe"
    } else {
        b"punsubscribe"
    };
    let names: Vec<Vec<u8>> = if args.len() > 1 {
        args.from(1).map(<[u8]>::to_vec).collect()
    } else {
        hub.names(session.client.id, by)
    };
    if names.is_empty() {
        confirm(session, kind, None, out);
    }
    for name in names {
        session.subscriptions = hub.unsubscribe(session.client.id, by, &name);
        confirm(session, kind, Some(&name), out);
    }
    None
}

/// All of both kinds.
pub fn unsubscribe_all(core: &Core, session: &mut Session) {
    let mut hub = core.hub.borrow_mut();
    for by in [By::Channel, By::Pattern] {
        for name in hub.names(session.client.id, by) {
            hub.unsubscribe(session.client.id, by, &name);
        }
    }
    session.subscriptions = 0;
}

fn confirm(session: &Session, kind: &[u8], name: Option<&[u8]>, out: &mut Out) {
    encode::push(out, 3, session.version);
    encode::bulk(out, kind);
    match name {
        Some(name) => encode::bulk(out, name),
        None => encode::null(out, session.version),
    }
    encode::integer(out, session.subscriptions as i64);
}

/// `PUBSUB CHANNELS|NUMPAT|NUMSUB`
pub fn pubsub(core: &Core, _: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    let hub = core.hub.borrow();
    let sub = args.get(1).to_ascii_lowercase();
    match (&sub[..], args.len()) {
        (b"channels", 2 | 3) => {
            let pattern = match (args.len() == 3)
                .then(|| Glob::new(args.get(2)))
                .transpose()
            {
                Ok(pattern) => pattern,
                Err(error) => {
                    encode::error(out, format!("ERR {error}"));
                    return None;
                }
            };
            let mut channels = Vec::new();
            let mut bytes = 0;
            for name in hub.channels(pattern.as_ref()) {
                bytes += name.len();
                if bytes > NAMES_BYTES_MAX {
                    let text = format!("ERR their names take more than {NAMES_BYTES_MAX} bytes");
                    encode::error(out, text);
                    return None;
                }
                channels.push(name);
            }
            encode::array(out, channels.len());
            channels.iter().for_each(|name| encode::bulk(out, name));
        }
        (b"numsub", _) => {
            encode::array(out, (args.len() - 2) * 2);
            for name in args.from(2) {
                encode::bulk(out, name);
                encode::integer(out, hub.subscribers(name) as i64);
            }
        }
        (b"numpat", 2) => encode::integer(out, hub.patterns() as i64),
        (b"channels", _) => {
            let sub = String::from_utf8_lossy(args.get(1));
            encode::error(
                out,
                format!(
                    "ERR unknown subcommand or wrong number of arguments for '{sub}'. Try PUBSUB HELP."
                ),
            );
        }
        (b"numpat", _) => wrong_arity("pubsub|numpat", out),
        (b"help", 2) => help(
            "PUBSUB",
            &[
                "CHANNELS [<pattern>]",
                "    Return the channels with a subscriber on this socket, all or those that match.",
                "NUMPAT",
                "    Return the number of different patterns.",
                "NUMSUB [<channel> ...]",
                "    Return how many subscribe to each of these channels.",
            ],
            out,
        ),
        _ => unknown_subcommand("PUBSUB", args, out),
    }
    None
}
