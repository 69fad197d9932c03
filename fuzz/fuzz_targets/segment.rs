//! A journal's segment that anything may have happened to: examined without a panic, and what is told of
//! it is what it holds.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tallyd::journal::examine::{Expected, examine_bytes};
use tallyd::journal::format::{Header, RECORDS_AT};

/// A sound segment: the input is what changes in it.
const WHOLE: &[u8] = include_bytes!("../../tests/corpus/segment/whole");

fuzz_target!(|input: &[u8]| {
    let golden = Header::decode(WHOLE).expect("the corpus is sound");
    let expected = Expected {
        node: golden.node,
        number: golden.number,
        batch_keys: golden.batch_keys,
    };
    let check = |bytes: &[u8]| {
        if let Ok(found) = examine_bytes(bytes, expected) {
            assert!(found.end <= bytes.len().max(RECORDS_AT));
            assert!(found.records as usize <= bytes.len() / 16);
        }
    };
    check(input);
    // Places and bytes that are set there: most of what is read is sound then, as on a real disk.
    let mut bytes = WHOLE.to_vec();
    for change in input.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
        if let Some(byte) = bytes.get_mut(at) {
            *byte = change[2];
        }
    }
    check(&bytes);
});
