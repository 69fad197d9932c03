//! The journal against what may happen to it. Each test that guards a promise names the
//! protection that it was seen to fail without.

mod damage;
mod directory;
mod kill;
mod live;
mod model;

use std::fs;
use std::path::Path;

use super::examine::{Examined, Expected, examine_bytes};
use super::format::{self, Header};
use super::segment::{BYTES_INITIAL, Writer};
use super::{Directory, Recovery};
use crate::counters::Recorder;
use crate::store::NodeId;

/// Bytes of records that a segment may hold, more than any test here writes.
const BYTES_MAX: usize = 8 << 20;
const NODE: NodeId = NodeId(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);

/// Key and delta, in a batch's order.
type Records = Vec<(Vec<u8>, i64)>;
/// A batch's number and its records.
type Batches = Vec<(u64, Records)>;

/// In memory where that is to be had: what is tested here is what is written, not the disk.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn header(number: u64, batch_keys: u32) -> Header {
    Header {
        node: NODE,
        number,
        batch_keys,
        created_ms: 1_763_835_000_123,
    }
}

fn expected(number: u64, batch_keys: u32) -> Expected {
    Expected {
        node: NODE,
        number,
        batch_keys,
    }
}

/// Every batch of every segment, as a flush would send them.
fn batches(recovery: &Recovery) -> Batches {
    let mut batches = Vec::new();
    for segment in &recovery.segments {
        for number in segment.first_batch()..=segment.last_batch() {
            let records = segment
                .batch(number)
                .map(|delta| (delta.key.to_vec(), delta.amount))
                .collect();
            batches.push((number, records));
        }
    }
    batches
}

/// The batches in a file's bytes, found as [`Examined`] tells.
fn batches_of(bytes: &[u8], found: &Examined, first_batch: u64) -> Batches {
    let salt = found.header.salt();
    let mut bounds: Vec<usize> = found
        .batch_starts
        .iter()
        .map(|&at| at as usize * 16)
        .collect();
    bounds.push(found.end);
    bounds
        .windows(2)
        .zip(first_batch..)
        .map(|(bounds, number)| {
            let mut records = Vec::new();
            let mut at = bounds[0];
            while at < bounds[1] {
                if let Some(record) = format::record(bytes, at, bounds[1], salt) {
                    records.push((record.key.to_vec(), record.delta));
                    at = record.next;
                } else {
                    at += 16;
                }
            }
            (number, records)
        })
        .collect()
}

/// A state directory's files, to begin anew from after each damage.
fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to.join("segments")).unwrap();
    fs::copy(from.join("node.json"), to.join("node.json")).unwrap();
    for entry in fs::read_dir(from.join("segments")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join("segments").join(entry.file_name())).unwrap();
    }
}

fn open(path: &Path, batch_keys: u32) -> (Directory, Recovery, Writer) {
    Directory::open(path, batch_keys, BYTES_MAX).unwrap()
}

/// Ends the epoch as the flush stage does: the next segment is begun first.
fn seal(directory: &mut Directory, writer: &mut Writer) -> super::Sealed {
    let mut next = directory.create_segment(BYTES_MAX).unwrap();
    next.begin(writer.next_first_batch());
    std::mem::replace(writer, next).seal().unwrap()
}

/// A segment of five records in three batches, by hand: it pins the format.
fn golden(dir: &Path) -> Vec<u8> {
    let path = dir.join("golden.seg");
    let mut writer = Writer::create(&path, header(7, 2), BYTES_MAX, BYTES_INITIAL).unwrap();
    writer.begin(41);
    let first = writer.append(b"likes:42", 8731).unwrap();
    writer.append(b"", i64::MIN).unwrap();
    writer.append(b"\x00\xff\r\n", -1).unwrap();
    writer.append(&[b'k'; 12], i64::MAX).unwrap();
    writer.append(&[b'k'; 13], 0).unwrap();
    writer.add(first, -731).unwrap();
    let sealed = writer.seal().unwrap();
    sealed.set_applied(42).unwrap();
    fs::read(path).unwrap()
}

/// Protection: the format itself. A change to what is written or read, however symmetric, would
/// make journals of an older tallyd unreadable after an upgrade.
#[test]
fn format_1_is_as_the_golden_file_has_it() {
    let dir = scratch();
    let written = golden(dir.path());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/segment-v1.seg");
    let bytes = fs::read(path).unwrap();
    assert_eq!(bytes.len(), 8192);
    let differs = bytes.iter().zip(&written).position(|(a, b)| a != b);
    assert_eq!((differs, written.len()), (None, bytes.len()));

    let found = examine_bytes(&bytes, expected(7, 2)).unwrap();
    assert_eq!(found.header, header(7, 2));
    assert_eq!((found.first_batch, found.applied), (Some(41), Some(42)));
    assert_eq!((found.sealed, found.records), (true, 5));
    assert_eq!(
        found.sum,
        8000 - 1 + i128::from(i64::MIN) + i128::from(i64::MAX)
    );
    assert_eq!(found.damage, Vec::<String>::new());
    assert_eq!(
        batches_of(&bytes, &found, 41),
        [
            (41, vec![(b"likes:42".to_vec(), 8000), (vec![], i64::MIN)]),
            (
                42,
                vec![(b"\x00\xff\r\n".to_vec(), -1), (vec![b'k'; 12], i64::MAX)]
            ),
            (43, vec![(vec![b'k'; 13], 0)]),
        ]
    );
}
