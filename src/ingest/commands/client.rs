//! `CLIENT`: who is connected, what each holds, and cutting one off.

use std::rc::Rc;

use super::super::core::Core;
use super::super::listener::Client;
use super::super::report;
use super::super::session::{Next, ReplyMode, Session};
use super::{help, null, unknown_subcommand, wrong_arity};
use crate::wire::decode::Args;
use crate::wire::encode::{self, Out};
use crate::wire::number::parse_i64;

/// A client's name, and what it says of its library, in bytes each.
const NAME_BYTES_MAX: usize = 1024;
/// Clients whose lines are written at a time.
const LINES: usize = 200;
/// What a line costs, in units of a [`Slice`](super::super::slice::Slice).
const LINE_UNITS: usize = 50;

/// Which clients are meant; each condition that is given must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// In order.
    ids: Option<Vec<u64>>,
    subscribers: Option<bool>,
    address: Option<Vec<u8>>,
    pid: Option<i64>,
    uid: Option<i64>,
    but: Option<u64>,
    /// No client can be meant.
    nobody: bool,
}

impl Filter {
    fn meets(&self, core: &Core, client: &Client) -> bool {
        let is = |wanted: Option<i64>, found: Option<i64>| wanted.is_none() || wanted == found;
        !self.nobody
            && self.but != Some(client.id)
            && self
                .ids
                .as_ref()
                .is_none_or(|ids| ids.binary_search(&client.id).is_ok())
            && self
                .address
                .as_ref()
                .is_none_or(|address| client.address().as_bytes() == address)
            && is(self.pid, client.peer.map(|(pid, _)| i64::from(pid)))
            && is(self.uid, client.peer.map(|(_, uid)| i64::from(uid)))
            && self.subscribers.is_none_or(|wanted| {
                let (channels, patterns) = core.hub.borrow().counts(client.id);
                wanted == (channels + patterns > 0)
            })
    }

    /// `TYPE`
    fn kind(&mut self, word: &[u8]) -> Result<(), String> {
        match &word.to_ascii_lowercase()[..] {
            b"normal" => self.subscribers = Some(false),
            b"pubsub" => self.subscribers = Some(true),
            b"master" | b"replica" | b"slave" => self.nobody = true,
            _ => {
                let word = String::from_utf8_lossy(word);
                return Err(format!("ERR Unknown client type '{word}'"));
            }
        }
        Ok(())
    }

    /// Of `CLIENT LIST`.
    fn of_list(args: Args<'_>) -> Result<Self, String> {
        let mut filter = Filter::default();
        let word = args.get(2).to_ascii_lowercase();
        match (&word[..], args.len()) {
            (_, 2) => {}
            (b"type", 4) => filter.kind(args.get(3))?,
            (b"id", 4..) => {
                let ids: Option<Vec<u64>> = args.from(3).map(id).collect();
                let mut ids = ids.ok_or("ERR Invalid client ID")?;
                ids.sort_unstable();
                filter.ids = Some(ids);
            }
            _ => return Err("ERR syntax error".to_owned()),
        }
        Ok(filter)
    }

    /// Of `CLIENT KILL` with filters; `me` is who asks.
    fn of_kill(args: Args<'_>, me: u64) -> Result<Self, String> {
        let mut filter = Filter {
            but: Some(me),
            ..Filter::default()
        };
        if !args.len().is_multiple_of(2) {
            return Err("ERR syntax error".to_owned());
        }
        for at in (2..args.len()).step_by(2) {
            let value = args.get(at + 1);
            let number = || parse_i64(value).ok_or("ERR value is not an integer or out of range");
            match &args.get(at).to_ascii_lowercase()[..] {
                b"id" => {
                    let id = id(value).ok_or("ERR client-id should be greater than 0")?;
                    filter.ids = Some(vec![id]);
                }
                b"type" => filter.kind(value)?,
                b"addr" => filter.address = Some(value.to_vec()),
                b"pid" => filter.pid = Some(number()?),
                b"uid" => filter.uid = Some(number()?),
                // There is no other, and no address of ours by which clients differ.
                b"user" if value == b"default" => {}
                b"user" => {
                    let user = String::from_utf8_lossy(value);
                    return Err(format!("ERR No such user '{user}'"));
                }
                b"skipme" => match &value.to_ascii_lowercase()[..] {
                    b"yes" => filter.but = Some(me),
                    b"no" => filter.but = None,
                    _ => return Err("ERR syntax error".to_owned()),
                },
                _ => return Err("ERR syntax error".to_owned()),
            }
        }
        Ok(filter)
    }
}

