//! The commands: one table says of each what it is called, what it takes, and who runs it. Answers and
//! errors are worded as Redis words them.
//!
//! - [`counters`]: what changes or reads counters
//! - [`connection`]: what a client sends on connect
//! - [`client`]: `CLIENT`: who is connected
//! - [`server`]: questions about this daemon
//! - [`subscriptions`]: channels and patterns
//! - [`mod@own`] of tallyd, `TALLY.*`

// All entries of the table have one form, whether or not they can fail or end a burst.
#![allow(clippy::unnecessary_wraps)]

pub(super) mod client;
pub(super) mod connection;
pub(super) mod counters;
pub(super) mod own;
pub(super) mod server;
pub(super) mod subscriptions;

use super::core::Core;
use super::hub::By;
use super::session::{Action, Next, Session};
use crate::wire::decode::Args;
use crate::wire::encode::{self, Out, Version};

/// What a command does to one counter, from its arguments.
pub type OnCounter = fn(Args<'_>) -> Result<Action, &'static str>;
/// Answers a command. `Some`: the burst stops behind it.
pub type Answer = fn(&Core, &mut Session, Args<'_>, &mut Out) -> Option<Next>;

/// Who runs a command.
#[derive(Clone, Copy)]
pub enum Run {
    /// One operation of the group that is gathering.
    Counter(OnCounter),
    /// One for each key, answered by one array.
    Values,
    /// One for each key, answered by the number of those that exist.
    Exists,
    /// The session, which knows of transactions.
    Multi,
    /// See [`Multi`](Self::Multi).
    Exec,
    /// See [`Multi`](Self::Multi).
    Discard,
    /// This function, without the counters.
    Answer(Answer),
}

/// What becomes of a command between `MULTI` and `EXEC`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InMulti {
    /// It is queued.
    Queued,
    /// It runs.
    AtOnce,
    /// It is refused.
    Refused,
}

/// A command's entry in the table.
#[derive(Clone, Copy)]
pub struct Spec {
    /// Its name in lower case, as errors print it.
    pub name: &'static str,
    /// As `COMMAND` tells it: so many arguments with the name, or at least `-arity`.
    pub arity: i32,
    /// First and last key, and the step between keys; zeros for none.
    pub keys: (i8, i8, i8),
    /// Whether it changes a counter.
    pub write: bool,
    /// Who runs it.
    pub run: Run,
    /// Between `MULTI` and `EXEC`.
    pub in_multi: InMulti,
    /// Whether all before it is answered first: it begins a group of its own, or waits.
    pub alone: bool,
    /// Whether a client of RESP2 may send it while it is subscribed.
    pub subscribed: bool,
}

/// A command without keys that is answered here.
const fn answer(name: &'static str, arity: i32, run: Answer) -> Spec {
    Spec {
        name,
        arity,
        keys: (0, 0, 0),
        write: false,
        run: Run::Answer(run),
        in_multi: InMulti::Queued,
        alone: false,
        subscribed: false,
    }
}

const fn counter(name: &'static str, arity: i32, write: bool, run: OnCounter) -> Spec {
    Spec {
        keys: (1, 1, 1),
        write,
        run: Run::Counter(run),
        ..answer(name, arity, connection::ping)
    }
}

const fn all_keys(name: &'static str, run: Run) -> Spec {
    Spec {
        keys: (1, -1, 1),
        run,
        alone: true,
        ..answer(name, -2, connection::ping)
    }
}

/// Of the session itself.
const fn transaction(name: &'static str, run: Run) -> Spec {
    Spec {
        run,
        in_multi: InMulti::AtOnce,
        alone: true,
        ..answer(name, 1, connection::ping)
    }
}

impl Spec {
    const fn in_multi(self, in_multi: InMulti) -> Self {
        Spec { in_multi, ..self }
    }

    const fn alone(self) -> Self {
        Spec {
            alone: true,
            ..self
        }
    }

    const fn subscribed(self) -> Self {
        Spec {
            subscribed: true,
            ..self
        }
    }

    const fn one_key(self) -> Self {
        Spec {
            keys: (1, 1, 1),
            ..self
        }
    }

    /// Whether so many arguments, the name included, are right.
    #[inline]
    pub fn takes(&self, args: usize) -> bool {
        if self.arity >= 0 {
            args == self.arity as usize
        } else {
            args >= self.arity.unsigned_abs() as usize
        }
    }
}

const SUBSCRIBE: Answer =
    |core, session, args, out| subscriptions::subscribe(core, session, By::Channel, args, out);
const PSUBSCRIBE: Answer =
    |core, session, args, out| subscriptions::subscribe(core, session, By::Pattern, args, out);
const UNSUBSCRIBE: Answer =
    |core, session, args, out| subscriptions::unsubscribe(core, session, By::Channel, args, out);
const PUNSUBSCRIBE: Answer =
    |core, session, args, out| subscriptions::unsubscribe(core, session, By::Pattern, args, out);

/// Every command, the most frequent first.
pub const COMMANDS: &[Spec] = &[
    counter("incr", 2, true, counters::incr),
    counter("incrby", 3, true, counters::incrby),
    counter("get", 2, false, counters::get),
    counter("decr", 2, true, counters::decr),
    counter("decrby", 3, true, counters::decrby),
    all_keys("mget", Run::Values),
    all_keys("exists", Run::Exists),
    transaction("multi", Run::Multi),
    transaction("exec", Run::Exec),
    transaction("discard", Run::Discard),
    answer("ping", -1, connection::ping).subscribed(),
    answer("echo", 2, connection::echo),
    answer("hello", -1, connection::hello).in_multi(InMulti::Refused),
    answer("auth", -2, connection::auth).in_multi(InMulti::Refused),
    answer("select", 2, connection::select),
    answer("reset", 1, connection::reset)
        .in_multi(InMulti::AtOnce)
        .subscribed(),
    answer("quit", -1, connection::quit)
        .in_multi(InMulti::AtOnce)
        .alone()
        .subscribed(),
    answer("client", -2, client::client),
    answer("command", -1, server::command),
    answer("info", -1, server::info),
    answer("time", 1, server::time),
    answer("config", -2, server::config),
    answer("subscribe", -2, SUBSCRIBE)
        .in_multi(InMulti::Refused)
        .subscribed(),
    answer("unsubscribe", -1, UNSUBSCRIBE)
        .in_multi(InMulti::Refused)
        .subscribed(),
    answer("psubscribe", -2, PSUBSCRIBE)
        .in_multi(InMulti::Refused)
        .subscribed(),
    answer("punsubscribe", -1, PUNSUBSCRIBE)
        .in_multi(InMulti::Refused)
        .subscribed(),
    answer("pubsub", -2, subscriptions::pubsub),
    answer("tally.flush", -1, own::flush)
        .in_multi(InMulti::Refused)
        .alone(),
    answer("tally.hot", -1, own::hot),
    answer("tally.pending", 2, own::pending).one_key(),
    answer("tally.stats", 1, own::stats),
];

/// Finds a command by its name in any case.
#[inline]
pub fn lookup(name: &[u8]) -> Option<&'static Spec> {
    COMMANDS
        .iter()
        .find(|spec| spec.name.as_bytes().eq_ignore_ascii_case(name))
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

fn unknown_subcommand(command: &str, args: Args<'_>, out: &mut Out) {
    let sub = args.get(1);
    if sub.eq_ignore_ascii_case(b"help") {
        return wrong_arity(&format!("{}|help", command.to_ascii_lowercase()), out);
    }
    let sub = String::from_utf8_lossy(&sub[..sub.len().min(128)]);
    encode::error(
        out,
        format!("ERR unknown subcommand '{sub}'. Try {command} HELP."),
    );
}

/// `… HELP`, as Redis has it: each line a simple string.
fn help(command: &str, lines: &[&str], out: &mut Out) {
    encode::array(out, lines.len() + 3);
    encode::simple(
        out,
        &format!("{command} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"),
    );
    for line in lines.iter().chain(&["HELP", "    Prints this help."]) {
        encode::simple(out, line);
    }
}

/// Runs a command that is answered here, and counts what it answers with an error.
pub fn run(
    core: &Core,
    session: &mut Session,
    run: Answer,
    args: Args<'_>,
    out: &mut Out,
) -> Option<Next> {
    let at = out.len();
    let next = run(core, session, args, out);
    if out.get(at) == Some(&b'-') {
        core.stats.errors_total.add(1);
    }
    next
}

/// What is answered where there is nothing to say.
fn null(session: &Session, out: &mut Out) {
    encode::null(out, session.version);
}

/// Whether a client is to be spoken to in RESP2.
fn is_resp2(session: &Session) -> bool {
    session.version == Version::Resp2
}
