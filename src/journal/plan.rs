//! What recovery does with each segment file, decided before anything is touched. Pure.
//!
//! The same decision is carried out by [`Directory`](super::Directory) and shown by
//! `tallyd journal show`.
//!
//! Invariants:
//! 1. No two segments share a batch number, and none gets a number that may have been sent before:
//!    the token would call it applied. Where numbers are lost, or may be (a power cut takes the
//!    youngest writes), new ones begin far above; the flush stage steps over gaps.
//! 2. A segment that was sealed keeps its numbers, or is not used.

use super::examine::{ExamineError, Examined};
use super::format::HeaderError;
use crate::store::NodeId;

/// One segment file as found.
#[derive(Debug)]
pub struct Found {
    /// The number in its name.
    pub number: u64,
    /// What it holds.
    pub examined: Result<Examined, ExamineError>,
}

/// What becomes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Holds no record, and its number is not needed: removed.
    Remove,
    /// Its batches are used, numbered from here.
    Use {
        /// Number of its first batch.
        first_batch: u64,
    },
    /// Moved to `damaged/`, for this reason.
    SetAside(String),
    /// The directory is not opened at all: another node's, a newer format, or not readable.
    Refuse,
}

/// The whole decision.
#[derive(Debug)]
pub struct Plan {
    /// One for each file, in order.
    pub fates: Vec<Fate>,
    /// Number of the first batch of the segment that is opened next.
    pub next_batch: u64,
    /// The last batch known to be in the store.
    pub applied: u64,
    /// Whether numbers were lost, so that `next_batch` was chosen far above any.
    pub numbers_lost: bool,
}

/// What else decides, besides the files.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances {
    /// Whose directory it is.
    pub node: NodeId,
    /// Whether a token of this node may be in the store.
    pub claimed: bool,
    /// Whether the youngest writes may be missing, also those to segments that were sent.
    pub power_cut: bool,
    /// Now, in ms since the beginning of 1970.
    pub unix_ms: u64,
}

/// Decides.
pub fn plan(files: &[Found], circumstances: Circumstances) -> Plan {
    let Circumstances {
        node,
        claimed,
        power_cut,
        unix_ms,
    } = circumstances;
    let mut plan = Plan {
        fates: Vec::with_capacity(files.len()),
        next_batch: 1,
        applied: 0,
        numbers_lost: false,
    };
    // Whether a batch may have been sent of which no file tells.
    let untold = power_cut && claimed;
    let firsts = first_batches(files, node, untold);
    // A number that no batch can have had: batches are fewer than 2^20 a millisecond.
    let unused = unix_ms << 20;
    // The number that follows the last one used; `None`: not known.
    let mut next = (!claimed).then_some(1);
    // The last batch of the segments used so far.
    let mut used_up_to: Option<u64> = None;
    for (index, file) in files.iter().enumerate() {
        let fate = match judge(file, node) {
            Judged::Remove if is_blank(file) && files[index + 1..].iter().any(was_opened) => {
                // The newest file may be blank, when its process was killed. An older one is not.
                Fate::SetAside("nothing is in it, and later segments were opened".to_owned())
            }
            Judged::Remove => {
                if let Some(first) = firsts[index] {
                    // Empty: only its number matters.
                    next = Some(next.map_or(first, |next| next.max(first)));
                    if used_up_to.is_none() {
                        plan.applied = plan.applied.max(first - 1);
                    }
                }
                Fate::Remove
            }
            Judged::Refuse => Fate::Refuse,
            Judged::SetAside(reason) => {
                next = None;
                Fate::SetAside(reason)
            }
            Judged::Use(found) => {
                let first = firsts[index].or_else(|| {
                    // Never sealed, so never sent: any numbers will do. After a power cut it may have
                    // been sealed and sent; then only those that follow the last ones will do.
                    let new = || unused.max(plan.next_batch);
                    let any = || (!untold).then(new);
                    (!found.sealed).then(|| next.or_else(any)).flatten()
                });
                match first {
                    Some(first) if first < plan.next_batch => Fate::SetAside(format!(
                        "its batches are numbered from {first}, and those up to {} come before it",
                        plan.next_batch - 1
                    )),
                    Some(first_batch) => {
                        let last = found.last_batch(first_batch);
                        // After a roll-back an earlier segment may be unapplied in part: the cells
                        // of later ones say nothing then. Numbers that are missing in between were
                        // set aside.
                        if used_up_to.is_none_or(|used| used <= plan.applied) {
                            let applied = found.applied.unwrap_or(0);
                            plan.applied = applied.clamp(first_batch - 1, last);
                        }
                        used_up_to = Some(last);
                        next = (!found.batches_lost).then_some(last + 1);
                        plan.next_batch = plan.next_batch.max(last + 1);
                        Fate::Use { first_batch }
                    }
                    None => {
                        next = None;
                        let mut reasons = found.damage.clone();
                        reasons.push("the numbers of its batches are lost".to_owned());
                        Fate::SetAside(reasons.join("; "))
                    }
                }
            }
        };
        plan.next_batch = plan.next_batch.max(next.unwrap_or(0));
        plan.fates.push(fate);
    }
    if next.is_none() {
        plan.numbers_lost = true;
    }
    // After a power cut no damage shows where the last segments are missing altogether.
    if next.is_none() || untold {
        plan.next_batch = plan.next_batch.max(unused);
    }
    plan
}

