//! A group of more operations than fit into a slice, a transaction or a command over very many keys: it is
//! gathered, applied, loaded and answered in slices, with other clients in between.
//!
//! A transaction is applied behind the [`gate`](super::super::gate): others are served as far as they do not
//! touch counters, and see all of it or nothing. Once its first operation is applied, all are, whatever
//! becomes of its client.

use super::super::account::Part;
use super::super::core::Core;
use super::group::Cursor;
use super::transaction::Transaction;
use super::{ReplyMode, Session};
use crate::wire::encode::Out;

/// Operations of a slice; a group of more is large.
pub(super) const LARGE_OPS: usize = 4096;
/// Bytes of answers that are made within a unit of work.
const BYTES_A_UNIT: usize = 64;

/// What is to be done in slices.
pub(super) enum Large {
    /// The keys of a gathered group are ranges of this.
    Keys(Vec<u8>),
    /// To be gathered.
    Transaction(Transaction),
}

impl Large {
    pub(super) fn held_bytes(&self) -> usize {
        match self {
            Large::Keys(input) => input.capacity(),
            Large::Transaction(transaction) => transaction.held_bytes(),
        }
    }
}

impl Session {
    /// What is held meanwhile is charged, and the client that holds most goes where that is too much.
    fn charge(&self, core: &Core, held: usize) {
        let bytes = self.command_bytes() + held;
        self.client.account.set(Part::Commands, bytes);
        if core.accounts.is_over() {
            core.make_room();
        }
    }

    /// Does and answers what [`Next::Large`](super::Next::Large) announced.
    pub async fn run_large(&mut self, core: &Core, out: &mut Out) {
        let (input, isolated) = match self.large.take() {
            None => return,
            Some(Large::Keys(input)) => (input, false),
            Some(Large::Transaction(transaction)) => {
                (self.gather_all(core, transaction).await, true)
            }
        };
        self.apply_all(core, &input, isolated).await;
        self.load_all(core, &input).await;
        self.answer_all(core, out).await;
    }

    async fn gather_all(&mut self, core: &Core, transaction: Transaction) -> Vec<u8> {
        let reply = self.reply;
        let mut at = 0;
        for command in 0..transaction.len() as usize {
            let before = self.raw.len();
            at = match self.gather_queued(core, &transaction, command, at, reply) {
                Some(next) => next,
                None => break, // Refused: there is nothing to apply.
            };
            let made = self.raw.len().saturating_sub(before);
            if (command + 1).is_multiple_of(LARGE_OPS) {
                self.charge(core, transaction.held_bytes());
            }
            core.slice.spend(1 + made / BYTES_A_UNIT);
            core.slice.pause_if_due(&core.stats).await;
        }
        if reply == ReplyMode::SkipNext {
            self.reply = ReplyMode::On;
        }
        transaction.into_bytes()
    }

    async fn apply_all(&mut self, core: &Core, input: &[u8], isolated: bool) {
        let closed = if isolated {
            Some(core.gate.close().await)
        } else {
            core.gate.open().await;
            None
        };
        let mut left = Left {
            session: self,
            core,
            input,
            at: 0,
            must_end: isolated,
        };
        while left.apply_some() {
            left.session.charge(core, input.len());
            core.slice.spend(LARGE_OPS);
            core.slice.pause(&core.stats).await;
            if !isolated {
                core.gate.open().await;
            }
        }
        drop(left);
        drop(closed);
    }

    /// Waits for values that are not known.
    async fn load_all(&mut self, core: &Core, input: &[u8]) {
        if self.waiting > 0 {
            self.charge(core, input.len());
            for from in (0..self.ops.len()).step_by(LARGE_OPS) {
                let range = from..self.ops.len().min(from + LARGE_OPS);
                let keys = self.cold_keys_of(input, range);
                core.slice.spend(keys.len());
                if !keys.is_empty() {
                    core.loads.wait(self.client.id, &keys).await;
                }
            }
            let cold = std::mem::take(&mut self.cold);
            let mut cold = cold.into_iter();
            while cold.len() > 0 {
                self.settle_cold(core, input, cold.by_ref().take(LARGE_OPS));
                core.slice.spend(LARGE_OPS);
                core.slice.pause(&core.stats).await;
            }
            for from in (0..self.ops.len()).step_by(LARGE_OPS) {
                let range = from..self.ops.len().min(from + LARGE_OPS);
                self.settle_aged(core, input, range);
                core.slice.spend(LARGE_OPS / 2);
                core.slice.pause_if_due(&core.stats).await;
            }
        }
        self.cold.clear();
    }

    async fn answer_all(&mut self, core: &Core, out: &mut Out) {
        for from in (0..self.ops.len()).step_by(LARGE_OPS) {
            self.note_answers(core, from..self.ops.len().min(from + LARGE_OPS));
            core.slice.spend(LARGE_OPS / 4);
            core.slice.pause_if_due(&core.stats).await;
        }
        let mut cursor = Cursor::default();
        while !self.answer_pieces(core, out, &mut cursor, LARGE_OPS) {
            core.slice.spend(LARGE_OPS / 2);
            core.slice.pause_if_due(&core.stats).await;
        }
        self.drop_group();
    }
}

/// Operations that are not applied yet.
struct Left<'a> {
    session: &'a mut Session,
    core: &'a Core,
    input: &'a [u8],
    at: usize,
    /// Whether all must be applied once one is.
    must_end: bool,
}

impl Left<'_> {
    /// `false`: that was the last of them.
    fn apply_some(&mut self) -> bool {
        let len = self.session.ops.len();
        let to = len.min(self.at + LARGE_OPS);
        self.session.apply_ops(self.core, self.input, self.at..to);
        self.at = to;
        to < len
    }
}

impl Drop for Left<'_> {
    fn drop(&mut self) {
        // The client was cut off in the middle.
        while self.must_end && self.at > 0 && self.at < self.session.ops.len() {
            self.apply_some();
        }
    }
}
