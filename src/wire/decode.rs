//! Bytes to commands, as Redis does it: RESP arrays of bulk strings, and inline commands.
//!
//! Invariants:
//! 1. `at <= input.len()`: what lies before `at` has been decoded, and what lies before `searched`
//!    holds no end of a line; neither is looked at again, so a command that arrives a byte at a
//!    time costs no more than one that arrives whole.
//! 2. Nothing is allocated for a length that was announced; only bytes that came count. What a
//!    large command took is given back when the next one is asked for.
//! 3. The same bytes give the same commands and the same refusal however they are cut: limits are
//!    places in the frame, not amounts of input.
//!
//! The caller hands in, each time, the input from the first byte of the unfinished command on.

use std::ops::Range;

use super::number::parse_i64;

/// A whole request, in bytes: 174,000 of the shortest arguments, or some 10,000 keys of an `MGET`.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Arguments of one request.
pub const ARGS_MAX: i64 = 1 << 20;
/// A line: an inline command, or a length (Redis: `PROTO_INLINE_MAX_SIZE`).
pub const LINE_BYTES_MAX: usize = 64 * 1024;
/// Arguments whose places a decoder keeps room for between commands.
const ARGS_KEPT: usize = 64;

/// What was found at the beginning of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A command; its arguments are in [`Decoder::args`]. It took so many bytes.
    Command(usize),
    /// Nothing to do (an empty line or array). It took so many bytes.
    Nothing(usize),
    /// More bytes are needed; call again with the same ones and those that follow.
    Incomplete,
}

/// Why the connection cannot go on. The text is Redis' own where Redis has one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// `*` and something that is no count.
    #[error("Protocol error: invalid multibulk length")]
    MultibulkLength,
    /// `$` and something that is no length.
    #[error("Protocol error: invalid bulk length")]
    BulkLength,
    /// Something else where `$` was due.
    #[error("Protocol error: expected '$', got '{}'", printable(*.0))]
    ExpectedBulk(u8),
    /// A line without end.
    #[error("Protocol error: too big mbulk count string")]
    MultibulkLine,
    /// A line without end.
    #[error("Protocol error: too big bulk count string")]
    BulkLine,
    /// A line without end.
    #[error("Protocol error: too big inline request")]
    InlineLine,
    /// An inline command with an open quote.
    #[error("Protocol error: unbalanced quotes in request")]
    Quotes,
    /// A request beyond [`FRAME_BYTES_MAX`].
    #[error("Protocol error: request larger than {FRAME_BYTES_MAX} bytes")]
    TooLarge,
}

fn printable(byte: u8) -> char {
    match byte {
        // As Redis: no line breaks within an error.
        b'\r' | b'\n' => ' ',
        b' '..=b'~' => byte as char,
        _ => '?',
    }
}

/// Where the decoding of one connection stands.
#[derive(Debug, Default)]
pub struct Decoder {
    args: Vec<Range<usize>>,
    /// Unescaped arguments of an inline command; its ranges are ranges of this.
    inline: Option<Vec<u8>>,
    /// Arguments still to come; `None` outside of an array.
    missing: Option<usize>,
    /// Length of the bulk string whose bytes are due.
    bulk: Option<usize>,
    at: usize,
    /// Where the search for the end of the current line goes on.
    searched: usize,
}

impl Decoder {
    /// Decodes the first command of `input`, which begins where the last one ended.
    ///
    /// # Errors
    /// See [`ProtocolError`]; the connection is to be closed after the error is told.
    pub fn decode(&mut self, input: &[u8]) -> Result<Step, ProtocolError> {
        if !self.is_amid() && (self.args.capacity() > ARGS_KEPT || self.inline.is_some()) {
            // One large command is no reason to keep the memory while the connection is idle.
            self.args = Vec::new();
            self.inline = None;
        }
        let step = self.step(input)?;
        match step {
            Step::Incomplete if input.len() > FRAME_BYTES_MAX => {
                return Err(ProtocolError::TooLarge);
            }
            Step::Incomplete => {}
            Step::Command(_) | Step::Nothing(_) => {
                self.at = 0;
                self.searched = 0;
                self.missing = None;
                self.bulk = None;
            }
        }
        Ok(step)
    }

    /// Where argument `index` of the command just decoded lies in its input; `None` for an inline
    /// command, whose arguments are copies, and for an argument that is not there.
    pub fn place(&self, index: usize) -> Option<Range<usize>> {
        if self.inline.is_some() {
            None
        } else {
            self.args.get(index).cloned()
        }
    }

    /// What it has allocated, in bytes.
    pub fn held_bytes(&self) -> usize {
        self.args.capacity() * size_of::<Range<usize>>()
            + self.inline.as_ref().map_or(0, Vec::capacity)
    }

    /// Whether the last call to `decode` ended amid a command.
    pub fn is_amid(&self) -> bool {
        self.at > 0 || self.searched > 0 || self.missing.is_some()
    }

    /// The arguments of the command just decoded from `input`, its name first.
    pub fn args<'a>(&'a self, input: &'a [u8]) -> Args<'a> {
        Args {
            bytes: self.inline.as_deref().unwrap_or(input),
            ranges: &self.args,
        }
    }

