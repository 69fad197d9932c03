//! Messages of the channel of deltas, from whoever may publish there.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tallyd::sync::message::Received;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(message) = Received::decode(bytes) {
        let _ = message.sender();
        let _ = message.is_empty();
        let _ = message.announced();
    }
});
