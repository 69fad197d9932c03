//! Keys that are to be read from the store, by who asked: who is read next.
//!
//! Clients are served in turn, [`TURN`] keys at a time, so that one that asks for very many holds up
//! nobody else; a first turn comes before all further ones.
//!
//! Invariants:
//! 1. A key that somebody waits for is in the queue of each client that asked for it, or under way.
//! 2. A key is under way once at a time.
//! 3. Who stands in a ring has keys queued, so that looking for the next ones is never a long search.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use bytes::Bytes;
use tokio::sync::Notify;

/// Keys of one read: it holds up others' commands in the store for so long.
pub const KEYS_MAX: usize = 1000;
/// Keys that a client is read at a time.
const TURN: usize = 100;
/// Further turns get at least so many of a read.
const FURTHER: usize = KEYS_MAX / 2;
/// Keys and their places that may be queued without anyone who waits, in bytes.
const UNAWAITED_BYTES_MAX: usize = 32 << 20;
/// What a queued key takes besides its bytes.
pub const KEY_BYTES: usize = 256;

/// Somebody who waits for keys.
#[derive(Debug, Default)]
pub struct Waiter {
    /// Keys that have not come.
    left: Cell<usize>,
    /// Whether one came since this was last asked.
    moved: Cell<bool>,
    done: Notify,
}

impl Waiter {
    /// Whether nothing is waited for.
    pub fn is_done(&self) -> bool {
        self.left.get() == 0
    }

    /// Whether a key came since this was last asked.
    pub fn has_moved(&self) -> bool {
        self.moved.replace(false)
    }

    /// Waits for the last key.
    pub async fn done(&self) {
        self.done.notified().await;
    }
}

#[derive(Debug, Default)]
struct Wanted {
    under_way: bool,
    /// Queues that it is in.
    queued: usize,
    waiters: Vec<Rc<Waiter>>,
    /// Whether it is part of `unawaited`.
    counted: bool,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Queue {
    keys: HashMap<Bytes, Wanted>,
    clients: HashMap<u64, VecDeque<Bytes>>,
    /// Clients that have not had a turn, then those that have.
    first: VecDeque<u64>,
    further: VecDeque<u64>,
    /// What is queued without anyone who waits.
    unawaited: usize,
}

fn bytes(key: &Bytes) -> usize {
    key.len() + KEY_BYTES
}

impl Queue {
    /// `client` wants `key`. `false`: nobody waits for it, and there is no room.
    pub fn push(&mut self, client: u64, key: &Bytes, waiter: Option<&Rc<Waiter>>) -> bool {
        if let Some(waiter) = waiter {
            waiter.left.set(waiter.left.get() + 1);
        } else if self.keys.contains_key(key) {
            return true;
        } else if self.unawaited + bytes(key) > UNAWAITED_BYTES_MAX {
            return false;
        }
        let wanted = self.keys.entry(key.clone()).or_default();
        if waiter.is_none() {
            wanted.counted = true;
            self.unawaited += bytes(key);
        }
        wanted.waiters.extend(waiter.cloned());
        if !wanted.under_way {
            wanted.queued += 1;
            let queue = self.clients.entry(client).or_insert_with(|| {
                self.first.push_back(client);
                VecDeque::new()
            });
            queue.push_back(key.clone());
        }
        true
    }

    /// Keys of first turns, as far as `limit`.
    pub fn first_keys(&self, limit: usize) -> usize {
        let mut keys = 0;
        for client in &self.first {
            keys += self.clients.get(client).map_or(0, VecDeque::len).min(TURN);
            if keys >= limit {
                return limit;
            }
        }
        keys
    }

    /// Keys of first turns alone; they are under way then.
    pub fn take_first(&mut self) -> Vec<Bytes> {
        let mut keys = Vec::new();
        self.take_turns(KEYS_MAX, true, &mut keys);
        keys
    }

