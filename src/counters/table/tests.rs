//! The table against a naive model, whose journal is a plain list.

use std::collections::{HashMap, VecDeque};

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::RecordError;
use super::super::sent::Sent;
use super::*;

/// What the recorder was asked and what it answered.
pub(super) type Call = (Vec<u8>, i64, Result<(), RecordError>);

/// Records of the open epoch and of sealed ones, every one of them whole.
#[derive(Default)]
pub(super) struct Plain {
    epoch: u32,
    open: Vec<(Vec<u8>, i64)>,
    pub(super) sealed: VecDeque<(Vec<u8>, i64)>,
    pub(super) calls: VecDeque<Call>,
    /// Refuses this call of every so many, and why.
    refuse: Option<(usize, RecordError)>,
    count: usize,
}

impl Plain {
    pub(super) fn new(refuse: Option<(usize, RecordError)>) -> Self {
        Plain {
            epoch: 1,
            refuse,
            ..Plain::default()
        }
    }

    pub(super) fn seal(&mut self) {
        self.epoch += 1;
        self.sealed.extend(self.open.drain(..));
    }

    pub(super) fn open_is_empty(&self) -> bool {
        self.open.is_empty()
    }

    fn refusal(&mut self) -> Option<RecordError> {
        self.count += 1;
        let (every, why) = self.refuse?;
        self.count.is_multiple_of(every).then_some(why)
    }

    /// What is written down for each key and not settled.
    pub(super) fn sums(&self) -> HashMap<&[u8], i64> {
        let mut sums = HashMap::new();
        for (key, amount) in self.open.iter().chain(&self.sealed) {
            let sum: &mut i64 = sums.entry(&key[..]).or_default();
            *sum = sum.wrapping_add(*amount);
        }
        sums
    }
}

impl Recorder for Plain {
    fn epoch(&self) -> u32 {
        self.epoch
    }

    fn append(&mut self, key: &[u8], amount: i64) -> Result<u32, RecordError> {
        let answer = match self.refusal() {
            Some(error) => Err(error),
            None => Ok(()),
        };
        self.calls.push_back((key.to_vec(), amount, answer));
        answer.map(|()| {
            self.open.push((key.to_vec(), amount));
            (self.open.len() - 1) as u32
        })
    }

    fn add(&mut self, record: u32, amount: i64) -> Result<(), RecordError> {
        let refusal = self.refusal();
        // A record of another epoch would be out of range, or another key's.
        let (key, delta) = &mut self.open[record as usize];
        let answer = match (refusal, delta.checked_add(amount)) {
            (Some(error), _) => Err(error),
            (None, None) => Err(RecordError::Overflow),
            (None, Some(sum)) => {
                *delta = sum;
                Ok(())
            }
        };
        self.calls.push_back((key.clone(), amount, answer));
        answer
    }

    fn delta(&self, record: u32) -> i64 {
        self.open[record as usize].1
    }

    fn prefetch(&self, record: u32) {
        assert!((record as usize) < self.open.len());
    }
}

/// One key as the model sees it.
#[derive(Debug, Clone, Default, PartialEq)]
struct Counter {
    value: i64,
    clock: u64,
    pending: i64,
    known: bool,
    exists: bool,
    stored: bool,
    /// An add may be on its way to the store.
    added: bool,
    /// The value is what a message says.
    hearsay: bool,
    bad: Option<BadValue>,
}

impl Counter {
    fn add(&mut self, key: &[u8], amount: i64, calls: &mut VecDeque<Call>) -> Answer {
        if let Some(bad) = self.bad {
            return Answer::Bad(bad);
        }
        let Some(pending) = self.pending.checked_add(amount) else {
            return Answer::Overflow;
        };
        let Some(view) = self.value.checked_add(pending) else {
            return Answer::Overflow;
        };
        let (recorded_key, recorded, answer) = calls.pop_front().expect("it is written down");
        assert_eq!((&recorded_key[..], recorded), (key, amount));
        if let Err(error) = answer {
            return Answer::Record(error);
        }
        self.pending = pending;
        self.exists = true;
        self.added = true;
        if self.known {
            Answer::Value(view)
        } else {
            Answer::Cold(view)
        }
    }

    fn get(&self) -> Answer {
        let view = self.value.saturating_add(self.pending);
        match (self.bad, self.known, self.exists) {
            (Some(bad), _, _) => Answer::Bad(bad),
            (None, false, true) => Answer::Cold(self.pending),
            (None, false, false) => Answer::Unknown,
            (None, true, true) => Answer::Value(view),
            (None, true, false) => Answer::Missing,
        }
    }

