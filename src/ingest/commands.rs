//! The commands beside the counters: what clients send on connect, subscriptions, and questions.
//! Answers and errors are worded as Redis words them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::core::Core;
use super::glob::Glob;
use super::hub::{By, NAMES_BYTES_MAX};
use super::listener::Client;
use super::report;
use super::session::{Next, ReplyMode, Session};
use crate::hot;
use crate::wire::command::{COMMANDS, Command, Spec, lookup};
use crate::wire::decode::Args;
use crate::wire::encode::{self, Out, Version};
use crate::wire::number::parse_i64;

/// Channels and patterns of one client.
const SUBSCRIPTIONS_MAX: usize = 10_000;
/// Keys that `TALLY.HOT` tells if it is not said how many, and at most.
const HOT_KEYS: usize = 10;
const HOT_KEYS_MAX: usize = 100;
/// A client's name, and what it says of its library, in bytes each.
const NAME_BYTES_MAX: usize = 1024;

/// As Redis words what an ACL refuses. A pattern is taken whatever it says: its subscribers get
/// the channels that they may.
const NO_CHANNEL: &str = "NOPERM this user has no permissions to access one of the channels used as arguments (limits.allow_keys)";

/// The version of Redis whose behaviour clients may expect.
pub const REDIS_VERSION: &str = "7.0.15";

/// Runs one command. `Some`: the burst stops behind it.
pub fn run(
    core: &Core,
    session: &mut Session,
    command: Command,
    args: Args<'_>,
    out: &mut Out,
) -> Option<Next> {
    let before = out.len();
    let next = match command {
        Command::Ping => ping(session, args, out),
        Command::Echo => {
            encode::bulk(out, args.get(1));
            None
        }
        Command::Quit => {
            encode::simple(out, "OK");
            Some(Next::Close)
        }
        Command::Reset => {
            unsubscribe_all(core, session);
            session.reset();
            session.client.name.take();
            session.client.note_names();
            encode::simple(out, "RESET");
            None
        }
        Command::Hello => hello(session, args, out),
        // The socket's mode and the allowed peers decide who gets in; a password that a client is
        // configured with for Redis does no harm here.
        Command::Auth => {
            if args.len() > 3 {
                encode::error(out, "ERR syntax error");
            } else {
                encode::simple(out, "OK");
            }
            None
        }
        Command::Select => select(args, out),
        Command::Time => time(out),
        Command::CommandInfo => command_info(session, args, out),
        Command::Info => {
            core.refresh_gauges();
            encode::verbatim(out, &report::info(core, args), session.version);
            None
        }
        Command::Client => client(core, session, args, out),
        Command::Config => config(core, session, args, out),
        Command::Subscribe => subscribe(core, session, By::Channel, args, out),
        Command::Psubscribe => subscribe(core, session, By::Pattern, args, out),
        Command::Unsubscribe => unsubscribe(core, session, By::Channel, args, out),
        Command::Punsubscribe => unsubscribe(core, session, By::Pattern, args, out),
        Command::Pubsub => pubsub(core, args, out),
        Command::TallyFlush => tally_flush(args, out),
        Command::TallyHot => tally_hot(core, args, out),
        Command::TallyPending => {
            let pending = core
                .state
                .borrow()
                .table
                .view(args.get(1))
                .map_or(0, |view| view.pending);
            encode::integer(out, pending);
            None
        }
        Command::TallyStats => {
            core.refresh_gauges();
            report::stats(core, session.version, out);
            None
        }
        Command::Incr
        | Command::Decr
        | Command::IncrBy
        | Command::DecrBy
        | Command::Get
        | Command::Mget
        | Command::Exists
        | Command::Multi
        | Command::Exec
        | Command::Discard => unreachable!("the session runs these itself"),
    };
    if out.get(before) == Some(&b'-') {
        core.stats.errors_total.add(1);
    }
    next
}

/// The error for a command that is not served.
pub fn unknown(args: Args<'_>) -> Vec<u8> {
    // Redis shows 128 bytes of the name and of the arguments, as they are.
    let shown = |bytes: &[u8], limit: usize| bytes[..bytes.len().min(limit)].to_vec();
    let mut text = b"ERR unknown command '".to_vec();
    text.extend(shown(args.get(0), 128));
    text.extend(b"', with args beginning with: ");
    let mut room = 128_usize;
    for arg in args.from(1) {
        if room == 0 {
            break;
        }
        let arg = shown(arg, room);
        room = room.saturating_sub(arg.len() + 3);
        text.push(b'\'');
        text.extend(arg);
        text.extend(b"' ");
    }
    text
}

