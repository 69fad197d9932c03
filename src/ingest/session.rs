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

use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

use super::commands;
use super::connection::CLIENT_BYTES_MAX;
use super::core::Core;
use super::hub::Inbox;
use super::listener::Client;
use super::loads::ColdKey;
use crate::counters::{Answer, BadValue, Kind, Op, RecordError};
use crate::store::KeyError;
use crate::wire::command::{Command, Spec, lookup};
use crate::wire::decode::{Args, Decoder, FRAME_BYTES_MAX, Step, increment};
use crate::wire::encode::{self, Out, Version};
use crate::wire::number::parse_i64;

/// Commands applied together: enough for their cache misses to overlap.
const GROUP: usize = 64;
/// A burst stops here to be written, so that small commands with large answers stay bounded.
const REPLY_BYTES_MAX: usize = 1 << 20;
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
    /// Wait for a flush, then answer and go on.
    Flush(Option<Duration>),
    /// Write what there is and close.
    Close,
}

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

/// Between groups of answers: what a command over several keys adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// The beginning of an array of so many answers.
    Array(usize),
    /// So many operations are answered by one array, with nothing for keys that hold no counter.
    Values(usize),
    /// So many operations are answered by one count of the keys that exist.
    Count(usize),
    /// Bytes of `Session::raw`, to be sent as they are.
    Raw { start: usize, end: usize },
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Comes before the answer to this operation.
    before: usize,
    what: What,
}

