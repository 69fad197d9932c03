//! Readers beside a writer.

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::directory::segment_files;
use super::super::examine::{ExamineError, examine_live};
use super::super::format::{END_AT, RECORDS_AT, cell, record};
use super::super::segment::map_read;
use super::*;

/// Protection: `end` moves after the record, in `append` itself: with the two the other way round,
/// another core sees an end that has no record below it, and a kill would leave that behind.
#[test]
fn no_reader_ever_sees_an_end_without_its_record() {
    const RECORDS: usize = 20_000;
    let dir = scratch();
    for round in 0..10 {
        let path = dir.path().join(format!("{round}.seg"));
        let mut writer = Writer::create(&path, header(3, 2), BYTES_MAX, BYTES_INITIAL).unwrap();
        writer.begin(1);
        let file = fs::File::open(&path).unwrap();
        let map = map_read(&file, file.metadata().unwrap().len() as usize).unwrap();
        let salt = header(3, 2).salt();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut at, mut records) = (RECORDS_AT, 0);
                while records < RECORDS {
                    // Torn now and then: a cell is for a process that ended, not for a core.
                    let Ok(Some(end)) = cell(&map, END_AT, salt) else {
                        continue;
                    };
                    while at < end as usize {
                        let Some(record) = record(&map, at, end as usize, salt) else {
                            return Err(at);
                        };
                        at = record.next;
                        records += 1;
                    }
                }
                Ok(())
            });
            for index in 0..RECORDS as u32 {
                writer.append(&index.to_be_bytes(), 1).unwrap();
            }
            assert_eq!(reader.join().unwrap(), Ok(()));
        });
    }
}

/// A daemon shortens and removes files, and writes to what is being read. Reading instead of mapping,
/// and reading again, are for moments too short to be met at will: without either of them this
/// test still passes, so it shows that nothing is wrong, not that both are needed.
#[test]
fn a_directory_in_use_is_examined_without_false_alarm() {
    let dir = scratch();
    let (mut directory, _, mut writer) = open(dir.path(), 100);
    let node = directory.identity().node;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let path = dir.path();
        let done = &done;
        let reader = scope.spawn(move || {
            let mut examined = 0;
            while !done.load(Ordering::Relaxed) || examined < 50 {
                for (number, path) in segment_files(path).unwrap() {
                    let expected = Expected {
                        node,
                        number,
                        batch_keys: 100,
                    };
                    match examine_live(&path, expected) {
                        Ok(found) => assert_eq!(found.damage, Vec::<String>::new()),
                        // Removed, or just made.
                        Err(ExamineError::Io(_) | ExamineError::Blank) => {}
                        Err(error) => panic!("{error}"),
                    }
                    examined += 1;
                }
            }
        });
        for _ in 0..30 {
            let places: Vec<u32> = (0..1_000_u32)
                .map(|key| writer.append(&key.to_be_bytes(), 1).unwrap())
                .collect();
            for round in 0..200 {
                for &place in &places {
                    writer.add(place, round).unwrap();
                }
            }
            seal(&mut directory, &mut writer).keep().remove().unwrap();
        }
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
}
