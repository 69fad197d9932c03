//! Commands to bytes, and bytes to replies: RESP2, as far as a lane needs it.
//!
//! Written for batches: a command is encoded into a buffer that is used again, and a reply is
//! looked at where it lies, so a key costs no allocation either way.
//!
//! Invariants:
//! 1. `start <= end <= bytes.len()`: what lies between `start` and `end` was received and not yet
//!    taken.
//! 2. An incomplete reply is normal: it stays where it is until the rest has come, and one byte
//!    at a time gives the same replies.
//! 3. A length is checked against [`REPLY_BYTES_MAX`] before room is made for it.

/// The longest line or string that a lane's replies may hold, in bytes. The longest that is due
/// is an `INFO` section, of a few KiB.
pub(super) const REPLY_BYTES_MAX: usize = 64 << 10;

/// Room for one read, in bytes: some 3,000 replies to a batch's commands.
const READ_BYTES: usize = 32 << 10;

/// Appends the head of a command that has `parts` parts, its name included.
pub(super) fn put_command(out: &mut Vec<u8>, parts: usize) {
    out.push(b'*');
    put_decimal(out, parts);
}

/// Appends one part of a command.
pub(super) fn put_part(out: &mut Vec<u8>, part: &[u8]) {
    out.push(b'$');
    put_decimal(out, part.len());
    out.extend_from_slice(part);
    out.extend_from_slice(b"\r\n");
}

/// Appends a whole command.
pub(super) fn put_whole(out: &mut Vec<u8>, parts: &[&[u8]]) {
    put_command(out, parts.len());
    for part in parts {
        put_part(out, part);
    }
}

/// Appends `INCRBY key amount`.
pub(super) fn put_incrby(out: &mut Vec<u8>, key: &[u8], amount: i64) {
    out.extend_from_slice(b"*3\r\n$6\r\nINCRBY\r\n");
    put_part(out, key);
    put_part(out, itoa::Buffer::new().format(amount).as_bytes());
}

fn put_decimal(out: &mut Vec<u8>, number: usize) {
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// One piece of a reply. The elements of an array follow its head as replies of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply<'b> {
    /// `+…`
    Status(&'b [u8]),
    /// `-…`
    Error(&'b [u8]),
    /// `:…`
    Integer(i64),
    /// `$…`
    Bulk(&'b [u8]),
    /// `$…` of so many bytes, which are passed over: more than are taken.
    Long(usize),
    /// `$-1` or `*-1`
    Nil,
    /// The head of an array of so many elements.
    Array(usize),
}

/// Bytes that are no RESP2, or more than a lane takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("{}", kind_text(*.0))]
    Kind(u8),
    #[error("a number in a reply is malformed")]
    Number,
    #[error("a string in a reply does not end where it should")]
    End,
    #[error("a reply larger than what is taken")]
    Long,
}

/// Who speaks so, where the first byte tells.
fn kind_text(byte: u8) -> String {
    match byte {
        b'H' => "it answers as an HTTP server does, not as Redis: is the port right?".to_owned(),
        0x15 | 0x16 => "it speaks TLS: is it meant to be rediss://?".to_owned(),
        other => format!("a reply begins with byte {other:#04x}: is this Redis?"),
    }
}

/// What was received and not yet taken.
#[derive(Debug)]
pub(super) struct ReplyBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// Longest string or line taken, in bytes.
    limit: usize,
    /// Whether longer strings are passed over.
    skips: bool,
    /// Bytes of such a string that are still to come, its line's end included.
    skip: usize,
}

impl ReplyBuffer {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; READ_BYTES],
            start: 0,
            end: 0,
            limit: REPLY_BYTES_MAX,
            skips: false,
            skip: 0,
        }
    }

    /// Changes how long a string or a line may be.
    pub(super) fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Strings over the limit are passed over from now on, as [`Reply::Long`], instead of refused.
    pub(super) fn skip_long(&mut self) {
        self.skips = true;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end && self.skip == 0
    }

    /// Room for the next read; what was read is then told to [`filled`](Self::filled).
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.bytes.len() - self.end < READ_BYTES / 2 {
            // Bounded by `Malformed::Long`: nothing grows beyond a reply that is still allowed.
            self.bytes.resize(self.bytes.len() + READ_BYTES, 0);
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// Tells that `count` bytes were written to the front of [`room`](Self::room).
    pub(super) fn filled(&mut self, count: usize) {
        debug_assert!(self.end + count <= self.bytes.len());
        self.end = (self.end + count).min(self.bytes.len());
    }

    /// Takes the next piece of a reply; `None` until all of it has come.
    ///
    /// # Errors
    /// What was received is no RESP2: nothing behind it can be understood.
    pub(super) fn next_reply(&mut self) -> Result<Option<Reply<'_>>, Malformed> {
        let passed = self.skip.min(self.end - self.start);
        self.start += passed;
        self.skip -= passed;
        let received = self.bytes.get(self.start..self.end).unwrap_or_default();
        let Some((reply, length)) = scan(received, self.limit)? else {
            return Ok(None);
        };
        self.start += length;
        if let Reply::Long(bytes) = reply {
            if !self.skips {
                return Err(Malformed::Long);
            }
            self.skip = bytes.saturating_add(2);
        }
        Ok(Some(reply))
    }
}

