//! What one client's commands do: the hot path, transactions, and the order of answers.
//!
//! Commands on counters gather in a group; the group is applied and answered when it is full, when
//! the burst ends, or when another kind of command must be answered behind it.
//!
//! Invariants:
//! 1. Answers go out in the order of the commands.
//! 2. An increment is in the journal before its answer is encoded.
//! 3. All commands of a client's transaction are applied within one borrow of the counters, so
//!    they share an epoch.
//!
//! - [`group`]: what is applied together, and the answers
//! - [`large`]: groups that take more than a slice
//! - [`transaction`]: `MULTI` to `EXEC`

mod group;
mod large;
mod transaction;

use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use group::{Piece, What};
use large::{LARGE_OPS, Large};
use transaction::Transaction;

use super::commands::client::Filter;
use super::commands::counters::GET;
use super::commands::{self, InMulti, Run, Spec};
use super::core::Core;
use super::inbox::Inbox;
use super::listener::Client;
use super::loads::{ColdKey, KEY_BYTES};
use super::taken::Verb;
use crate::counters::{Kind, Op};
use crate::wire::decode::{Args, Decoder, Step, increment};
use crate::wire::encode::{self, Out, Version};

/// Commands applied together: enough for their cache misses to overlap.
const GROUP: usize = 64;
/// A burst stops here to be written, and others have a turn: small commands with large answers are no more
/// work than the increments of one read.
const REPLY_BYTES_MAX: usize = 64 << 10;
/// What an operation on a key that is not known holds while it waits, with its key's entry.
const COLD_BYTES: usize = size_of::<(usize, i64, Rc<ColdKey>)>() + 128;
/// Keys that begin so are this daemon's own.
const RESERVED: &[u8] = b"tallyd:";

/// As Redis words what an ACL refuses.
const NO_KEY: &str = "NOPERM this user has no permissions to access one of the keys used as arguments (limits.allow_keys)";

/// What the connection does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Read more.
    Read,
    /// Write what there is, then go on with the rest of the input.
    More,
    /// Wait for values, then call [`Session::finish_cold`] and go on.
    Cold,
    /// List the clients that [`Session::listing`] tells, in slices, then go on.
    List,
    /// Call [`Session::run_large`], then go on.
    Large,
    /// Wait for a flush, then answer and go on.
    Flush(Option<Duration>),
    /// Write what there is and close.
    Close,
}

/// What one operation does, by how much, and for an increment by which command.
pub type Action = (Kind, i64, Verb);

/// `CLIENT REPLY`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyMode {
    /// Every command is answered.
    On,
    /// None is.
    Off,
    /// The next one is not.
    SkipNext,
}

/// One client's state.
pub struct Session {
    /// What others may know of it.
    pub client: Rc<Client>,
    /// RESP2 or RESP3.
    pub version: Version,
    /// Whether answers are wanted.
    pub reply: ReplyMode,
    /// Channels and patterns subscribed to.
    pub subscriptions: usize,
    /// Whether an answer encoded now says that an increment was taken.
    pub took: bool,
    /// The queue of a client that has just subscribed, until the connection takes it.
    pub inbox: Option<Inbox>,
    /// Whether `EXEC` runs the commands: none of them can wait.
    pub executing: bool,
    /// What [`Next::List`] is to list.
    pub listing: Filter,
    /// Whether the command that the burst stopped at is to be looked at again.
    again: bool,
    decoder: Decoder,
    transaction: Option<Transaction>,
    ops: Vec<Op>,
    pieces: Vec<Piece>,
    raw: Vec<u8>,
    /// The input of a group that waits for values.
    cold_input: Vec<u8>,
    /// Its operations on keys that were not known, with their sums.
    cold: Vec<(usize, i64, Rc<ColdKey>)>,
    /// Operations that wait for values.
    waiting: usize,
    /// Whether the group waits for another client's transaction.
    blocked: bool,
    /// What [`Next::Large`] is to do.
    large: Option<Large>,
}