fn wrong_arity(command: &str, out: &mut Out) {
    encode::error(
        out,
        format!("ERR wrong number of arguments for '{command}' command"),
    );
}

fn ping(session: &Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    if args.len() > 2 {
        wrong_arity("ping", out);
    } else if session.subscriptions > 0 && session.version == Version::Resp2 {
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

fn hello(session: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
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

fn select(args: Args<'_>, out: &mut Out) -> Option<Next> {
    match parse_i64(args.get(1)) {
        Some(0) => encode::simple(out, "OK"),
        // There is one database here: the one that `store.url` names.
        Some(_) => encode::error(out, "ERR DB index is out of range"),
        None => encode::error(out, "ERR value is not an integer or out of range"),
    }
    None
}

fn time(out: &mut Out) -> Option<Next> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    encode::array(out, 2);
    encode::bulk_integer(out, now.as_secs() as i64);
    encode::bulk_integer(out, i64::from(now.subsec_micros()));
    None
}

fn command_info(session: &Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    let sub = args.get(1).to_ascii_lowercase();
    match (&sub[..], args.len()) {
        (_, 1) => {
            encode::array(out, COMMANDS.len());
            COMMANDS.iter().for_each(|spec| describe(spec, out));
        }
        (b"count", 2) => encode::integer(out, COMMANDS.len() as i64),
        (b"list", 2) => {
            encode::array(out, COMMANDS.len());
            COMMANDS
                .iter()
                .for_each(|spec| encode::bulk(out, spec.name.as_bytes()));
        }
        (b"info", 2) => {
            encode::array(out, COMMANDS.len());
            COMMANDS.iter().for_each(|spec| describe(spec, out));
        }
        (b"info", _) => {
            encode::array(out, args.len() - 2);
            for name in args.from(2) {
                match lookup(name) {
                    Some(spec) => describe(spec, out),
                    None if session.version == Version::Resp2 => out.extend_from_slice(b"*-1\r\n"),
                    None => encode::null(out, session.version),
                }
            }
        }
        // Nothing to add to the names; redis-cli is content with an empty map.
        (b"docs", _) => encode::map(out, 0, session.version),
        _ => unknown_subcommand("COMMAND", args, out),
    }
    None
}

/// As `COMMAND` of Redis 7 does: name, arity, flags, keys, and three empty lists.
fn describe(spec: &Spec, out: &mut Out) {
    encode::array(out, 10);
    encode::bulk(out, spec.name.as_bytes());
    encode::integer(out, i64::from(spec.arity));
    encode::array(out, 2);
    encode::simple(out, if spec.write { "write" } else { "readonly" });
    encode::simple(out, "fast");
    for place in [spec.keys.0, spec.keys.1, spec.keys.2] {
        encode::integer(out, i64::from(place));
    }
    for _ in 0..4 {
        encode::array(out, 0);
    }
}

fn unknown_subcommand(command: &str, args: Args<'_>, out: &mut Out) {
    let sub = args.get(1);
    let sub = String::from_utf8_lossy(&sub[..sub.len().min(128)]);
    encode::error(
        out,
        format!("ERR unknown subcommand '{sub}'. Try {command} HELP."),
    );
}

fn set_name(client: &Client, name: &[u8]) -> Result<(), &'static str> {
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

fn client(core: &Core, session: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
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
                encode::null(out, session.version);
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
            let line = report::client_line(&session.client, session.subscriptions);
            encode::verbatim(out, &line, session.version);
        }
        (b"list", _) => {
            let lines: String = core
                .clients
                .all()
                .iter()
                .map(|client| report::client_line(client, 0))
                .collect();
            encode::verbatim(out, &lines, session.version);
        }
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
        (b"setname" | b"getname" | b"setinfo" | b"id" | b"info" | b"reply" | b"tracking", _) => {
            let sub = String::from_utf8_lossy(&sub).into_owned();
            wrong_arity(&format!("client|{sub}"), out);
        }
        (b"no-evict" | b"no-touch", _) => encode::error(out, "ERR syntax error"),
        _ => unknown_subcommand("CLIENT", args, out),
    }
    None
}