    fn step(&mut self, input: &[u8]) -> Result<Step, ProtocolError> {
        let mut missing = match self.missing {
            Some(missing) => missing,
            None => match input.first() {
                None => return Ok(Step::Incomplete),
                Some(b'*') => {
                    self.args.clear();
                    self.inline = None;
                    let Some((line, next)) = self.line(input, 1, ProtocolError::MultibulkLine)?
                    else {
                        return Ok(Step::Incomplete);
                    };
                    let count = parse_i64(line)
                        .filter(|&count| count <= ARGS_MAX)
                        .ok_or(ProtocolError::MultibulkLength)?;
                    if count <= 0 {
                        return Ok(Step::Nothing(next));
                    }
                    self.at = next;
                    count as usize
                }
                Some(_) => return self.inline(input),
            },
        };
        while missing > 0 {
            let len = if let Some(len) = self.bulk {
                len
            } else {
                match input.get(self.at) {
                    None => break,
                    Some(b'$') => {}
                    Some(&other) => return Err(ProtocolError::ExpectedBulk(other)),
                }
                let Some((line, next)) = self.line(input, self.at + 1, ProtocolError::BulkLine)?
                else {
                    break;
                };
                let len = parse_i64(line)
                    .and_then(|len| usize::try_from(len).ok())
                    .filter(|&len| len <= FRAME_BYTES_MAX)
                    .ok_or(ProtocolError::BulkLength)?;
                if next + len + 2 > FRAME_BYTES_MAX {
                    return Err(ProtocolError::TooLarge); // Before its bytes are waited for.
                }
                self.at = next;
                len
            };
            let end = self.at + len;
            if end + 2 > input.len() {
                self.bulk = Some(len);
                break;
            }
            self.args.push(self.at..end);
            // Like Redis, without a look at the two bytes.
            self.at = end + 2;
            self.bulk = None;
            missing -= 1;
        }
        if missing == 0 {
            return Ok(Step::Command(self.at));
        }
        self.missing = Some(missing);
        Ok(Step::Incomplete)
    }

    fn inline(&mut self, input: &[u8]) -> Result<Step, ProtocolError> {
        let Some(end) = self.search(input, 0, b'\n', ProtocolError::InlineLine)? else {
            self.at = self.searched;
            return Ok(Step::Incomplete);
        };
        let line = &input[..end];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        self.args.clear();
        let mut words = Vec::new();
        split_words(line, &mut words, &mut self.args)?;
        self.inline = Some(words);
        Ok(if self.args.is_empty() {
            Step::Nothing(end + 1)
        } else {
            Step::Command(end + 1)
        })
    }

    /// The bytes from `at` to the next CR LF, and where the line after it begins; `None`: it has
    /// not come yet. Like Redis, without a look at what follows the CR.
    #[inline]
    fn line<'a>(
        &mut self,
        input: &'a [u8],
        at: usize,
        too_long: ProtocolError,
    ) -> Result<Option<(&'a [u8], usize)>, ProtocolError> {
        let end = self.search(input, at, b'\r', too_long)?;
        Ok(end
            .filter(|end| end + 2 <= input.len())
            .map(|end| (&input[at..end], end + 2)))
    }

    /// Where the next `byte` from `at` on is, no further than a line may be long.
    #[inline]
    fn search(
        &mut self,
        input: &[u8],
        at: usize,
        byte: u8,
        too_long: ProtocolError,
    ) -> Result<Option<usize>, ProtocolError> {
        let from = at.max(self.searched);
        let to = input.len().min(at + LINE_BYTES_MAX + 1);
        // Lengths are short: a plain loop beats a search routine.
        let found = input
            .get(from..to)
            .and_then(|rest| rest.iter().position(|&other| other == byte));
        match found {
            Some(found) => Ok(Some(from + found)),
            None if to > at + LINE_BYTES_MAX => Err(too_long),
            None => {
                self.searched = to;
                Ok(None)
            }
        }
    }
}

/// What ends a word that is not quoted.
fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\n' | b'\r' | b'\t')
}

/// C's `isspace`: what may lie between words.
fn is_space(byte: u8) -> bool {
    is_blank(byte) || matches!(byte, 0x0b | 0x0c)
}