impl Session {
    /// A client that has just connected.
    pub fn new(client: Rc<Client>) -> Self {
        Session {
            client,
            version: Version::default(),
            reply: ReplyMode::On,
            subscriptions: 0,
            took: false,
            inbox: None,
            executing: false,
            listing: Filter::default(),
            again: false,
            decoder: Decoder::default(),
            transaction: None,
            ops: Vec::with_capacity(GROUP),
            pieces: Vec::new(),
            raw: Vec::new(),
            cold_input: Vec::new(),
            cold: Vec::new(),
            waiting: 0,
            blocked: false,
            large: None,
        }
    }

    /// What its commands hold, in bytes: those of a transaction, and those that wait for values.
    pub fn command_bytes(&self) -> usize {
        self.transaction.as_ref().map_or(0, Transaction::held_bytes)
            + self.ops.capacity() * size_of::<Op>()
            + self.pieces.capacity() * size_of::<Piece>()
            + self.raw.capacity()
            // And a copy of each key while it is waited for.
            + 2 * self.cold_input.capacity()
            + self.waiting * KEY_BYTES
            + self.large.as_ref().map_or(0, Large::held_bytes)
            + self.cold.capacity() * COLD_BYTES
    }

    /// Tells others how this client stands.
    pub fn note(&self) {
        let queued = self.transaction.as_ref().map(Transaction::len);
        self.client.queued.set(queued);
        self.client.resp3.set(self.version == Version::Resp3);
    }

    /// What the decoder holds of unfinished input, in bytes.
    pub fn decoder_bytes(&self) -> usize {
        self.decoder.held_bytes()
    }

    /// Back to what a new connection is, but for its subscriptions.
    pub fn reset(&mut self) {
        self.version = Version::default();
        self.reply = ReplyMode::On;
        self.transaction = None;
    }

    /// Does what `input` says and answers into `out`. Returns how much of the input is done with.
    pub fn burst(&mut self, core: &Core, input: &[u8], out: &mut Out) -> (usize, Next) {
        let mut at = 0;
        let before = out.len();
        let access = core.access.borrow();
        let every_key = access.keys.is_all();
        loop {
            if self.is_plain() {
                while let Some(found) = increment(&input[at..]) {
                    let key = found.key;
                    if key.len() > core.config.key_bytes_max
                        || input[at + key.start..at + key.end].starts_with(RESERVED)
                        || !(every_key || access.keys.allow(&input[at + key.start..at + key.end]))
                    {
                        break; // The careful way has the words for it.
                    }
                    let by = if found.by { Verb::IncrBy } else { Verb::Incr };
                    let add = (Kind::Add, found.amount, by);
                    self.push_op(add, at + key.start, key.len());
                    at += found.used;
                    if self.ops.len() >= GROUP && self.finish_group(core, input, out) == Next::Cold
                    {
                        return (at, Next::Cold);
                    }
                }
                if self.is_full(out, before) {
                    return (at, self.end_group(core, input, out, Next::More));
                }
            }
            let used = match self.decoder.decode(&input[at..]) {
                Ok(Step::Command(used)) => used,
                Ok(Step::Nothing(used)) => {
                    at += used;
                    continue;
                }
                Ok(Step::Incomplete) => {
                    return (at, self.end_group(core, input, out, Next::Read));
                }
                Err(error) => {
                    // What came before is answered first, also if that has to wait.
                    if self.finish_group(core, input, out) == Next::Cold {
                        return (at, Next::Cold);
                    }
                    core.stats.errors_total.add(1);
                    encode::error(out, format!("ERR {error}"));
                    return (input.len(), Next::Close);
                }
            };
            let frame = at..at + used;
            at += used;
            match self.command(core, input, frame.clone(), out) {
                None => {}
                // Looked at again when what came before it is answered.
                Some(Next::Cold) if self.again => {
                    self.again = false;
                    return (frame.start, Next::Cold);
                }
                Some(next) => return (at, next),
            }
            if self.is_full(out, before) {
                return (at, self.end_group(core, input, out, Next::More));
            }
        }
    }

