//! The hottest keys of the moment: by how much each changed in the epochs that were sealed of late.
//!
//! Fed with whole epochs, each once, after it was sealed and off the ingest thread: increments pay
//! nothing for it, and an epoch of 100,000 keys takes about 0.3 ms (5 ms in the worst order). Two
//! windows follow each other: the one being filled and the one before. What is shown covers both, so
//! that it never begins at nothing, and what is older is forgotten. Windows consist of whole epochs:
//! when none is sealed, because the store is away, the picture stands still, and says as of when it is.
//!
//! Bounded: [`KEYS_MAX`] keys in each window, 256 bytes of each.
//!
//! - [`summary`]: the algorithm, and what it promises

pub mod summary;

use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use summary::{Summary, Weighed};

/// Keys kept in a window: a key with more than 1/512 of all changes is sure to be among them.
pub const KEYS_MAX: usize = 512;
/// A window that covers so much is followed by the next.
const WINDOW: Duration = Duration::from_secs(5);

/// See the module's documentation. Shared by the flush stage and those who look.
#[derive(Debug)]
pub struct Hot(Mutex<Windows>);

#[derive(Debug)]
struct Windows {
    /// When the one before began.
    since: Instant,
    before: Summary,
    /// Where they meet.
    turn: Instant,
    filling: Summary,
    /// When the last epoch ended.
    until: Instant,
}

/// The hottest keys at a moment.
#[derive(Debug, Clone)]
pub struct Hottest {
    /// When the time that this covers began.
    pub since: Instant,
    /// When it ended: with the last epoch.
    pub until: Instant,
    /// The changes of all keys together.
    pub total: u64,
    /// The hottest first.
    pub keys: Vec<Weighed>,
}

impl Default for Hot {
    fn default() -> Self {
        Hot::new(Instant::now())
    }
}

impl Hot {
    /// Nothing is hot; the first epoch begins now.
    pub fn new(now: Instant) -> Self {
        Hot(Mutex::new(Windows {
            since: now,
            before: Summary::new(KEYS_MAX),
            turn: now,
            filling: Summary::new(KEYS_MAX),
            until: now,
        }))
    }

    /// An epoch that ended now: its keys, each once, and by how much each changed. One without keys
    /// counts as well: it is how hot keys cool down.
    pub fn add_epoch<'a>(&self, now: Instant, epoch: impl Iterator<Item = (&'a [u8], i64)>) {
        let weights = epoch.map(|(key, delta)| (key, delta.unsigned_abs()));
        // The long part, before anybody could wait for it.
        let summary = Summary::of_epoch(KEYS_MAX, weights);
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        windows.add(now, summary);
    }

    /// The `count` hottest.
    pub fn hottest(&self, count: usize) -> Hottest {
        let (mut both, before, since, until) = {
            let windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let (filling, before) = (windows.filling.clone(), windows.before.clone());
            (filling, before, windows.since, windows.until)
        };
        both.merge(before);
        Hottest {
            since,
            until,
            total: both.total(),
            keys: both.heaviest(count),
        }
    }
}

impl Windows {
    fn add(&mut self, now: Instant, epoch: Summary) {
        if self.until.duration_since(self.turn) >= WINDOW {
            self.since = self.turn;
            self.turn = self.until;
            self.before = std::mem::replace(&mut self.filling, Summary::new(KEYS_MAX));
        }
        self.filling.merge(epoch);
        self.until = now;
    }
}

/// A key for a reader: what cannot be seen, or would change how the rest is seen, is escaped.
pub fn readable(key: &[u8]) -> String {
    let mut text = String::new();
    for chunk in key.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\'' | '"' => text.push(c),
                _ => text.extend(c.escape_debug()),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

impl Weighed {
    /// The key for a reader; what was cut off is told.
    pub fn text(&self) -> String {
        let mut text = readable(&self.shown);
        if self.key_bytes > self.shown.len() {
            let _ = write!(text, "… ({} bytes)", self.key_bytes);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(hottest: &Hottest) -> Vec<(String, u64)> {
        let name = |key: &Weighed| (key.text(), key.count);
        hottest.keys.iter().map(name).collect()
    }

    #[test]
    fn both_windows_are_shown_and_what_is_older_is_forgotten() {
        let begin = Instant::now();
        let hot = Hot::new(begin);
        let at = |seconds| begin + Duration::from_secs(seconds);
        let add = |seconds, epoch: &[(&str, i64)]| {
            let epoch = epoch.iter().map(|&(key, delta)| (key.as_bytes(), delta));
            hot.add_epoch(at(seconds), epoch);
        };
        let named = |key: &str, count| (key.to_owned(), count);
        add(3, &[("old", 5), ("both", 2)]);
        add(6, &[("down", -9)]);
        add(9, &[("both", 4)]);
        let seen = hot.hottest(3);
        assert_eq!(
            names(&seen),
            [named("down", 9), named("both", 6), named("old", 5)]
        );
        assert_eq!((seen.since, seen.until, seen.total), (begin, at(9), 20));
        add(12, &[]);
        add(13, &[("new", 1)]);
        let seen = hot.hottest(3);
        assert_eq!(names(&seen), [named("both", 4), named("new", 1)]);
        assert_eq!((seen.since, seen.until), (at(6), at(13)));
        // Nothing happens, and that is seen as well.
        add(20, &[]);
        add(30, &[]);
        add(40, &[]);
        assert_eq!(names(&hot.hottest(3)), []);
    }

    #[test]
    fn keys_are_shown_as_text_whatever_they_hold() {
        let text = |key: &[u8]| {
            let weighed = Weighed {
                shown: key.into(),
                key_bytes: key.len(),
                count: 0,
                error: 0,
            };
            weighed.text()
        };
        assert_eq!(text("gefällt:42 \"ja\"".as_bytes()), "gefällt:42 \"ja\"");
        assert_eq!(text(b"a\xff\x00\n\\"), "a\\xff\\0\\n\\\\");
        // Would turn the direction of what follows.
        assert_eq!(text("a\u{202e}b".as_bytes()), "a\\u{202e}b");
        assert_eq!(text(b"<img src=x>"), "<img src=x>");
        let mut long = Weighed {
            shown: b"abc".as_slice().into(),
            key_bytes: 2000,
            count: 0,
            error: 0,
        };
        assert_eq!(long.text(), "abc… (2000 bytes)");
        // Cut within a character.
        long.shown = b"ab\xc3".as_slice().into();
        assert_eq!(long.text(), "ab\\xc3… (2000 bytes)");
    }
}
