//! A group: operations that are applied together, and their answers in the order of the commands.

use std::ops::Range;
use std::rc::Rc;

use bytes::Bytes;

use super::super::core::{Core, State};
use super::super::loads::ColdKey;
use super::super::taken::{LANE_MAX, Lanes, Verb};
use super::{Action, GROUP, Next, ReplyMode, Session};
use crate::counters::{Answer, BadValue, Kind, Op, RecordError};
use crate::store::KeyError;
use crate::wire::encode::{self, Out, Version};

/// Operations for which room is kept between groups.
const OPS_KEPT: usize = 1024;
/// Answers beside those of the counters for which room is kept between groups, in bytes.
const RAW_BYTES_KEPT: usize = 64 << 10;

/// To a read that cannot be answered. Begins as what Redis says while it loads its data: clients try again.
const UNLOADED: &str = "LOADING the store has not told this key's value within reply.load_timeout; what is counted here is safe";

/// Between groups of answers: what a command over several keys adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// The beginning of an array of so many answers.
    Array(usize),
    /// So many operations are answered by one array, with nothing for keys that hold no counter.
    Values(usize),
    /// So many operations are answered by one count of the keys that exist.
    Count(usize),
    /// Bytes of `Session::raw`, to be sent as they are.
    Raw { start: usize, end: usize },
}

/// How far a group is answered.
#[derive(Debug, Default)]
pub(super) struct Cursor {
    piece: usize,
    at: usize,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    /// Comes before the answer to this operation.
    pub(super) before: usize,
    pub(super) what: What,
}

impl Session {
    pub(super) fn push_op(&mut self, (kind, amount, by): Action, start: usize, len: usize) {
        let mut op = Op::new(kind, start, len, amount);
        op.note = by as u8;
        if self.reply != ReplyMode::On {
            op.quiet = true;
            if self.reply == ReplyMode::SkipNext {
                self.reply = ReplyMode::On;
            }
        }
        self.ops.push(op);
    }

    pub(super) fn push_piece(&mut self, what: What) {
        if self.reply == ReplyMode::On {
            self.pieces.push(Piece {
                before: self.ops.len(),
                what,
            });
        }
    }

    /// Finishes the group because the burst ends with `next`; waiting for values comes first.
    pub(super) fn end_group(
        &mut self,
        core: &Core,
        input: &[u8],
        out: &mut Out,
        next: Next,
    ) -> Next {
        if self.finish_group(core, input, out) == Next::Cold {
            Next::Cold
        } else {
            next
        }
    }

    pub(super) fn finish_group(&mut self, core: &Core, input: &[u8], out: &mut Out) -> Next {
        if !self.ops.is_empty() && self.apply_group(core, input) {
            return Next::Cold;
        }
        self.answer_group(core, out);
        Next::Read
    }

    /// Applies the group. `true`: it must wait before it is answered, for values or for another client's
    /// transaction.
    pub(super) fn apply_group(&mut self, core: &Core, input: &[u8]) -> bool {
        self.blocked = core.gate.is_closed();
        if !self.blocked {
            self.apply_ops(core, input, 0..self.ops.len());
        }
        let waits = self.blocked || self.waiting > 0;
        if waits {
            self.cold_input.clear();
            self.cold_input.extend_from_slice(input);
        } else {
            self.cold.clear();
        }
        waits
    }

    /// What the group waited for is over: applies it now, as [`apply_group`](Self::apply_group).
    pub fn apply_again(&mut self, core: &Core) -> bool {
        let input = std::mem::take(&mut self.cold_input);
        self.apply_group(core, &input)
    }

    /// Applies some operations, and notes which of them wait for values.
    pub(super) fn apply_ops(&mut self, core: &Core, input: &[u8], range: Range<usize>) {
        let ops = &mut self.ops[range.clone()];
        if core.durable.failure().is_some() {
            for op in ops {
                op.answer = Answer::Record(RecordError::Unsynced);
            }
            return;
        }
        if core.gone.get().is_some() {
            for run in ops.chunk_by_mut(|a, b| a.kind == b.kind) {
                match run.first().map(|op| op.kind) {
                    Some(Kind::Add) => {
                        for op in run {
                            op.answer = Answer::Record(RecordError::Gone);
                        }
                    }
                    _ => core.apply(input, run),
                }
            }
        } else {
            core.apply(input, ops);
        }
        let mut bad = false;
        for (index, op) in range.clone().zip(&self.ops[range.clone()]) {
            bad |= matches!(op.answer, Answer::Bad(_));
            match op.answer {
                Answer::Cold(_) | Answer::Unknown if core.config.load => {
                    let key = core.loads.cold(op.key(input));
                    let sum = key.add(if op.kind == Kind::Add { op.amount } else { 0 });
                    self.cold.push((index, sum, key));
                    self.waiting += usize::from(!op.quiet);
                }
                Answer::Aged(_) => self.waiting += usize::from(!op.quiet),
                _ => {}
            }
        }
        if bad {
            // Looked at again: someone may have mended them.
            let ops = self.ops[range].iter();
            let bad = ops.filter(|op| matches!(op.answer, Answer::Bad(_)));
            let keys: Vec<Bytes> = bad
                .map(|op| Bytes::copy_from_slice(op.key(input)))
                .collect();
            core.loads.ask_again(self.client.id, keys);
        }
    }

