//! The table: open addressing over 64-byte entries, commands applied in groups.
//!
//! The index holds 8 bytes a slot (32 bits of the key's hash, the entry's number), probed
//! linearly, at most 3/4 full. Entries never move, so that an entry's number stays good while the
//! index grows. Eviction is the CLOCK algorithm (Corbató, 1968): one hand, one bit of recent use.
//!
//! A group is applied in passes, each of which asks for the memory that the next one needs:
//! hash every key; find its slot; compare its key; then apply in order.

mod index;
mod observe;

use super::Recorder;
use super::entry::{
    EXISTS, Entry, HEARSAY, INLINE, KNOWN, LongKeys, NOT_INTEGER, STORED, USED, WRONG_TYPE,
};
use super::huge::prefer_large_pages;
use super::op::{Answer, BadValue, Kind, NONE, Op};
use super::prefetch::prefetch;
pub use observe::{Announced, Observed, Reach, StaleSweep};

/// So many commands have their cache misses in flight together.
pub const GROUP: usize = 64;
/// What one counter costs: its entry, and its share of an index that is 3/8 to 3/4 full.
const ENTRY_BYTES: usize = size_of::<Entry>() + 16;
/// After a search in vain, so many keys are brought in before the next one.
const SEARCH_EVERY: u8 = 64;
/// So many entries one search for a victim looks at, at most: some microseconds.
const SWEEP: usize = 4096;

/// What is known of one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Last known value; 0 until known.
    pub value: i64,
    /// Taken and not yet settled.
    pub pending: i64,
    /// The clock of `value`.
    pub clock: u64,
    /// Whether `value` came from the store.
    pub known: bool,
    /// Whether the key exists, by the store or by what is pending.
    pub exists: bool,
    /// Whether the store has it.
    pub stored: bool,
    /// What the store holds instead of a counter.
    pub bad: Option<BadValue>,
}

/// Bounds, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct TableLimits {
    /// Entries, index and long keys together, but for keys with something pending: these are never
    /// refused here, and bounded by what the recorder takes.
    pub bytes_max: usize,
    /// How many of these there may be at a time, for which address space is reserved.
    pub pending_keys_max: usize,
}

/// See the module's documentation.
pub struct Table {
    slots: Vec<u64>,
    entries: Vec<Entry>,
    long: LongKeys,
    free: Vec<u32>,
    hasher: foldhash::fast::RandomState,
    limits: TableLimits,
    taken: usize,
    hand: usize,
    evicted: u64,
    /// Of all entries, wrapping.
    pending_sum: i64,
    /// Keys to be brought in before room is searched for again.
    search_in: u8,
    generation: u8,
    now: u16,
    age_max: u16,
}

impl Table {
    /// An empty table.
    pub fn new(limits: TableLimits) -> Self {
        // Reserved whole, so that growing copies nothing; the system gives pages when touched. What it
        // does not let be reserved is copied when it comes to that.
        let mut entries = Vec::new();
        let mut wanted = (limits.bytes_max / ENTRY_BYTES)
            .saturating_add(limits.pending_keys_max)
            .min(NONE as usize - 1);
        while entries.try_reserve_exact(wanted).is_err() {
            wanted /= 2;
        }
        prefer_large_pages(&mut entries);
        Table {
            slots: vec![0; 1024],
            entries,
            long: LongKeys::default(),
            free: Vec::new(),
            hasher: foldhash::fast::RandomState::default(),
            limits,
            taken: 0,
            hand: 0,
            evicted: 0,
            pending_sum: 0,
            search_in: 0,
            generation: 0,
            now: 0,
            age_max: u16::MAX,
        }
    }

    /// Number of keys held.
    pub fn len(&self) -> usize {
        self.taken
    }

    /// Whether no key is held.
    pub fn is_empty(&self) -> bool {
        self.taken == 0
    }

    /// Memory of all counters, in bytes.
    pub fn bytes(&self) -> usize {
        self.taken * ENTRY_BYTES + self.long.bytes()
    }

    /// What is pending of all keys, wrapping.
    pub fn pending_sum(&self) -> i64 {
        self.pending_sum
    }

    /// Entries given up for others, ever.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }

    /// Applies the operations in order and fills in their answers.
    ///
    /// What is taken is in the recorder when this returns.
    pub fn apply(&mut self, input: &[u8], ops: &mut [Op], recorder: &mut impl Recorder) {
        for group in ops.chunks_mut(GROUP) {
            self.apply_group(input, group, recorder);
        }
    }

