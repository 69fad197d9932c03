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