    /// Whether the group waits for another client's transaction, not for values.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// The keys that the group waits for.
    pub fn cold_keys(&self) -> Vec<Bytes> {
        self.cold_keys_of(&self.cold_input, 0..self.ops.len())
    }

    pub(super) fn cold_keys_of(&self, input: &[u8], range: Range<usize>) -> Vec<Bytes> {
        let cold = |op: &&Op| {
            matches!(
                op.answer,
                Answer::Cold(_) | Answer::Unknown | Answer::Aged(_)
            )
        };
        let ops = self.ops[range].iter().filter(cold);
        let mut keys: Vec<&[u8]> = ops.map(|op| op.key(input)).collect();
        keys.sort_unstable();
        keys.dedup();
        keys.into_iter().map(Bytes::copy_from_slice).collect()
    }

    /// The values that the group waited for have come, or will not: answers it.
    pub fn finish_cold(&mut self, core: &Core, out: &mut Out) {
        let input = std::mem::take(&mut self.cold_input);
        let cold = std::mem::take(&mut self.cold);
        self.settle_cold(core, &input, cold.into_iter());
        self.settle_aged(core, &input, 0..self.ops.len());
        self.answer_group(core, out);
    }

    /// The answers of operations on keys that were not known.
    pub(super) fn settle_cold(
        &mut self,
        core: &Core,
        input: &[u8],
        cold: impl Iterator<Item = (usize, i64, Rc<ColdKey>)>,
    ) {
        let (mut reads, mut increments) = (0, 0);
        let mut state = core.state.borrow_mut();
        let State { table, writer, .. } = &mut *state;
        for (index, sum, cold) in cold {
            let op = &mut self.ops[index];
            let key = op.key(input);
            let view = table.view(key);
            let is_known = view.is_some_and(|view| view.known || view.bad.is_some());
            if !is_known && op.kind == Kind::Add {
                increments += 1;
            } else if !is_known && matches!(op.answer, Answer::Unknown) {
                reads += 1;
                if core.config.unloaded_is_error {
                    op.answer = Answer::Unloaded;
                    continue;
                }
            }
            let Some(view) = view else {
                continue;
            };
            let now = view.value.saturating_add(view.pending);
            if let Some(bad) = view.bad {
                let taken_back = op.kind == Kind::Add && table.take_back(key, op.amount, writer);
                if taken_back {
                    core.books.take(op.amount.wrapping_neg());
                }
                if op.kind == Kind::Get || taken_back {
                    op.answer = Answer::Bad(bad);
                }
            } else if matches!(op.answer, Answer::Unknown) && !cold.existed().unwrap_or(view.stored)
            {
                op.answer = Answer::Missing;
            } else {
                // Also if the value did not come: then on what was last known of it, if anything.
                op.answer = Answer::Value(cold.answer(sum, now));
            }
        }
        core.stats.unloaded_reads_total.add(reads);
        core.stats.unloaded_increments_total.add(increments);
    }