    fn apply_group(&mut self, input: &[u8], ops: &mut [Op], recorder: &mut impl Recorder) {
        let mask = self.slots.len() - 1;
        for op in &mut *ops {
            op.tag = self.tag(op.key(input));
            prefetch(&self.slots[op.tag as usize & mask]);
        }
        for op in &mut *ops {
            op.entry = self.candidate(op.tag);
            if op.entry != NONE {
                prefetch(&self.entries[op.entry as usize]);
            }
        }
        let epoch = recorder.epoch();
        for op in &mut *ops {
            if op.entry == NONE {
                continue;
            }
            let key = op.key(input);
            if !self.entries[op.entry as usize].holds(key, &self.long) {
                op.entry = self.find(key, op.tag);
                if op.entry == NONE {
                    continue;
                }
            }
            let entry = &self.entries[op.entry as usize];
            if entry.epoch == epoch {
                recorder.prefetch(entry.record);
            }
        }
        // What was found before an eviction may be among the evicted.
        let mut stale = false;
        let mut added: i64 = 0;
        for op in ops {
            let key = op.key(input);
            if op.entry == NONE || stale {
                // Or an operation before this one has brought the key in.
                op.entry = self.find(key, op.tag);
            }
            if op.entry == NONE {
                stale |= self.make_room(entry_bytes(key));
                op.entry = self.insert(key, op.tag);
            }
            let entry = &mut self.entries[op.entry as usize];
            op.answer = match op.kind {
                Kind::Add => {
                    let before = entry.pending;
                    let answer = add(entry, key, op.amount, epoch, recorder);
                    added = added.wrapping_add(entry.pending.wrapping_sub(before));
                    answer
                }
                Kind::Get => get(entry, self.now, self.age_max),
            };
        }
        self.pending_sum = self.pending_sum.wrapping_add(added);
    }

    /// Brings what is held of these keys, at most [`GROUP`] of them, near, so that their cache misses
    /// overlap.
    pub fn prefetch<'k>(&self, keys: impl Iterator<Item = &'k [u8]>) {
        let mask = self.slots.len() - 1;
        let mut tags = [0; GROUP];
        let mut count = 0;
        for (key, tag) in keys.zip(&mut tags) {
            *tag = self.tag(key);
            prefetch(&self.slots[*tag as usize & mask]);
            count += 1;
        }
        for &tag in &tags[..count] {
            let entry = self.candidate(tag);
            if entry != NONE {
                prefetch(&self.entries[entry as usize]);
            }
        }
    }

    /// What is known of `key`; `None`: nothing at all.
    pub fn view(&self, key: &[u8]) -> Option<View> {
        let at = self.find(key, self.tag(key));
        (at != NONE).then(|| {
            let entry = &self.entries[at as usize];
            View {
                value: entry.value,
                pending: entry.pending,
                clock: entry.clock,
                known: entry.has(KNOWN),
                exists: entry.has(EXISTS),
                stored: entry.has(STORED),
                bad: bad_value(entry),
            }
        })
    }

    /// A delta of `amount` is in the store, which then had `value` at `clock`; or, with `None`,
    /// was set aside for good and is no longer pending. `open_epoch` is the recorder's.
    pub fn settle(
        &mut self,
        key: &[u8],
        amount: i64,
        stored: Option<(i64, u64)>,
        open_epoch: u32,
    ) -> Observed {
        let tag = self.tag(key);
        let mut at = self.find(key, tag);
        if at == NONE {
            if amount == 0 {
                return Observed::Absent;
            }
            // Evicted while its deltas cancelled out; without this one, the others no longer do.
            at = self.insert(key, tag);
            self.entries[at as usize].flags |= EXISTS;
        }
        let entry = &mut self.entries[at as usize];
        entry.pending = entry.pending.wrapping_sub(amount);
        self.pending_sum = self.pending_sum.wrapping_sub(amount);
        if entry.pending == 0 && entry.epoch != open_epoch {
            // No add is on its way any more that would bring the key about, should it be deleted.
            entry.epoch = 0;
        }
        // Not only a higher clock is news: a key that was evicted amid an epoch stands twice in its
        // batch, and the second time tells the value after both.
        let Some((value, clock)) = stored else {
            return Observed::Old;
        };
        let disputed = clock < entry.clock && entry.has(KNOWN) && entry.has(HEARSAY);
        if clock >= entry.clock || !entry.has(KNOWN) || disputed {
            let moved = entry.value != value || !entry.has(STORED);
            entry.value = value;
            entry.clock = clock;
            entry.seen = self.now;
            entry.flags |= KNOWN | EXISTS | STORED;
            entry.flags &= !(WRONG_TYPE | NOT_INTEGER | HEARSAY);
            return Observed::Taken { moved, disputed };
        }
        Observed::Old
    }

    /// Undoes an add whose key turned out to hold no counter: the opposite amount is recorded, so
    /// that what the client was refused is never sent. `false`: it could not be recorded.
    pub fn take_back(&mut self, key: &[u8], amount: i64, recorder: &mut impl Recorder) -> bool {
        let at = self.find(key, self.tag(key));
        let Some(opposite) = amount.checked_neg() else {
            return false;
        };
        if at == NONE {
            return false;
        }
        let entry = &mut self.entries[at as usize];
        let bad = entry.flags & (WRONG_TYPE | NOT_INTEGER);
        entry.flags &= !bad;
        let before = entry.pending;
        let answer = add(entry, key, opposite, recorder.epoch(), recorder);
        let change = entry.pending.wrapping_sub(before);
        self.pending_sum = self.pending_sum.wrapping_add(change);
        entry.flags |= bad;
        matches!(answer, Answer::Value(_) | Answer::Cold(_))
    }

    /// A delta that is in a journal, not in the store, is pending (again). Limits do not apply:
    /// it was taken under them before.
    pub fn restore(&mut self, key: &[u8], amount: i64) {
        let tag = self.tag(key);
        let mut at = self.find(key, tag);
        if at == NONE {
            at = self.insert(key, tag);
        }
        let entry = &mut self.entries[at as usize];
        entry.pending = entry.pending.wrapping_add(amount);
        self.pending_sum = self.pending_sum.wrapping_add(amount);
        entry.flags |= EXISTS;
    }
}

