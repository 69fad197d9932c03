//! Bytes that change, go missing, or come from elsewhere.

use std::fs::File;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::directory::damaged_files;
use super::super::format::{
    APPLIED_AT, END_AT, FIRST_BATCH_AT, FIRST_BATCH_COPY_AT, RECORD_HEAD, RECORDS_AT, SEALED_AT,
    record, record_bytes,
};
use super::super::plan::{Circumstances, Fate, Found, plan};
use super::super::segment::table_bytes;
use super::*;

const BATCH_KEYS: u32 = 2;

/// After a mere kill, of a node that has a token in the store.
fn killed(node: NodeId) -> Circumstances {
    Circumstances {
        node,
        claimed: true,
        power_cut: false,
        unix_ms: 1,
    }
}

/// Two segments of one directory: 1 is sealed, 2 is open.
struct Sample {
    dir: tempfile::TempDir,
    node: NodeId,
    segments: [Vec<u8>; 2],
    /// By segment: batches as they were written.
    batches: [Batches; 2],
    next_batch: u64,
}

impl Sample {
    fn new() -> Self {
        let dir = scratch();
        let state = dir.path().join("state");
        let (mut directory, _, mut writer) = open(&state, BATCH_KEYS);
        directory.note_server("a server").unwrap();
        // Earlier batches are gone, so that a number taken for 1 is wrong.
        for _ in 0..4 {
            writer.append(b"gone", 1).unwrap();
            let sealed = seal(&mut directory, &mut writer);
            sealed.keep().remove().unwrap();
        }
        let keys: [&[u8]; 8] = [
            b"likes:42",
            b"",
            b"\xff\x00",
            &[b'k'; 40],
            b"e",
            b"f",
            b"g",
            b"h",
        ];
        let mut batches = [Vec::new(), Vec::new()];
        let mut number = 5;
        for (segment, keys) in [&keys[..5], &keys[5..]].into_iter().enumerate() {
            for keys in keys.chunks(BATCH_KEYS as usize) {
                let records = keys
                    .iter()
                    .map(|key| (key.to_vec(), 100 + key.len() as i64));
                batches[segment].push((number, records.collect()));
                number += 1;
            }
            for key in keys {
                writer.append(key, 100 + key.len() as i64).unwrap();
            }
            if segment == 0 {
                let sealed = seal(&mut directory, &mut writer);
                sealed.set_applied(5).unwrap();
            }
        }
        let node = directory.identity().node;
        let end = RECORDS_AT + writer.bytes();
        drop((directory, writer));
        let file = |number| state.join(format!("segments/{number:016}.seg"));
        // What follows the end is zeros, and short files are quick to damage.
        let open = File::options().write(true).open(file(6)).unwrap();
        open.set_len((end + 64).next_multiple_of(4096) as u64)
            .unwrap();
        let segments = [5, 6].map(|number| fs::read(file(number)).unwrap());
        Sample {
            dir,
            node,
            segments,
            batches,
            next_batch: number,
        }
    }

    fn numbered(segment: usize) -> u64 {
        5 + segment as u64
    }

    fn expected(&self, segment: usize) -> Expected {
        Expected {
            node: self.node,
            number: Self::numbered(segment),
            batch_keys: BATCH_KEYS,
        }
    }

    /// Where things are in a segment, and what they mean.
    fn meaning(&self, segment: usize) -> Vec<(std::ops::Range<usize>, Option<Vec<u8>>)> {
        let bytes = &self.segments[segment];
        let mut meaning = vec![(0..56, None)];
        for at in [
            FIRST_BATCH_AT,
            END_AT,
            SEALED_AT,
            APPLIED_AT,
            FIRST_BATCH_COPY_AT,
        ] {
            meaning.push((at..at + 16, None));
        }
        let mut at = RECORDS_AT;
        for (key, _) in self.batches[segment]
            .iter()
            .flat_map(|(_, records)| records)
        {
            meaning.push((at..at + RECORD_HEAD + key.len(), Some(key.clone())));
            at += record_bytes(key.len());
        }
        if segment == 0 {
            meaning.push((at..at + table_bytes(self.batches[0].len()), None));
        }
        assert!(meaning.iter().all(|(range, _)| range.end <= bytes.len()));
        meaning
    }

