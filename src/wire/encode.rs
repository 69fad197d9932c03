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
    // Most counters are small: one digit at a time from the table below is itoa's work.
    let mut digits = itoa::Buffer::new();
    let digits = digits.format(value).as_bytes();
    out.reserve(digits.len() + 3);
    out.push(b':');
    out.extend_from_slice(digits);
    out.extend_from_slice(b"\r\n");
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
pub fn error(out: &mut Out, text: &str) {
    out.push(b'-');
    out.extend(text.bytes().map(|byte| {
        if byte == b'\r' || byte == b'\n' {
            b' '
        } else {
            byte
        }
    }));
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
        #[test]
        fn integers_are_written_as_rust_writes_them(value: i64) {
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