    /// Keys of all turns; they are under way then.
    pub fn take(&mut self) -> Vec<Bytes> {
        let mut keys = Vec::new();
        let first = if self.further.is_empty() {
            KEYS_MAX
        } else {
            KEYS_MAX - FURTHER
        };
        self.take_turns(first, true, &mut keys);
        self.take_turns(KEYS_MAX, false, &mut keys);
        keys
    }

    fn take_turns(&mut self, limit: usize, first: bool, keys: &mut Vec<Bytes>) {
        while keys.len() < limit {
            let next = if first {
                self.first.pop_front()
            } else {
                self.further.pop_front()
            };
            let Some(client) = next else { return };
            let turn = TURN.min(limit - keys.len());
            let Some(queue) = self.clients.get_mut(&client) else {
                continue;
            };
            let mut taken = 0;
            while taken < turn
                && let Some(key) = queue.pop_front()
            {
                // Another client's turn may have been before.
                let Some(wanted) = self.keys.get_mut(&key) else {
                    continue;
                };
                wanted.queued = wanted.queued.saturating_sub(1);
                if !wanted.under_way {
                    wanted.under_way = true;
                    keys.push(key);
                    taken += 1;
                }
            }
            if queue.is_empty() {
                self.clients.remove(&client);
            } else {
                self.further.push_back(client);
            }
        }
    }

    /// The key was answered, well or not.
    pub fn arrived(&mut self, key: &Bytes) {
        let Some(wanted) = self.keys.remove(key) else {
            return;
        };
        self.forget(key, wanted.counted);
        for waiter in wanted.waiters {
            waiter.left.set(waiter.left.get() - 1);
            waiter.moved.set(true);
            if waiter.is_done() {
                waiter.done.notify_one();
            }
        }
    }

    /// `client` no longer wants what it has queued.
    pub fn cancel(&mut self, client: u64, waiter: Option<&Rc<Waiter>>) {
        let Some(queue) = self.clients.remove(&client) else {
            return;
        };
        self.first.retain(|other| *other != client);
        self.further.retain(|other| *other != client);
        for key in queue {
            let Some(wanted) = self.keys.get_mut(&key) else {
                continue;
            };
            wanted.queued = wanted.queued.saturating_sub(1);
            if let Some(waiter) = waiter {
                wanted.waiters.retain(|other| !Rc::ptr_eq(other, waiter));
            }
            if wanted.queued == 0 && !wanted.under_way && wanted.waiters.is_empty() {
                let counted = wanted.counted;
                self.keys.remove(&key);
                self.forget(&key, counted);
            }
        }
    }

    fn forget(&mut self, key: &Bytes, counted: bool) {
        if counted {
            self.unawaited -= bytes(key);
        }
    }