    /// What a recovery would do with the two segments' bytes.
    fn plan(&self, segments: [&[u8]; 2]) -> (Vec<Found>, super::super::plan::Plan) {
        let found: Vec<Found> = segments
            .iter()
            .enumerate()
            .map(|(segment, bytes)| Found {
                number: Self::numbered(segment),
                examined: examine_bytes(bytes, self.expected(segment)),
            })
            .collect();
        let plan = plan(&found, killed(self.node));
        (found, plan)
    }

    fn with<'a>(&'a self, segment: usize, damaged: &'a [u8]) -> [&'a [u8]; 2] {
        let mut both = [&self.segments[0][..], &self.segments[1][..]];
        both[segment] = damaged;
        both
    }

    /// Recovers a directory in which one segment has these bytes.
    fn recover(&self, segment: usize, damaged: &[u8]) -> (tempfile::TempDir, Recovery) {
        let dir = scratch();
        copy_directory(&self.dir.path().join("state"), dir.path());
        let number = Self::numbered(segment);
        let file = dir.path().join(format!("segments/{number:016}.seg"));
        fs::write(file, damaged).unwrap();
        let (_, recovery, _) = open(dir.path(), BATCH_KEYS);
        (dir, recovery)
    }

    fn without(&self, lost: Option<&[u8]>) -> Batches {
        let mut batches = self.batches.concat();
        for (_, records) in &mut batches {
            records.retain(|(key, _)| Some(&key[..]) != lost);
        }
        batches
    }
}

/// Protections, each taken out once: the check of a record, of a cell, of the table and of the
/// header; rebuilding the header; finding the table by its check.
#[test]
fn any_changed_bit_costs_the_record_that_it_is_in_at_most_and_is_noticed() {
    let sample = Sample::new();
    for segment in 0..2 {
        let mut bytes = sample.segments[segment].clone();
        for (range, key) in sample.meaning(segment) {
            for at in range {
                for flip in [1, 2, 4, 8, 16, 32, 64, 128, 255_u8] {
                    bytes[at] ^= flip;
                    let case = format!("segment {segment}, byte {at} ^ {flip:#x}");
                    let (found, plan) = sample.plan(sample.with(segment, &bytes));
                    let examined = found[segment].examined.as_ref().expect(&case);
                    assert!(!examined.damage.is_empty(), "{case}: not noticed");
                    let mut batches = Vec::new();
                    for (index, fate) in plan.fates.iter().enumerate() {
                        let Fate::Use { first_batch } = *fate else {
                            panic!("{case}: {fate:?}");
                        };
                        let all = sample.with(segment, &bytes);
                        let examined = found[index].examined.as_ref().expect(&case);
                        batches.extend(batches_of(all[index], examined, first_batch));
                    }
                    let mut expected = sample.without(key.as_deref());
                    // In a segment that was never sent, what is left may be grouped anew.
                    if segment == 1 && key.is_some() {
                        regroup(&mut batches, 8);
                        regroup(&mut expected, 8);
                    } else {
                        assert_eq!(plan.next_batch, sample.next_batch, "{case}");
                    }
                    assert_eq!(batches, expected, "{case}");
                    bytes[at] ^= flip;
                }
            }
        }
    }
}

/// Joins the batches from this number on.
fn regroup(batches: &mut Batches, from: u64) {
    let (before, after): (Batches, Batches) =
        batches.drain(..).partition(|(number, _)| *number < from);
    *batches = before;
    let records: Records = after.into_iter().flat_map(|(_, records)| records).collect();
    batches.push((from, records));
}

/// Protections: the copy to `damaged/` before a segment is mended; mending, without which the
/// header's damage is there for ever; stable boundaries.
#[test]
fn a_damaged_file_is_kept_and_mended_and_recovers_the_same_again() {
    let sample = Sample::new();
    for segment in 0..2 {
        for (range, key) in sample.meaning(segment) {
            let mut bytes = sample.segments[segment].clone();
            bytes[range.start + 1] ^= 0x55;
            let case = format!("segment {segment}, byte {}", range.start + 1);
            let (dir, first) = sample.recover(segment, &bytes);
            assert_eq!(first.damage.len(), 1, "{case}: {:?}", first.damage);
            let kept = damaged_files(dir.path()).unwrap();
            assert_eq!(kept.len(), 1, "{case}");
            assert_eq!(fs::read(&kept[0]).unwrap(), bytes, "{case}");
            let named = kept[0].display().to_string();
            assert!(
                first.damage[0].contains(&named),
                "{case}: {:?}",
                first.damage
            );

            let before = (batches(&first), first.next_batch, first.applied);
            drop(first);
            let (_, second, _) = open(dir.path(), BATCH_KEYS);
            let after = (batches(&second), second.next_batch, second.applied);
            assert_eq!(before, after, "{case}");
            // A lost record stays lost; the rest is mended.
            assert_eq!(second.damage.is_empty(), key.is_none(), "{case}");
            assert_eq!(damaged_files(dir.path()).unwrap().len(), 1, "{case}");
        }
    }
}