fn is_blank(file: &Found) -> bool {
    matches!(file.examined, Err(ExamineError::Blank))
}

fn was_opened(file: &Found) -> bool {
    matches!(&file.examined, Ok(found) if found.first_batch.is_some())
}

enum Judged<'a> {
    Remove,
    Refuse,
    SetAside(String),
    Use(&'a Examined),
}

fn judge(file: &Found, node: NodeId) -> Judged<'_> {
    match &file.examined {
        Err(ExamineError::Blank) => Judged::Remove,
        Err(ExamineError::Io(_) | ExamineError::Header(HeaderError::Format(_))) => Judged::Refuse,
        Err(error @ ExamineError::Header(_)) => Judged::SetAside(error.to_string()),
        Ok(found) if found.header.node != node => Judged::Refuse,
        Ok(found) if found.header.number != file.number => {
            Judged::SetAside(format!("it is segment {}, renamed", found.header.number))
        }
        Ok(found) if found.is_empty() => Judged::Remove,
        Ok(found) if found.unusable => Judged::SetAside(format!(
            "{}; which record belongs to which batch is lost",
            found.damage.join("; ")
        )),
        Ok(found) => Judged::Use(found),
    }
}

/// The number of each file's first batch: its own, or as its neighbours tell it. A number that is too
/// low does no harm: what is in the store is skipped. One that is too high would count twice, so the
/// file after is no help where a segment may lack its youngest batches (`untold`).
fn first_batches(files: &[Found], node: NodeId, untold: bool) -> Vec<Option<u64>> {
    let found = |index: usize| match judge(&files[index], node) {
        Judged::Use(found) => Some(found),
        Judged::Remove => files[index].examined.as_ref().ok(),
        Judged::SetAside(_) | Judged::Refuse => None,
    };
    let own = |index| found(index).and_then(|found| found.first_batch);
    let mut firsts: Vec<Option<u64>> = (0..files.len()).map(own).collect();
    // Files are numbered without gaps, so a neighbour is one by its number.
    let neighbours = |one: usize, other: usize| files[one].number + 1 == files[other].number;
    for index in 1..files.len() {
        if firsts[index].is_none()
            && neighbours(index - 1, index)
            && let (Some(before), Some(first)) = (found(index - 1), firsts[index - 1])
            && found(index).is_some_and(|found| !found.is_empty())
        {
            firsts[index] = Some(before.last_batch(first) + 1);
        }
    }
    for index in (1..files.len()).rev() {
        if !untold
            && firsts[index - 1].is_none()
            && neighbours(index - 1, index)
            && let (Some(found), Some(after)) = (found(index - 1), firsts[index])
            && !found.is_empty()
        {
            firsts[index - 1] = after
                .checked_sub(found.batch_starts.len() as u64)
                .filter(|&first| first > 0);
        }
    }
    firsts
}
