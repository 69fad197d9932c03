//! One command on one key, and its answer.

use super::RecordError;

/// The number of no entry.
pub(super) const NONE: u32 = u32::MAX;

/// What a command wants of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Add `amount`.
    Add,
    /// Read the view.
    Get,
}

/// One command on one key, and its answer.
#[derive(Debug, Clone, Copy)]
pub struct Op {
    /// Where the key begins in the group's input.
    pub start: u32,
    /// The key's length in bytes.
    pub len: u32,
    /// What to do.
    pub kind: Kind,
    /// Whether nobody waits for the answer.
    pub quiet: bool,
    /// The caller's own: the table does not look at it.
    pub note: u8,
    /// For [`Kind::Add`].
    pub amount: i64,
    /// Filled in by [`Table::apply`](super::Table::apply).
    pub answer: Answer,
    pub(super) tag: u32,
    pub(super) entry: u32,
}

impl Op {
    /// An operation on `input[start..start + len]`, not yet answered.
    pub fn new(kind: Kind, start: usize, len: usize, amount: i64) -> Self {
        Op {
            start: start as u32,
            len: len as u32,
            kind,
            quiet: false,
            note: 0,
            amount,
            answer: Answer::Missing,
            tag: 0,
            entry: NONE,
        }
    }

    /// The key within the input of its group.
    #[inline]
    pub fn key<'a>(&self, input: &'a [u8]) -> &'a [u8] {
        &input[self.start as usize..self.start as usize + self.len as usize]
    }
}

/// The answer to one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The view after the operation.
    Value(i64),
    /// Taken (an add) or looked up (a get), but the store's value is not known: only what is
    /// pending.
    Cold(i64),
    /// A read of a key of which nothing is known, and nothing pending.
    Unknown,
    /// A read of a value that was not seen for long: what was pending right after it.
    Aged(i64),
    /// A read of a key of which nothing is known, whose value did not come in time.
    Unloaded,
    /// A read of a key that neither the store nor this node has.
    Missing,
    /// Not taken: the store holds no counter there.
    Bad(BadValue),
    /// Not taken: the view would leave 64 bits.
    Overflow,
    /// Not taken: the journal refused.
    Record(RecordError),
}

/// What a key holds that is no counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadValue {
    /// A list, a hash ...
    WrongType,
    /// Text.
    NotInteger,
}