/// Protections: numbers are kept for batches whose records are lost; a number that nothing
/// tells is not guessed.
#[test]
fn a_file_cut_off_anywhere_keeps_what_is_whole_and_all_numbers() {
    let sample = Sample::new();
    for segment in 0..2 {
        let whole = &sample.segments[segment];
        let end = sample.meaning(segment).last().unwrap().0.end;
        for bytes in 1..end {
            let case = format!("segment {segment} cut to {bytes} bytes");
            let cut = &whole[..bytes];
            let (found, plan) = sample.plan(sample.with(segment, cut));
            if let Ok(examined) = &found[segment].examined {
                assert!(!examined.damage.is_empty(), "{case}: not noticed");
            }
            let mut left = Vec::new();
            for (index, fate) in plan.fates.iter().enumerate() {
                match *fate {
                    Fate::Use { first_batch } => {
                        let all = sample.with(segment, cut);
                        let mut padded = all[index].to_vec();
                        padded.resize(padded.len().max(RECORDS_AT), 0);
                        let examined = found[index].examined.as_ref().expect(&case);
                        left.extend(batches_of(&padded, examined, first_batch));
                    }
                    Fate::SetAside(_) => {
                        assert_eq!(index, segment, "{case}");
                        assert!(bytes < RECORDS_AT, "{case}: set aside");
                    }
                    Fate::Remove | Fate::Refuse => panic!("{case}: {fate:?}"),
                }
            }
            // Every record that is left has the number that it had, and all whole ones are left.
            let all = sample.batches.concat();
            for (number, records) in &left {
                let (_, original) = all.iter().find(|(n, _)| n == number).expect(&case);
                assert!(
                    records.iter().all(|record| original.contains(record)),
                    "{case}"
                );
            }
            let kept: usize = left.iter().map(|(_, records)| records.len()).sum();
            let cut_off = sample
                .meaning(segment)
                .iter()
                .filter(|(range, key)| key.is_some() && range.end.next_multiple_of(16) > bytes)
                .count();
            assert_eq!(kept, 8 - cut_off, "{case}");
            if segment == 0 && bytes >= RECORDS_AT {
                let examined = found[0].examined.as_ref().expect(&case);
                assert_eq!(examined.batch_starts.len(), 3, "{case}: numbers lost");
            }
            // No number is given twice, also when the token is ahead of what is left.
            let used = if segment == 0 { sample.next_batch } else { 8 };
            assert!(plan.next_batch >= used, "{case}: {}", plan.next_batch);
        }
    }
}

/// Protection: the second first-batch cell, where there is no neighbour that tells the number.
#[test]
fn a_segment_alone_tells_its_number_with_any_byte_of_it_changed() {
    let sample = Sample::new();
    for at in
        (FIRST_BATCH_AT..FIRST_BATCH_AT + 16).chain(FIRST_BATCH_COPY_AT..FIRST_BATCH_COPY_AT + 16)
    {
        let mut bytes = sample.segments[1].clone();
        bytes[at] ^= 0x10;
        let alone = [Found {
            number: Sample::numbered(1),
            examined: examine_bytes(&bytes, sample.expected(1)),
        }];
        let plan = plan(&alone, killed(sample.node));
        assert_eq!(plan.fates, [Fate::Use { first_batch: 8 }], "byte {at}");
        assert_eq!(plan.next_batch, sample.next_batch, "byte {at}");
    }
}