    /// Whether there are so many keys of further turns.
    pub fn has_further(&self, keys: usize) -> bool {
        let queues = self
            .further
            .iter()
            .filter_map(|client| self.clients.get(client));
        let mut sum = 0;
        queues.into_iter().any(|queue| {
            sum += queue.len();
            sum >= keys
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn key(number: usize) -> Bytes {
        Bytes::from(format!("key:{number}"))
    }

    fn ask(queue: &mut Queue, client: u64, keys: std::ops::Range<usize>) -> Rc<Waiter> {
        let waiter = Rc::default();
        for number in keys {
            assert!(queue.push(client, &key(number), Some(&waiter)));
        }
        waiter
    }

    #[test]
    fn one_that_asks_for_few_is_not_behind_one_that_asks_for_many() {
        let mut queue = Queue::default();
        let many = ask(&mut queue, 1, 0..50_000);
        let first: Vec<Bytes> = queue.take();
        assert_eq!(first.len(), KEYS_MAX);
        let few = ask(&mut queue, 2, 60_000..60_003);
        assert_eq!(queue.first_keys(64), 3);
        let next = queue.take_first();
        assert_eq!(next, [key(60_000), key(60_001), key(60_002)]);
        next.iter().for_each(|key| queue.arrived(key));
        assert!(few.is_done() && !many.is_done());
        first.iter().for_each(|key| queue.arrived(key));
        assert!(many.has_moved() && !many.has_moved());
    }

    #[test]
    fn further_turns_get_their_part_beside_first_ones() {
        let mut queue = Queue::default();
        ask(&mut queue, 1, 0..10_000);
        queue.take();
        for client in 2..100 {
            let from = 10_000 + client as usize * 100;
            ask(&mut queue, client, from..from + 100);
        }
        let further = queue.take();
        let further = further
            .iter()
            .filter(|key| !key.starts_with(b"key:1") || key.len() < 9);
        assert!(further.count() >= FURTHER);
    }

    // The story: a store that stood still let those who gave up pile up in the ring, and each further key
    // went through all of them.
    #[test]
    fn those_who_gave_up_are_not_gone_through() {
        let mut queue = Queue::default();
        for client in 1..100 {
            let waiter = ask(&mut queue, client, 0..3);
            queue.cancel(client, Some(&waiter));
        }
        assert!(queue.first.is_empty() && queue.further.is_empty());
    }

    #[test]
    fn what_nobody_waits_for_is_bounded() {
        let mut queue = Queue::default();
        let taken = (0..1_000_000).take_while(|&number| queue.push(0, &key(number), None));
        let taken = taken.count();
        assert!((50_000..200_000).contains(&taken), "{taken}");
        assert!(queue.push(0, &key(0), None), "it is queued already");
        queue.cancel(0, None);
        assert_eq!(queue.unawaited, 0);
        assert!(queue.keys.is_empty());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Ask(u64, std::ops::Range<usize>),
        Tell(u64, std::ops::Range<usize>),
        Take(bool),
        Arrive,
        Cancel(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let keys = || (0..300_usize, 1..200_usize).prop_map(|(from, count)| from..from + count);
        prop_oneof![
            (1..5_u64, keys()).prop_map(|(client, keys)| Step::Ask(client, keys)),
            (0..5_u64, keys()).prop_map(|(client, keys)| Step::Tell(client, keys)),
            any::<bool>().prop_map(Step::Take),
            Just(Step::Arrive),
            (1..5_u64).prop_map(Step::Cancel),
        ]
    }

    proptest! {
        // Nobody waits for ever: once all that is taken has arrived, and all is taken, all waiters that
        // did not leave are done. No key is under way twice.
        #[test]
        fn whoever_waits_is_served(steps in proptest::collection::vec(step(), 0..60)) {
            let mut queue = Queue::default();
            let mut waiters: HashMap<u64, Rc<Waiter>> = HashMap::new();
            let mut under_way: HashSet<Bytes> = HashSet::new();
            for step in steps {
                match step {
                    // A client waits for one group at a time.
                    Step::Ask(client, keys) if !waiters.contains_key(&client) => {
                        waiters.insert(client, ask(&mut queue, client, keys));
                    }
                    Step::Ask(..) => {}
                    Step::Tell(client, keys) => {
                        for number in keys {
                            queue.push(client, &key(number), None);
                        }
                    }
                    Step::Take(first) => {
                        let keys = if first { queue.take_first() } else { queue.take() };
                        prop_assert!(keys.len() <= KEYS_MAX);
                        for key in keys {
                            prop_assert!(under_way.insert(key));
                        }
                    }
                    Step::Arrive => under_way.drain().for_each(|key| queue.arrived(&key)),
                    Step::Cancel(client) => {
                        let waiter = waiters.remove(&client);
                        queue.cancel(client, waiter.as_ref());
                    }
                }
            }
            loop {
                let keys = queue.take();
                if keys.is_empty() && under_way.is_empty() {
                    break;
                }
                under_way.extend(keys);
                under_way.drain().for_each(|key| queue.arrived(&key));
            }
            for (client, waiter) in &waiters {
                prop_assert!(waiter.is_done(), "{client} waits for {}", waiter.left.get());
            }
            prop_assert!(queue.keys.is_empty() && queue.clients.is_empty());
            prop_assert_eq!(queue.unawaited, 0);
        }
    }
}
