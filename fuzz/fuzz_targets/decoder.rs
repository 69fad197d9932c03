//! The RESP decoder against one that knows nothing of pieces: whole commands, however they are cut.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tallyd::wire::decode::{Decoder, FRAME_BYTES_MAX, LINE_BYTES_MAX, Step};

type Commands = Vec<Vec<Vec<u8>>>;

/// Commands until the input ends, and whether it ended in a refusal.
fn in_pieces(bytes: &[u8], piece: usize) -> (Commands, bool) {
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
            Ok(Step::Incomplete) => end = (end + piece).min(bytes.len()),
            Err(_) => return (commands, true),
        }
    }
}

enum Naive {
    Command(Vec<Vec<u8>>, usize),
    Nothing(usize),
    Incomplete,
    Refused,
    /// An inline command: its quoting is the decoder's own affair.
    Inline,
}

/// A line, without its end, and what comes after it.
fn line(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let end = at + bytes.get(at..)?.iter().position(|&byte| byte == b'\r')?;
    (end + 2 <= bytes.len()).then(|| (&bytes[at..end], end + 2))
}

fn number(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    let number: i64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

fn naive(bytes: &[u8]) -> Naive {
    match bytes.first() {
        None => return Naive::Incomplete,
        Some(b'*') => {}
        Some(_) => return Naive::Inline,
    }
    let Some((count, mut at)) = line(bytes, 1) else {
        return Naive::Incomplete;
    };
    let Some(count) = number(count).filter(|&count| count <= 1 << 20) else {
        return Naive::Refused;
    };
    if count <= 0 {
        return Naive::Nothing(at);
    }
    let mut args = Vec::new();
    for _ in 0..count {
        match bytes.get(at) {
            None => return Naive::Incomplete,
            Some(b'$') => {}
            Some(_) => return Naive::Refused,
        }
        let Some((len, next)) = line(bytes, at + 1) else {
            return Naive::Incomplete;
        };
        let Some(len) = number(len).filter(|len| (0..=FRAME_BYTES_MAX as i64).contains(len)) else {
            return Naive::Refused;
        };
        let end = next + len as usize;
        if end + 2 > FRAME_BYTES_MAX {
            return Naive::Refused;
        }
        if end + 2 > bytes.len() {
            return Naive::Incomplete;
        }
        args.push(bytes[next..end].to_vec());
        at = end + 2;
    }
    Naive::Command(args, at)
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&piece, bytes)) = bytes.split_first() else {
        return;
    };
    let (commands, refused) = in_pieces(bytes, usize::MAX / 2);
    let cut = in_pieces(bytes, usize::from(piece % 16) + 1);
    assert_eq!(cut, (commands.clone(), refused), "cut in pieces");
    if bytes.len() > LINE_BYTES_MAX {
        return; // The naive one has no limit of a line.
    }
    let (mut at, mut known) = (0, commands.iter());
    loop {
        match naive(&bytes[at..]) {
            Naive::Command(args, used) => {
                assert_eq!(known.next(), Some(&args));
                at += used;
            }
            Naive::Nothing(used) => at += used,
            Naive::Inline => return,
            end => {
                assert_eq!(known.next(), None);
                assert_eq!(refused, matches!(end, Naive::Refused));
                return;
            }
        }
    }
});