fn id(word: &[u8]) -> Option<u64> {
    let id = parse_i64(word).and_then(|id| u64::try_from(id).ok());
    id.filter(|&id| id > 0)
}

/// Cuts off those who are meant. `Some`: the one who asks is among them.
fn kill(core: &Core, session: &Session, filter: &Filter) -> (i64, Option<Next>) {
    let mut count = 0;
    let mut next = None;
    for client in core.clients.all() {
        if filter.meets(core, &client) {
            count += 1;
            if client.id == session.client.id && !session.executing {
                next = Some(Next::Close); // When it has its answer.
            } else {
                client.kill();
                core.hub.borrow_mut().remove(client.id);
            }
        }
    }
    (count, next)
}

impl Core {
    /// The answer to `CLIENT LIST`, in slices.
    pub async fn list_clients(&self, filter: &Filter) -> String {
        let mut text = String::new();
        for clients in self.clients.all().chunks(LINES) {
            lines(self, clients, filter, &mut text);
            self.slice.spend(clients.len() * LINE_UNITS);
            self.slice.pause_if_due(&self.stats).await;
        }
        text
    }
}

fn lines(core: &Core, clients: &[Rc<Client>], filter: &Filter, text: &mut String) {
    for client in clients.iter().filter(|client| filter.meets(core, client)) {
        report::client_line(core, client, text);
    }
}

/// `CLIENT SETNAME`
///
/// # Errors
/// The name cannot be shown, or is too long.
pub fn set_name(client: &Client, name: &[u8]) -> Result<(), &'static str> {
    if !name.iter().all(|byte| (b'!'..=b'~').contains(byte)) {
        return Err("ERR Client names cannot contain spaces, newlines or special characters.");
    }
    if name.len() > NAME_BYTES_MAX {
        return Err("ERR Client names cannot be longer than 1024 bytes");
    }
    *client.name.borrow_mut() = String::from_utf8_lossy(name).into_owned();
    client.note_names();
    Ok(())
}

