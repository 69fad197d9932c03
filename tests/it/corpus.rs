//! The kept corpus: inputs that are, or were, worth a thought, for each reader of bytes that come
//! from outside. None may panic, hang, or give something else than what its name says.
//!
//! The property tests beside the readers make up the rest.

use std::fs;
use std::path::PathBuf;

use tallyd::journal::examine::{Expected, examine};
use tallyd::journal::format::Header;
use tallyd::sync::message::Received;
use tallyd::wire::decode::{Decoder, Step};

fn files(kind: &str) -> Vec<(String, PathBuf)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/corpus")
        .join(kind);
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
        .collect();
    files.sort();
    assert!(files.len() > 10, "the corpus of {kind} is gone");
    files
}

/// Commands decoded until the input ends, and whether it ended in a refusal.
fn decode(bytes: &[u8], step: usize) -> (Vec<Vec<Vec<u8>>>, bool) {
    let mut decoder = Decoder::default();
    let mut commands = Vec::new();
    let (mut start, mut end) = (0, 0);
    loop {
        match decoder.decode(&bytes[start..end]) {
            Ok(Step::Command(used)) => {
                let args = decoder.args(&bytes[start..end]);
                commands.push(args.from(0).map(<[u8]>::to_vec).collect());
                start += used;
            }
            Ok(Step::Nothing(used)) => start += used,
            Ok(Step::Incomplete) if end == bytes.len() => return (commands, false),
            Ok(Step::Incomplete) => end = (end + step).min(bytes.len()),
            Err(_) => return (commands, true),
        }
    }
}

#[test]
fn the_decoder_takes_the_corpus_alike_however_it_is_cut() {
    for (name, path) in files("resp") {
        let bytes = fs::read(path).unwrap();
        let whole = decode(&bytes, usize::MAX / 2);
        for step in 1..8 {
            assert_eq!(
                decode(&bytes, step),
                whole,
                "{name}, {step} bytes at a time"
            );
        }
        let refused = [
            "array-overflow",
            "huge-array",
            "huge-bulk",
            "inline-open-quote",
            "leading-zero-length",
            "negative-bulk",
            "star-only",
            "wrong-type",
        ];
        if refused.contains(&&name[..]) {
            assert!(whole.1, "{name} is taken");
        }
        if ["incr", "incrby-min", "empty-lines", "inline-quotes"].contains(&&name[..]) {
            assert!(!whole.1 && whole.0.len() == 1, "{name}: {whole:?}");
        }
    }
}

#[test]
fn the_reader_of_segments_takes_the_corpus() {
    let golden = Header::decode(&fs::read("tests/corpus/segment/whole").unwrap()).unwrap();
    let expected = Expected {
        node: golden.node,
        number: golden.number,
        batch_keys: golden.batch_keys,
    };
    for (name, path) in files("segment") {
        let examined = examine(&path, expected);
        let sound = matches!(&examined, Ok(found) if found.damage.is_empty() && found.records > 0);
        assert_eq!(sound, name == "whole", "{name}: {examined:?}");
    }
}

#[test]
fn the_reader_of_messages_takes_the_corpus() {
    for (name, path) in files("message") {
        let bytes = fs::read(path).unwrap();
        let taken = Received::decode(&bytes).and_then(|message| message.announced());
        let sound = ["base64", "batch", "escapes", "heartbeat"].contains(&&name[..]);
        assert_eq!(taken.is_ok(), sound, "{name}: {taken:?}");
    }
}