/// The story: the one segment left, idle, with one bad byte in its header. Batch numbers began
/// anew at 1, below the token; flushing stopped as if another daemon were at work.
/// Protection: numbers that begin far above when nothing tells the last one.
#[test]
fn numbers_that_are_lost_are_not_given_again() {
    let sample = Sample::new();
    // All of the header page, in the newest file, and no other one is there.
    let dir = scratch();
    copy_directory(&sample.dir.path().join("state"), dir.path());
    fs::remove_file(dir.path().join("segments/0000000000000005.seg")).unwrap();
    let mut bytes = sample.segments[1].clone();
    bytes[..RECORDS_AT].fill(0);
    fs::write(dir.path().join("segments/0000000000000006.seg"), &bytes).unwrap();
    let (directory, recovery, _) = open(dir.path(), BATCH_KEYS);
    let found = batches(&recovery);
    let records: Records = found
        .iter()
        .flat_map(|(_, records)| records.clone())
        .collect();
    let written: Records = sample.batches[1]
        .iter()
        .flat_map(|(_, r)| r.clone())
        .collect();
    assert_eq!(records, written);
    assert!(found[0].0 > 1 << 40, "{}", found[0].0);
    assert_eq!(recovery.next_batch, found.last().unwrap().0 + 1);
    assert_eq!(directory.numbered(), found.last().unwrap().0);

    // No file at all.
    let dir = scratch();
    copy_directory(&sample.dir.path().join("state"), dir.path());
    fs::remove_dir_all(dir.path().join("segments")).unwrap();
    let (_, recovery, _) = open(dir.path(), BATCH_KEYS);
    assert!(recovery.next_batch > 1 << 40);
    assert_eq!(recovery.applied, 0);
    assert_eq!(recovery.damage.len(), 1);
}

/// Protection: after a power cut a segment without its number may have been sent, and may lack its
/// youngest batches; neither the file behind it nor a fresh number is right, both could count twice.
#[test]
fn after_a_power_cut_a_segment_gets_no_number_that_may_be_too_high() {
    let sample = Sample::new();
    let mut bytes = sample.segments[0].clone();
    bytes[..RECORDS_AT].fill(0);
    let found = [(0, &bytes), (1, &sample.segments[1])].map(|(segment, bytes)| Found {
        number: Sample::numbered(segment),
        examined: examine_bytes(bytes, sample.expected(segment)),
    });
    let first = |fate: &Fate| match fate {
        Fate::Use { first_batch } => Some(*first_batch),
        _ => None,
    };
    let by_a_kill = plan(&found, killed(sample.node));
    assert!(by_a_kill.fates.iter().all(|fate| first(fate).is_some()));
    assert_eq!(by_a_kill.next_batch, sample.next_batch);

    let power_cut = Circumstances {
        power_cut: true,
        ..killed(sample.node)
    };
    let plan_of = |found: &[Found]| {
        let plan = plan(found, power_cut);
        assert!(plan.next_batch >= 1 << 20, "{}", plan.next_batch);
        plan.fates.iter().map(first).collect::<Vec<_>>()
    };
    let own = first(&by_a_kill.fates[1]);
    assert_eq!(plan_of(&found), [None, own]);
    assert_eq!(plan_of(&found[..1]), [None]);
    assert_eq!(plan_of(&[]), []);
}

/// Protection: a segment that was sealed, and whose boundaries are lost, is not sent under numbers
/// that may have been used for other records.
#[test]
fn a_sealed_segment_with_lost_boundaries_is_set_aside_whole() {
    let sample = Sample::new();
    let mut bytes = sample.segments[0].clone();
    bytes[RECORDS_AT] ^= 1;
    let table = sample.meaning(0).last().unwrap().0.start;
    bytes[table] ^= 1;
    let (dir, recovery) = sample.recover(0, &bytes);
    assert_eq!(batches(&recovery), sample.batches[1]);
    assert_eq!(recovery.next_batch, sample.next_batch);
    assert_eq!(
        fs::read(&damaged_files(dir.path()).unwrap()[0]).unwrap(),
        bytes
    );
}

