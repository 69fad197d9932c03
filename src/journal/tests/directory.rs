//! Whose directory it is, and what in it is none of our business.

use super::super::JournalError;
use super::super::format::{RECORDS_AT, record_bytes};
use super::*;
use crate::counters::RecordError;

fn refusal(path: &Path) -> JournalError {
    match Directory::open(path, 2, BYTES_MAX) {
        Ok(_) => panic!("opened"),
        Err(error) => error,
    }
}

/// A directory with one record in segment 1, of a process that was killed.
fn sample() -> tempfile::TempDir {
    let dir = scratch();
    let (_, _, mut writer) = open(dir.path(), 2);
    writer.append(b"a", 1).unwrap();
    dir
}

fn contents(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(path.join("segments"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// Protection: the lock. Two daemons in one directory would both send its batches.
#[test]
fn a_second_daemon_is_refused_until_the_first_is_gone() {
    let dir = sample();
    let held = open(dir.path(), 2);
    let error = refusal(dir.path());
    assert!(matches!(error, JournalError::Locked { .. }), "{error}");
    assert!(error.to_string().contains("node.state_dir"), "{error}");
    drop(held);
    drop(open(dir.path(), 2));
}

/// Protection: the node id in each segment. A copied segment would be counted twice, by two nodes.
#[test]
fn a_segment_of_another_node_is_refused_and_nothing_is_touched() {
    let (dir, other) = (sample(), sample());
    let name = "segments/0000000000000001.seg";
    fs::copy(
        other.path().join(name),
        dir.path().join("segments/0000000000000009.seg"),
    )
    .unwrap();
    let before = contents(dir.path());
    let error = refusal(dir.path());
    assert!(matches!(error, JournalError::Foreign { .. }), "{error}");
    assert_eq!(contents(dir.path()), before);
    assert!(!dir.path().join("damaged").exists());
}

/// Protection: the format's number. An older tallyd must not take a newer segment for damaged.
#[test]
fn a_newer_format_is_refused_with_a_way_out_and_nothing_is_touched() {
    let dir = sample();
    let path = dir.path().join("segments/0000000000000001.seg");
    let mut bytes = fs::read(&path).unwrap();
    bytes[8..12].copy_from_slice(&2_u32.to_le_bytes());
    let check = xxhash_rust::xxh3::xxh3_64(&bytes[..48]);
    bytes[48..56].copy_from_slice(&check.to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    let before = contents(dir.path());
    let error = refusal(dir.path());
    assert!(matches!(error, JournalError::Newer { .. }), "{error}");
    let text = error.to_string();
    for words in [
        "0000000000000001.seg",
        "format 2",
        "reads format 1",
        "start the newer tallyd",
    ] {
        assert!(text.contains(words), "{text}");
    }
    assert_eq!(contents(dir.path()), before);
}

/// Protection: a node file is never made up where one was: a new id would begin a new token, and
/// what is retained would be sent again.
#[test]
fn a_node_file_that_is_broken_or_gone_is_refused() {
    for text in [
        "",
        "{}",
        r#"{"format":2,"node":"0","runs":[]}"#,
        r#"{"format":1,"node":"x","runs":[]}"#,
        r#"{"format":1,"node":"0","runs":["y"]}"#,
    ] {
        let dir = sample();
        fs::write(dir.path().join("node.json"), text).unwrap();
        let error = refusal(dir.path());
        assert!(matches!(error, JournalError::Node { .. }), "{error}");
        assert_eq!(
            fs::read_to_string(dir.path().join("node.json")).unwrap(),
            text
        );
    }
    let dir = sample();
    fs::remove_file(dir.path().join("node.json")).unwrap();
    let error = refusal(dir.path());
    assert!(matches!(error, JournalError::Node { .. }), "{error}");
    assert!(error.to_string().contains("there are segments"), "{error}");
}

#[test]
fn a_node_keeps_its_id_and_remembers_its_runs_and_its_claim() {
    let dir = scratch();
    let (mut directory, _, _) = open(dir.path(), 2);
    let first = directory.identity();
    assert!(!directory.ever_claimed());
    directory.note_server("a server").unwrap();
    drop(directory);
    for runs in 2..70 {
        let (directory, ..) = open(dir.path(), 2);
        assert_eq!(directory.identity().node, first.node);
        assert_ne!(directory.identity().run, first.run);
        assert_eq!(directory.runs().len(), runs.min(64));
        assert_eq!(directory.runs().last(), Some(&directory.identity().run));
        assert!(directory.ever_claimed());
        assert_eq!(directory.server(), Some("a server"));
    }
}

#[test]
fn unknown_files_are_left_alone() {
    let dir = sample();
    let unknown = [
        "segments/notes.txt",
        "segments/x.seg",
        "segments/1.seg.bak",
        "more",
    ];
    for name in unknown {
        fs::write(dir.path().join(name), "mine").unwrap();
    }
    let (_, recovery, _) = open(dir.path(), 2);
    assert_eq!(recovery.damage, Vec::<String>::new());
    for name in unknown {
        assert_eq!(fs::read_to_string(dir.path().join(name)).unwrap(), "mine");
    }
}

/// What is no segment, under a segment's name: kept, reported, and its number not given again.
#[test]
fn a_file_that_is_no_segment_is_set_aside() {
    let dir = sample();
    fs::write(dir.path().join("segments/0000000000000044.seg"), "mine").unwrap();
    for _ in 0..2 {
        let (_, recovery, writer) = open(dir.path(), 2);
        assert_eq!(batches(&recovery), [(1, vec![(b"a".to_vec(), 1)])]);
        assert_eq!(writer.number(), 45);
        // As if the process had ended before it made this one.
        fs::remove_file(dir.path().join("segments/0000000000000045.seg")).unwrap();
    }
    let kept = dir.path().join("damaged/0000000000000044.whole.seg");
    assert_eq!(fs::read_to_string(kept).unwrap(), "mine");
}

/// Protection: `bytes_max`. What is pending has a limit, and at it the segment still works.
#[test]
fn at_its_limit_a_segment_refuses_new_keys_only() {
    let dir = scratch();
    let (mut directory, _, mut writer) = Directory::open(dir.path(), 2, 64).unwrap();
    let a = writer.append(b"a", 1).unwrap();
    writer.append(b"b", 1).unwrap();
    assert_eq!(writer.append(b"c", 1), Err(RecordError::Limit));
    writer.add(a, 41).unwrap();
    writer.set_bytes_max(96);
    writer.append(b"c", 1).unwrap();
    let sealed = seal(&mut directory, &mut writer);
    let sum: i64 = sealed.deltas().map(|delta| delta.amount).sum();
    assert_eq!((sealed.records(), sum), (3, 44));
}

/// Protection: room for the table of batches is taken with each record, so that sealing cannot fail
/// for want of it.
#[test]
fn records_that_fill_the_file_to_its_last_byte_leave_room_for_the_table() {
    let dir = scratch();
    let path = dir.path().join("full.seg");
    let mut writer = Writer::create(&path, header(1, 1), BYTES_MAX, BYTES_INITIAL).unwrap();
    writer.begin(1);
    let room = fs::metadata(path).unwrap().len() as usize - RECORDS_AT;
    let records = (room / record_bytes(4)) as u32;
    for index in 0..records {
        writer.append(&index.to_be_bytes(), 1).unwrap();
    }
    assert_eq!(writer.bytes(), room);
    let sealed = writer.seal().unwrap();
    assert_eq!(sealed.last_batch(), u64::from(records));
    assert_eq!(sealed.deltas().count(), records as usize);
}

#[test]
fn a_segment_that_has_grown_many_times_seals_and_recovers() {
    let dir = scratch();
    let (_, _, mut writer) = Directory::open(dir.path(), 1, 64 << 20).unwrap();
    for index in 0..80_000_u32 {
        writer.append(&index.to_be_bytes(), 1).unwrap();
    }
    let bytes = fs::metadata(dir.path().join("segments/0000000000000001.seg"))
        .unwrap()
        .len();
    assert!(bytes > 2 << 20, "it has not grown: {bytes}");
    drop(writer);
    let (_, recovery, _) = Directory::open(dir.path(), 1, 64 << 20).unwrap();
    let segment = &recovery.segments[0];
    assert_eq!((segment.records(), segment.last_batch()), (80_000, 80_000));
    assert!((1..=80_000).all(|batch| segment.batch(batch).count() == 1));
}
