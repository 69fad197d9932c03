//! The view alone against a store: whatever is lost, late, repeated or out of order on the way,
//! once values are read anew every key that is held shows the store's value; and a value that was
//! just read never shows a delta twice or not at all. Among the messages are forged ones, with clocks
//! behind and ahead of the store's.
//!
//! Seen to fail when `Table::observe_at` takes a value of any clock (after 6 cases), when any value,
//! not only a reading, makes up for a loss (after 105), when it takes a value that may contain a
//! delta that was sent (after 75), and when a message's clock binds the store's own words (after 9).

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::sent::Sent;
use super::tests::Plain;
use super::*;

const KEYS: usize = 4;

#[derive(Debug, Clone)]
enum Step {
    /// Another node's batch; whether its message is lost.
    Other(Vec<(usize, i64)>, bool),
    /// A message that no node sent arrives: key, value, how far its clock is from the store's.
    Forged(usize, i64, i8),
    /// A message that is under way arrives; whether it stays under way, to arrive again.
    Arrive(usize, bool),
    /// This node takes an increment.
    Add(usize, i64),
    /// The epoch is sealed, if the one before is settled.
    Seal,
    /// So many of its deltas are sent as a batch, and the store applies it; the answer is under way.
    Send(usize),
    /// The oldest answer arrives.
    Settle,
    /// A client's read begins.
    Ask(usize),
    /// The oldest read's answer arrives.
    Answer,
    /// The loss of messages is noticed, and the keys are searched.
    Stale,
    /// Values that had to wait are told again.
    Retry,
}

fn step() -> impl Strategy<Value = Step> {
    let amount = || -5..=5_i64;
    prop_oneof![
        4 => (vec((0..KEYS, amount()), 1..4), any::<bool>())
            .prop_map(|(deltas, lost)| Step::Other(deltas, lost)),
        4 => (0..8_usize, any::<bool>()).prop_map(|(at, again)| Step::Arrive(at, again)),
        2 => (0..KEYS, -99..99_i64, -3..9_i8)
            .prop_map(|(key, value, ahead)| Step::Forged(key, value, ahead)),
        4 => (0..KEYS, amount()).prop_map(|(key, amount)| Step::Add(key, amount)),
        2 => Just(Step::Seal),
        3 => (1..4_usize).prop_map(Step::Send),
        2 => Just(Step::Settle),
        2 => (0..KEYS).prop_map(Step::Ask),
        2 => Just(Step::Answer),
        1 => Just(Step::Stale),
        1 => Just(Step::Retry),
    ]
}

fn name(key: usize) -> Vec<u8> {
    format!("key:{key}").into_bytes()
}

/// Key, amount, value after it.
type After = (usize, i64, i64);

struct Asked {
    losses: u64,
    clock: u64,
    sent: Sent,
    values: Vec<(usize, Option<i64>)>,
}

struct World {
    table: Table,
    recorder: Plain,
    store: BTreeMap<usize, i64>,
    clock: u64,
    sent: Sent,
    messages: Vec<(u64, Vec<(usize, i64)>)>,
    /// Batches that the store has applied: clock, key, amount, value after it.
    answers: Vec<(u64, Vec<After>)>,
    asked: Vec<Asked>,
    unsettled: Vec<(usize, Option<i64>, u64, Reach)>,
    losses: u64,
    /// Records of the sealed epoch when none of it was sent.
    unsent: usize,
}

impl World {
    fn new() -> Self {
        World {
            table: Table::new(TableLimits {
                bytes_max: 1 << 20,
                pending_keys_max: 0,
            }),
            recorder: Plain::new(None),
            store: BTreeMap::new(),
            clock: 0,
            sent: Sent::ANY,
            messages: Vec::new(),
            answers: Vec::new(),
            asked: Vec::new(),
            unsettled: Vec::new(),
            losses: 0,
            unsent: 0,
        }
    }

