//! `MULTI` to `EXEC`: what is queued, and that it is gathered as one group.

use std::ops::Range;

use super::super::commands::{InMulti, Spec};
use super::super::core::Core;
use super::group::{Piece, What};
use super::large::{LARGE_OPS, Large};
use super::{Next, ReplyMode, Session};
use crate::counters::Op;
use crate::wire::decode::Args;
use crate::wire::encode::{self, Out};

/// What the answers in one `EXEC` may take besides those of the counters, in bytes: they are made
/// before the first one can be written.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// What a queued argument holds besides its bytes: its place here, and its operation once it is gathered.
const ARG_BYTES: usize = size_of::<Range<usize>>() + size_of::<Op>();
/// What a queued command holds besides its arguments.
const COMMAND_BYTES: usize = size_of::<(&Spec, usize)>() + size_of::<Piece>();

/// Commands between `MULTI` and `EXEC`.
#[derive(Default)]
pub(super) struct Transaction {
    bytes: Vec<u8>,
    /// Of all commands' arguments, one after the other.
    ranges: Vec<Range<usize>>,
    /// Each with the number of its arguments.
    commands: Vec<(&'static Spec, usize)>,
    pub(super) refused: bool,
}

impl Transaction {
    /// What it holds, and what running it adds, in bytes.
    pub(super) fn held_bytes(&self) -> usize {
        self.bytes.capacity()
            + self.ranges.capacity() * ARG_BYTES
            + self.commands.capacity() * COMMAND_BYTES
    }

    /// Commands queued.
    pub(super) fn len(&self) -> u32 {
        self.commands.len() as u32
    }

    /// The commands' bytes.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// It will not run: nothing of it is kept.
    pub(super) fn refuse(&mut self) {
        *self = Transaction {
            refused: true,
            ..Transaction::default()
        };
    }
}

impl Session {
    pub(super) fn queue(&mut self, core: &Core, spec: &'static Spec, args: Args<'_>) {
        let Some(transaction) = &mut self.transaction else {
            return;
        };
        if spec.in_multi == InMulti::Refused {
            return self.refuse(core, "ERR Command not allowed inside a transaction");
        }
        if !transaction.refused {
            let bytes: usize = args.from(0).map(<[u8]>::len).sum();
            let used = transaction.bytes.len()
                + bytes
                + (transaction.ranges.len() + args.len()) * ARG_BYTES
                + (transaction.commands.len() + 1) * COMMAND_BYTES;
            let limit = core.config.transaction_bytes_max;
            if used > limit {
                let text = format!(
                    "ERR the transaction takes more than limits.max_transaction_bytes ({limit})"
                );
                return self.refuse(core, &text);
            }
            for arg in args.from(0) {
                let start = transaction.bytes.len();
                transaction.bytes.extend_from_slice(arg);
                transaction.ranges.push(start..transaction.bytes.len());
            }
            transaction.commands.push((spec, args.len()));
        }
        self.direct(core, |_, raw| {
            encode::simple(raw, "QUEUED");
            None
        });
    }

    pub(super) fn exec(&mut self, core: &Core, out: &mut Out) -> Option<Next> {
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
        let transaction = transaction.unwrap_or_default();
        core.stats.commands_total.add(1);
        self.push_piece(What::Array(transaction.commands.len()));
        if transaction.ranges.len() > LARGE_OPS {
            self.large = Some(Large::Transaction(transaction));
            return Some(Next::Large);
        }
        let reply = self.reply;
        let mut at = 0;
        for command in 0..transaction.commands.len() {
            // Nothing is applied before all is gathered.
            at = self.gather_queued(core, &transaction, command, at, reply)?;
        }
        if reply == ReplyMode::SkipNext {
            self.reply = ReplyMode::On;
        }
        (self.finish_group(core, &transaction.bytes, out) == Next::Cold).then_some(Next::Cold)
    }

    /// Gathers one command of a transaction, whose arguments begin at `at`; returns where those of the next one
    /// do. `None`: the answers take too much, and nothing of the transaction is done.
    pub(super) fn gather_queued(
        &mut self,
        core: &Core,
        transaction: &Transaction,
        command: usize,
        at: usize,
        reply: ReplyMode,
    ) -> Option<usize> {
        let (spec, args) = transaction.commands[command];
        let ranges = &transaction.ranges[at..at + args];
        self.executing = true;
        self.gather(core, spec, Args::new(&transaction.bytes, ranges), ranges);
        self.executing = false;
        self.reply = reply;
        if self.raw.len() > ANSWER_BYTES_MAX {
            self.drop_group();
            let text = format!(
                "EXECABORT Transaction discarded because its answers take more than \
                 {ANSWER_BYTES_MAX} bytes"
            );
            self.refuse(core, &text);
            return None;
        }
        Some(at + args)
    }
}
