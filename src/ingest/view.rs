//! What the stages tell of values, and how the view follows: settled batches, readings, messages of
//! other nodes, and the search for what may be out of date.
//!
//! Invariants:
//! 1. Messages of the stages are taken in their order, each whole before the next; a long one in slices,
//!    with clients in between. A key is settled, or restored, within one slice, so that between two slices
//!    each key is as if the batch had held those before it alone.
//! 2. What the store itself says replaces what a message said, whatever the clocks; where the message's
//!    clock was ahead, the key is read anew.
//! 3. However often messages are lost, or said to be, values are read anew at no more than
//!    [`SWEEP_KEYS_A_SECOND`].

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use bytes::Bytes;

use super::core::{Core, State};
use super::hub::KEY_CHANNEL;
use super::loads::OWN;
use crate::counters::{
    Announced, BadValue, GROUP, Observed, Reach, Recorder, Sent, StaleSweep, Table,
};
use crate::flush::{Asked, Settled};
use crate::journal::Sealed;
use crate::store::{Delta, KeyError, NodeId, Reading, StoreError};

/// Values that may wait for a batch to settle; beyond it the view is read anew.
const UNSETTLED_MAX: usize = 100_000;
/// Keys of one step of the search for stale values.
const SWEEP_KEYS: usize = 1000;
/// Keys that the search may have read in a second: some 10 % of what a Redis can read.
pub const SWEEP_KEYS_A_SECOND: usize = 100_000;
/// Batches of all nodes that a true message may be ahead of what the store last showed here.
const AHEAD_MAX: u64 = 1000;
/// Keys that are settled, restored or taken from a message at once.
const SLICE_KEYS: usize = 1024;

/// Values that had to wait, and the search for values to be read anew.
pub struct Doubts {
    /// Values that may or may not contain a batch of this node whose answer is still under way.
    unsettled: HashMap<Bytes, Unsettled>,
    /// The search, while it goes on.
    sweep: Option<StaleSweep>,
    /// Keys of that search that are being read.
    sweeping: usize,
    /// Keys that it may still ask for in this second.
    sweep_left: usize,
    /// Whether keys of that search could not be read: it begins anew at the next tick.
    sweep_again: bool,
    /// Whether values were marked stale since the search began: another one follows it.
    stale_again: bool,
    /// How often all clocks were forgotten.
    forgotten: u64,
    /// Whose message had the highest clock.
    claim: Option<(NodeId, u64)>,
}

impl Default for Doubts {
    fn default() -> Self {
        Self {
            unsettled: HashMap::new(),
            sweep: None,
            sweeping: 0,
            sweep_left: SWEEP_KEYS_A_SECOND,
            sweep_again: false,
            stale_again: false,
            forgotten: 0,
            claim: None,
        }
    }
}

struct Unsettled {
    value: Option<i64>,
    clock: u64,
    reach: Reach,
    /// Whether a whole tick has passed since.
    aged: bool,
    /// Whether a message claimed a later value meanwhile, which is then to be looked for.
    disputed: bool,
}

/// Values that are now the store's, for those who watch single counters.
#[derive(Default)]
struct Moved {
    keys: Vec<u8>,
    values: Vec<(usize, i64)>,
}

impl Moved {
    fn push(&mut self, key: &[u8], value: i64) {
        self.keys.extend_from_slice(key);
        self.values.push((key.len(), value));
    }
}

impl Core {
    /// A batch is done with.
    pub(super) async fn settle(
        &self,
        segment: &Sealed,
        batch: u64,
        settled: &[Settled],
        clock: u64,
    ) {
        self.heard.clock(clock);
        let deltas: Vec<Delta<'_>> = segment.batch(batch).collect();
        for first in (0..deltas.len()).step_by(SLICE_KEYS) {
            let range = first..deltas.len().min(first + SLICE_KEYS);
            let moved = self.settle_slice(&deltas, range.clone(), settled, clock);
            self.slice.spend(range.len());
            self.tell_watchers(&moved).await;
            self.slice.pause_if_due(&self.stats).await;
        }
    }

