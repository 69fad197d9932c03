//! Checks replies: each must be `:<integer>\r\n`.
//!
//! Invariants:
//!
//! 1. It resumes: whatever way the bytes are split, the same replies are counted and the same one is refused.
//! 2. `partial` is a proper prefix of one reply, at most [`REPLY_BYTES_MAX`] bytes long.

use std::fmt;

/// More than any integer needs; of a wrong reply, as much as is shown.
const REPLY_BYTES_MAX: usize = 512;
/// Digits of `i64::MIN`.
const DIGITS_MAX: usize = 19;

/// A reply that is not an integer.
#[derive(Debug, PartialEq, Eq)]
pub struct WrongReply(Vec<u8>);

impl fmt::Display for WrongReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

/// The replies of one connection.
#[derive(Debug, Default)]
pub struct Replies {
    partial: Vec<u8>,
}

/// What a buffer begins with.
enum Line {
    /// An integer of this many bytes, line end included.
    Integer(usize),
    /// What could become an integer.
    Incomplete,
    Wrong,
}

impl Replies {
    /// Counts the replies that `bytes` completes.
    ///
    /// # Errors
    ///
    /// The first reply that is not an integer.
    pub fn count(&mut self, bytes: &[u8]) -> Result<usize, WrongReply> {
        if self.partial.is_empty() {
            return self.count_whole(bytes);
        }
        // Rare: the kernel seldom splits a reply. Joining costs a copy, and keeps one way to read a line.
        let mut joined = std::mem::take(&mut self.partial);
        joined.extend_from_slice(bytes);
        self.count_whole(&joined)
    }

    /// As [`count`](Self::count), for bytes that begin with a reply.
    fn count_whole(&mut self, mut bytes: &[u8]) -> Result<usize, WrongReply> {
        let mut count = 0;
        loop {
            match integer_line(bytes) {
                Line::Integer(length) => {
                    bytes = &bytes[length..];
                    count += 1;
                }
                Line::Wrong => {
                    let end = bytes.iter().position(|&byte| byte == b'\n');
                    let end = end.unwrap_or(bytes.len()).min(REPLY_BYTES_MAX);
                    // A message is worth waiting for its end, to be shown whole.
                    if end == bytes.len() && end < REPLY_BYTES_MAX {
                        break;
                    }
                    return Err(WrongReply(bytes[..end].trim_ascii_end().to_vec()));
                }
                Line::Incomplete => break,
            }
        }
        self.partial.extend_from_slice(bytes);
        Ok(count)
    }

    /// The reply that was cut short, if any.
    pub fn cut_short(&mut self) -> Option<WrongReply> {
        let partial = std::mem::take(&mut self.partial);
        (!partial.is_empty()).then_some(WrongReply(partial))
    }
}

fn integer_line(bytes: &[u8]) -> Line {
    let mut at = match bytes {
        [] | [b':'] | [b':', b'-'] => return Line::Incomplete,
        [b':', b'-', ..] => 2,
        [b':', ..] => 1,
        _ => return Line::Wrong,
    };
    let first_digit = at;
    while bytes.get(at).is_some_and(u8::is_ascii_digit) {
        at += 1;
    }
    if at - first_digit > DIGITS_MAX {
        return Line::Wrong;
    }
    match &bytes[at..] {
        [] => Line::Incomplete,
        _ if at == first_digit => Line::Wrong,
        [b'\r'] => Line::Incomplete,
        [b'\r', b'\n', ..] => Line::Integer(at + 2),
        _ => Line::Wrong,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_split_at_any_byte_are_counted_the_same() {
        let stream = b":1\r\n:-23\r\n:9223372036854775807\r\n:0\r\n";
        for cut in 0..=stream.len() {
            let mut replies = Replies::default();
            let (first, second) = stream.split_at(cut);
            let count = replies.count(first).unwrap() + replies.count(second).unwrap();
            assert_eq!((count, replies.cut_short()), (4, None), "cut at {cut}");
        }
        let mut replies = Replies::default();
        let by_byte: usize = stream
            .iter()
            .map(|&byte| replies.count(&[byte]).unwrap())
            .sum();
        assert_eq!(by_byte, 4);
    }

    #[test]
    fn an_error_reply_is_refused_and_shown_whole_wherever_it_is_split() {
        let stream = b":1\r\n-ERR no such thing\r\n:2\r\n";
        for cut in 0..=stream.len() {
            let mut replies = Replies::default();
            let (first, second) = stream.split_at(cut);
            let refused = replies.count(first).and_then(|_| replies.count(second));
            let shown = refused.unwrap_err().to_string();
            assert_eq!(shown, "\"-ERR no such thing\"", "cut at {cut}");
        }
    }

    #[test]
    fn anything_but_an_integer_is_refused() {
        for wrong in [
            "+OK\r\n",
            "$1\r\n1\r\n",
            ":\r\n",
            ":-\r\n",
            ":+1\r\n",
            ":1\n",
            ":1\rx\n",
            ":1 \r\n",
            ":12345678901234567890\r\n",
            "\r\n",
        ] {
            let refused = Replies::default().count(wrong.as_bytes());
            assert!(refused.is_err(), "{wrong:?} was taken");
        }
    }

    #[test]
    fn a_wrong_reply_without_an_end_is_bounded() {
        let mut replies = Replies::default();
        let refused = (0..2000).find_map(|_| replies.count(b"x").err());
        assert_eq!(refused, Some(WrongReply(vec![b'x'; REPLY_BYTES_MAX])));
    }

    #[test]
    fn a_reply_cut_short_is_told_from_none() {
        let mut replies = Replies::default();
        assert_eq!(replies.count(b":1\r\n:2"), Ok(1));
        assert_eq!(replies.cut_short(), Some(WrongReply(b":2".to_vec())));
        assert_eq!(replies.cut_short(), None);
    }
}