    /// The answers of reads of values that were not seen for long.
    pub(super) fn settle_aged(&mut self, core: &Core, input: &[u8], range: Range<usize>) {
        let table = &core.state.borrow().table;
        for op in &mut self.ops[range] {
            if let Answer::Aged(pending) = op.answer
                && let Some(view) = table.view(op.key(input))
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
    }

    /// Encodes the answers of the group, which is in the journal by now.
    pub(super) fn answer_group(&mut self, core: &Core, out: &mut Out) {
        self.note_answers(core, 0..self.ops.len());
        if self.pieces.is_empty() {
            for op in self.ops.iter().filter(|op| !op.quiet) {
                answer(core, op, self.version, out);
            }
        } else {
            let all = self.answer_pieces(core, out, &mut Cursor::default(), usize::MAX);
            debug_assert!(all);
        }
        self.drop_group();
    }

    /// Counts what was taken and what was refused.
    pub(super) fn note_answers(&mut self, core: &Core, range: Range<usize>) {
        let mut taken = 0;
        let mut errors = 0;
        let ops = &self.ops[range];
        for ops in ops.chunks(LANE_MAX) {
            let mut lanes = Lanes::default();
            for op in ops {
                match op.answer {
                    Answer::Value(_) | Answer::Cold(_) => {
                        lanes.add(op.note, op.kind == Kind::Add);
                    }
                    Answer::Missing | Answer::Unknown | Answer::Aged(_) => {}
                    _ => errors += 1,
                }
            }
            taken += note_taken(core, lanes);
        }
        if errors > 0 {
            core.notices.refused(ops);
        }
        self.took |= taken > 0;
        core.stats.commands_total.add(ops.len() as u64);
        core.stats.errors_total.add(errors);
    }

    /// Forgets what was gathered. A large group is no reason to keep its memory.
    pub(super) fn drop_group(&mut self) {
        self.ops.clear();
        self.pieces.clear();
        self.raw.clear();
        self.waiting = 0;
        if self.ops.capacity() > OPS_KEPT {
            self.ops.shrink_to(GROUP);
        }
        if self.pieces.capacity() > OPS_KEPT {
            self.pieces.shrink_to(GROUP);
        }
        if self.raw.capacity() > RAW_BYTES_KEPT {
            self.raw.shrink_to(0);
        }
        if self.cold.capacity() > OPS_KEPT {
            self.cold.shrink_to(0);
        }
    }

    /// Encodes answers from `cursor` on, of `ops_max` operations and what a command over several keys adds.
    /// `false`: there are more.
    pub(super) fn answer_pieces(
        &self,
        core: &Core,
        out: &mut Out,
        cursor: &mut Cursor,
        ops_max: usize,
    ) -> bool {
        let Cursor { piece, at } = cursor;
        let from = *at;
        loop {
            while let Some(next) = self.pieces.get(*piece).filter(|piece| piece.before == *at) {
                *piece += 1;
                match next.what {
                    What::Array(len) => encode::array(out, len),
                    What::Raw { start, end } => out.extend_from_slice(&self.raw[start..end]),
                    // Nothing for a key that may have a value would be a lie, so the whole is an error.
                    What::Values(keys) | What::Count(keys)
                        if self.ops[*at..*at + keys]
                            .iter()
                            .any(|op| op.answer == Answer::Unloaded) =>
                    {
                        encode::error(out, UNLOADED);
                        *at += keys;
                    }
                    What::Values(keys) => {
                        encode::array(out, keys);
                        for op in &self.ops[*at..*at + keys] {
                            match op.answer {
                                Answer::Bad(_) => encode::null(out, self.version),
                                _ => answer(core, op, self.version, out),
                            }
                        }
                        *at += keys;
                    }
                    What::Count(keys) => {
                        let exist = self.ops[*at..*at + keys].iter().filter(|op| exists(op));
                        encode::integer(out, exist.count() as i64);
                        *at += keys;
                    }
                }
            }
            let Some(op) = self.ops.get(*at) else {
                return true;
            };
            if !op.quiet {
                answer(core, op, self.version, out);
            }
            *at += 1;
            if *at - from >= ops_max {
                return false;
            }
        }
    }
}

/// Adds to the numbers, by command; returns the sum.
fn note_taken(core: &Core, lanes: Lanes) -> u64 {
    let stats = &core.stats;
    let mut sum = 0;
    for (by, number) in [
        (Verb::Incr, &stats.increments_incr_total),
        (Verb::IncrBy, &stats.increments_incrby_total),
        (Verb::Decr, &stats.increments_decr_total),
        (Verb::DecrBy, &stats.increments_decrby_total),
    ] {
        let taken = lanes.get(by);
        if taken > 0 {
            number.add(taken);
            sum += taken;
        }
    }
    stats.increments_total.add(sum);
    sum
}

fn exists(op: &Op) -> bool {
    matches!(
        op.answer,
        Answer::Value(_) | Answer::Cold(_) | Answer::Bad(_)
    )
}

#[inline]
fn answer(core: &Core, op: &Op, version: Version, out: &mut Out) {
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
        (_, Answer::Unloaded) => encode::error(out, UNLOADED),
        (_, Answer::Overflow) => encode::error(out, KeyError::Overflow.to_string()),
        (_, Answer::Record(error)) => encode::error(
            out,
            match (error, core.gone.get()) {
                (RecordError::Gone, Some(gone)) => format!("ERR {gone}"),
                _ => error.to_string(),
            },
        ),
    }
}
