//! Replies to bytes, in the version of the protocol that the client asked for.

/// RESP2, or RESP3 after `HELLO 3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Version {
    /// What a connection begins with.
    #[default]
    Resp2,
    /// Maps, nulls and pushes of their own.
    Resp3,
}

/// A buffer of replies.
pub type Out = Vec<u8>;

/// `:1\r\n`
#[inline]
pub fn integer(out: &mut Out, value: i64) {
    let Some(small) = u32::try_from(value).ok().filter(|&value| value < SMALL) else {
        let mut digits = itoa::Buffer::new();
        out.push(b':');
        out.extend_from_slice(digits.format(value).as_bytes());
        return out.extend_from_slice(b"\r\n");
    };
    let digits = eight_digits(small);
    // The first digit is in the lowest byte; the last one stays even if it is zero.
    let zeros = (digits.trailing_zeros() / 8).min(7);
    let shown = (digits | 0x3030_3030_3030_3030) >> (8 * zeros);
    let end = 9 - zeros as usize;
    // Masks instead of checks, and a copy of fixed size: one of just these bytes would be a call.
    let mut reply = [b':'; 16];
    reply[1..9].copy_from_slice(&shown.to_le_bytes());
    reply[end & 15] = b'\r';
    reply[(end + 1) & 15] = b'\n';
    let len = out.len() + end + 2;
    out.extend_from_slice(&reply);
    out.truncate(len);
}

/// Below this, an integer has eight digits at most.
const SMALL: u32 = 100_000_000;

/// The decimal digits of a number below [`SMALL`], each in a byte, the first one lowest.
///
/// Lanes of four, two and one digit are divided at once by multiplication: P. Khuong, "How to print
/// integers really fast" (2017). Without a branch on the number of digits, which is different with
/// every counter: 35 ns for a whole increment instead of 39 with `itoa` (over 1,000 keys), though
/// `itoa` is faster over numbers of one length.
#[inline]
fn eight_digits(small: u32) -> u64 {
    let fours = u64::from(small / 10_000) | u64::from(small % 10_000) << 32;
    let high = ((fours * 10_486) >> 20) & 0x0000_007f_0000_007f;
    let twos = (fours - 100 * high) << 16 | high;
    let high = ((twos * 103) >> 10) & 0x000f_000f_000f_000f;
    (twos - 10 * high) << 8 | high
}

/// `$2\r\nab\r\n`
pub fn bulk(out: &mut Out, bytes: &[u8]) {
    header(out, b'$', bytes.len());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// An integer as a bulk string, as `GET` answers.
#[inline]
pub fn bulk_integer(out: &mut Out, value: i64) {
    bulk(out, itoa::Buffer::new().format(value).as_bytes());
}

/// `+OK\r\n`
pub fn simple(out: &mut Out, text: &str) {
    out.push(b'+');
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// `-ERR ...\r\n`; the text begins with its code. Line breaks in it become blanks.
pub fn error(out: &mut Out, text: impl AsRef<[u8]>) {
    out.push(b'-');
    let line = |&byte| {
        if matches!(byte, b'\r' | b'\n') {
            b' '
        } else {
            byte
        }
    };
    out.extend(text.as_ref().iter().map(line));
    out.extend_from_slice(b"\r\n");
}

/// No value.
pub fn null(out: &mut Out, version: Version) {
    out.extend_from_slice(match version {
        Version::Resp2 => b"$-1\r\n",
        Version::Resp3 => b"_\r\n",
    });
}

/// The beginning of an array.
pub fn array(out: &mut Out, len: usize) {
    header(out, b'*', len);
}

/// The beginning of a map of so many pairs (RESP2: an array of twice as many).
pub fn map(out: &mut Out, pairs: usize, version: Version) {
    match version {
        Version::Resp2 => header(out, b'*', pairs * 2),
        Version::Resp3 => header(out, b'%', pairs),
    }
}

/// The beginning of a message that answers no command.
pub fn push(out: &mut Out, len: usize, version: Version) {
    header(
        out,
        if version == Version::Resp3 {
            b'>'
        } else {
            b'*'
        },
        len,
    );
}

/// Text for people (`INFO`): in RESP3 marked as such.
pub fn verbatim(out: &mut Out, text: &str, version: Version) {
    match version {
        Version::Resp2 => bulk(out, text.as_bytes()),
        Version::Resp3 => {
            header(out, b'=', text.len() + 4);
            out.extend_from_slice(b"txt:");
            out.extend_from_slice(text.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
    }
}

fn header(out: &mut Out, mark: u8, len: usize) {
    out.push(mark);
    out.extend_from_slice(itoa::Buffer::new().format(len).as_bytes());
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(encode: impl FnOnce(&mut Out)) -> String {
        // What is there already stays.
        let mut out = b"+0\r\n".to_vec();
        encode(&mut out);
        let text = String::from_utf8(out).expect("text");
        text.strip_prefix("+0\r\n").expect("kept").to_owned()
    }

    #[test]
    fn replies_that_are_alike_in_both_versions() {
        for (reply, expected) in [
            (encoded(|out| integer(out, 0)), ":0\r\n"),
            (encoded(|out| integer(out, -17)), ":-17\r\n"),
            (
                encoded(|out| integer(out, i64::MIN)),
                ":-9223372036854775808\r\n",
            ),
            (
                encoded(|out| integer(out, i64::MAX)),
                ":9223372036854775807\r\n",
            ),
            (encoded(|out| bulk(out, b"")), "$0\r\n\r\n"),
            (encoded(|out| bulk(out, b"a\r\nb")), "$4\r\na\r\nb\r\n"),
            (encoded(|out| bulk_integer(out, -5)), "$2\r\n-5\r\n"),
            (encoded(|out| simple(out, "OK")), "+OK\r\n"),
            (encoded(|out| array(out, 12)), "*12\r\n"),
        ] {
            assert_eq!(reply, expected);
        }
    }

    #[test]
    fn replies_that_differ_between_the_versions() {
        type Encode = fn(&mut Out, Version);
        for (encode, resp2, resp3) in [
            (null as Encode, "$-1\r\n", "_\r\n"),
            (|out, v| map(out, 3, v), "*6\r\n", "%3\r\n"),
            (|out, v| push(out, 3, v), "*3\r\n", ">3\r\n"),
            (
                |out, v| verbatim(out, "a\nb", v),
                "$3\r\na\nb\r\n",
                "=7\r\ntxt:a\nb\r\n",
            ),
        ] {
            assert_eq!(encoded(|out| encode(out, Version::Resp2)), resp2);
            assert_eq!(encoded(|out| encode(out, Version::Resp3)), resp3);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn integers_are_written_as_rust_writes_them(
            value in prop_oneof![
                any::<i64>(),
                -1000..1000_i64,
                0..1_000_000_000_i64,
                (0..18_u32, -1..=1_i64).prop_map(|(power, step)| 10_i64.pow(power) + step),
            ],
        ) {
            prop_assert_eq!(encoded(|out| integer(out, value)), format!(":{value}\r\n"));
        }

        // Fails without the blanks in `error`: what a client sent is quoted in errors, and a line
        // break there would be the beginning of another reply.
        #[test]
        fn an_error_is_one_line(text in "(ERR|[\r\n]|.){0,20}") {
            let reply = encoded(|out| error(out, &text));
            let line = reply.strip_prefix('-').and_then(|line| line.strip_suffix("\r\n"));
            let line = line.expect("begins and ends as an error does");
            prop_assert!(!line.contains(['\r', '\n']));
            prop_assert_eq!(line, text.replace(['\r', '\n'], " "));
        }
    }
}
