//! The decoder against its own encoder, cut anywhere; the short way against the careful one.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

type Words = Vec<Vec<u8>>;

/// Feeds `bytes` as a connection does: what is not done with is kept and handed in again.
fn feed<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Words>, Option<ProtocolError>) {
    let mut decoder = Decoder::default();
    let mut held = Vec::new();
    let mut commands = Vec::new();
    for piece in pieces {
        held.extend_from_slice(piece);
        let mut at = 0;
        loop {
            let step = decoder.decode(&held[at..]);
            // The shortest argument takes six bytes, and a vector doubles.
            assert!(decoder.args.capacity() <= ARGS_KEPT.max(held.len() / 3));
            match step {
                Ok(Step::Command(used)) => {
                    let args = decoder.args(&held[at..]);
                    assert!(!args.is_empty());
                    commands.push((0..args.len()).map(|i| args.get(i).to_vec()).collect());
                    at += used;
                }
                Ok(Step::Nothing(used)) => at += used,
                Ok(Step::Incomplete) => break,
                Err(error) => return (commands, Some(error)),
            }
        }
        held.drain(..at);
    }
    (commands, None)
}

fn whole(bytes: &[u8]) -> (Vec<Words>, Option<ProtocolError>) {
    feed(std::iter::once(bytes))
}

fn bytewise(bytes: &[u8]) -> (Vec<Words>, Option<ProtocolError>) {
    feed(bytes.chunks(1))
}

fn array(words: &[Vec<u8>]) -> Vec<u8> {
    let mut out = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
    out
}

fn quoted(word: &[u8]) -> Vec<u8> {
    let mut out = vec![b'"'];
    for &byte in word {
        match byte {
            b'a'..=b'z' | b'\'' | b' ' => out.push(byte),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            _ => out.extend_from_slice(format!("\\x{byte:02X}").as_bytes()),
        }
    }
    out.push(b'"');
    out
}

/// A request's bytes, and the command that they are.
fn request() -> impl Strategy<Value = (Vec<u8>, Option<Words>)> {
    let word = || prop_oneof![4 => vec(any::<u8>(), 0..12), 1 => vec(any::<u8>(), 0..600)];
    let words = || vec(word(), 1..6);
    prop_oneof![
        4 => words().prop_map(|words| (array(&words), Some(words))),
        2 => (words(), prop_oneof![Just("\n"), Just("\r\n")]).prop_map(|(words, end)| {
            let line: Vec<Vec<u8>> = words.iter().map(|word| quoted(word)).collect();
            let mut line = line.join(&b" \t"[..]);
            line.extend_from_slice(end.as_bytes());
            (line, Some(words))
        }),
        1 => prop_oneof![Just("\r\n"), Just("\n"), Just("  \n"), Just("*0\r\n"), Just("*-1\r\n")]
            .prop_map(|nothing| (nothing.as_bytes().to_vec(), None)),
    ]
}

/// Bytes that look like requests more often than chance would have it.
fn near_requests() -> impl Strategy<Value = Vec<u8>> {
    let piece = proptest::sample::select(
        &[
            "*1\r\n",
            "*2\r\n$4\r\nINCR\r\n",
            "*3\r\n$6\r\nINCRBY\r\n",
            "$1\r\nk\r\n",
            "$0\r\n\r\n",
            "$-1\r\n",
            "\r\n",
            "PING\r\n",
            "\"a\\x4",
        ][..],
    );
    let byte = prop_oneof![
        6 => proptest::sample::select(&b"*$0123456789-\r\n \"'\\xINCRincr\0"[..]),
        1 => any::<u8>(),
    ];
    let part = prop_oneof![
        piece.prop_map(|text| text.as_bytes().to_vec()),
        vec(byte, 0..4)
    ];
    vec(part, 0..24).prop_map(|parts| parts.concat())
}