    fn view(&self) -> View {
        View {
            value: self.value,
            pending: self.pending,
            clock: self.clock,
            known: self.known,
            exists: self.exists,
            stored: self.stored,
            bad: self.bad,
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// Keys, and amounts of adds; `None` for reads.
    Group(Vec<(usize, Option<i64>)>),
    Seal,
    /// So many of the oldest sealed records; what the store says of them.
    Settle(usize, Option<(i64, u64)>),
    Restore(usize, i64),
    Observe(usize, Option<i64>, u64, Reach),
    ObserveBad(usize, BadValue),
    TakeBack(usize, i64),
    ForgetClocks,
}

fn amount() -> impl Strategy<Value = i64> {
    prop_oneof![
        6 => -3..=3_i64,
        1 => any::<i64>(),
        1 => proptest::sample::select(&[i64::MIN, i64::MAX, i64::MIN + 1, i64::MAX - 1][..]),
    ]
}

fn bad() -> impl Strategy<Value = BadValue> {
    prop_oneof![Just(BadValue::WrongType), Just(BadValue::NotInteger)]
}

fn step(keys: usize) -> impl Strategy<Value = Step> {
    let key = move || 0..keys;
    let op = (key(), proptest::option::weighted(0.8, amount()));
    let clock = 0..20_u64;
    let reach = prop_oneof![Just(Reach::Read), Just(Reach::Announced)];
    prop_oneof![
        8 => vec(op, 1..150).prop_map(Step::Group),
        3 => Just(Step::Seal),
        4 => (1..60_usize, proptest::option::of((amount(), clock.clone())))
            .prop_map(|(count, stored)| Step::Settle(count, stored)),
        1 => (key(), amount()).prop_map(|(key, amount)| Step::Restore(key, amount)),
        4 => (key(), proptest::option::of(amount()), clock, reach)
            .prop_map(|(key, value, clock, reach)| Step::Observe(key, value, clock, reach)),
        1 => (key(), bad()).prop_map(|(key, bad)| Step::ObserveBad(key, bad)),
        2 => (key(), amount()).prop_map(|(key, amount)| Step::TakeBack(key, amount)),
        1 => Just(Step::ForgetClocks),
    ]
}

/// Of every length around that of an inline key, some alike but for their ends or beginnings.
fn key(number: usize) -> Vec<u8> {
    let long = b"a-key-that-is-longer-than-what-its-entry-can-hold";
    match number {
        0 => Vec::new(),
        1 => long[..INLINE - 1].to_vec(),
        2 => long[..INLINE].to_vec(),
        3 => long[..=INLINE].to_vec(),
        4 => vec![0; 300],
        number if number % 3 == 0 => [&long[..], number.to_string().as_bytes()].concat(),
        number if number % 3 == 1 => [number.to_string().as_bytes(), &long[..]].concat(),
        number => format!("k{number}").into_bytes(),
    }
}

struct Pair {
    table: Table,
    recorder: Plain,
    model: HashMap<Vec<u8>, Counter>,
    evicts: bool,
}

impl Pair {
    fn new(entries_max: Option<usize>, refuse: Option<(usize, RecordError)>) -> Self {
        let bytes_max = entries_max.map_or(1 << 20, |entries| entries * ENTRY_BYTES);
        Pair {
            table: Table::new(TableLimits {
                bytes_max,
                pending_keys_max: 0,
            }),
            recorder: Plain::new(refuse),
            model: HashMap::new(),
            evicts: entries_max.is_some(),
        }
    }

    fn group(&mut self, wanted: &[(usize, Option<i64>)]) {
        let mut input = Vec::new();
        let mut ops: Vec<Op> = wanted
            .iter()
            .map(|&(number, amount)| {
                let key = key(number);
                input.extend_from_slice(&key);
                let kind = if amount.is_some() {
                    Kind::Add
                } else {
                    Kind::Get
                };
                Op::new(
                    kind,
                    input.len() - key.len(),
                    key.len(),
                    amount.unwrap_or(0),
                )
            })
            .collect();
        let before = self.table.bytes();
        self.table.apply(&input, &mut ops, &mut self.recorder);
        let pending = self.model.values().filter(|counter| counter.pending != 0);
        let pending = pending.count() + ops.len() + usize::from(SEARCH_EVERY);
        let held = self.table.limits.bytes_max + pending * entry_bytes(&[0; 100]);
        assert!(self.table.bytes() <= before.max(held));
        for op in &ops {
            let key = op.key(&input);
            let counter = self.model.entry(key.to_vec()).or_default();
            let before = (counter.clone(), self.recorder.calls.clone());
            let calls = &mut self.recorder.calls;
            let answer = |counter: &mut Counter, calls: &mut VecDeque<Call>| match op.kind {
                Kind::Add => counter.add(key, op.amount, calls),
                Kind::Get => counter.get(),
            };
            let mut expected = answer(counter, calls);
            if op.answer != expected && self.evicts && before.0.pending == 0 {
                // It had been given up for another.
                *counter = Counter::default();
                *calls = before.1;
                expected = answer(counter, calls);
            }
            assert_eq!(op.answer, expected, "{op:?}");
        }
        assert_eq!(self.recorder.calls.len(), 0, "written down without need");
    }

    fn settle(&mut self, stored: Option<(i64, u64)>) {
        let Some((key, amount)) = self.recorder.sealed.pop_front() else {
            return;
        };
        self.table.settle(&key, amount, stored, self.recorder.epoch);
        if amount == 0 && !self.model.contains_key(&key) {
            return;
        }
        let open = self.recorder.open.iter().any(|(other, _)| *other == key);
        let counter = self.model.entry(key).or_insert_with(|| Counter {
            exists: true,
            ..Counter::default()
        });
        counter.pending = counter.pending.wrapping_sub(amount);
        counter.added &= counter.pending != 0 || open;
        if let Some((value, clock)) = stored
            && (clock >= counter.clock || !counter.known || counter.hearsay)
        {
            counter.hearsay = false;
            counter.value = value;
            counter.clock = clock;
            counter.known = true;
            counter.exists = true;
            counter.stored = true;
            counter.bad = None;
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Group(ref wanted) => self.group(wanted),
            Step::Seal => self.recorder.seal(),
            Step::Settle(count, stored) => {
                for index in 0..count as i64 {
                    let stored = stored.map(|(value, clock)| (value.wrapping_add(index), clock));
                    self.settle(stored);
                }
            }
            Step::Restore(number, amount) => {
                let key = key(number);
                self.table.restore(&key, amount);
                self.recorder.sealed.push_back((key.clone(), amount));
                let counter = self.model.entry(key).or_default();
                counter.pending = counter.pending.wrapping_add(amount);
                counter.exists = true;
            }
            Step::Observe(number, value, clock, reach) => {
                let key = key(number);
                let observed =
                    self.table
                        .observe(&key, value, clock, reach, None::<(&Plain, Sent)>);
                let taken = matches!(observed, Observed::Taken { .. });
                let Some(counter) = self.model.get_mut(&key) else {
                    assert!(!taken);
                    return;
                };
                let read = reach == Reach::Read;
                let ahead = clock > counter.clock || (read && clock == counter.clock);
                let disputed = read && !ahead && counter.known && counter.hearsay;
                let news = ahead || !counter.known || disputed;
                assert_eq!(taken, news);
                if let Observed::Taken { disputed: told, .. } = observed {
                    assert_eq!(told, disputed);
                }
                if news {
                    counter.hearsay = !read;
                    counter.value = value.unwrap_or(0);
                    counter.clock = clock;
                    counter.known = true;
                    counter.bad = None;
                    counter.stored = value.is_some();
                    counter.exists = value.is_some() || counter.added || counter.pending != 0;
                }
            }
            Step::ObserveBad(number, bad) => {
                let key = key(number);
                self.table.observe_bad(&key, bad);
                if let Some(counter) = self.model.get_mut(&key) {
                    counter.bad = Some(bad);
                }
            }
            Step::TakeBack(number, amount) => {
                let key = key(number);
                let took = self.table.take_back(&key, amount, &mut self.recorder);
                let counter = self.model.get_mut(&key);
                let expected = match (counter, amount.checked_neg()) {
                    (Some(counter), Some(opposite)) => {
                        let bad = counter.bad.take();
                        let answer = counter.add(&key, opposite, &mut self.recorder.calls);
                        counter.bad = bad;
                        matches!(answer, Answer::Value(_) | Answer::Cold(_))
                    }
                    _ => false,
                };
                assert_eq!(took, expected);
            }
            Step::ForgetClocks => {
                self.table.forget_clocks();
                for counter in self.model.values_mut() {
                    counter.clock = 0;
                    counter.known = false;
                }
            }
        }
        self.check();
    }

    fn check(&mut self) {
        // What had been evicted is seen here; only what has nothing pending may be.
        let Pair { table, evicts, .. } = self;
        self.model.retain(|key, counter| {
            let view = table.view(key);
            if view.is_none() {
                assert!(*evicts && counter.pending == 0, "{key:?} is lost");
                return false;
            }
            if *evicts && counter.pending == 0 && view != Some(counter.view()) {
                // Given up and asked for again since.
                *counter = Counter {
                    exists: counter.exists && view.is_some_and(|view| view.exists),
                    added: counter.added && view.is_some_and(|view| view.exists),
                    ..Counter::default()
                };
            }
            // Given up after the clocks were forgotten, and asked for again: only this tells.
            counter.stored &= !*evicts || view.is_some_and(|view| view.known || view.stored);
            assert_eq!(view, Some(counter.view()), "{key:?}");
            true
        });
        assert_eq!(table.len(), self.model.len());
        let bytes: usize = self.model.keys().map(|key| entry_bytes(key)).sum();
        assert_eq!(table.bytes(), bytes);
        let pending = self.model.values().map(|counter| counter.pending);
        let pending = pending.fold(0, i64::wrapping_add);
        assert_eq!(table.pending_sum(), pending);
        let sums = self.recorder.sums();
        for (key, sum) in &sums {
            let pending = self.model.get(*key).map_or(0, |counter| counter.pending);
            assert_eq!(pending, *sum, "{key:?}: written down and pending differ");
        }
        for (key, counter) in &self.model {
            assert!(counter.pending == 0 || sums.contains_key(&key[..]));
        }
    }
}

fn refusals() -> impl Strategy<Value = Option<(usize, RecordError)>> {
    let why = proptest::sample::select(
        &[RecordError::Limit, RecordError::Disk, RecordError::Overflow][..],
    );
    proptest::option::of((2..20_usize, why))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    // Fails without: the look for a key that an earlier operation of the group brought in, the check
    // that the view fits, the order of record and pending, the marks kept by `take_back`.
    #[test]
    fn the_table_does_what_a_naive_one_does(
        steps in vec(step(40), 1..60),
        refuse in refusals(),
    ) {
        let mut pair = Pair::new(None, refuse);
        for step in &steps {
            pair.step(step);
        }
    }

    // Fails without: the look at `pending` before a victim is taken, the second look for what was
    // found before an eviction, the return of a long key's memory, the return of an entry that is
    // settled while it was away.
    #[test]
    fn a_small_table_gives_up_only_what_has_nothing_pending(
        steps in vec(step(60), 1..60),
        entries_max in 1..40_usize,
        refuse in refusals(),
    ) {
        let mut pair = Pair::new(Some(entries_max), refuse);
        for step in &steps {
            pair.step(step);
        }
    }
}

fn apply_one(table: &mut Table, kind: Kind, key: &[u8], recorder: &mut Plain) -> Answer {
    let mut op = [Op::new(kind, 0, key.len(), 1)];
    table.apply(key, &mut op, recorder);
    recorder.calls.clear();
    op[0].answer
}

fn small_table(entries: usize) -> Table {
    Table::new(TableLimits {
        bytes_max: entries * ENTRY_BYTES,
        pending_keys_max: 0,
    })
}

fn numbered(number: u32) -> [u8; 4] {
    number.to_le_bytes()
}

// Fails if a key is taken to be that of the first entry with its hash.
#[test]
fn all_of_many_keys_are_found_while_the_index_grows() {
    let mut table = small_table(200_000);
    let mut recorder = Plain::new(None);
    for number in 0..100_000 {
        assert_eq!(
            apply_one(&mut table, Kind::Add, &numbered(number), &mut recorder),
            Answer::Cold(1)
        );
    }
    assert_eq!(table.len(), 100_000);
    for number in 0..100_000 {
        let view = table.view(&numbered(number)).expect("it is there");
        assert_eq!(view.pending, 1);
    }
}

// Fails if `remove` leaves a hole in a probe path.
#[test]
fn all_remaining_keys_are_found_after_evictions() {
    // 3/4 of the first index, at which the paths are longest.
    let mut table = small_table(768);
    let mut recorder = Plain::new(None);
    let mut pending = Vec::new();
    for number in 0..20_000 {
        // Every 50th stays for good.
        let kind = if number % 50 == 0 {
            pending.push(number);
            Kind::Add
        } else {
            Kind::Get
        };
        apply_one(&mut table, kind, &numbered(number), &mut recorder);
        if number % 100 == 0 {
            let found = (0..=number).filter(|&number| table.view(&numbered(number)).is_some());
            assert_eq!(found.count(), table.len());
        }
    }
    assert_eq!(table.slots.len(), 1024);
    assert!(table.evicted() > 19_000);
    for number in pending {
        assert!(table.view(&numbered(number)).is_some(), "{number}");
    }
}

// The story: a full table whose entries had all been used of late, none of them with anything
// pending, gave up none of them: the search cleared 64 bits of use and ended.
#[test]
fn keys_with_something_pending_take_the_place_of_the_others_and_then_come_besides() {
    let mut table = small_table(1000);
    let mut recorder = Plain::new(None);
    for number in 0..1000 {
        apply_one(&mut table, Kind::Get, &numbered(number), &mut recorder);
    }
    for number in 1000..2000 {
        assert_eq!(
            apply_one(&mut table, Kind::Add, &numbered(number), &mut recorder),
            Answer::Cold(1)
        );
    }
    assert_eq!((table.len(), table.evicted()), (1000, 1000));
    for number in 2000..3000 {
        assert_eq!(
            apply_one(&mut table, Kind::Add, &numbered(number), &mut recorder),
            Answer::Cold(1)
        );
    }
    assert_eq!(table.len(), 2000);
    // Reads are served as well, and do not add up.
    for number in 3000..20_000 {
        apply_one(&mut table, Kind::Get, &numbered(number), &mut recorder);
    }
    let besides = table.len() - 2000;
    assert!(besides <= 2 * usize::from(SEARCH_EVERY), "{besides}");
    for number in 1000..3000 {
        table.settle(&numbered(number), 1, Some((1, 1)), u32::MAX);
    }
    while table.trim() {}
    assert_eq!(table.len(), 1000);
}

// The story: room was made for the new keys of a group by giving up the old ones of the same
// group, which then found no room themselves although others could have gone.
#[test]
fn a_group_finds_room_for_all_its_keys() {
    let mut table = small_table(100);
    let mut recorder = Plain::new(None);
    for number in 0..100 {
        apply_one(&mut table, Kind::Get, &numbered(number), &mut recorder);
    }
    let input: Vec<u8> = (68..132).flat_map(numbered).collect();
    let mut ops: Vec<Op> = (0..64)
        .map(|index| Op::new(Kind::Add, index * 4, 4, 1))
        .collect();
    // The hand stands before those that the group wants.
    table.hand = 67;
    table.apply(&input, &mut ops, &mut recorder);
    assert!(ops.iter().all(|op| op.answer == Answer::Cold(1)));
}

// The story: +5 in one epoch and -5 in the next left nothing pending, and the entry was given up.
// The first epoch was settled while it was away; the second, settled when it was back, left +5
// pending for ever.
#[test]
fn deltas_that_cancel_out_are_settled_one_by_one_also_after_an_eviction() {
    let mut table = small_table(1);
    let mut recorder = Plain::new(None);
    let add = |table: &mut Table, recorder: &mut Plain, amount| {
        let mut op = [Op::new(Kind::Add, 0, 1, amount)];
        table.apply(b"k", &mut op, recorder);
        op[0].answer
    };
    add(&mut table, &mut recorder, 5);
    recorder.seal();
    assert_eq!(add(&mut table, &mut recorder, -5), Answer::Cold(0));
    assert_eq!(
        apply_one(&mut table, Kind::Get, b"other", &mut recorder),
        Answer::Unknown
    );
    assert_eq!(table.view(b"k"), None);
    table.settle(b"k", 5, Some((105, 1)), u32::MAX);
    table.observe(b"k", Some(105), 1, Reach::Read, None::<(&Plain, Sent)>);
    assert_eq!(add(&mut table, &mut recorder, 3), Answer::Value(103));
    table.settle(b"k", -5, Some((100, 2)), u32::MAX);
    table.settle(b"k", 3, Some((103, 3)), u32::MAX);
    let view = table.view(b"k").expect("it is there");
    assert_eq!((view.value, view.pending), (103, 0));
}

// The story: a key counted long ago and since deleted in the store was read as "0", not as no key.
#[test]
fn a_key_that_the_store_has_lost_is_gone_once_nothing_is_pending() {
    let mut table = small_table(10);
    let mut recorder = Plain::new(None);
    apply_one(&mut table, Kind::Add, b"k", &mut recorder);
    table.observe(b"k", None, 1, Reach::Read, None::<(&Plain, Sent)>);
    assert_eq!(
        apply_one(&mut table, Kind::Get, b"k", &mut recorder),
        Answer::Value(1)
    );
    table.settle(b"k", 1, Some((1, 2)), u32::MAX);
    table.observe(b"k", None, 3, Reach::Read, None::<(&Plain, Sent)>);
    assert_eq!(
        apply_one(&mut table, Kind::Get, b"k", &mut recorder),
        Answer::Missing
    );
}
