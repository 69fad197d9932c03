//! A summary of a stream of weighted keys: the heaviest, each with bounds of its true weight.
//!
//! Space-Saving (Metwally, Agrawal, El Abbadi, 2005) as a mergeable summary (Agarwal et al., 2012).
//! Epochs come here added up already, so a key's weight in one is exact: the summary of an epoch is
//! its heaviest keys, and summaries are merged. That asks for no look-up per record, and errs less
//! than counting records one by one.
//!
//! With `N` the weight of all, `k` the keys kept and `t` the true weight of a key:
//! 1. `count - error <= t <= count` for a key that is kept.
//! 2. `t <= floor` for a key that is not.
//! 3. `(k + 1) * floor + sum of (count - floor) <= N`; so `floor <= N / (k + 1)`, and every key
//!    heavier than that is kept.
//!
//! Why merging holds 3: with `v = count - floor`, the two sums of `v` add up, as the two floors and
//! the two `N` do. Cutting back to `k` keys raises the floor by the `v` of the heaviest key that
//! goes; that takes as much from each of the `k` that stay, and from itself.

use std::cmp::Reverse;
use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_128;

/// So many bytes of a key are kept to be shown; keys are told apart by all of theirs.
pub const SHOWN_BYTES_MAX: usize = 256;

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct Summary {
    keys_max: usize,
    total: u64,
    floor: u64,
    /// By the hash of the whole key, which bounds the memory however long keys are. It could be
    /// made to collide on purpose: then one row of a page is wrong, and nothing else.
    keys: HashMap<u128, Weighed>,
}

/// One of the heaviest keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weighed {
    /// Its first bytes, at most [`SHOWN_BYTES_MAX`].
    pub shown: Box<[u8]>,
    /// How long it is.
    pub key_bytes: usize,
    /// It weighs no more than this,
    pub count: u64,
    /// and no less than `count - error`.
    pub error: u64,
}

impl Summary {
    /// Of nothing.
    pub fn new(keys_max: usize) -> Self {
        Summary {
            keys_max,
            total: 0,
            floor: 0,
            keys: HashMap::new(),
        }
    }

    /// Of one epoch, in which no key comes twice.
    pub fn of_epoch<'a>(keys_max: usize, epoch: impl Iterator<Item = (&'a [u8], u64)>) -> Self {
        let mut summary = Summary::new(keys_max);
        let mut heaviest = Vec::with_capacity(2 * keys_max);
        for (key, weight) in epoch {
            summary.total = summary.total.saturating_add(weight);
            // Most records of a large epoch end here.
            if weight <= summary.floor {
                continue;
            }
            heaviest.push((weight, key));
            // Sorting out only now and then is linear, in whatever order the weights come.
            if heaviest.len() == 2 * keys_max {
                summary.floor = cut(&mut heaviest, keys_max);
            }
        }
        if heaviest.len() > keys_max {
            summary.floor = cut(&mut heaviest, keys_max);
        }
        summary.keys = heaviest
            .into_iter()
            .map(|(count, key)| {
                let weighed = Weighed {
                    shown: key[..key.len().min(SHOWN_BYTES_MAX)].into(),
                    key_bytes: key.len(),
                    count,
                    error: 0,
                };
                (xxh3_128(key), weighed)
            })
            .collect();
        summary
    }

    /// Adds what another summary, of as many keys, has seen.
    pub fn merge(&mut self, mut other: Summary) {
        if other.total == 0 {
            return;
        }
        for (id, mine) in &mut self.keys {
            // What the other has not kept weighs at most its floor there, perhaps nothing.
            let (count, error) = other
                .keys
                .remove(id)
                .map_or((other.floor, other.floor), |theirs| {
                    (theirs.count, theirs.error)
                });
            mine.count = mine.count.saturating_add(count);
            mine.error = mine.error.saturating_add(error);
        }
        for (id, mut theirs) in other.keys {
            theirs.count = theirs.count.saturating_add(self.floor);
            theirs.error = theirs.error.saturating_add(self.floor);
            self.keys.insert(id, theirs);
        }
        self.total = self.total.saturating_add(other.total);
        self.floor = self.floor.saturating_add(other.floor);
        self.cut();
    }

    fn cut(&mut self) {
        if self.keys.len() <= self.keys_max {
            return;
        }
        let mut keys: Vec<_> = self.keys.drain().collect();
        keys.sort_unstable_by_key(|(id, key)| (Reverse(key.count), *id));
        self.floor = self.floor.max(keys[self.keys_max].1.count);
        keys.truncate(self.keys_max);
        self.keys.extend(keys);
    }

    /// What all keys weigh together.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// No key that is not kept weighs more.
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// The `count` heaviest, the heaviest first.
    pub fn heaviest(&self, count: usize) -> Vec<Weighed> {
        let mut keys: Vec<&Weighed> = self.keys.values().collect();
        keys.sort_unstable_by_key(|key| (Reverse(key.count), key.error, &key.shown));
        keys.into_iter().take(count).cloned().collect()
    }
}

