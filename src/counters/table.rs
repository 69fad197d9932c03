//! The table: open addressing over 64-byte entries, commands applied in groups.
//!
//! The index holds 8 bytes a slot (32 bits of the key's hash, the entry's number), probed
//! linearly, at most 3/4 full. Entries never move, so that an entry's number stays good while the
//! index grows. Eviction is the CLOCK algorithm (Corbató, 1968): one hand, one bit of recent use.
//!
//! A group is applied in passes, each of which asks for the memory that the next one needs:
//! hash every key; find its slot; compare its key; then apply in order.

use std::hash::{BuildHasher, Hasher};

use super::entry::{
    EXISTS, Entry, INLINE, KNOWN, LongKeys, NOT_INTEGER, STORED, TAKEN, USED, WRONG_TYPE,
};
use super::huge::prefer_large_pages;
use super::prefetch::prefetch;
use super::{RecordError, Recorder};

/// So many commands have their cache misses in flight together.
const GROUP: usize = 64;
/// What one counter costs: its entry, and its share of an index that is 3/8 to 3/4 full.
const ENTRY_BYTES: usize = size_of::<Entry>() + 16;
const NONE: u32 = u32::MAX;
/// So many entries one search for a victim looks at, at most: some microseconds.
const SWEEP: usize = 4096;

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
    /// Filled in by [`Table::apply`].
    pub answer: Answer,
    tag: u32,
    entry: u32,
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
    /// A read of a key that neither the store nor this node has.
    Missing,
    /// Not taken: the store holds no counter there.
    Bad(BadValue),
    /// Not taken: the view would leave 64 bits.
    Overflow,
    /// Not taken: `limits.max_view_bytes` is reached, and a long search found only entries that
    /// have something pending.
    Full,
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
    /// Entries, index and long keys together.
    pub bytes_max: usize,
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
    generation: u8,
    now: u16,
    age_max: u16,
}