/// `INCR` and `INCRBY` as clients send them, some with one byte changed, dropped or doubled.
fn increments() -> impl Strategy<Value = Vec<u8>> {
    let key = prop_oneof![
        8 => vec(any::<u8>(), 0..40),
        1 => vec(any::<u8>(), 95..105),
        1 => vec(any::<u8>(), 990..1010),
    ];
    let name = proptest::sample::select(&["INCR", "incr", "iNcR", "INCRBY", "incrby", "DECR"][..]);
    let amount = prop_oneof![
        any::<i64>().prop_map(|amount| amount.to_string()),
        proptest::sample::select(&["0", "-0", "01", "+1", "", "1 ", "9223372036854775808"][..])
            .prop_map(str::to_owned),
    ];
    let change = (0..4_u8, any::<proptest::sample::Index>(), any::<u8>());
    (
        name,
        key,
        proptest::option::of(amount),
        proptest::option::of(change),
        vec(any::<u8>(), 0..8),
    )
        .prop_map(|(name, key, amount, change, tail)| {
            let mut words = vec![name.as_bytes().to_vec(), key];
            words.extend(amount.map(String::into_bytes));
            let mut frame = array(&words);
            if let Some((how, place, byte)) = change {
                let place = place.index(frame.len());
                let common = b"0123456789\r\n$*-"[usize::from(byte) % 15];
                match how {
                    0 => frame[place] = common,
                    1 => frame[place] = byte,
                    2 => drop(frame.remove(place)),
                    _ => frame.insert(place, common),
                }
            }
            frame.extend_from_slice(&tail);
            frame
        })
}

/// What the short way takes, the careful one must take alike.
fn agree(input: &[u8]) -> Result<bool, TestCaseError> {
    let Some(found) = increment(input) else {
        return Ok(false);
    };
    let Increment {
        key, amount, used, ..
    } = found;
    let mut decoder = Decoder::default();
    prop_assert_eq!(decoder.decode(input), Ok(Step::Command(used)));
    let args = decoder.args(input);
    prop_assert_eq!(decoder.place(1), Some(key));
    prop_assert_eq!(found.by, args.get(0).eq_ignore_ascii_case(b"INCRBY"));
    if args.get(0).eq_ignore_ascii_case(b"INCR") {
        prop_assert_eq!((args.len(), amount), (2, 1));
    } else {
        prop_assert!(args.get(0).eq_ignore_ascii_case(b"INCRBY"));
        prop_assert_eq!(args.len(), 3);
        prop_assert_eq!(parse_i64(args.get(2)), Some(amount));
    }
    Ok(true)
}

proptest! {
    // Fails without `bulk` or `missing` kept between calls, and with `searched` kept from one
    // command to the next.
    #[test]
    fn commands_are_the_same_however_their_bytes_are_cut(
        requests in vec(request(), 1..12),
        cuts in vec(any::<proptest::sample::Index>(), 0..12),
    ) {
        let bytes: Vec<u8> = requests.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
        let expected: Vec<Words> = requests.into_iter().filter_map(|(_, words)| words).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]);
        prop_assert_eq!(&feed(pieces), &(expected.clone(), None));
        prop_assert_eq!(&whole(&bytes), &(expected.clone(), None));
        prop_assert_eq!(&bytewise(&bytes), &(expected, None));
    }

    // Fails (panics) where a length is used before it is compared with what came.
    #[test]
    fn any_bytes_are_decoded_or_refused_and_alike_however_cut(bytes in near_requests()) {
        let (commands, error) = whole(&bytes);
        prop_assert_eq!(bytewise(&bytes), (commands, error.clone()));
        if let Some(error) = error {
            let text = error.to_string();
            prop_assert!(text.starts_with("Protocol error: "), "{}", text);
            prop_assert!(!text.contains(['\r', '\n']), "{:?}", text);
        }
    }

    // Fails without the refusal of leading zeros in `short_bulk` ("$05"), and without that of a
    // fourth digit ("$0005\n", which has no CR).
    #[test]
    fn the_short_way_takes_nothing_that_the_careful_one_takes_otherwise(
        input in prop_oneof![increments(), near_requests()],
    ) {
        agree(&input)?;
    }

    #[test]
    fn usual_increments_go_the_short_way(
        key in vec(any::<u8>(), 1..999),
        amount in proptest::option::of(any::<i64>()),
        tail in vec(any::<u8>(), 0..8),
    ) {
        let name = if amount.is_some() { "INCRBY" } else { "INCR" };
        let mut words = vec![name.as_bytes().to_vec(), key];
        words.extend(amount.map(|amount| amount.to_string().into_bytes()));
        let mut frame = array(&words);
        let len = frame.len();
        frame.extend_from_slice(&tail);
        prop_assert!(agree(&frame)?);
        for cut in [1, 2, len / 2, len] {
            prop_assert_eq!(increment(&frame[..len - cut]), None);
        }
    }
}

#[test]
fn lengths_that_only_the_short_way_took_are_left_to_the_careful_one() {
    for length in [
        "05",
        "005",
        "0005",
        "+5",
        "-5",
        "5 ",
        "\r5",
        "00000000005",
        "",
    ] {
        for end in ["\r\n", "\n", "\r", "\r\r\n"] {
            let frame = format!("*2\r\n$4\r\nINCR\r\n${length}{end}abcde\r\n*2\r\n");
            assert_eq!(increment(frame.as_bytes()), None, "{frame:?}");
        }
    }
}