/// Leaves the `count` heaviest of more than so many; the weight of the heaviest that is gone.
fn cut(heaviest: &mut Vec<(u64, &[u8])>, count: usize) -> u64 {
    heaviest.select_nth_unstable_by_key(count, |&(weight, _)| Reverse(weight));
    let (gone, _) = heaviest[count];
    heaviest.truncate(count);
    gone
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    type Epoch = BTreeMap<Vec<u8>, u64>;

    fn summary_of(keys_max: usize, epoch: &Epoch) -> Summary {
        let weights = epoch.iter().map(|(key, &weight)| (&key[..], weight));
        Summary::of_epoch(keys_max, weights)
    }

    /// What the module's documentation promises, against an exact count.
    fn check(summary: &Summary, keys_max: usize, truth: &Epoch) {
        let total: u64 = truth.values().sum();
        assert_eq!(summary.total(), total);
        let kept = summary.heaviest(usize::MAX);
        assert!(kept.len() <= keys_max);
        for key in &kept {
            let exact = truth[&key.shown.to_vec()];
            assert!(key.count >= exact, "{key:?} weighs {exact}");
            assert!(key.count - key.error <= exact, "{key:?} weighs {exact}");
            assert!(key.error <= summary.floor(), "{key:?}");
        }
        let keys = keys_max as u64;
        assert!(summary.floor() <= total / (keys + 1));
        for (key, &exact) in truth {
            let is_kept = kept.iter().any(|kept| *kept.shown == key[..]);
            assert!(is_kept || exact <= summary.floor(), "{key:?}: {exact}");
        }
        let above: u64 = kept.iter().map(|key| key.count - summary.floor()).sum();
        assert!((keys + 1) * summary.floor() + above <= total);
    }

    /// Few keys and small weights, so that ties, gaps and changes of rank are common; now and then
    /// a heavy one.
    fn epoch() -> impl Strategy<Value = Epoch> {
        let weight = prop_oneof![4 => 0..6_u64, 1 => 0..1000_u64];
        prop::collection::btree_map((0..60_u8).prop_map(|n| vec![b'k', n]), weight, 0..50)
    }

    proptest! {
        #[test]
        fn bounds_hold_over_any_epochs(
            keys_max in 1..12_usize,
            epochs in prop::collection::vec(epoch(), 0..12),
        ) {
            let mut summary = Summary::new(keys_max);
            let mut truth = Epoch::new();
            for epoch in &epochs {
                summary.merge(summary_of(keys_max, epoch));
                for (key, weight) in epoch {
                    *truth.entry(key.clone()).or_default() += weight;
                }
                check(&summary, keys_max, &truth);
            }
        }

        /// Two windows that have each been merged are merged again to be read.
        #[test]
        fn bounds_hold_over_merges_of_merges(
            keys_max in 1..12_usize,
            windows in prop::collection::vec(prop::collection::vec(epoch(), 0..5), 0..4),
        ) {
            let mut summary = Summary::new(keys_max);
            let mut truth = Epoch::new();
            for window in &windows {
                let mut merged = Summary::new(keys_max);
                for epoch in window {
                    merged.merge(summary_of(keys_max, epoch));
                    for (key, weight) in epoch {
                        *truth.entry(key.clone()).or_default() += weight;
                    }
                }
                summary.merge(merged);
            }
            check(&summary, keys_max, &truth);
        }

        #[test]
        fn nothing_is_uncertain_while_all_keys_have_room(
            epochs in prop::collection::vec(epoch(), 0..5),
        ) {
            let mut summary = Summary::new(60);
            for epoch in &epochs {
                summary.merge(summary_of(60, epoch));
            }
            prop_assert_eq!(summary.floor(), 0);
            prop_assert!(summary.heaviest(60).iter().all(|key| key.error == 0));
        }
    }

    #[test]
    fn the_heaviest_come_first_and_ties_have_an_order() {
        let epoch: Epoch = [("b", 5), ("a", 5), ("c", 9), ("d", 1)]
            .map(|(key, weight)| (key.as_bytes().to_vec(), weight))
            .into();
        let summary = summary_of(3, &epoch);
        let shown: Vec<_> = summary
            .heaviest(3)
            .iter()
            .map(|k| k.shown.clone())
            .collect();
        assert_eq!(shown, [&b"c"[..], b"a", b"b"].map(Box::from));
        assert_eq!((summary.total(), summary.floor()), (20, 1));
    }

    #[test]
    fn long_keys_are_cut_for_showing_and_still_told_apart() {
        let long = |last: u8| [&[b'x'; 2000][..], &[last]].concat();
        let (a, b) = (long(b'a'), long(b'b'));
        let summary = Summary::of_epoch(4, [(&a[..], 7), (&b[..], 3)].into_iter());
        let kept = summary.heaviest(4);
        assert_eq!((kept[0].count, kept[1].count), (7, 3));
        assert_eq!(kept[0].shown.len(), SHOWN_BYTES_MAX);
        assert_eq!(kept[0].key_bytes, 2001);
    }

    #[test]
    fn weights_at_the_end_of_the_range_do_not_wrap() {
        let mut summary = Summary::of_epoch(2, [(&b"a"[..], u64::MAX)].into_iter());
        summary.merge(Summary::of_epoch(2, [(&b"a"[..], 5)].into_iter()));
        assert_eq!(summary.heaviest(1)[0].count, u64::MAX);
        assert_eq!(summary.total(), u64::MAX);
    }
}