impl Table {
    /// An empty table.
    pub fn new(limits: TableLimits) -> Self {
        // Reserved whole, so that growing copies nothing; the system gives pages when touched.
        let mut entries =
            Vec::with_capacity((limits.bytes_max / ENTRY_BYTES).min(NONE as usize - 1));
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
        let mut full = false;
        for op in ops {
            let key = op.key(input);
            if op.entry == NONE || stale {
                // Or an operation before this one has brought the key in.
                op.entry = self.find(key, op.tag);
            }
            if op.entry == NONE {
                let bytes = entry_bytes(key);
                if self.bytes() + bytes > self.limits.bytes_max && !full {
                    stale |= self.evict(bytes);
                }
                if self.bytes() + bytes > self.limits.bytes_max {
                    // One search a group: the next would find no more.
                    full = true;
                    op.answer = Answer::Full;
                    continue;
                }
                op.entry = self.insert(key, op.tag);
            }
            let entry = &mut self.entries[op.entry as usize];
            op.answer = match op.kind {
                Kind::Add => add(entry, key, op.amount, epoch, recorder),
                Kind::Get => get(entry, self.now, self.age_max),
            };
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
    /// was set aside for good and is no longer pending. `open_epoch` is the recorder's. Returns
    /// whether the store's value is another one than before.
    pub fn settle(
        &mut self,
        key: &[u8],
        amount: i64,
        stored: Option<(i64, u64)>,
        open_epoch: u32,
    ) -> bool {
        let tag = self.tag(key);
        let mut at = self.find(key, tag);
        if at == NONE {
            if amount == 0 {
                return false;
            }
            // Evicted while its deltas cancelled out; without this one, the others no longer do.
            at = self.insert(key, tag);
            self.entries[at as usize].flags |= EXISTS;
        }
        let entry = &mut self.entries[at as usize];
        entry.pending = entry.pending.wrapping_sub(amount);
        if entry.pending == 0 && entry.epoch != open_epoch {
            // No add is on its way any more that would bring the key about, should it be deleted.
            entry.epoch = 0;
        }
        // Not only a higher clock is news: a key that was evicted amid an epoch stands twice in its
        // batch, and the second time tells the value after both.
        if let Some((value, clock)) = stored
            && (clock >= entry.clock || !entry.has(KNOWN))
        {
            let moved = entry.value != value || !entry.has(STORED);
            entry.value = value;
            entry.clock = clock;
            entry.seen = self.now;
            entry.flags |= KNOWN | EXISTS | STORED;
            entry.flags &= !(WRONG_TYPE | NOT_INTEGER);
            return moved;
        }
        false
    }

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
        let answer = add(entry, key, opposite, recorder.epoch(), recorder);
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
        entry.flags |= EXISTS;
    }

    /// The store has `value` for `key` (`None`: has no such key) as of `clock`.
    ///
    /// A key that nobody asked for is not brought in. With `recorder`, a value that may or may not
    /// contain a sealed delta of this node is left alone; without it, it is taken as it is.
    pub fn observe(
        &mut self,
        key: &[u8],
        value: Option<i64>,
        clock: u64,
        reach: Reach,
        recorder: Option<&impl Recorder>,
    ) -> Observed {
        let at = self.find(key, self.tag(key));
        self.observe_at(at, value, clock, reach, recorder)
    }

    /// Takes the values of a message, in groups as commands are. `each` hears what became of every
    /// key.
    pub fn observe_announced(
        &mut self,
        announced: &Announced,
        recorder: &impl Recorder,
        mut each: impl FnMut(&[u8], i64, Observed),
    ) {
        let mut found = [(0, NONE); GROUP];
        let mut start = 0;
        for group in announced.values.chunks(GROUP) {
            let first = start;
            let mask = self.slots.len() - 1;
            for (&(len, _), found) in group.iter().zip(&mut found) {
                found.0 = self.tag(&announced.keys[start..start + len as usize]);
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
                let key = &announced.keys[at..at + len as usize];
                at += len as usize;
                let mut entry = candidate;
                if entry != NONE && !self.entries[entry as usize].holds(key, &self.long) {
                    entry = self.find(key, tag);
                }
                let (clock, reach) = (announced.clock, Reach::Announced);
                let observed = self.observe_at(entry, Some(value), clock, reach, Some(recorder));
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
        recorder: Option<&impl Recorder>,
    ) -> Observed {
        if at == NONE {
            return Observed::Absent;
        }
        let entry = &mut self.entries[at as usize];
        let news = match reach {
            Reach::Read | Reach::ReadBefore => clock >= entry.clock,
            Reach::Announced => clock > entry.clock,
        };
        if entry.has(KNOWN) && !news {
            return Observed::Old;
        }
        if let Some(recorder) = recorder
            && entry.pending != 0
        {
            let open = if entry.epoch == recorder.epoch() {
                recorder.delta(entry.record)
            } else {
                0
            };
            if entry.pending != open {
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
        entry.flags &= !(WRONG_TYPE | NOT_INTEGER | EXISTS | STORED);
        if value.is_some() {
            entry.flags |= STORED;
        }
        if value.is_some() || entry.epoch != 0 || entry.pending != 0 {
            entry.flags |= EXISTS;
        }
        Observed::Taken { moved }
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

    #[inline]
    fn tag(&self, key: &[u8]) -> u32 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(key);
        hasher.finish() as u32
    }

    /// The first entry on the probe path whose hash agrees; its key is not looked at.
    #[inline]
    fn candidate(&self, tag: u32) -> u32 {
        let mask = self.slots.len() - 1;
        let mut at = tag as usize & mask;
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                return NONE;
            }
            if (slot >> 32) as u32 == tag {
                return slot as u32 - 1;
            }
            at = (at + 1) & mask;
        }
    }

    fn find(&self, key: &[u8], tag: u32) -> u32 {
        let mask = self.slots.len() - 1;
        let mut at = tag as usize & mask;
        loop {
            let slot = self.slots[at];
            if slot == 0 {
                return NONE;
            }
            let entry = (slot as u32).wrapping_sub(1);
            if (slot >> 32) as u32 == tag && self.entries[entry as usize].holds(key, &self.long) {
                return entry;
            }
            at = (at + 1) & mask;
        }
    }

    /// Brings in a key that is not there.
    fn insert(&mut self, key: &[u8], tag: u32) -> u32 {
        if (self.taken + 1) * 4 > self.slots.len() * 3 {
            self.grow_index();
        }
        let entry = Entry::new(key, &mut self.long);
        let number = if let Some(number) = self.free.pop() {
            self.entries[number as usize] = entry;
            number
        } else {
            self.entries.push(entry);
            (self.entries.len() - 1) as u32
        };
        place(
            &mut self.slots,
            u64::from(tag) << 32 | u64::from(number + 1),
        );
        self.taken += 1;
        number
    }

    fn grow_index(&mut self) {
        let mut slots = vec![0; self.slots.len() * 2];
        prefer_large_pages(&mut slots);
        for &slot in self.slots.iter().filter(|&&slot| slot != 0) {
            place(&mut slots, slot);
        }
        self.slots = slots;
    }

    /// Gives up entries that hold nothing pending until there is room for `bytes` more, or the
    /// search has gone far enough. Returns whether any was given up.
    fn evict(&mut self, bytes: usize) -> bool {
        let before = self.evicted;
        let from = self.hand;
        self.sweep(bytes);
        if self.bytes() + bytes > self.limits.bytes_max {
            // Over the same entries again, whose bits of recent use are cleared by now: better to
            // give up one that is used than to refuse a key.
            self.hand = from;
            self.sweep(bytes);
        }
        self.evicted != before
    }

    fn sweep(&mut self, bytes: usize) {
        for _ in 0..SWEEP.min(self.entries.len()) {
            if self.bytes() + bytes <= self.limits.bytes_max {
                break;
            }
            self.hand = (self.hand + 1) % self.entries.len();
            let entry = &mut self.entries[self.hand];
            if !entry.has(TAKEN) || entry.pending != 0 {
                continue;
            }
            if entry.has(USED) {
                entry.flags &= !USED;
                continue;
            }
            self.remove(self.hand as u32);
            self.evicted += 1;
        }
    }

    fn remove(&mut self, number: u32) {
        let mask = self.slots.len() - 1;
        let tag = self.tag(self.entries[number as usize].key(&self.long));
        let mut hole = tag as usize & mask;
        while self.slots[hole] as u32 != number + 1 {
            hole = (hole + 1) & mask;
        }
        // Close the hole: move back each follower whose own place is at or before it.
        let mut next = (hole + 1) & mask;
        while self.slots[next] != 0 {
            let start = (self.slots[next] >> 32) as usize & mask;
            if next.wrapping_sub(start) & mask >= next.wrapping_sub(hole) & mask {
                self.slots[hole] = self.slots[next];
                hole = next;
            }
            next = (next + 1) & mask;
        }
        self.slots[hole] = 0;
        self.entries[number as usize].free(&mut self.long);
        self.free.push(number);
        self.taken -= 1;
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

fn place(slots: &mut [u64], slot: u64) {
    let mask = slots.len() - 1;
    let mut at = (slot >> 32) as usize & mask;
    while slots[at] != 0 {
        at = (at + 1) & mask;
    }
    slots[at] = slot;
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
#[path = "table_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "view_tests.rs"]
#[allow(clippy::type_complexity, clippy::needless_range_loop)]
mod view_tests;