    /// A value that was just taken from a reading of what the store has now, with what this node has
    /// not sent yet, is all there is.
    fn is_exact(&self, key: usize, clock: u64) {
        let (name, pending) = (name(key), &self.recorder);
        let waits = pending.sums().get(&name[..]).copied().unwrap_or(0);
        if let Some(view) = self.table.view(&name).filter(|view| view.known)
            && (view.clock, clock) == (self.clock, self.clock)
        {
            let stored = self.store.get(&key).copied().unwrap_or(0);
            assert_eq!(view.value + view.pending, stored + waits);
        }
    }

    fn op(&mut self, kind: Kind, key: usize, amount: i64) -> Answer {
        let input = name(key);
        let mut ops = [Op::new(kind, 0, input.len(), amount)];
        self.table.apply(&input, &mut ops, &mut self.recorder);
        self.recorder.calls.clear();
        ops[0].answer
    }

    fn apply(&mut self, deltas: &[(usize, i64)]) -> Vec<After> {
        self.clock += 1;
        let mut after = Vec::new();
        for &(key, amount) in deltas {
            let value = self.store.entry(key).or_default();
            *value += amount;
            after.push((key, amount, *value));
        }
        after
    }

    fn observe(
        &mut self,
        key: usize,
        value: Option<i64>,
        clock: u64,
        reach: Reach,
        sent: Sent,
    ) -> Observed {
        let deltas = Some((&self.recorder, sent));
        let observed = self.table.observe(&name(key), value, clock, reach, deltas);
        if observed == Observed::Unsettled {
            self.unsettled.push((key, value, clock, reach));
        }
        self.heed(key, observed);
        observed
    }

    /// As the owner of the counters does it.
    fn heed(&mut self, key: usize, observed: Observed) {
        if let Observed::Taken { disputed: true, .. } = observed {
            self.ask(&[key]);
        }
    }

    fn retry(&mut self) {
        for (key, value, clock, reach) in std::mem::take(&mut self.unsettled) {
            self.observe(key, value, clock, reach, Sent::ANY);
        }
    }

    fn ask(&mut self, keys: &[usize]) {
        let values = keys.iter().map(|key| (*key, self.store.get(key).copied()));
        self.asked.push(Asked {
            losses: self.losses,
            clock: self.clock,
            sent: self.sent,
            values: values.collect(),
        });
    }

    /// As the owner of the counters does it.
    fn stale(&mut self) {
        self.table.mark_stale();
        self.losses += 1;
        for seen in &mut self.unsettled {
            if seen.3 == Reach::Read {
                seen.3 = Reach::ReadBefore;
            }
        }
        self.search();
    }

