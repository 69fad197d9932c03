//! What a client sends on connect and on leaving.

use super::super::core::Core;
use super::super::session::{Next, Session};
use super::client::set_name;
use super::server::REDIS_VERSION;
use super::subscriptions::unsubscribe_all;
use super::{is_resp2, wrong_arity};
use crate::wire::decode::Args;
use crate::wire::encode::{self, Out, Version};
use crate::wire::number::parse_i64;

/// `PING [message]`
pub fn ping(_: &Core, session: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    if args.len() > 2 {
        wrong_arity("ping", out);
    } else if session.subscriptions > 0 && is_resp2(session) {
        encode::array(out, 2);
        encode::bulk(out, b"pong");
        encode::bulk(out, args.get(1));
    } else if args.len() == 2 {
        encode::bulk(out, args.get(1));
    } else {
        encode::simple(out, "PONG");
    }
    None
}

/// `ECHO message`
pub fn echo(_: &Core, _: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    encode::bulk(out, args.get(1));
    None
}

/// `QUIT`
pub fn quit(_: &Core, _: &mut Session, _: Args<'_>, out: &mut Out) -> Option<Next> {
    encode::simple(out, "OK");
    Some(Next::Close)
}

/// `RESET`
pub fn reset(core: &Core, session: &mut Session, _: Args<'_>, out: &mut Out) -> Option<Next> {
    unsubscribe_all(core, session);
    session.reset();
    session.client.name.take();
    session.client.note_names();
    encode::simple(out, "RESET");
    None
}

/// `AUTH [name] password`: the socket's mode and the allowed peers decide who gets in; a password that a
/// client is configured with for Redis does no harm here.
pub fn auth(_: &Core, _: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    if args.len() > 3 {
        encode::error(out, "ERR syntax error");
    } else {
        encode::simple(out, "OK");
    }
    None
}

/// `HELLO [version [AUTH name password] [SETNAME name]]`
pub fn hello(_: &Core, session: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    let mut version = session.version;
    if args.len() > 1 {
        version = match parse_i64(args.get(1)) {
            Some(2) => Version::Resp2,
            Some(3) => Version::Resp3,
            Some(_) => {
                encode::error(out, "NOPROTO unsupported protocol version");
                return None;
            }
            None => {
                encode::error(
                    out,
                    "ERR Protocol version is not an integer or out of range",
                );
                return None;
            }
        };
    }
    let mut at = 2;
    while at < args.len() {
        let left = args.len() - at - 1;
        let option = args.get(at);
        if option.eq_ignore_ascii_case(b"AUTH") && left >= 2 {
            at += 3;
        } else if option.eq_ignore_ascii_case(b"SETNAME") && left >= 1 {
            if let Err(text) = set_name(&session.client, args.get(at + 1)) {
                encode::error(out, text);
                return None;
            }
            at += 2;
        } else {
            let option = String::from_utf8_lossy(option);
            encode::error(out, format!("ERR Syntax error in HELLO option '{option}'"));
            return None;
        }
    }
    session.version = version;
    encode::map(out, 7, version);
    encode::bulk(out, b"server");
    encode::bulk(out, b"redis");
    encode::bulk(out, b"version");
    encode::bulk(out, REDIS_VERSION.as_bytes());
    encode::bulk(out, b"proto");
    encode::integer(out, if version == Version::Resp3 { 3 } else { 2 });
    encode::bulk(out, b"id");
    encode::integer(out, session.client.id as i64);
    encode::bulk(out, b"mode");
    encode::bulk(out, b"standalone");
    encode::bulk(out, b"role");
    encode::bulk(out, b"master");
    encode::bulk(out, b"modules");
    encode::array(out, 0);
    None
}

/// `SELECT index`
pub fn select(_: &Core, _: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    match parse_i64(args.get(1)) {
        Some(0) => encode::simple(out, "OK"),
        // There is one database here: the one that `store.url` names.
        Some(_) => encode::error(out, "ERR DB index is out of range"),
        None => encode::error(out, "ERR value is not an integer or out of range"),
    }
    None
}