fn entry_bytes(key: &[u8]) -> usize {
    ENTRY_BYTES
        + if key.len() > INLINE {
            key.len() + LongKeys::OVERHEAD
        } else {
            0
        }
}

#[inline]
fn add(
    entry: &mut Entry,
    key: &[u8],
    amount: i64,
    epoch: u32,
    recorder: &mut impl Recorder,
) -> Answer {
    if let Some(bad) = bad_value(entry) {
        return Answer::Bad(bad);
    }
    let Some(pending) = entry.pending.checked_add(amount) else {
        return Answer::Overflow;
    };
    let Some(view) = entry.value.checked_add(pending) else {
        return Answer::Overflow;
    };
    let written = if entry.epoch == epoch {
        recorder.add(entry.record, amount)
    } else {
        recorder.append(key, amount).map(|record| {
            entry.record = record;
            entry.epoch = epoch;
        })
    };
    if let Err(error) = written {
        return Answer::Record(error);
    }
    entry.pending = pending;
    entry.flags |= EXISTS | USED;
    if entry.has(KNOWN) {
        Answer::Value(view)
    } else {
        Answer::Cold(view)
    }
}

#[inline]
fn get(entry: &mut Entry, now: u16, age_max: u16) -> Answer {
    entry.flags |= USED;
    if let Some(bad) = bad_value(entry) {
        return Answer::Bad(bad);
    }
    let view = entry.value.saturating_add(entry.pending);
    // Someone who is no tallyd may have set it: after a while it is read again.
    let aged = now.wrapping_sub(entry.seen) > age_max;
    if aged && entry.has(KNOWN) {
        Answer::Aged(entry.pending)
    } else if !entry.has(KNOWN) {
        if entry.has(EXISTS) {
            Answer::Cold(entry.pending)
        } else {
            Answer::Unknown
        }
    } else if entry.has(EXISTS) {
        Answer::Value(view)
    } else {
        Answer::Missing
    }
}

fn bad_value(entry: &Entry) -> Option<BadValue> {
    if entry.flags & (WRONG_TYPE | NOT_INTEGER) == 0 {
        None
    } else if entry.has(WRONG_TYPE) {
        Some(BadValue::WrongType)
    } else {
        Some(BadValue::NotInteger)
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
#[allow(clippy::type_complexity, clippy::needless_range_loop)]
mod view_tests;