// Fails where a mask for letters' case lets other bytes pass, or a byte of a length is taken for a
// digit that is none.
#[test]
fn no_byte_anywhere_parts_the_short_way_from_the_careful_one() {
    for mut frame in [
        b"*2\r\n$4\r\nINCR\r\n$1\r\n".to_vec(),
        b"*2\r\n$4\r\nincr\r\n$12\r\n".to_vec(),
        b"*2\r\n$4\r\nINCR\r\n$123\r\n".to_vec(),
        b"*3\r\n$6\r\nINCRBY\r\n$3\r\nabc\r\n$2\r\n17\r\n".to_vec(),
    ] {
        let head = frame.len();
        // Enough for whatever a wrong length comes to.
        frame.resize(head + 30_000, b'7');
        for place in 0..head {
            let kept = frame[place];
            for byte in 0..=255 {
                frame[place] = byte;
                agree(&frame).expect("alike");
            }
            frame[place] = kept;
        }
        assert!(agree(&frame).expect("alike"));
    }
}

#[test]
fn a_refusal_has_the_words_of_redis() {
    let long = vec![b'1'; LINE_BYTES_MAX + 1];
    let with_long = |start: &[u8]| [start, &long].concat();
    for (bytes, text) in [
        (b"*a\r\n".to_vec(), "invalid multibulk length"),
        (b"*01\r\n".to_vec(), "invalid multibulk length"),
        (b"*1048577\r\n".to_vec(), "invalid multibulk length"),
        (b"*1\r\n$-1\r\n".to_vec(), "invalid bulk length"),
        (b"*1\r\n$a\r\n".to_vec(), "invalid bulk length"),
        (b"*1\r\n$05\r\n".to_vec(), "invalid bulk length"),
        (b"*1\r\n$1048577\r\n".to_vec(), "invalid bulk length"),
        (b"*1\r\n:1\r\n".to_vec(), "expected '$', got ':'"),
        (b"*1\r\n\r\n".to_vec(), "expected '$', got ' '"),
        (b"*1\r\n\xff\r\n".to_vec(), "expected '$', got '?'"),
        (with_long(b"*"), "too big mbulk count string"),
        (with_long(b"*1\r\n$"), "too big bulk count string"),
        (with_long(b""), "too big inline request"),
        (b"GET \"a\r\n".to_vec(), "unbalanced quotes in request"),
        (b"GET \"a\"b\r\n".to_vec(), "unbalanced quotes in request"),
        (b"GET 'a\r\n".to_vec(), "unbalanced quotes in request"),
        (b"GET \"a\0\"\r\n".to_vec(), "unbalanced quotes in request"),
    ] {
        for (_, error) in [whole(&bytes), bytewise(&bytes)] {
            let error = error.expect("refused").to_string();
            assert_eq!(error, format!("Protocol error: {text}"));
        }
    }
}