/// `CLIENT`
pub fn client(core: &Core, session: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    let sub = args.get(1).to_ascii_lowercase();
    let word = args.get(2).to_ascii_lowercase();
    let ok = |out: &mut Out| encode::simple(out, "OK");
    match (&sub[..], args.len()) {
        (b"setname", 3) => match set_name(&session.client, args.get(2)) {
            Ok(()) => ok(out),
            Err(text) => encode::error(out, text),
        },
        (b"getname", 2) => {
            let name = session.client.name.borrow();
            if name.is_empty() {
                null(session, out);
            } else {
                encode::bulk(out, name.as_bytes());
            }
        }
        (b"setinfo", 4) => {
            let value = args.get(3);
            let mut library = session.client.library.borrow_mut();
            if !value.iter().all(|byte| (b'!'..=b'~').contains(byte)) {
                let name = String::from_utf8_lossy(&word);
                let text =
                    format!("ERR {name} cannot contain spaces, newlines or special characters.");
                encode::error(out, &text);
            } else if value.len() > NAME_BYTES_MAX {
                encode::error(
                    out,
                    "ERR lib-name and lib-ver cannot be longer than 1024 bytes",
                );
            } else if word == b"lib-name" {
                library.0 = String::from_utf8_lossy(value).into_owned();
                ok(out);
            } else if word == b"lib-ver" {
                library.1 = String::from_utf8_lossy(value).into_owned();
                ok(out);
            } else {
                let name = String::from_utf8_lossy(args.get(2)).into_owned();
                encode::error(out, format!("ERR Unrecognized option '{name}'"));
            }
            drop(library);
            session.client.note_names();
        }
        (b"id", 2) => encode::integer(out, session.client.id as i64),
        (b"info", 2) => {
            session.note();
            let mut line = String::new();
            report::client_line(core, &session.client, &mut line);
            encode::verbatim(out, &line, session.version);
        }
        (b"list", _) => match Filter::of_list(args) {
            Err(text) => encode::error(out, text),
            Ok(_) if session.reply != ReplyMode::On => {}
            Ok(filter) if session.executing => {
                let mut text = String::new();
                lines(core, &core.clients.all(), &filter, &mut text);
                encode::verbatim(out, &text, session.version);
            }
            Ok(filter) => {
                session.note();
                session.listing = filter;
                return Some(Next::List);
            }
        },
        (b"kill", 3) => {
            let filter = Filter {
                address: Some(args.get(2).to_vec()),
                ..Filter::default()
            };
            let (count, next) = kill(core, session, &filter);
            if count == 0 {
                encode::error(out, "ERR No such client");
            } else {
                ok(out);
            }
            return next;
        }
        (b"kill", 4..) => match Filter::of_kill(args, session.client.id) {
            Err(text) => encode::error(out, text),
            Ok(filter) => {
                let (count, next) = kill(core, session, &filter);
                encode::integer(out, count);
                return next;
            }
        },
        (b"help", 2) => help("CLIENT", HELP, out),
        (b"reply", 3) => match &word[..] {
            b"on" => {
                session.reply = ReplyMode::On;
                ok(out);
            }
            b"off" => session.reply = ReplyMode::Off,
            // Within OFF it changes nothing, as in Redis.
            b"skip" if session.reply == ReplyMode::On => session.reply = ReplyMode::SkipNext,
            b"skip" => {}
            _ => encode::error(out, "ERR syntax error"),
        },
        (b"no-evict" | b"no-touch", 3) if matches!(&word[..], b"on" | b"off") => ok(out),
        (b"tracking", _) if word == b"off" => ok(out),
        (b"tracking", _) if word == b"on" => encode::error(
            out,
            "ERR client tracking is not served here: values on this socket are current by themselves",
        ),
        (
            b"setname" | b"getname" | b"setinfo" | b"id" | b"info" | b"kill" | b"reply"
            | b"tracking",
            _,
        ) => {
            let sub = String::from_utf8_lossy(&sub).into_owned();
            wrong_arity(&format!("client|{sub}"), out);
        }
        (b"no-evict" | b"no-touch", _) => encode::error(out, "ERR syntax error"),
        _ => unknown_subcommand("CLIENT", args, out),
    }
    None
}

const HELP: &[&str] = &[
    "GETNAME",
    "    Return the name of the current connection.",
    "ID",
    "    Return the ID of the current connection.",
    "INFO",
    "    Return information about the current client connection.",
    "KILL <addr>",
    "    Kill the connection with this address, as LIST shows it.",
    "KILL <option> <value> [<option> <value> [...]]",
    "    Kill connections. Options are:",
    "    * ADDR <addr>",
    "      Kill the connection with this address.",
    "    * ID <client-id>",
    "      Kill the connection with this id.",
    "    * PID <process-id>, UID <user-id>",
    "      Kill connections of this process or user of the host.",
    "    * TYPE (NORMAL|MASTER|REPLICA|PUBSUB)",
    "      Kill connections of this type.",
    "    * USER <username>",
    "      All are 'default'.",
    "    * SKIPME (YES|NO)",
    "      Skip killing current connection (default: yes).",
    "LIST [options ...]",
    "    Return information about client connections. Options:",
    "    * TYPE (NORMAL|MASTER|REPLICA|PUBSUB)",
    "      Return clients of this type.",
    "    * ID <client-id> [<client-id> ...]",
    "      Return clients of these ids.",
    "REPLY (ON|OFF|SKIP)",
    "    Control the replies sent to the current connection.",
    "SETNAME <name>",
    "    Assign the name <name> to the current connection.",
    "SETINFO <option> <value>",
    "    Set client meta attr. Options are:",
    "    * LIB-NAME: the client lib name.",
    "    * LIB-VER: the client lib version.",
];