    /// Whether a burst has answered enough; `before`: what `out` held when it began, unread answers
    /// of earlier ones.
    fn is_full(&self, out: &Out, before: usize) -> bool {
        out.len() - before + self.raw.len() > REPLY_BYTES_MAX
    }

    /// Whether increments may take the short way.
    fn is_plain(&self) -> bool {
        self.transaction.is_none()
            && self.reply != ReplyMode::SkipNext
            && (self.subscriptions == 0 || self.version == Version::Resp3)
            && !self.decoder.is_amid()
    }

    /// One command, its bytes in `frame`. `Some`: the burst stops behind it, or, with `again`,
    /// before it.
    fn command(
        &mut self,
        core: &Core,
        input: &[u8],
        frame: Range<usize>,
        out: &mut Out,
    ) -> Option<Next> {
        // The decoder is taken out so that its arguments can be read while the session changes.
        let decoder = std::mem::take(&mut self.decoder);
        let args = decoder.args(&input[frame.clone()]);
        let next = match self.check(core, args) {
            Err(text) => {
                self.refuse(core, &text);
                None
            }
            Ok(spec) if self.transaction.is_some() && spec.in_multi != InMulti::AtOnce => {
                self.queue(core, spec, args);
                None
            }
            Ok(spec) => match operation(spec.run, args) {
                Err(text) => {
                    self.refuse(core, text);
                    None
                }
                Ok(counter) => {
                    let place = decoder.place(1);
                    if let (Some(what), Some(key)) = (counter, &place) {
                        self.push_op(what, frame.start + key.start, key.len());
                        (self.ops.len() >= GROUP
                            && self.finish_group(core, input, out) == Next::Cold)
                            .then_some(Next::Cold)
                    } else if (counter.is_some() || spec.alone)
                        && self.finish_group(core, input, out) == Next::Cold
                    {
                        self.again = true;
                        Some(Next::Cold)
                    } else {
                        self.run(core, spec, args, out)
                    }
                }
            },
        };
        self.decoder = decoder;
        next
    }