    fn search(&mut self) {
        let (mut sweep, mut found) = (StaleSweep::default(), Vec::new());
        while self.table.next_stale(&mut sweep, 100, &mut found) {}
        let keys: Vec<usize> = (0..KEYS)
            .filter(|&key| found.iter().any(|other| **other == name(key)[..]))
            .collect();
        self.ask(&keys);
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Other(ref deltas, lost) => {
                // One record a key, as in a batch.
                let deltas: BTreeMap<usize, i64> = deltas.iter().copied().collect();
                let deltas: Vec<_> = deltas.into_iter().collect();
                let after = self.apply(&deltas);
                if !lost {
                    let values = after.iter().map(|&(key, _, value)| (key, value)).collect();
                    self.messages.push((self.clock, values));
                }
            }
            Step::Arrive(at, again) if !self.messages.is_empty() => {
                let at = at % self.messages.len();
                let (clock, values) = self.messages[at].clone();
                if !again {
                    self.messages.remove(at);
                }
                for (key, value) in values {
                    self.observe(key, Some(value), clock, Reach::Announced, Sent::ANY);
                }
            }
            Step::Forged(key, value, ahead) => {
                let clock = if ahead == 8 {
                    u64::MAX
                } else {
                    self.clock.saturating_add_signed(ahead.into())
                };
                self.observe(key, Some(value), clock, Reach::Announced, Sent::ANY);
            }
            Step::Add(key, amount) => {
                self.op(Kind::Add, key, amount);
            }
            Step::Seal if self.recorder.sealed.is_empty() && self.answers.is_empty() => {
                self.recorder.seal();
                self.unsent = self.recorder.sealed.len();
            }
            Step::Send(count) => {
                let sealed = &mut self.recorder.sealed;
                let deltas: Vec<(usize, i64)> = sealed
                    .drain(..count.min(sealed.len()))
                    .map(|(key, amount)| (usize::from(key[4] - b'0'), amount))
                    .collect();
                if !deltas.is_empty() {
                    let end = self.unsent - self.recorder.sealed.len();
                    self.sent = Sent::before(self.recorder.epoch() - 1, end as u32);
                    let after = self.apply(&deltas);
                    self.answers.push((self.clock, after));
                }
            }
            Step::Settle if !self.answers.is_empty() => {
                let (clock, after) = self.answers.remove(0);
                let epoch = self.recorder.epoch();
                for (key, amount, value) in after {
                    let stored = Some((value, clock));
                    let observed = self.table.settle(&name(key), amount, stored, epoch);
                    self.heed(key, observed);
                }
                self.retry();
            }
            Step::Ask(key) => self.ask(&[key]),
            Step::Answer if !self.asked.is_empty() => {
                let asked = self.asked.remove(0);
                let reach = if asked.losses == self.losses {
                    Reach::Read
                } else {
                    Reach::ReadBefore
                };
                for (key, value) in asked.values {
                    let observed = self.observe(key, value, asked.clock, reach, asked.sent);
                    // Until it is taken, what shows may be a forged message's.
                    if observed != Observed::Unsettled {
                        self.is_exact(key, asked.clock);
                    }
                }
            }
            Step::Stale => self.stale(),
            Step::Retry => self.retry(),
            Step::Arrive(..) | Step::Seal | Step::Settle | Step::Answer => {}
        }
    }

    /// What is lost is noticed at last, and then nothing is sent and all under way arrives.
    fn come_to_rest(&mut self, order: &[Step]) {
        while !(self.recorder.open_is_empty()
            && self.recorder.sealed.is_empty()
            && self.answers.is_empty())
        {
            self.step(&Step::Seal);
            self.step(&Step::Send(1));
            self.step(&Step::Settle);
        }
        self.stale();
        for step in order {
            if matches!(
                step,
                Step::Arrive(..) | Step::Settle | Step::Answer | Step::Retry
            ) {
                self.step(step);
            }
        }
        // What waits may be forged: told before the last reading, which is stronger.
        self.retry();
        while !(self.messages.is_empty() && self.answers.is_empty() && self.asked.is_empty()) {
            self.step(&Step::Arrive(0, false));
            self.step(&Step::Settle);
            self.step(&Step::Answer);
        }
        // Keys that became known only after the search are found by the next.
        self.search();
        // Whatever a message said, one reading later the view is the store's.
        self.ask(&(0..KEYS).collect::<Vec<_>>());
        while !self.asked.is_empty() {
            self.step(&Step::Answer);
            self.retry();
        }
        assert!(self.unsettled.is_empty());
    }
}

proptest! {
    #[test]
    fn every_view_comes_to_the_stores_value(
        held in vec(any::<bool>(), KEYS),
        steps in vec(step(), 1..60),
        order in vec(step(), 0..40),
    ) {
        let mut world = World::new();
        for (key, _) in held.iter().enumerate().filter(|(_, held)| **held) {
            // A client asked for it: it is held from here on.
            world.op(Kind::Get, key, 0);
            world.ask(&[key]);
            world.step(&Step::Answer);
        }
        for step in &steps {
            world.step(step);
        }
        world.come_to_rest(&order);
        for (key, &held) in held.iter().enumerate() {
            if let Some(view) = world.table.view(&name(key)).filter(|view| view.known) {
                let stored = world.store.get(&key).copied();
                prop_assert_eq!(view.pending, 0);
                prop_assert_eq!((view.value, view.stored), (stored.unwrap_or(0), stored.is_some()));
            }
            prop_assert!(!held || world.table.view(&name(key)).is_some_and(|view| view.known));
        }
    }
}
