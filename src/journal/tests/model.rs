//! Random histories against a list in memory.

use std::collections::HashMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::Sealed;
use super::*;
use crate::counters::RecordError;

#[derive(Debug, Clone)]
enum Step {
    Add {
        key: usize,
        amount: i64,
    },
    Seal,
    /// The store has taken one batch more.
    Apply,
    /// The store goes back by so many batches, as far as they are retained.
    RollBack(u64),
    /// Wholly applied segments are removed.
    Release,
    /// The process is gone, and another one starts.
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let amount = prop_oneof![
        8 => -1_000..1_000_i64,
        1 => any::<i64>(),
        1 => Just(i64::MAX),
    ];
    let step = prop_oneof![
        12 => (0..8_usize, amount).prop_map(|(key, amount)| Step::Add { key, amount }),
        2 => Just(Step::Seal),
        3 => Just(Step::Apply),
        1 => (1..4_u64).prop_map(Step::RollBack),
        1 => Just(Step::Release),
        2 => Just(Step::Reopen),
    ];
    vec(step, 1..40)
}

fn keys() -> impl Strategy<Value = Vec<Vec<u8>>> {
    vec(
        prop_oneof![
            4 => vec(any::<u8>(), 0..40),
            1 => vec(any::<u8>(), 0..1_100),
        ],
        8,
    )
}

/// What should be on the disk.
#[derive(Default)]
struct Model {
    batch_keys: usize,
    /// Segments, each a list of its batches.
    sealed: Vec<Batches>,
    open: Records,
    open_first: u64,
    applied: u64,
}

impl Model {
    fn seal(&mut self) {
        let records = std::mem::take(&mut self.open);
        let batches: Batches = (self.open_first..)
            .zip(records.chunks(self.batch_keys).map(<[_]>::to_vec))
            .collect();
        self.open_first += batches.len() as u64;
        if !batches.is_empty() {
            self.sealed.push(batches);
        }
    }

    /// What a recovery now would find.
    fn recovered(&self) -> (Batches, u64) {
        let mut after = Model {
            batch_keys: self.batch_keys,
            sealed: self.sealed.clone(),
            open: self.open.clone(),
            open_first: self.open_first,
            applied: self.applied,
        };
        after.seal();
        (after.sealed.concat(), after.open_first)
    }

    fn compare(&self, recovery: &Recovery) {
        let (expected, next_batch) = self.recovered();
        assert_eq!(batches(recovery), expected);
        assert_eq!(recovery.next_batch, next_batch);
        assert_eq!(recovery.applied, self.applied);
        assert_eq!(recovery.damage, Vec::<String>::new());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Protections, each taken out once: `end` moved in `append`; `batch_starts` kept in `append`;
    /// the check updated in `add`; the batch number carried on by empty segments; the applied cell.
    #[test]
    fn after_every_step_recovery_finds_what_was_written(
        steps in steps(),
        keys in keys(),
        batch_keys in 1..5_u32,
    ) {
        // Keys differ: one record a key and epoch is the table's promise, not the journal's.
        let keys: Vec<Vec<u8>> = keys.into_iter().enumerate()
            .map(|(index, mut key)| { if index > 0 { key.push(index as u8); } else { key.clear(); } key })
            .collect();
        let dir = scratch();
        let state = dir.path().join("state");
        let (mut directory, _, mut writer) = open(&state, batch_keys);
        directory.note_server("a server").unwrap();
        let mut model = Model { batch_keys: batch_keys as usize, open_first: 1, ..Model::default() };
        let mut sealed: Vec<Sealed> = Vec::new();
        let mut places: HashMap<usize, (u32, usize)> = HashMap::new();

        for (index, step) in steps.iter().enumerate() {
            match step {
                Step::Add { key, amount } => match places.get(key) {
                    None => {
                        let place = writer.append(&keys[*key], *amount).unwrap();
                        places.insert(*key, (place, model.open.len()));
                        model.open.push((keys[*key].clone(), *amount));
                    }
                    Some(&(place, at)) => {
                        let sum = model.open[at].1.checked_add(*amount);
                        let answer = sum.map(|_| ()).ok_or(RecordError::Overflow);
                        prop_assert_eq!(writer.add(place, *amount), answer);
                        model.open[at].1 = sum.unwrap_or(model.open[at].1);
                    }
                },
                Step::Seal if model.open.is_empty() => {}
                Step::Seal => {
                    sealed.push(seal(&mut directory, &mut writer));
                    model.seal();
                    places.clear();
                }
                Step::Apply => {
                    if let Some(segment) = sealed.iter().find(|s| s.last_batch() > model.applied) {
                        model.applied += 1;
                        segment.set_applied(model.applied).unwrap();
                    }
                }
                Step::RollBack(batches) => {
                    let oldest = sealed.first().map_or(model.open_first, Sealed::first_batch);
                    let to = model.applied.saturating_sub(*batches).max(oldest - 1);
                    if to < model.applied {
                        for segment in sealed.iter().filter(|s| s.first_batch() <= model.applied) {
                            segment.set_applied(to.max(segment.first_batch() - 1)).unwrap();
                        }
                        model.applied = to;
                    }
                }
                Step::Release => {
                    while sealed.first().is_some_and(|s| s.last_batch() <= model.applied) {
                        sealed.remove(0).keep().remove().unwrap();
                        model.sealed.remove(0);
                    }
                }
                Step::Reopen => {
                    drop((directory, writer));
                    let recovery;
                    (directory, recovery, writer) = open(&state, batch_keys);
                    model.compare(&recovery);
                    model.seal();
                    sealed = recovery.segments;
                    places.clear();
                }
            }
            // Another process, had this one been killed here: twice, to see that it is stable.
            let killed = dir.path().join(format!("killed-{index}"));
            copy_directory(&state, &killed);
            for other_batch_keys in [batch_keys, batch_keys + 1] {
                let (_, recovery, _) = open(&killed, other_batch_keys);
                model.compare(&recovery);
            }
            fs::remove_dir_all(&killed).unwrap();
        }
    }
}
