//! A process that ends between any two stores to the map.

use super::super::format::{
    APPLIED_AT, END_AT, FIRST_BATCH_AT, FIRST_BATCH_COPY_AT, RECORD_HEAD, RECORDS_AT, SEALED_AT,
    cell_check, record_bytes, record_check, record_seed,
};
use super::super::segment::batch_table;
use super::*;

const KEY: &[u8] = b"the-next-key";

/// A segment with two records that is open, as bytes.
fn open_segment(dir: &Path) -> (Vec<u8>, usize) {
    let path = dir.join("open.seg");
    let mut writer = Writer::create(&path, header(3, 2), BYTES_MAX, BYTES_INITIAL).unwrap();
    writer.begin(10);
    writer.append(b"a", 1).unwrap();
    writer.append(b"b", 2).unwrap();
    let end = RECORDS_AT + writer.bytes();
    let mut bytes = fs::read(path).unwrap();
    bytes.truncate(end + 4096);
    (bytes, end)
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}

fn put_cell(bytes: &mut [u8], at: usize, value: u64) {
    let check = cell_check(header(3, 2).salt(), at, value);
    put(bytes, at, &value.to_le_bytes());
    put(bytes, at + 8, &check.to_le_bytes());
}

/// Protection: `end` moves after the record. Were it the other way round, recovery would report
/// damage after an ordinary kill.
#[test]
fn a_kill_at_any_step_of_append_leaves_the_record_out_or_in() {
    let dir = scratch();
    let (before, end) = open_segment(dir.path());
    let salt = header(3, 2).salt();
    let check = record_check(record_seed(salt, end, KEY), 5);
    let new_end = end + record_bytes(KEY.len());
    let two = vec![(10, vec![(b"a".to_vec(), 1), (b"b".to_vec(), 2)])];
    let mut three = two.clone();
    three.push((11, vec![(KEY.to_vec(), 5)]));

    let mut bytes = before;
    let look = |bytes: &[u8], step: &str, batches: &Batches| {
        let found = examine_bytes(bytes, expected(3, 2)).unwrap();
        assert_eq!(&batches_of(bytes, &found, 10), batches, "{step}");
        assert_eq!(found.damage, Vec::<String>::new(), "{step}");
        assert!(!found.sealed, "{step}");
    };
    look(&bytes, "nothing written", &two);
    put(&mut bytes, end + 16, &(KEY.len() as u32).to_le_bytes());
    look(&bytes, "length written", &two);
    for written in 1..=KEY.len() {
        put(&mut bytes, end + RECORD_HEAD, &KEY[..written]);
        look(&bytes, "key written in part", &two);
    }
    put(&mut bytes, end, &5_i64.to_le_bytes());
    put(&mut bytes, end + 8, &check.to_le_bytes());
    look(&bytes, "record whole, end not moved", &two);
    put_cell(&mut bytes, END_AT, new_end as u64);
    look(&bytes, "end moved", &three);
    // The stores of sealing: the table, then the cell.
    let table = batch_table(&[256, (end / 16) as u32], salt);
    for written in 1..=table.len() {
        put(&mut bytes, new_end, &table[..written]);
        look(&bytes, "table written in part", &three);
    }
    put_cell(&mut bytes, SEALED_AT, 1 + 3);
    let found = examine_bytes(&bytes, expected(3, 2)).unwrap();
    assert!(found.sealed && found.damage.is_empty());
    assert_eq!(batches_of(&bytes, &found, 10), three);
}

/// Protection: the store of `append` itself, in its order, on the real map. The map's bytes are read
/// through the file after each call, as a killed process leaves them.
#[test]
fn what_append_and_add_leave_behind_is_sound_after_each_call() {
    let dir = scratch();
    let path = dir.path().join("open.seg");
    let mut writer = Writer::create(&path, header(3, 2), BYTES_MAX, BYTES_INITIAL).unwrap();
    writer.begin(1);
    let mut sum = 0;
    for index in 0..50_i64 {
        let place = writer
            .append(format!("key:{index}").as_bytes(), index)
            .unwrap();
        writer.add(place, -3 * index).unwrap();
        sum -= i128::from(2 * index);
        let found = examine_bytes(&fs::read(&path).unwrap(), expected(3, 2)).unwrap();
        assert_eq!((found.records, found.sum), (index as u32 + 1, sum));
        assert_eq!(found.damage, Vec::<String>::new());
    }
}

/// Protection: a file that its process had no time to write is no damage; a segment that was opened
/// and then emptied is.
#[test]
fn a_kill_at_any_step_of_creating_and_opening_is_no_damage() {
    let dir = scratch();
    let path = dir.path().join("s.seg");
    let mut writer = Writer::create(&path, header(3, 2), BYTES_MAX, BYTES_INITIAL).unwrap();
    let standby = fs::read(&path).unwrap();
    writer.begin(10);
    let begun = fs::read(&path).unwrap();
    let state = dir.path().join("state");
    drop(open(&state, 2));
    // The directory's own files are 1, and this one comes after it.
    let file = state.join("segments/0000000000000002.seg");
    let look = |bytes: &[u8]| {
        let again = dir.path().join("again");
        copy_directory(&state, &again);
        let node = super::super::directory::read_node(&again)
            .unwrap()
            .unwrap()
            .node;
        let bytes = renode(bytes, node, 2);
        fs::write(
            again.join("segments").join(file.file_name().unwrap()),
            bytes,
        )
        .unwrap();
        let (_, recovery, _) = open(&again, 2);
        assert_eq!(recovery.damage, Vec::<String>::new());
        assert!(recovery.segments.is_empty());
        fs::remove_dir_all(&again).unwrap();
        recovery.next_batch
    };
    assert_eq!(look(&[]), 1);
    assert_eq!(look(&vec![0; standby.len()]), 1);
    assert_eq!(look(&standby), 1);
    let mut bytes = standby;
    for at in [FIRST_BATCH_COPY_AT, FIRST_BATCH_AT, END_AT] {
        put(&mut bytes, at, &begun[at..at + 16]);
        assert_eq!(look(&bytes), 10, "cell {at} written");
    }
    assert_eq!(bytes, begun);
}

/// The same segment, of another node and number: all checks made anew.
fn renode(bytes: &[u8], node: NodeId, number: u64) -> Vec<u8> {
    let Ok(old) = Header::decode(bytes) else {
        return bytes.to_vec();
    };
    let new = Header {
        node,
        number,
        ..old
    };
    let mut renewed = bytes.to_vec();
    put(&mut renewed, 0, &new.encode());
    for at in [
        FIRST_BATCH_AT,
        FIRST_BATCH_COPY_AT,
        END_AT,
        SEALED_AT,
        APPLIED_AT,
    ] {
        if let Some(value) = format::cell(bytes, at, old.salt()).unwrap() {
            put(
                &mut renewed,
                at + 8,
                &cell_check(new.salt(), at, value).to_le_bytes(),
            );
        }
    }
    renewed
}