/// Protection: batches are never numbered like those before them: the token would speak of both.
#[test]
fn a_segment_whose_numbers_are_taken_is_set_aside() {
    let dir = scratch();
    let found: Vec<Found> = [(1, 10), (2, 11)]
        .into_iter()
        .map(|(number, first_batch)| {
            let path = dir.path().join(number.to_string());
            let mut writer =
                Writer::create(&path, header(number, 1), BYTES_MAX, BYTES_INITIAL).unwrap();
            writer.begin(first_batch);
            writer.append(b"a", 1).unwrap();
            writer.append(b"b", 1).unwrap();
            drop(writer.seal().unwrap());
            Found {
                number,
                examined: examine_bytes(&fs::read(path).unwrap(), expected(number, 1)),
            }
        })
        .collect();
    let plan = plan(&found, killed(NODE));
    assert_eq!(plan.fates[0], Fate::Use { first_batch: 10 });
    assert!(matches!(&plan.fates[1], Fate::SetAside(why) if why.contains("numbered from 11")));
    assert!(plan.next_batch >= 12);
}

/// Protection: the salt, which ties a record to its node, segment and place.
#[test]
fn a_record_of_another_place_or_segment_is_refused() {
    let sample = Sample::new();
    let [one, two] = &sample.segments;
    let salt = |bytes: &[u8]| Header::decode(bytes).unwrap().salt();
    let first = record(one, RECORDS_AT, one.len(), salt(one)).unwrap();
    let whole = RECORDS_AT..first.next;
    for at in (RECORDS_AT..RECORDS_AT + 256).step_by(16) {
        let mut bytes = one.clone();
        bytes.copy_within(whole.clone(), at);
        let here = record(&bytes, at, bytes.len(), salt(one));
        assert_eq!(here.is_some(), at == RECORDS_AT, "moved to {at}");
    }
    let mut bytes = two.clone();
    bytes[whole.clone()].copy_from_slice(&one[whole]);
    assert_eq!(record(&bytes, RECORDS_AT, bytes.len(), salt(two)), None);
    // The whole segment under another's name: refused by its number.
    let (_, plan) = sample.plan([one, one]);
    assert!(matches!(&plan.fates[1], Fate::SetAside(why) if why.contains("is segment 5")));
}

fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
    let noise = vec(any::<u8>(), 0..12_000);
    let lengths =
        vec((0..80_000_u32).prop_map(u32::to_le_bytes), 0..4_000).prop_map(|words| words.concat());
    let mangled =
        (vec((0..8_192_usize, any::<u8>()), 0..40), 0..8_192_usize).prop_map(|(changes, cut)| {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/segment-v1.seg");
            let mut bytes = fs::read(path).unwrap();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            bytes.truncate(8_192 - cut / 2);
            bytes
        });
    let behind_a_header = vec(any::<u8>(), 4_040..9_000).prop_map(|mut bytes| {
        bytes.splice(..0, header(7, 2).encode());
        bytes
    });
    prop_oneof![noise, lengths, mangled, behind_a_header]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Reading must end, without a panic, on whatever lies there; and no record of the golden
    /// segment may come back changed. `tests/golden` is the corpus.
    #[test]
    fn any_bytes_can_be_examined(bytes in any_bytes()) {
        let golden: Records = vec![
            (b"likes:42".to_vec(), 8000),
            (vec![], i64::MIN),
            (b"\x00\xff\r\n".to_vec(), -1),
            (vec![b'k'; 12], i64::MAX),
            (vec![b'k'; 13], 0),
        ];
        let found = examine_bytes(&bytes, expected(7, 2));
        if let Ok(found) = &found {
            let mut padded = bytes.clone();
            padded.resize(padded.len().max(RECORDS_AT), 0);
            for (_, records) in batches_of(&padded, found, 1) {
                prop_assert!(records.iter().all(|record| golden.contains(record)));
            }
        }
        let found = [Found { number: 7, examined: found }];
        let plan = plan(&found, killed(NODE));
        prop_assert!(plan.next_batch > plan.applied);
    }
}

/// Protection: `KEY_BYTES_MAX`. Without it each 16 bytes of such a file are a record to be hashed to
/// its end: minutes for a large one.
#[test]
fn lengths_that_lie_do_not_make_reading_slow() {
    let mut bytes = header(7, 2).encode().to_vec();
    bytes.resize(RECORDS_AT, 0);
    let length = ((4 << 20) as u32).to_le_bytes();
    bytes.extend(length.iter().cycle().take(16 << 20));
    let began = std::time::Instant::now();
    let found = examine_bytes(&bytes, expected(7, 2)).unwrap();
    assert_eq!(found.records, 0);
    assert!(began.elapsed().as_secs() < 10, "{:?}", began.elapsed());
}