    /// Whether the command exists and may be given now.
    fn check(&self, core: &Core, args: Args<'_>) -> Result<&'static Spec, Vec<u8>> {
        let name = args.get(0);
        let spec = commands::lookup(name).ok_or_else(|| commands::unknown(args))?;
        if !spec.takes(args.len()) {
            let wrong = format!("wrong number of arguments for '{}' command", spec.name);
            return Err(if matches!(spec.run, Run::Exec) {
                format!("EXECABORT Transaction discarded because of: {wrong}").into_bytes()
            } else {
                format!("ERR {wrong}").into_bytes()
            });
        }
        if self.subscriptions > 0 && self.version == Version::Resp2 && !spec.subscribed {
            return Err(format!(
                "ERR Can't execute '{}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context",
                spec.name
            )
            .into_bytes());
        }
        if spec.keys.0 > 0 {
            let access = core.access.borrow();
            let last = if spec.keys.1 < 0 { args.len() } else { 2 };
            for key in args.from(1).take(last - 1) {
                if key.len() > core.config.key_bytes_max {
                    return Err(format!(
                        "ERR the key has {} bytes and limits.max_key_bytes is {}",
                        key.len(),
                        core.config.key_bytes_max
                    )
                    .into_bytes());
                }
                if key.starts_with(RESERVED) {
                    return Err(b"ERR keys that begin with 'tallyd:' are reserved".to_vec());
                }
                if !access.keys.allow(key) {
                    return Err(NO_KEY.into());
                }
            }
        }
        Ok(spec)
    }

    fn refuse(&mut self, core: &Core, text: impl AsRef<[u8]>) {
        if text.as_ref().starts_with(b"EXECABORT") {
            self.transaction = None; // `EXEC` ends it, whatever else is wrong.
        }
        if let Some(transaction) = &mut self.transaction {
            transaction.refuse();
        }
        core.stats.errors_total.add(1);
        self.direct(core, |_, raw| {
            encode::error(raw, text);
            None
        });
    }

    /// Runs a command that is not queued, and whose key is not in the input.
    fn run(
        &mut self,
        core: &Core,
        spec: &'static Spec,
        args: Args<'_>,
        out: &mut Out,
    ) -> Option<Next> {
        match spec.run {
            Run::Exec => self.exec(core, out),
            Run::Multi => self.direct(core, |session, raw| {
                if session.transaction.is_some() {
                    encode::error(raw, "ERR MULTI calls can not be nested");
                } else {
                    session.transaction = Some(Transaction::default());
                    encode::simple(raw, "OK");
                }
                None
            }),
            Run::Discard => self.direct(core, |session, raw| {
                if session.transaction.take().is_some() {
                    encode::simple(raw, "OK");
                } else {
                    encode::error(raw, "ERR DISCARD without MULTI");
                }
                None
            }),
            _ => {
                let mut bytes = Vec::new();
                let ranges: Vec<Range<usize>> = args
                    .from(0)
                    .map(|arg| {
                        let start = bytes.len();
                        bytes.extend_from_slice(arg);
                        start..bytes.len()
                    })
                    .collect();
                // Operations of this command are ranges of `bytes`: they are a group of their own,
                // and what came before was answered. Without any, its answer stays behind the group
                // that is gathering.
                let gathered = self.ops.len();
                let next = self.gather(core, spec, Args::new(&bytes, &ranges), &ranges);
                if self.ops.len() > gathered + LARGE_OPS {
                    self.large = Some(Large::Keys(bytes));
                    return Some(Next::Large);
                }
                if self.ops.len() > gathered {
                    return (self.finish_group(core, &bytes, out) == Next::Cold)
                        .then_some(Next::Cold);
                }
                if next.is_some() {
                    self.answer_group(core, out);
                }
                next
            }
        }
    }

    /// Adds a command's operations and pieces to the group, whose input `args` are ranges of.
    fn gather(
        &mut self,
        core: &Core,
        spec: &'static Spec,
        args: Args<'_>,
        ranges: &[Range<usize>],
    ) -> Option<Next> {
        match (operation(spec.run, args), spec.run) {
            (Err(text), _) => {
                self.refuse(core, text);
                None
            }
            (Ok(Some(what)), _) => {
                self.push_op(what, ranges[1].start, ranges[1].len());
                None
            }
            (Ok(None), Run::Values | Run::Exists) => {
                let keys = &ranges[1..];
                self.push_piece(if matches!(spec.run, Run::Values) {
                    What::Values(keys.len())
                } else {
                    What::Count(keys.len())
                });
                let reply = self.reply;
                for key in keys {
                    self.reply = reply;
                    self.push_op(GET, key.start, key.len());
                }
                None
            }
            (Ok(None), Run::Answer(run)) => self.direct(core, |session, raw| {
                commands::run(core, session, run, args, raw)
            }),
            // Of these, [`run`](Self::run) is the one to know.
            (Ok(None), Run::Counter(_) | Run::Multi | Run::Exec | Run::Discard) => None,
        }
    }

    /// A command that is answered without the counters, behind what is gathered so far.
    fn direct(
        &mut self,
        core: &Core,
        run: impl FnOnce(&mut Self, &mut Out) -> Option<Next>,
    ) -> Option<Next> {
        let before = self.reply;
        let start = self.raw.len();
        let mut raw = std::mem::take(&mut self.raw);
        let next = run(self, &mut raw);
        core.stats.commands_total.add(1);
        // `CLIENT REPLY` is answered as the mode that it leaves says.
        let skipped = before == ReplyMode::SkipNext && self.reply == ReplyMode::SkipNext;
        if skipped {
            self.reply = ReplyMode::On;
        }
        if skipped || self.reply != ReplyMode::On {
            raw.truncate(start);
        }
        let end = raw.len();
        self.raw = raw;
        if end > start {
            self.pieces.push(Piece {
                before: self.ops.len(),
                what: What::Raw { start, end },
            });
        }
        next
    }
}

/// What a command on one counter does to it; `Ok(None)`: it is none.
fn operation(run: Run, args: Args<'_>) -> Result<Option<Action>, &'static str> {
    match run {
        Run::Counter(action) => action(args).map(Some),
        _ => Ok(None),
    }
}
