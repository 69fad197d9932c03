//! What the store says of keys: values that were read or announced, and which may be out of date.
//!
//! A message is hearsay: anybody who may publish can write one. What the store itself says to this node,
//! a reading or the reply to a batch, replaces it whatever its clock. Where its clock was ahead, the message
//! may also be true and only faster: then the key is to be read anew ([`Observed::Taken`], `disputed`), by
//! which time a true message's clock is the store's.

use super::super::Recorder;
use super::super::entry::{EXISTS, HEARSAY, KNOWN, NOT_INTEGER, STORED, TAKEN, USED, WRONG_TYPE};
use super::super::op::{BadValue, NONE};
use super::super::prefetch::prefetch;
use super::super::sent::Sent;
use super::{GROUP, SWEEP, Table};

/// Where a value comes from, which decides whether an equal clock is news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Read from the store at that clock: at least as new as anything known with it.
    Read,
    /// The same, but asked for before values were marked stale: it may be among those.
    ReadBefore,
    /// Announced as the value right after the batch with that clock.
    Announced,
}

/// What became of a value that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observed {
    /// The view is the value's now, or was already.
    Taken {
        /// Whether it is another one than before.
        moved: bool,
        /// Whether a message had claimed a later one: the key is to be read anew.
        disputed: bool,
    },
    /// Older than what is known.
    Old,
    /// Nobody here asked for this key.
    Absent,
    /// A batch of this node may or may not be part of the value: tell it again when that is settled.
    Unsettled,
}

/// Values of one message, their keys one after the other.
#[derive(Debug, Default)]
pub struct Announced {
    /// The keys' bytes.
    pub keys: Vec<u8>,
    /// Length of each key, and its value.
    pub values: Vec<(u32, i64)>,
    /// The clock of all of them.
    pub clock: u64,
}

/// Where a search for stale entries stands: first those that were used of late, then the rest.
#[derive(Debug, Clone, Copy, Default)]
pub struct StaleSweep {
    at: usize,
    rest: bool,
}

impl Table {
    /// Moves the coarse clock by which values age; ticks wrap around.
    pub fn set_now(&mut self, tick: u16) {
        self.now = tick;
    }

    /// Reads of a value older than this many ticks ask for it anew; at most half of the range.
    pub fn set_age_max(&mut self, ticks: u16) {
        self.age_max = ticks.min(u16::MAX / 2);
    }