    fn settle_slice(
        &self,
        deltas: &[Delta<'_>],
        range: Range<usize>,
        settled: &[Settled],
        clock: u64,
    ) -> Moved {
        let state = &mut *self.state.borrow_mut();
        let epoch = state.writer.epoch();
        let watched = self.hub.borrow().watches_keys();
        let mut moved = Moved::default();
        let mut disputed = Vec::new();
        let pairs = deltas[range.clone()].iter().zip(&settled[range.clone()]);
        for (index, (delta, settled)) in range.clone().zip(pairs) {
            if (index - range.start).is_multiple_of(GROUP) {
                let next = deltas[index..range.end].iter();
                state.table.prefetch(next.map(|delta| delta.key));
            }
            match settled {
                Settled::Stored(value) => {
                    let stored = value.map(|value| (value, clock));
                    let seen = state.table.settle(delta.key, delta.amount, stored, epoch);
                    self.known(&state.table, delta.key);
                    note(seen, delta.key, *value, watched, &mut moved, &mut disputed);
                }
                Settled::Rejected(error) => {
                    state.table.settle(delta.key, delta.amount, None, epoch);
                    if let Some(bad) = bad_value(error) {
                        state.table.observe_bad(delta.key, bad);
                    }
                }
                Settled::Before => {}
            }
            if !state.doubts.unsettled.is_empty() {
                self.retry_one(state, delta.key, watched, &mut moved, &mut disputed);
            }
        }
        self.dispute(&mut state.doubts, &disputed);
        moved
    }

    /// The store has lost this batch; `skip` of its deltas stay settled.
    pub(super) async fn restore(&self, segment: &Sealed, batch: u64, skip: &[usize]) {
        let skip: HashSet<usize> = skip.iter().copied().collect();
        for (index, delta) in segment.batch(batch).enumerate() {
            if !skip.contains(&index) {
                let mut state = self.state.borrow_mut();
                state.table.restore(delta.key, delta.amount);
            }
            self.slice.spend(1);
            self.slice.pause_if_due(&self.stats).await;
        }
    }

    /// Values of another node's message.
    pub(super) async fn announced(&self, node: NodeId, announced: &Announced) {
        {
            let claim = &mut self.state.borrow_mut().doubts.claim;
            if claim.is_none_or(|(_, clock)| clock < announced.clock) {
                *claim = Some((node, announced.clock));
            }
        }
        let mut at = 0;
        for values in announced.values.chunks(SLICE_KEYS) {
            let bytes: usize = values.iter().map(|(len, _)| *len as usize).sum();
            let keys = &announced.keys[at..at + bytes];
            at += bytes;
            let moved = self.announced_slice(keys, values, announced.clock);
            self.slice.spend(values.len());
            self.tell_watchers(&moved).await;
            self.slice.pause_if_due(&self.stats).await;
        }
    }

    fn announced_slice(&self, keys: &[u8], values: &[(u32, i64)], clock: u64) -> Moved {
        let state = &mut *self.state.borrow_mut();
        let State {
            table,
            writer,
            doubts,
            ..
        } = state;
        let watched = self.hub.borrow().watches_keys();
        let awaited = self.loads.any_cold();
        let mut full = false;
        let mut taken = Vec::new();
        let mut moved = Moved::default();
        table.observe_announced(keys, values, clock, writer, |key, value, observed| {
            match observed {
                Observed::Unsettled if doubts.unsettled.len() < UNSETTLED_MAX => {
                    let seen = Unsettled {
                        value: Some(value),
                        clock,
                        reach: Reach::Announced,
                        aged: false,
                        disputed: false,
                    };
                    keep_best(&mut doubts.unsettled, key, seen);
                }
                Observed::Unsettled => full = true,
                Observed::Taken { .. } if awaited => taken.push(key.to_vec()),
                _ => {}
            }
            let news = matches!(
                observed,
                Observed::Taken { moved: true, .. } | Observed::Absent
            );
            if watched && news {
                moved.push(key, value);
            }
        });
        for key in taken {
            self.known(table, &key);
        }
        if full {
            self.mark_stale(state);
        }
        moved
    }

    /// Values that were asked for: a reading of at most a thousand keys, taken at once.
    pub(super) async fn loaded(
        &self,
        keys: &[Bytes],
        reading: &Result<Reading, StoreError>,
        asked: Asked,
        sent: Sent,
    ) {
        let moved = {
            let state = &mut *self.state.borrow_mut();
            let mut waiting = HashSet::new();
            let mut moved = Moved::default();
            match reading {
                Ok(reading) => {
                    if reading.clock < asked.clock {
                        tracing::warn!("the store went back in time: all values are read anew");
                        self.forget_clocks(state, reading.clock);
                    }
                    self.heard.clock(reading.clock);
                    let reach = if asked.losses == self.heard.now().losses {
                        Reach::Read
                    } else {
                        Reach::ReadBefore
                    };
                    (waiting, moved) = self.read(state, keys, reading, reach, sent);
                    state.doubts.sweeping = state.doubts.sweeping.saturating_sub(keys.len());
                }
                // The search has gone past them.
                Err(_) => state.doubts.sweep_again = true,
            }
            let done = keys.iter().filter(|key| !waiting.contains(*key));
            self.loads.arrived(done, reading.is_ok());
            self.loads.read_ended(keys.len());
            self.continue_sweep(state);
            moved
        };
        self.slice.spend(keys.len() * 2);
        self.tell_watchers(&moved).await;
        self.slice.pause_if_due(&self.stats).await;
    }

    /// Takes a reading. Returns the keys whose values must wait for a batch, or for another reading.
    fn read(
        &self,
        state: &mut State,
        keys: &[Bytes],
        reading: &Reading,
        reach: Reach,
        sent: Sent,
    ) -> (HashSet<Bytes>, Moved) {
        let mut waiting = HashSet::new();
        let mut moved = Moved::default();
        let mut disputed = Vec::new();
        let watched = self.hub.borrow().watches_keys();
        let State {
            table,
            writer,
            doubts,
            ..
        } = state;
        for (key, value) in keys.iter().zip(&reading.values) {
            match value {
                Ok(value) => {
                    let (value, clock) = (*value, reading.clock);
                    let seen = table.observe(key, value, clock, reach, Some((&*writer, sent)));
                    if seen == Observed::Unsettled && doubts.unsettled.len() < UNSETTLED_MAX {
                        let seen = Unsettled {
                            value,
                            clock,
                            reach,
                            aged: false,
                            disputed: false,
                        };
                        keep_best(&mut doubts.unsettled, key, seen);
                        waiting.insert(key.clone());
                    }
                    let value = Some(value.unwrap_or(0));
                    note(seen, key, value, watched, &mut moved, &mut disputed);
                    self.known(table, key);
                }
                Err(error) => {
                    if let Some(bad) = bad_value(error) {
                        table.observe_bad(key, bad);
                    }
                }
            }
        }
        self.dispute(doubts, &disputed);
        (waiting, moved)
    }

    /// A value that had to wait for the batch of this key, if there is one.
    fn retry_one(
        &self,
        state: &mut State,
        key: &[u8],
        watched: bool,
        moved: &mut Moved,
        disputed: &mut Vec<Bytes>,
    ) {
        let Some((key, seen)) = state.doubts.unsettled.remove_entry(key) else {
            return;
        };
        if let Some(seen) = self.try_again(state, &key, seen, false, watched, moved, disputed) {
            state.doubts.unsettled.insert(key, seen);
        }
    }

    /// `Some`: it must wait on.
    #[allow(clippy::too_many_arguments)] // What is noted goes to those who watch and to those who ask.
    fn try_again(
        &self,
        state: &mut State,
        key: &Bytes,
        mut seen: Unsettled,
        tick: bool,
        watched: bool,
        moved: &mut Moved,
        disputed: &mut Vec<Bytes>,
    ) -> Option<Unsettled> {
        let deltas = (!(tick && seen.aged)).then_some((&state.writer, Sent::ANY));
        seen.aged |= tick;
        let (table, reach) = (&mut state.table, seen.reach);
        let observed = table.observe(key, seen.value, seen.clock, reach, deltas);
        if observed == Observed::Unsettled {
            return Some(seen);
        }
        let value = Some(seen.value.unwrap_or(0));
        note(observed, key, value, watched, moved, disputed);
        if seen.disputed {
            disputed.push(key.clone());
        }
        self.known(table, key);
        self.loads.arrived([key], true);
        None
    }

    /// Values that have waited for a whole tick are taken as they are, so that a store that is slow to
    /// answer this node does not hide what others do; and the search goes on.
    pub(super) async fn tick_view(&self) {
        let (waiting, forgotten) = {
            let doubts = &mut self.state.borrow_mut().doubts;
            let waiting: Vec<_> = doubts.unsettled.drain().collect();
            (waiting, doubts.forgotten)
        };
        let mut waiting = waiting.into_iter().peekable();
        while waiting.peek().is_some() {
            let mut moved = Moved::default();
            let mut disputed = Vec::new();
            {
                let state = &mut *self.state.borrow_mut();
                if state.doubts.forgotten != forgotten {
                    break; // Their clocks hold no more.
                }
                let watched = self.hub.borrow().watches_keys();
                for (key, seen) in waiting.by_ref().take(SLICE_KEYS) {
                    let (moved, disputed) = (&mut moved, &mut disputed);
                    let again = self.try_again(state, &key, seen, true, watched, moved, disputed);
                    if let Some(seen) = again {
                        keep_best(&mut state.doubts.unsettled, &key, seen);
                    }
                }
                self.dispute(&mut state.doubts, &disputed);
            }
            self.slice.spend(SLICE_KEYS);
            self.tell_watchers(&moved).await;
            self.slice.pause_if_due(&self.stats).await;
        }
        let state = &mut *self.state.borrow_mut();
        // A step whose keys were asked for by others ends without a reading of its own.
        state.doubts.sweeping = 0;
        state.doubts.sweep_left = SWEEP_KEYS_A_SECOND;
        if std::mem::take(&mut state.doubts.sweep_again) {
            state.doubts.sweep = Some(StaleSweep::default());
        }
        self.continue_sweep(state);
    }

    /// Messages were lost, or may have been: every value held is to be read anew. While a search for an
    /// earlier loss goes on, the one for this follows it.
    pub(super) fn mark_stale(&self, state: &mut State) {
        self.heard.loss();
        for seen in state.doubts.unsettled.values_mut() {
            if seen.reach == Reach::Read {
                seen.reach = Reach::ReadBefore;
            }
        }
        if state.doubts.sweep.is_some() {
            state.doubts.stale_again = true;
            return;
        }
        state.table.mark_stale();
        state.doubts.sweep = Some(StaleSweep::default());
        self.continue_sweep(state);
    }

    /// One bounded step of reading stale values anew; the next follows when it is answered, or in the
    /// next second.
    fn continue_sweep(&self, state: &mut State) {
        let doubts = &mut state.doubts;
        if doubts.sweeping > 0 || doubts.sweep_left == 0 {
            return;
        }
        let Some(sweep) = &mut doubts.sweep else {
            return;
        };
        let mut keys = Vec::new();
        let more = state.table.next_stale(sweep, SWEEP_KEYS, &mut keys);
        self.slice.spend(SWEEP_KEYS);
        if !more {
            doubts.sweep = None;
            if std::mem::take(&mut doubts.stale_again) {
                state.table.mark_stale();
                doubts.sweep = Some(StaleSweep::default());
            }
        }
        if keys.is_empty() {
            // Nothing here: looks on at the next message or tick, with clients in between.
            self.sweep_wanted.notify_one();
            return;
        }
        doubts.sweeping = keys.len();
        doubts.sweep_left = doubts.sweep_left.saturating_sub(keys.len());
        self.stats.rereads_total.add(keys.len() as u64);
        let keys: Vec<Bytes> = keys.into_iter().map(Bytes::from).collect();
        if !self.loads.ask(OWN, &keys) {
            doubts.sweep_again = true;
        }
    }

    /// Goes on with a search that found nothing in its last step.
    pub(super) async fn sweep_on(&self) {
        self.slice.pause_if_due(&self.stats).await;
        self.continue_sweep(&mut self.state.borrow_mut());
    }

    /// A message's clock was ahead of the store's own for these keys: they are read anew.
    fn dispute(&self, doubts: &mut Doubts, keys: &[Bytes]) {
        if keys.is_empty() {
            return;
        }
        self.stats.disputed_total.add(keys.len() as u64);
        self.loads.ask(OWN, keys);
        let store = self.heard.now().clock;
        if let Some((node, clock)) = doubts
            .claim
            .take_if(|(_, clock)| *clock > store + AHEAD_MAX)
        {
            self.notices.false_claim(node, clock, store);
        }
    }

    /// Whoever waits for this key's value can be answered, if it is known now.
    fn known(&self, table: &Table, key: &[u8]) {
        self.loads
            .known(key, || table.view(key).filter(|view| view.known));
    }

    /// The store went back in time: no clock holds any more.
    pub(super) fn forget_clocks(&self, state: &mut State, clock: u64) {
        state.table.forget_clocks();
        let unsettled = state.doubts.unsettled.drain();
        let keys: Vec<Bytes> = unsettled.map(|(key, _)| key).collect();
        self.loads.arrived(&keys, true); // They may be asked for again.
        state.doubts.forgotten += 1;
        self.heard.restart(clock);
    }

    /// Tells those who watch single counters, if there are any.
    async fn tell_watchers(&self, moved: &Moved) {
        let mut at = 0;
        for &(len, value) in &moved.values {
            let key = &moved.keys[at..at + len];
            at += len;
            if !self.access.borrow().keys.allow(key) {
                continue; // Other nodes' clients may use others.
            }
            let channel = [KEY_CHANNEL, key].concat();
            self.publish(&channel, value.to_string().as_bytes()).await;
        }
    }
}

/// Notes what became of a value that the store itself told.
fn note(
    seen: Observed,
    key: &[u8],
    value: Option<i64>,
    watched: bool,
    moved: &mut Moved,
    disputed: &mut Vec<Bytes>,
) {
    let Observed::Taken {
        moved: is_moved,
        disputed: is_disputed,
    } = seen
    else {
        return;
    };
    if let Some(value) = value
        && watched
        && is_moved
    {
        moved.push(key, value);
    }
    if is_disputed {
        disputed.push(Bytes::copy_from_slice(key));
    }
}

/// Of two values that wait for the same batch the newer; but a message does not replace a reading, it
/// only makes for another one.
fn keep_best(unsettled: &mut HashMap<Bytes, Unsettled>, key: &[u8], new: Unsettled) {
    let Some(known) = unsettled.get_mut(key) else {
        unsettled.insert(Bytes::copy_from_slice(key), new);
        return;
    };
    let (was_read, is_read) = (
        known.reach != Reach::Announced,
        new.reach != Reach::Announced,
    );
    match (was_read, is_read) {
        (true, false) => known.disputed |= new.clock > known.clock,
        (false, true) => {
            let disputed = known.clock > new.clock;
            *known = Unsettled { disputed, ..new };
        }
        _ if new.clock > known.clock || (is_read && new.clock == known.clock) => {
            let disputed = known.disputed | new.disputed;
            *known = Unsettled { disputed, ..new };
        }
        _ => known.disputed |= new.disputed,
    }
}

fn bad_value(error: &KeyError) -> Option<BadValue> {
    match error {
        KeyError::WrongType => Some(BadValue::WrongType),
        KeyError::NotInteger => Some(BadValue::NotInteger),
        _ => None,
    }
}