#[test]
fn inline_commands_split_as_in_redis() {
    for (line, words) in [
        ("a b", &["a", "b"][..]),
        ("\x0b a\t\tb \x0c", &["a", "b"]),
        // Only blanks and tabs end a word.
        ("a\x0cb a\x0bb", &["a\x0cb", "a\x0bb"]),
        ("a\0b c", &["a"]),
        ("\0a", &[]),
        ("\"a b\" 'c d'", &["a b", "c d"]),
        ("a\"b c\"\x0bd", &["ab c", "d"]),
        (r#""\n\r\t\b\a\x41\x4\q\"""#, &["\n\r\t\x08\x07Ax4q\""]),
        (r"'\n\''", &[r"\n'"]),
        (r#""" ''"#, &["", ""]),
    ] {
        let expected: Words = words.iter().map(|word| word.as_bytes().to_vec()).collect();
        let expected = Vec::from_iter((!expected.is_empty()).then_some(expected));
        assert_eq!(
            whole(format!("{line}\r\n").as_bytes()),
            (expected, None),
            "{line:?}"
        );
    }
}

/// A request of exactly so many bytes: `ECHO` and one long argument.
fn frame_of(bytes: usize) -> Vec<u8> {
    let mut argument = vec![b'x'; bytes - 27];
    let frame = loop {
        let frame = array(&[b"ECHO".to_vec(), argument.clone()]);
        match frame.len().cmp(&bytes) {
            std::cmp::Ordering::Less => argument.push(b'x'),
            std::cmp::Ordering::Equal => break frame,
            std::cmp::Ordering::Greater => drop(argument.pop()),
        }
    };
    assert_eq!(frame.len(), bytes);
    frame
}

// The story: a request a little beyond the limit was taken when its last bytes came together with
// its end, and refused when they came alone. Likewise an inline request beyond its own.
#[test]
fn limits_do_not_depend_on_how_the_bytes_are_cut() {
    for (bytes, taken) in [(FRAME_BYTES_MAX, true), (FRAME_BYTES_MAX + 1, false)] {
        let frame = frame_of(bytes);
        for pieces in [bytes, 64 * 1024, 7777] {
            let (commands, error) = feed(frame.chunks(pieces));
            assert_eq!(commands.len(), usize::from(taken));
            assert_eq!(error, (!taken).then_some(ProtocolError::TooLarge));
        }
    }
    for (bytes, taken) in [(LINE_BYTES_MAX, true), (LINE_BYTES_MAX + 1, false)] {
        let mut line = vec![b'x'; bytes];
        line.push(b'\n');
        for pieces in [line.len(), 1000, 1] {
            let (commands, error) = feed(line.chunks(pieces));
            assert_eq!(commands.len(), usize::from(taken));
            assert_eq!(error, (!taken).then_some(ProtocolError::InlineLine));
        }
    }
}

// Bytes that were searched are changed behind the decoder's back, and it does not notice.
#[test]
fn what_was_searched_for_the_end_of_a_line_is_not_looked_at_again() {
    for (before, after) in [
        ("*11", "*\r\n1"),
        ("*1\r\n$11", "*1\r\n$\r\n1"),
        ("PING", "P\nNGS"),
    ] {
        let mut decoder = Decoder::default();
        for input in [before, after] {
            assert_eq!(decoder.decode(input.as_bytes()), Ok(Step::Incomplete));
        }
    }
}

// These would take minutes if what came before were looked at again with each byte.
#[test]
fn long_requests_a_byte_at_a_time_are_not_scanned_again() {
    let feed_bytes = |bytes: &[u8]| {
        let mut decoder = Decoder::default();
        (1..=bytes.len())
            .map(|end| decoder.decode(&bytes[..end]))
            .find(|step| *step != Ok(Step::Incomplete))
    };
    let frame = frame_of(FRAME_BYTES_MAX);
    assert_eq!(feed_bytes(&frame), Some(Ok(Step::Command(frame.len()))));
    let many = array(&vec![b"k".to_vec(); 100_000]);
    assert_eq!(feed_bytes(&many), Some(Ok(Step::Command(many.len()))));
    for start in ["*", "*1\r\n$", "GET "] {
        let line = [start.as_bytes(), &vec![b'1'; LINE_BYTES_MAX + 1]].concat();
        assert!(matches!(feed_bytes(&line), Some(Err(_))), "{start}");
    }
}

// An idle connection would hold 4 MiB after one large `MGET`.
#[test]
fn the_memory_of_a_large_request_is_given_back_when_the_next_is_asked_for() {
    let mut decoder = Decoder::default();
    let frame = array(&vec![b"k".to_vec(); 100_000]);
    assert_eq!(decoder.decode(&frame), Ok(Step::Command(frame.len())));
    assert_eq!(decoder.args(&frame).len(), 100_000);
    assert_eq!(decoder.decode(&[]), Ok(Step::Incomplete));
    assert!(decoder.args.capacity() <= ARGS_KEPT);
    let line = [&vec![b'k'; 50_000][..], b"\n"].concat();
    assert_eq!(decoder.decode(&line), Ok(Step::Command(line.len())));
    assert_eq!(decoder.decode(&[]), Ok(Step::Incomplete));
    assert_eq!(decoder.inline, None);
}

// Fails if `searched` outlives its command: the second one's end of line lies before it.
#[test]
fn where_a_line_was_searched_to_is_forgotten_with_its_command() {
    let mut decoder = Decoder::default();
    assert_eq!(decoder.decode(b"PING and a lot more"), Ok(Step::Incomplete));
    assert!(decoder.is_amid());
    assert_eq!(
        decoder.decode(b"PING and a lot more\n"),
        Ok(Step::Command(20))
    );
    assert_eq!(
        decoder.decode(b"*1\r\n$4\r\nPING\r\n"),
        Ok(Step::Command(14))
    );
    // Amid a count is amid a command too: the short way must not take it over.
    assert_eq!(decoder.decode(b"*1"), Ok(Step::Incomplete));
    assert!(decoder.is_amid());
}