/// The first piece of a reply in `bytes`, and how many bytes it takes.
fn scan(bytes: &[u8], limit: usize) -> Result<Option<(Reply<'_>, usize)>, Malformed> {
    const QUEUED: &[u8] = b"+QUEUED\r\n";
    // Half of all replies to a batch.
    if bytes.starts_with(QUEUED) {
        return Ok(Some((Reply::Status(b"QUEUED"), QUEUED.len())));
    }
    let Some((&kind, rest)) = bytes.split_first() else {
        return Ok(None);
    };
    if !matches!(kind, b'+' | b'-' | b':' | b'$' | b'*') {
        return Err(Malformed::Kind(kind));
    }
    let Some(line_end) = rest.windows(2).position(|pair| pair == b"\r\n") else {
        return if rest.len() > limit {
            Err(Malformed::Long)
        } else {
            Ok(None)
        };
    };
    let line = rest.get(..line_end).unwrap_or_default();
    let head = 1 + line_end + 2;
    let reply = match kind {
        b'+' => Reply::Status(line),
        b'-' => Reply::Error(line),
        b':' => Reply::Integer(number(line)?),
        b'*' => match number(line)? {
            -1 => Reply::Nil,
            count => Reply::Array(usize::try_from(count).map_err(|_| Malformed::Number)?),
        },
        _ => match number(line)? {
            -1 => Reply::Nil,
            length => {
                let length = usize::try_from(length).map_err(|_| Malformed::Number)?;
                if length > limit {
                    return Ok(Some((Reply::Long(length), head)));
                }
                let Some(body) = bytes.get(head..head + length + 2) else {
                    return Ok(None);
                };
                let Some(text) = body.strip_suffix(b"\r\n") else {
                    return Err(Malformed::End);
                };
                return Ok(Some((Reply::Bulk(text), head + length + 2)));
            }
        },
    };
    Ok(Some((reply, head)))
}

/// A decimal of up to 64 bits with its sign.
fn number(line: &[u8]) -> Result<i64, Malformed> {
    let (negative, digits) = match line.split_first() {
        Some((b'-', digits)) => (true, digits),
        _ => (false, line),
    };
    if digits.is_empty() {
        return Err(Malformed::Number);
    }
    // Downwards, because the lowest number has no positive twin.
    let mut value = 0i64;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return Err(Malformed::Number);
        }
        value = value
            .checked_mul(10)
            .and_then(|v| v.checked_sub(i64::from(digit - b'0')))
            .ok_or(Malformed::Number)?;
    }
    if negative {
        Ok(value)
    } else {
        value.checked_neg().ok_or(Malformed::Number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes all replies of `bytes`, given in pieces of `step` bytes, as text.
    fn replies(bytes: &[u8], step: usize) -> Result<Vec<String>, Malformed> {
        let mut buffer = ReplyBuffer::new();
        let mut seen = Vec::new();
        for piece in bytes.chunks(step) {
            let mut piece = piece;
            while !piece.is_empty() {
                let room = buffer.room();
                let count = piece.len().min(room.len());
                room[..count].copy_from_slice(&piece[..count]);
                buffer.filled(count);
                piece = &piece[count..];
                while let Some(reply) = buffer.next_reply()? {
                    seen.push(format!("{reply:?}"));
                }
            }
        }
        Ok(seen)
    }

    #[test]
    fn any_split_gives_the_same_replies() {
        let bytes =
            b"+OK\r\n+QUEUED\r\n-ERR no\r\n:-9223372036854775808\r\n:9223372036854775807\r\n\
            *2\r\n$5\r\na\r\nbc\r\n$-1\r\n*-1\r\n*0\r\n$0\r\n\r\n+\r\n";
        let whole = replies(bytes, bytes.len()).unwrap();
        assert_eq!(whole.len(), 12);
        assert_eq!(whole[3], "Integer(-9223372036854775808)");
        for step in 1..bytes.len() {
            assert_eq!(replies(bytes, step).unwrap(), whole, "pieces of {step}");
        }
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        for (bytes, error) in [
            (&b"HTTP/1.1 400\r\n"[..], Malformed::Kind(b'H')),
            (b":1x\r\n", Malformed::Number),
            (b":\r\n", Malformed::Number),
            (b":-\r\n", Malformed::Number),
            (b":9223372036854775808\r\n", Malformed::Number),
            (b"$-2\r\n", Malformed::Number),
            (b"$65537\r\n", Malformed::Long),
            (b"$1\r\nabc", Malformed::End),
        ] {
            assert_eq!(replies(bytes, 1), Err(error));
        }
        assert_eq!(
            replies(&vec![b'+'; REPLY_BYTES_MAX + 3], 4096),
            Err(Malformed::Long)
        );
    }

    #[test]
    fn a_command_is_encoded_as_the_protocol_says() {
        let mut out = Vec::new();
        put_incrby(&mut out, b"k\r\n", i64::MIN);
        put_whole(&mut out, &[b"SET", b"a", b""]);
        assert_eq!(
            out,
            b"*3\r\n$6\r\nINCRBY\r\n$3\r\nk\r\n\r\n$20\r\n-9223372036854775808\r\n\
              *3\r\n$3\r\nSET\r\n$1\r\na\r\n$0\r\n\r\n"
        );
    }
}
