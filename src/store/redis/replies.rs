//! Follows the replies to a batch, and says what became of it.
//!
//! Invariants:
//! 1. "Not applied" is said only on the server's word: a nil or a known refusal in the place of
//!    `EXEC`'s result.
//! 2. Error texts, which differ between versions, are not asked whether the key or the command is
//!    refused: the lane finds out.

use super::codec::Reply;
use super::exchange::Replies;
use super::server_error::{self, concerns_all};
use crate::store::KeyError;

/// What the token held before a transaction set it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum OldToken {
    Absent,
    Text(Vec<u8>),
    /// `SET … GET` itself failed inside the transaction.
    Failed(String),
}

/// What came in the place of `EXEC`'s result.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Ran,
    /// A watched key had changed.
    Aborted,
    /// `EXEC` was answered by an error.
    Refused(String),
}

/// What became of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It ran. The clock is an error where its `INCR` failed, and `Ok(0)` where none was due.
    Ran {
        values: Vec<Result<i64, KeyError>>,
        clock: Result<i64, String>,
        old: OldToken,
    },
    /// The token had changed: nothing of it is in the store.
    Aborted,
    /// These keys, by index, keep it from running: nothing of it is in the store.
    Keys(Vec<(usize, KeyError)>),
    /// The server takes none of it: nothing of it is in the store.
    Refused(String),
    /// The server did what it must not do; anything may have happened.
    Broken(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Due {
    Multi,
    /// Acknowledgement of the command with this index.
    Queued(usize),
    Exec,
    /// Result of the command with this index.
    Result(usize),
    Watch,
    Nothing,
}

/// Follows `MULTI · INCRBY key … · [INCR clock] · SET token GET · EXEC · WATCH token`.
#[derive(Debug)]
pub(super) struct Transaction {
    keys: usize,
    /// Keys, clock and token together.
    commands: usize,
    due: Due,
    multi_refused: Option<String>,
    queue_errors: Vec<(usize, String)>,
    values: Vec<Result<i64, KeyError>>,
    clock: Result<i64, String>,
    old: OldToken,
    end: Option<End>,
}

impl Transaction {
    /// Of a batch of so many keys.
    pub(super) fn batch(keys: usize) -> Self {
        Self::new(keys, keys + 2)
    }

    /// Of a claim: it sets the token, nothing else.
    pub(super) fn claim() -> Self {
        Self::new(0, 1)
    }

    fn new(keys: usize, commands: usize) -> Self {
        Self {
            keys,
            commands,
            due: Due::Multi,
            multi_refused: None,
            queue_errors: Vec::new(),
            values: Vec::with_capacity(keys),
            clock: Ok(0),
            old: OldToken::Absent,
            end: None,
        }
    }

    /// What became of it, once all replies have been taken.
    pub(super) fn verdict(self) -> Verdict {
        if let Some(message) = self.multi_refused {
            return Verdict::Broken(format!(
                "MULTI was refused ({message}): the commands behind it may have run one by one"
            ));
        }
        match self.end {
            Some(End::Ran) if self.queue_errors.is_empty() => Verdict::Ran {
                values: self.values,
                clock: self.clock,
                old: self.old,
            },
            Some(End::Aborted) => Verdict::Aborted,
            Some(End::Refused(message)) if concerns_all(&message) => {
                refused(self.keys, self.queue_errors, message)
            }
            Some(End::Refused(message)) => {
                // A proxy may say so after the server has done it.
                Verdict::Broken(format!("EXEC was answered by an error: {message}"))
            }
            Some(End::Ran) => {
                Verdict::Broken("EXEC ran though commands before it were refused".to_owned())
            }
            None => Verdict::Broken("the replies ended before EXEC's".to_owned()),
        }
    }

    fn take_result(&mut self, index: usize, reply: Reply<'_>) -> Result<(), String> {
        if index < self.keys {
            self.values.push(match reply {
                Reply::Integer(value) => Ok(value),
                Reply::Error(message) => Err(server_error::of_key(&text(message))),
                other => return Err(unexpected("a key's result", other)),
            });
        } else if index + 1 < self.commands {
            self.clock = match reply {
                Reply::Integer(value) => Ok(value),
                Reply::Error(message) => Err(text(message)),
                other => return Err(unexpected("the clock's result", other)),
            };
        } else {
            self.old = match reply {
                Reply::Nil => OldToken::Absent,
                Reply::Bulk(value) => OldToken::Text(value.to_vec()),
                Reply::Error(message) => OldToken::Failed(text(message)),
                other => return Err(unexpected("the token's old value", other)),
            };
        }
        Ok(())
    }
}

/// Nothing was applied: because of some keys, or because of everything?
fn refused(keys: usize, mut errors: Vec<(usize, String)>, exec: String) -> Verdict {
    let by_key = !errors.is_empty()
        && errors
            .iter()
            .all(|(index, message)| *index < keys && !concerns_all(message));
    if by_key {
        return Verdict::Keys(
            errors
                .iter()
                .map(|(index, message)| (*index, server_error::of_key(message)))
                .collect(),
        );
    }
    // The first error that is not one key's, as EXEC itself only says "previous errors".
    let telling = errors
        .iter()
        .position(|(index, message)| *index >= keys || concerns_all(message));
    Verdict::Refused(match telling {
        Some(at) => errors.swap_remove(at).1,
        None => exec,
    })
}

impl Replies for Transaction {
    fn take(&mut self, reply: Reply<'_>) -> Result<bool, String> {
        self.due = match (self.due, reply) {
            (Due::Multi, Reply::Status(b"OK")) => Due::Queued(0),
            (Due::Multi, Reply::Error(message)) => {
                self.multi_refused = Some(text(message));
                // What follows are the results of commands that ran unguarded: of no use.
                Due::Nothing
            }
            (Due::Queued(index), reply) => {
                match reply {
                    Reply::Status(b"QUEUED") => {}
                    Reply::Error(message) => self.queue_errors.push((index, text(message))),
                    other => return Err(unexpected("QUEUED", other)),
                }
                if index + 1 == self.commands {
                    Due::Exec
                } else {
                    Due::Queued(index + 1)
                }
            }
            (Due::Exec, Reply::Array(length)) if length == self.commands => {
                self.end = Some(End::Ran);
                Due::Result(0)
            }
            (Due::Exec, Reply::Nil) => {
                self.end = Some(End::Aborted);
                Due::Nothing
            }
            (Due::Exec, Reply::Error(message)) => {
                self.end = Some(End::Refused(text(message)));
                // The server itself goes on with the `WATCH`; a proxy's error may be its last word.
                if message.starts_with(b"EXECABORT ") {
                    Due::Watch
                } else {
                    Due::Nothing
                }
            }
            (Due::Result(index), reply) => {
                self.take_result(index, reply)?;
                if index + 1 == self.commands {
                    Due::Watch
                } else {
                    Due::Result(index + 1)
                }
            }
            (Due::Watch, Reply::Status(b"OK")) => Due::Nothing,
            (due, reply) => return Err(unexpected(&format!("{due:?}"), reply)),
        };
        Ok(self.due == Due::Nothing)
    }
}

/// Follows `INCRBY key … · INCR clock`, each on its own.
#[derive(Debug)]
pub(super) struct Pipeline {
    keys: usize,
    pub(super) values: Vec<Result<i64, KeyError>>,
    /// `None` until its reply has come, which is the last.
    pub(super) clock: Option<Result<i64, String>>,
}

impl Pipeline {
    pub(super) fn new(keys: usize) -> Self {
        Self {
            keys,
            values: Vec::with_capacity(keys),
            clock: None,
        }
    }
}

impl Replies for Pipeline {
    fn take(&mut self, reply: Reply<'_>) -> Result<bool, String> {
        let result = match reply {
            Reply::Integer(value) => Ok(value),
            Reply::Error(message) => Err(text(message)),
            other => return Err(unexpected("INCRBY's result", other)),
        };
        if self.values.len() < self.keys {
            self.values
                .push(result.map_err(|message| server_error::of_key(&message)));
            Ok(false)
        } else {
            self.clock = Some(result);
            Ok(true)
        }
    }
}

/// A whole reply, for the handshake, where nothing is counted in nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    Status(String),
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Nil,
    Array(Vec<Frame>),
}

