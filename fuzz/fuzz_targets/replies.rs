//! What a server answers, in pieces of any size.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tallyd::store::redis::fuzzing::replies;

fuzz_target!(|bytes: &[u8]| {
    let Some((&piece, bytes)) = bytes.split_first() else {
        return;
    };
    let whole = replies(bytes, usize::MAX);
    let cut = replies(bytes, usize::from(piece % 16) + 1);
    assert_eq!(cut, whole, "cut in pieces");
});