fn config(core: &Core, session: &Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    let sub = args.get(1).to_ascii_lowercase();
    match (&sub[..], args.len()) {
        (b"get", 3..) => {
            let values = [
                ("appendonly", "yes".to_owned()),
                ("databases", "1".to_owned()),
                ("maxclients", core.config.connections_max.to_string()),
                ("maxmemory", "0".to_owned()),
                (
                    "proto-max-bulk-len",
                    crate::wire::decode::FRAME_BYTES_MAX.to_string(),
                ),
                ("save", String::new()),
                ("timeout", "0".to_owned()),
            ];
            let asked = |name: &str| {
                args.from(2)
                    .filter_map(|pattern| Glob::new(&pattern.to_ascii_lowercase()).ok())
                    .any(|pattern| pattern.matches(name.as_bytes()))
            };
            let found: Vec<_> = values.iter().filter(|(name, _)| asked(name)).collect();
            encode::map(out, found.len(), session.version);
            for (name, value) in found {
                encode::bulk(out, name.as_bytes());
                encode::bulk(out, value.as_bytes());
            }
        }
        (b"get", _) => wrong_arity("config|get", out),
        (b"set" | b"rewrite" | b"resetstat", _) => encode::error(
            out,
            "ERR tallyd is configured by its file, environment and flags; see 'tallyd check'",
        ),
        _ => unknown_subcommand("CONFIG", args, out),
    }
    None
}

fn subscribe(
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
        session.inbox = Some(hub.add(std::rc::Rc::clone(&session.client)));
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

fn unsubscribe(
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

fn unsubscribe_all(core: &Core, session: &mut Session) {
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

fn pubsub(core: &Core, args: Args<'_>, out: &mut Out) -> Option<Next> {
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
            let channels = hub.channels(pattern.as_ref());
            let bytes: usize = channels.iter().map(|name| name.len()).sum();
            if bytes > NAMES_BYTES_MAX {
                let text = format!("ERR their names take more than {NAMES_BYTES_MAX} bytes");
                encode::error(out, text);
                return None;
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
        _ => unknown_subcommand("PUBSUB", args, out),
    }
    None
}

fn tally_flush(args: Args<'_>, out: &mut Out) -> Option<Next> {
    if args.len() > 2 {
        wrong_arity("tally.flush", out);
        return None;
    }
    if args.len() == 1 {
        return Some(Next::Flush(None));
    }
    if let Some(ms) = parse_i64(args.get(1)).and_then(|ms| u64::try_from(ms).ok()) {
        Some(Next::Flush(Some(Duration::from_millis(ms))))
    } else {
        encode::error(out, "ERR timeout is not an integer or out of range");
        None
    }
}

/// The keys that change most, each with its change and by how much that may be too high.
fn tally_hot(core: &Core, args: Args<'_>, out: &mut Out) -> Option<Next> {
    let asked = match args.len() {
        1 => Some(HOT_KEYS),
        2 => parse_i64(args.get(1)).and_then(|count| usize::try_from(count).ok()),
        _ => {
            wrong_arity("tally.hot", out);
            return None;
        }
    };
    let Some(count) = asked.filter(|count| (1..=HOT_KEYS_MAX).contains(count)) else {
        let text = format!("ERR count must be an integer from 1 to {HOT_KEYS_MAX}");
        encode::error(out, text);
        return None;
    };
    let access = core.access.borrow();
    let mut keys = core.hot.hottest(hot::KEYS_MAX).keys;
    // Of a key that was cut off nobody can tell whether it matches.
    keys.retain(|key| {
        access.keys.is_all() || (key.shown.len() == key.key_bytes && access.keys.allow(&key.shown))
    });
    keys.truncate(count);
    encode::array(out, keys.len());
    for key in keys {
        encode::array(out, 3);
        encode::bulk(out, &key.shown);
        encode::integer(out, i64::try_from(key.count).unwrap_or(i64::MAX));
        encode::integer(out, i64::try_from(key.error).unwrap_or(i64::MAX));
    }
    None
}