/// Splits a line as `sdssplitargs` of Redis does: blanks, '...' and "..." with escapes. A zero byte
/// ends it.
fn split_words(
    line: &[u8],
    words: &mut Vec<u8>,
    ranges: &mut Vec<Range<usize>>,
) -> Result<(), ProtocolError> {
    let mut rest = line
        .iter()
        .copied()
        .take_while(|&byte| byte != 0)
        .peekable();
    loop {
        while rest.next_if(|&byte| is_space(byte)).is_some() {}
        if rest.peek().is_none() {
            return Ok(());
        }
        let start = words.len();
        let mut quote = None;
        loop {
            match (quote, rest.next()) {
                (None, None) => break,
                (Some(_), None) => return Err(ProtocolError::Quotes),
                (None, Some(byte)) if is_blank(byte) => break,
                (None, Some(byte @ (b'"' | b'\''))) => quote = Some(byte),
                (Some(b'"'), Some(b'\\')) => {
                    let Some(escaped) = rest.next() else {
                        return Err(ProtocolError::Quotes);
                    };
                    words.push(match escaped {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'b' => 8,
                        b'a' => 7,
                        b'x' => {
                            let mut ahead = rest.clone();
                            match (hex(ahead.next()), hex(ahead.next())) {
                                (Some(high), Some(low)) => {
                                    rest = ahead;
                                    high << 4 | low
                                }
                                _ => b'x',
                            }
                        }
                        other => other,
                    });
                }
                (Some(b'\''), Some(b'\\')) if rest.peek() == Some(&b'\'') => {
                    rest.next();
                    words.push(b'\'');
                }
                (Some(open), Some(byte)) if byte == open => {
                    // A closing quote must end the word.
                    match rest.peek() {
                        None => {}
                        Some(&next) if is_space(next) => {}
                        Some(_) => return Err(ProtocolError::Quotes),
                    }
                    break;
                }
                (_, Some(byte)) => words.push(byte),
            }
        }
        ranges.push(start..words.len());
    }
}

fn hex(byte: Option<u8>) -> Option<u8> {
    (byte? as char).to_digit(16).map(|digit| digit as u8)
}

/// The arguments of a command.
#[derive(Debug, Clone, Copy)]
pub struct Args<'a> {
    bytes: &'a [u8],
    ranges: &'a [Range<usize>],
}

impl<'a> Args<'a> {
    /// Of ranges within `bytes`.
    pub fn new(bytes: &'a [u8], ranges: &'a [Range<usize>]) -> Self {
        Args { bytes, ranges }
    }

    /// How many, the name included.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Never: a command has a name.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Argument `index`; empty if there is none.
    #[inline]
    pub fn get(&self, index: usize) -> &'a [u8] {
        self.ranges
            .get(index)
            .map_or(&[], |range| &self.bytes[range.clone()])
    }

    /// All from `index` on.
    pub fn from(&self, index: usize) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let bytes = self.bytes;
        self.ranges
            .iter()
            .skip(index)
            .map(move |range| &bytes[range.clone()])
    }
}

/// A whole increment in its usual form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Increment {
    /// Where the key is.
    pub key: Range<usize>,
    /// By how much.
    pub amount: i64,
    /// Whether it is an `INCRBY`, else an `INCR`.
    pub by: bool,
    /// The bytes it took.
    pub used: usize,
}

/// The whole `INCR key` or `INCRBY key amount` in its usual form at the beginning of `input`: the
/// hot path. Anything else, an incomplete one included, is `None`, and is left to [`Decoder`].
#[inline]
pub fn increment(input: &[u8]) -> Option<Increment> {
    // Words of eight bytes: a comparison of slices would be a call.
    let head: &[u8; 16] = input.first_chunk()?;
    let [first, second] = [word(head, 0), word(head, 8)];
    // Without the bit that tells letters' case; and of the first name without the digit behind it.
    let (by, at) = if first == u64::from_le_bytes(*b"*2\r\n$4\r\n")
        && second & 0x00ff_ffff_dfdf_dfdf == u64::from_le_bytes(*b"INCR\r\n$\0")
    {
        (false, 15)
    } else if first == u64::from_le_bytes(*b"*3\r\n$6\r\n")
        && second & 0xffff_dfdf_dfdf_dfdf == u64::from_le_bytes(*b"INCRBY\r\n")
        && *input.get(16)? == b'$'
    {
        (true, 17)
    } else {
        return None;
    };
    let (key, at) = short_bulk(input, at)?;
    if !by {
        return Some(Increment {
            key,
            amount: 1,
            by,
            used: at,
        });
    }
    if *input.get(at)? != b'$' {
        return None;
    }
    let (amount, at) = short_bulk(input, at + 1)?;
    Some(Increment {
        key,
        amount: parse_i64(&input[amount])?,
        by,
        used: at,
    })
}

#[inline]
fn word(bytes: &[u8; 16], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// A bulk string of 1 to 999 bytes whose length begins at `at`.
#[inline]
fn short_bulk(input: &[u8], at: usize) -> Option<(Range<usize>, usize)> {
    let line: &[u8; 5] = input.get(at..)?.first_chunk()?;
    let digit = |place: usize| usize::from(line[place].wrapping_sub(b'0'));
    let ends = |place: usize| line[place] == b'\r' && line[place + 1] == b'\n';
    // Of lengths that begin with a zero only "0" is one, and that is left to the careful way.
    if !(1..=9).contains(&digit(0)) {
        return None;
    }
    let (len, start) = if digit(1) <= 9 && ends(2) {
        (digit(0) * 10 + digit(1), at + 4)
    } else if ends(1) {
        (digit(0), at + 3)
    } else if digit(1) <= 9 && digit(2) <= 9 && ends(3) {
        (digit(0) * 100 + digit(1) * 10 + digit(2), at + 5)
    } else {
        return None;
    };
    let end = start + len;
    (end + 2 <= input.len()).then_some((start..end, end + 2))
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