/// Elements of an array in a handshake, at most; two are due.
const ELEMENTS_MAX: usize = 16;

/// Collects a number of whole replies; arrays in arrays are not due in a handshake.
#[derive(Debug)]
pub(super) struct Frames {
    due: usize,
    pub(super) seen: Vec<Frame>,
    /// How many elements the array at the end of `seen` still lacks.
    open: usize,
}

impl Frames {
    pub(super) fn new(due: usize) -> Self {
        Self {
            due,
            seen: Vec::with_capacity(due),
            open: 0,
        }
    }
}

impl Replies for Frames {
    fn take(&mut self, reply: Reply<'_>) -> Result<bool, String> {
        let frame = match reply {
            Reply::Status(line) => Frame::Status(text(line)),
            Reply::Error(line) => Frame::Error(text(line)),
            Reply::Integer(value) => Frame::Integer(value),
            Reply::Bulk(bytes) => Frame::Bulk(bytes.to_vec()),
            Reply::Nil => Frame::Nil,
            Reply::Long(bytes) => return Err(format!("a string of {bytes} bytes")),
            Reply::Array(length) if length > ELEMENTS_MAX => {
                return Err(format!("an array of {length} elements"));
            }
            Reply::Array(length) if self.open == 0 => {
                self.open = length;
                self.seen.push(Frame::Array(Vec::new()));
                return Ok(length == 0 && self.seen.len() == self.due);
            }
            Reply::Array(_) => return Err("an array in an array".to_owned()),
        };
        if self.open > 0
            && let Some(Frame::Array(elements)) = self.seen.last_mut()
        {
            elements.push(frame);
            self.open -= 1;
        } else {
            self.seen.push(frame);
        }
        Ok(self.open == 0 && self.seen.len() == self.due)
    }
}