    /// Messages were lost: every value held may be out of date.
    pub fn mark_stale(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Goes on looking for keys that were marked stale and not seen since; `false` at the end.
    /// Looks at a bounded number of entries a call.
    pub fn next_stale(
        &self,
        sweep: &mut StaleSweep,
        keys_max: usize,
        keys: &mut Vec<Box<[u8]>>,
    ) -> bool {
        for _ in 0..SWEEP {
            if keys.len() >= keys_max {
                return true;
            }
            let Some(entry) = self.entries.get(sweep.at) else {
                if sweep.rest {
                    return false;
                }
                *sweep = StaleSweep { at: 0, rest: true };
                continue;
            };
            sweep.at += 1;
            let stale = entry.has(TAKEN) && entry.has(KNOWN) && entry.generation != self.generation;
            if stale && (sweep.rest || entry.has(USED)) {
                keys.push(entry.key(&self.long).into());
            }
        }
        true
    }

    /// The store has `value` for `key` (`None`: has no such key) as of `clock`.
    ///
    /// A key that nobody asked for is not brought in. A value that may or may not contain a sealed
    /// delta of this node is left alone, as the recorder and what had been sent by then tell; without
    /// them, it is taken as it is.
    pub fn observe(
        &mut self,
        key: &[u8],
        value: Option<i64>,
        clock: u64,
        reach: Reach,
        deltas: Option<(&impl Recorder, Sent)>,
    ) -> Observed {
        let at = self.find(key, self.tag(key));
        self.observe_at(at, value, clock, reach, deltas)
    }

    /// Takes values of a message with this clock, in groups as commands are, as [`Announced`] holds them. `each` hears what became of every
    /// key.
    pub fn observe_announced(
        &mut self,
        keys: &[u8],
        values: &[(u32, i64)],
        clock: u64,
        recorder: &impl Recorder,
        mut each: impl FnMut(&[u8], i64, Observed),
    ) {
        let mut found = [(0, NONE); GROUP];
        let mut start = 0;
        for group in values.chunks(GROUP) {
            let first = start;
            let mask = self.slots.len() - 1;
            for (&(len, _), found) in group.iter().zip(&mut found) {
                found.0 = self.tag(&keys[start..start + len as usize]);
                prefetch(&self.slots[found.0 as usize & mask]);
                start += len as usize;
            }
            for found in &mut found[..group.len()] {
                found.1 = self.candidate(found.0);
                if found.1 != NONE {
                    prefetch(&self.entries[found.1 as usize]);
                }
            }
            let mut at = first;
            for (&(len, value), &(tag, candidate)) in group.iter().zip(&found) {
                let key = &keys[at..at + len as usize];
                at += len as usize;
                let mut entry = candidate;
                if entry != NONE && !self.entries[entry as usize].holds(key, &self.long) {
                    entry = self.find(key, tag);
                }
                let reach = Reach::Announced;
                let deltas = Some((recorder, Sent::ANY));
                let observed = self.observe_at(entry, Some(value), clock, reach, deltas);
                each(key, value, observed);
            }
        }
    }

    fn observe_at(
        &mut self,
        at: u32,
        value: Option<i64>,
        clock: u64,
        reach: Reach,
        deltas: Option<(&impl Recorder, Sent)>,
    ) -> Observed {
        if at == NONE {
            return Observed::Absent;
        }
        let entry = &mut self.entries[at as usize];
        let own = reach != Reach::Announced;
        let news = clock > entry.clock || (own && clock == entry.clock);
        let disputed = own && !news && entry.has(KNOWN) && entry.has(HEARSAY);
        if entry.has(KNOWN) && !news && !disputed {
            return Observed::Old;
        }
        if let Some((recorder, sent)) = deltas {
            // An epoch is sealed only when the one before is settled: what is pending is of the open
            // epoch and the last sealed one, and the two may cancel out.
            let unsure = if entry.epoch == recorder.epoch() {
                entry.pending != recorder.delta(entry.record)
            } else {
                entry.pending != 0 && sent.may_have(entry.epoch, entry.record)
            };
            if unsure {
                return Observed::Unsettled;
            }
        }
        let moved = entry.value != value.unwrap_or(0) || entry.has(STORED) != value.is_some();
        entry.value = value.unwrap_or(0);
        entry.clock = clock;
        entry.seen = self.now;
        if reach == Reach::Read {
            // Nothing else makes up for a loss: the lost message may have been the newer one.
            entry.generation = self.generation;
        }
        entry.flags |= KNOWN;
        entry.flags &= !(WRONG_TYPE | NOT_INTEGER | EXISTS | STORED | HEARSAY);
        if !own {
            entry.flags |= HEARSAY;
        }
        if value.is_some() {
            entry.flags |= STORED;
        }
        if value.is_some() || entry.epoch != 0 || entry.pending != 0 {
            entry.flags |= EXISTS;
        }
        Observed::Taken { moved, disputed }
    }

    /// The store holds no counter under `key`: adds are refused until a value is seen again.
    pub fn observe_bad(&mut self, key: &[u8], bad: BadValue) {
        let at = self.find(key, self.tag(key));
        if at != NONE {
            let entry = &mut self.entries[at as usize];
            entry.flags &= !(WRONG_TYPE | NOT_INTEGER);
            entry.flags |= match bad {
                BadValue::WrongType => WRONG_TYPE,
                BadValue::NotInteger => NOT_INTEGER,
            };
        }
    }

    /// The store went back in time: what is known stays as the best guess, and any value seen from
    /// now on replaces it.
    pub fn forget_clocks(&mut self) {
        for entry in &mut self.entries {
            entry.clock = 0;
            entry.flags &= !KNOWN;
        }
    }
}