/// Commands between `MULTI` and `EXEC`.
#[derive(Default)]
struct Transaction {
    bytes: Vec<u8>,
    commands: Vec<(&'static Spec, Vec<Range<usize>>)>,
    refused: bool,
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
            again: false,
            decoder: Decoder::default(),
            transaction: None,
            ops: Vec::with_capacity(GROUP),
            pieces: Vec::new(),
            raw: Vec::new(),
            cold_input: Vec::new(),
            cold: Vec::new(),
        }
    }

    /// Back to what a new connection is, but for its subscriptions.
    pub fn reset(&mut self) {
        self.version = Version::default();
        self.reply = ReplyMode::On;
        self.transaction = None;
    }

    /// What a transaction that is being queued holds, in bytes.
    pub fn queued_bytes(&self) -> usize {
        self.transaction
            .as_ref()
            .map_or(0, |transaction| transaction.bytes.len())
    }

    /// Does what `input` says and answers into `out`. Returns how much of the input is done with.
    pub fn burst(&mut self, core: &Core, input: &[u8], out: &mut Out) -> (usize, Next) {
        let mut at = 0;
        let access = core.access.borrow();
        let every_key = access.keys.is_all();
        loop {
            if self.is_plain() {
                while let Some((key, amount, used)) = increment(&input[at..]) {
                    if key.len() > core.config.key_bytes_max
                        || input[at + key.start..at + key.end].starts_with(RESERVED)
                        || !(every_key || access.keys.allow(&input[at + key.start..at + key.end]))
                    {
                        break; // The careful way has the words for it.
                    }
                    self.push_op(Kind::Add, at + key.start, key.len(), amount);
                    at += used;
                    if self.ops.len() >= GROUP && self.finish_group(core, input, out) == Next::Cold
                    {
                        return (at, Next::Cold);
                    }
                }
                if out.len() > REPLY_BYTES_MAX {
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
            if out.len() > REPLY_BYTES_MAX {
                return (at, self.end_group(core, input, out, Next::More));
            }
        }
    }

    /// The values that the group waited for have come, or will not: answers it.
    pub fn finish_cold(&mut self, core: &Core, out: &mut Out) {
        let input = std::mem::take(&mut self.cold_input);
        let mut state = core.state.borrow_mut();
        let super::core::State { table, writer, .. } = &mut *state;
        for (index, sum, cold) in self.cold.drain(..) {
            let op = &mut self.ops[index];
            let key = op.key(&input);
            let Some(view) = table.view(key) else {
                continue;
            };
            let now = view.value.saturating_add(view.pending);
            if let Some(bad) = view.bad {
                if op.kind == Kind::Get || table.take_back(key, op.amount, writer) {
                    op.answer = Answer::Bad(bad);
                }
            } else if matches!(op.answer, Answer::Unknown) && !view.stored {
                op.answer = Answer::Missing;
            } else {
                // Also if the value did not come: then on what was last known of it, if anything.
                op.answer = Answer::Value(cold.answer(sum, now));
            }
        }
        for op in &mut self.ops {
            if let Answer::Aged(pending) = op.answer
                && let Some(view) = table.view(op.key(&input))
            {
                op.answer = if let Some(bad) = view.bad {
                    Answer::Bad(bad)
                } else if view.stored || view.pending != 0 {
                    Answer::Value(view.value.saturating_add(pending))
                } else {
                    Answer::Missing
                };
            }
        }
        drop(state);
        self.answer_group(core, out);
    }

    /// The keys that the group waits for.
    pub fn cold_keys(&self) -> Vec<Bytes> {
        let cold = |op: &&Op| {
            matches!(
                op.answer,
                Answer::Cold(_) | Answer::Unknown | Answer::Aged(_)
            )
        };
        let mut keys: Vec<&[u8]> = self
            .ops
            .iter()
            .filter(cold)
            .map(|op| op.key(&self.cold_input))
            .collect();
        keys.sort_unstable();
        keys.dedup();
        keys.into_iter().map(Bytes::copy_from_slice).collect()
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
            Ok(spec) if self.transaction.is_some() && !runs_at_once(spec.command) => {
                self.queue(core, spec, args);
                None
            }
            Ok(spec) => match operation(spec.command, args) {
                Err(text) => {
                    self.refuse(core, text);
                    None
                }
                Ok(counter) => {
                    let place = decoder.place(1);
                    if let (Some((kind, amount)), Some(key)) = (counter, &place) {
                        self.push_op(kind, frame.start + key.start, key.len(), amount);
                        (self.ops.len() >= GROUP
                            && self.finish_group(core, input, out) == Next::Cold)
                            .then_some(Next::Cold)
                    } else if (counter.is_some() || needs_all_answered(spec.command))
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
        let spec = lookup(name).ok_or_else(|| commands::unknown(args))?;
        if !spec.takes(args.len()) {
            let wrong = format!("wrong number of arguments for '{}' command", spec.name);
            return Err(if spec.command == Command::Exec {
                format!("EXECABORT Transaction discarded because of: {wrong}").into_bytes()
            } else {
                format!("ERR {wrong}").into_bytes()
            });
        }
        if self.subscriptions > 0
            && self.version == Version::Resp2
            && !matches!(
                spec.command,
                Command::Subscribe
                    | Command::Unsubscribe
                    | Command::Psubscribe
                    | Command::Punsubscribe
                    | Command::Ping
                    | Command::Quit
                    | Command::Reset
            )
        {
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
            transaction.refused = true;
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
        match spec.command {
            Command::Exec => self.exec(core, out),
            Command::Multi => self.direct(core, |session, raw| {
                if session.transaction.is_some() {
                    encode::error(raw, "ERR MULTI calls can not be nested");
                } else {
                    session.transaction = Some(Transaction::default());
                    encode::simple(raw, "OK");
                }
                None
            }),
            Command::Discard => self.direct(core, |session, raw| {
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
        match (operation(spec.command, args), spec.command) {
            (Err(text), _) => {
                self.refuse(core, text);
                None
            }
            (Ok(Some((kind, amount))), _) => {
                self.push_op(kind, ranges[1].start, ranges[1].len(), amount);
                None
            }
            (Ok(None), Command::Mget | Command::Exists) => {
                let keys = &ranges[1..];
                self.push_piece(if spec.command == Command::Mget {
                    What::Values(keys.len())
                } else {
                    What::Count(keys.len())
                });
                let reply = self.reply;
                for key in keys {
                    self.reply = reply;
                    self.push_op(Kind::Get, key.start, key.len(), 0);
                }
                None
            }
            (Ok(None), command) => self.direct(core, |session, raw| {
                commands::run(core, session, command, args, raw)
            }),
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

    fn push_op(&mut self, kind: Kind, start: usize, len: usize, amount: i64) {
        let mut op = Op::new(kind, start, len, amount);
        if self.reply != ReplyMode::On {
            op.quiet = true;
            if self.reply == ReplyMode::SkipNext {
                self.reply = ReplyMode::On;
            }
        }
        self.ops.push(op);
    }

    fn push_piece(&mut self, what: What) {
        if self.reply == ReplyMode::On {
            self.pieces.push(Piece {
                before: self.ops.len(),
                what,
            });
        }
    }

    fn queue(&mut self, core: &Core, spec: &'static Spec, args: Args<'_>) {
        let Some(transaction) = &mut self.transaction else {
            return;
        };
        let bytes: usize = args.from(0).map(<[u8]>::len).sum();
        if !queueable(spec.command) {
            return self.refuse(core, "ERR Command not allowed inside a transaction");
        }
        if core.client_bytes.get() > CLIENT_BYTES_MAX {
            let text = format!("OOM all clients together hold {CLIENT_BYTES_MAX} bytes");
            return self.refuse(core, &text);
        }
        if transaction.bytes.len() + bytes > FRAME_BYTES_MAX {
            let text = format!("ERR the transaction is larger than {FRAME_BYTES_MAX} bytes");
            return self.refuse(core, &text);
        }
        let ranges = args
            .from(0)
            .map(|arg| {
                let start = transaction.bytes.len();
                transaction.bytes.extend_from_slice(arg);
                start..transaction.bytes.len()
            })
            .collect();
        transaction.commands.push((spec, ranges));
        self.direct(core, |_, raw| {
            encode::simple(raw, "QUEUED");
            None
        });
    }

    fn exec(&mut self, core: &Core, out: &mut Out) -> Option<Next> {
        let refusal = match &self.transaction {
            None => Some("ERR EXEC without MULTI"),
            Some(transaction) if transaction.refused => {
                Some("EXECABORT Transaction discarded because of previous errors.")
            }
            Some(_) => None,
        };
        let transaction = self.transaction.take();
        if let Some(text) = refusal {
            self.refuse(core, text);
            return None;
        }
        let Transaction {
            bytes, commands, ..
        } = transaction.unwrap_or_default();
        self.push_piece(What::Array(commands.len()));
        let reply = self.reply;
        for (spec, ranges) in &commands {
            self.gather(core, spec, Args::new(&bytes, ranges), ranges);
            self.reply = reply;
        }
        if reply == ReplyMode::SkipNext {
            self.reply = ReplyMode::On;
        }
        core.stats.commands_total.add(1);
        (self.finish_group(core, &bytes, out) == Next::Cold).then_some(Next::Cold)
    }

    /// Finishes the group because the burst ends with `next`; waiting for values comes first.
    fn end_group(&mut self, core: &Core, input: &[u8], out: &mut Out, next: Next) -> Next {
        if self.finish_group(core, input, out) == Next::Cold {
            Next::Cold
        } else {
            next
        }
    }

    fn finish_group(&mut self, core: &Core, input: &[u8], out: &mut Out) -> Next {
        if !self.ops.is_empty() && self.apply_group(core, input) {
            return Next::Cold;
        }
        self.answer_group(core, out);
        Next::Read
    }

    /// Applies the group. `true`: it must wait for values before it is answered.
    fn apply_group(&mut self, core: &Core, input: &[u8]) -> bool {
        if core.durable.failure().is_some() {
            for op in &mut self.ops {
                op.answer = Answer::Record(RecordError::Disk);
            }
            return false;
        }
        core.apply(input, &mut self.ops);
        let mut cold = false;
        let mut bad = false;
        for (index, op) in self.ops.iter().enumerate() {
            bad |= matches!(op.answer, Answer::Bad(_));
            match op.answer {
                Answer::Cold(_) | Answer::Unknown if core.config.load => {
                    let key = core.loads.cold(op.key(input));
                    let sum = key.add(if op.kind == Kind::Add { op.amount } else { 0 });
                    self.cold.push((index, sum, key));
                    cold |= !op.quiet;
                }
                Answer::Aged(_) => cold |= !op.quiet,
                _ => {}
            }
        }
        if bad {
            // Looked at again: someone may have mended them.
            let bad = self
                .ops
                .iter()
                .filter(|op| matches!(op.answer, Answer::Bad(_)));
            let keys: Vec<Bytes> = bad
                .map(|op| Bytes::copy_from_slice(op.key(input)))
                .collect();
            core.loads.ask(&keys);
        }
        if !cold {
            self.cold.clear();
        }
        if cold {
            self.cold_input.clear();
            self.cold_input.extend_from_slice(input);
        }
        cold
    }

    /// Encodes the answers of the group, which is in the journal by now.
    fn answer_group(&mut self, core: &Core, out: &mut Out) {
        let mut taken = 0;
        let mut errors = 0;
        for op in &self.ops {
            match op.answer {
                Answer::Value(_) | Answer::Cold(_) => taken += u64::from(op.kind == Kind::Add),
                Answer::Missing | Answer::Unknown | Answer::Aged(_) => {}
                _ => errors += 1,
            }
        }
        if self.pieces.is_empty() {
            for op in self.ops.iter().filter(|op| !op.quiet) {
                answer(op, self.version, out);
            }
        } else {
            self.answer_pieces(out);
        }
        if errors > 0 {
            core.notices.refused(&self.ops);
        }
        self.took |= taken > 0;
        core.stats.increments_total.add(taken);
        core.stats.commands_total.add(self.ops.len() as u64);
        core.stats.errors_total.add(errors);
        self.ops.clear();
        self.pieces.clear();
        self.raw.clear();
    }

    fn answer_pieces(&self, out: &mut Out) {
        let mut pieces = self.pieces.iter().peekable();
        let mut at = 0;
        loop {
            while let Some(piece) = pieces.next_if(|piece| piece.before == at) {
                match piece.what {
                    What::Array(len) => encode::array(out, len),
                    What::Raw { start, end } => out.extend_from_slice(&self.raw[start..end]),
                    What::Values(keys) => {
                        encode::array(out, keys);
                        for op in &self.ops[at..at + keys] {
                            match op.answer {
                                Answer::Bad(_) => encode::null(out, self.version),
                                _ => answer(op, self.version, out),
                            }
                        }
                        at += keys;
                    }
                    What::Count(keys) => {
                        let exist = self.ops[at..at + keys].iter().filter(|op| exists(op));
                        encode::integer(out, exist.count() as i64);
                        at += keys;
                    }
                }
            }
            let Some(op) = self.ops.get(at) else { return };
            if !op.quiet {
                answer(op, self.version, out);
            }
            at += 1;
        }
    }
}

/// What a command on one counter does to it; `Ok(None)`: it is none.
fn operation(command: Command, args: Args<'_>) -> Result<Option<(Kind, i64)>, &'static str> {
    let amount = || parse_i64(args.get(2)).ok_or("ERR value is not an integer or out of range");
    Ok(Some(match command {
        Command::Incr => (Kind::Add, 1),
        Command::Decr => (Kind::Add, -1),
        Command::IncrBy => (Kind::Add, amount()?),
        Command::DecrBy => (
            Kind::Add,
            amount()?
                .checked_neg()
                .ok_or("ERR decrement would overflow")?,
        ),
        Command::Get => (Kind::Get, 0),
        _ => return Ok(None),
    }))
}

/// Commands that a transaction does not queue.
fn runs_at_once(command: Command) -> bool {
    matches!(
        command,
        Command::Multi | Command::Exec | Command::Discard | Command::Quit | Command::Reset
    )
}

fn queueable(command: Command) -> bool {
    !matches!(
        command,
        Command::Subscribe
            | Command::Unsubscribe
            | Command::Psubscribe
            | Command::Punsubscribe
            | Command::TallyFlush
            | Command::Hello
            | Command::Auth
    )
}

/// Commands that begin a group of their own, or after which the connection waits.
fn needs_all_answered(command: Command) -> bool {
    matches!(
        command,
        Command::Multi
            | Command::Exec
            | Command::Mget
            | Command::Exists
            | Command::Quit
            | Command::TallyFlush
    )
}

fn exists(op: &Op) -> bool {
    matches!(
        op.answer,
        Answer::Value(_) | Answer::Cold(_) | Answer::Bad(_)
    )
}

#[inline]
fn answer(op: &Op, version: Version, out: &mut Out) {
    match (op.kind, op.answer) {
        (Kind::Add, Answer::Value(value) | Answer::Cold(value)) => encode::integer(out, value),
        (Kind::Get, Answer::Value(value) | Answer::Cold(value)) => encode::bulk_integer(out, value),
        (_, Answer::Missing | Answer::Unknown | Answer::Aged(_)) => encode::null(out, version),
        (_, Answer::Bad(BadValue::WrongType)) => {
            encode::error(out, KeyError::WrongType.to_string());
        }
        (_, Answer::Bad(BadValue::NotInteger)) => {
            encode::error(out, KeyError::NotInteger.to_string());
        }
        (_, Answer::Overflow) => encode::error(out, KeyError::Overflow.to_string()),
        (_, Answer::Full) => encode::error(
            out,
            "OOM limits.max_view_bytes is reached, and every key in memory has deltas pending",
        ),
        (_, Answer::Record(error)) => encode::error(out, error.to_string()),
    }
}