/// A line as text.
pub(super) fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line).into_owned()
}

/// What was seen, and what was due.
pub(super) fn unexpected(due: &str, seen: Reply<'_>) -> String {
    let seen = match seen {
        Reply::Status(line) => format!("+{}", line.escape_ascii()),
        Reply::Error(line) => format!("-{}", line.escape_ascii()),
        Reply::Integer(value) => format!(":{value}"),
        Reply::Bulk(bytes) => format!("a string of {} bytes", bytes.len()),
        Reply::Long(bytes) => format!("a string of {bytes} bytes"),
        Reply::Nil => "nil".to_owned(),
        Reply::Array(length) => format!("an array of {length}"),
    };
    format!("{seen} where {due} was due")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The verdict on a batch of two keys that is answered so.
    fn verdict(replies: &[Reply<'_>]) -> Verdict {
        let mut transaction = Transaction::batch(2);
        let watch = replies.last().is_some_and(
            |last| matches!(last, Reply::Error(text) if text.starts_with(b"EXECABORT ")),
        );
        let replies: Vec<_> = replies.iter().chain(watch.then_some(&OK)).collect();
        for (at, &reply) in replies.iter().enumerate() {
            let last = transaction.take(*reply).unwrap();
            assert_eq!(last, at + 1 == replies.len(), "after reply {at}");
        }
        transaction.verdict()
    }

    const OK: Reply<'static> = Reply::Status(b"OK");
    const QUEUED: Reply<'static> = Reply::Status(b"QUEUED");
    const ABORT: Reply<'static> =
        Reply::Error(b"EXECABORT Transaction discarded because of previous errors.");

    fn error(text: &str) -> Reply<'_> {
        Reply::Error(text.as_bytes())
    }

    #[test]
    fn a_refusal_is_told_in_the_words_that_say_why() {
        let oom = error("OOM command not allowed when used memory > 'maxmemory'.");
        let queued = verdict(&[OK, oom, oom, oom, oom, ABORT]);
        assert!(matches!(queued, Verdict::Refused(why) if why.starts_with("OOM ")));
        // Redis 7 checks once more at EXEC.
        let late = error("EXECABORT Transaction discarded because of: READONLY ...");
        let late = verdict(&[OK, QUEUED, QUEUED, QUEUED, QUEUED, late]);
        assert!(matches!(late, Verdict::Refused(why) if why.contains("READONLY")));
        // One key and the whole at once: it is the whole that must pass first.
        let denied = error("NOPERM key");
        let both = verdict(&[OK, denied, oom, oom, oom, ABORT]);
        assert!(matches!(both, Verdict::Refused(why) if why.starts_with("OOM ")));
    }

    #[test]
    fn a_refusal_of_clock_or_token_concerns_the_whole() {
        let denied = error("NOPERM in whatever words");
        let key = verdict(&[OK, QUEUED, denied, QUEUED, QUEUED, ABORT]);
        assert!(matches!(key, Verdict::Keys(errors) if errors.len() == 1 && errors[0].0 == 1));
        let command = verdict(&[OK, denied, denied, denied, QUEUED, ABORT]);
        assert!(matches!(command, Verdict::Refused(why) if why.starts_with("NOPERM")));
        let token = verdict(&[OK, QUEUED, denied, QUEUED, error("NOPERM token"), ABORT]);
        assert!(matches!(token, Verdict::Refused(why) if why == "NOPERM token"));
    }

    #[test]
    fn what_is_not_certain_is_not_called_so() {
        let exec = error("ERR upstream timed out");
        let broken = [
            vec![error("NOPERM multi")],
            vec![OK, QUEUED, QUEUED, QUEUED, QUEUED, exec],
        ];
        for replies in broken {
            assert!(matches!(verdict(&replies), Verdict::Broken(_)));
        }
        // It ran though a command had been refused: no Redis does that.
        let (one, old, four) = (Reply::Integer(1), Reply::Nil, Reply::Array(4));
        let ran = [
            OK, QUEUED, ABORT, QUEUED, QUEUED, four, one, one, one, old, OK,
        ];
        assert!(matches!(verdict(&ran), Verdict::Broken(_)));
        // An array of another length cannot be told apart.
        let mut transaction = Transaction::claim();
        assert_eq!(transaction.take(OK), Ok(false));
        assert_eq!(transaction.take(QUEUED), Ok(false));
        assert!(transaction.take(Reply::Array(2)).is_err());
    }

    #[test]
    fn frames_hold_arrays_of_any_length() {
        let mut frames = Frames::new(3);
        let replies = [
            (Reply::Array(0), false),
            (Reply::Array(2), false),
            (Reply::Nil, false),
            (Reply::Integer(1), false),
            (Reply::Bulk(b"x"), true),
        ];
        for (reply, last) in replies {
            assert_eq!(frames.take(reply), Ok(last));
        }
        let pair = Frame::Array(vec![Frame::Nil, Frame::Integer(1)]);
        let due = [Frame::Array(vec![]), pair, Frame::Bulk(b"x".to_vec())];
        assert_eq!(frames.seen, due);
    }
}
