//! The message that tells every node what one batch did. Pure.
//!
//! ```json
//! {"v":1,"node":"3f6c…","name":"web-7","run":"a91e…","seq":1734,"clock":90211,
//!  "at":1763835000123,"deltas":[["likes:42",8731,1204113]]}
//! ```
//!
//! Each delta: key, amount, value after it. Keys that are not UTF-8 stand in `deltas_b64`, in
//! base64. `seq` counts a run's messages without gaps, from 1; an empty message repeats the last.

use std::borrow::Cow;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::counters::Announced;

/// The version written here.
pub const VERSION: u32 = 1;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// [`VERSION`].
    pub v: u32,
    /// The sender's node id.
    pub node: String,
    /// The sender's name.
    pub name: String,
    /// The sender's run.
    pub run: String,
    /// Number of the message in its run.
    pub seq: u64,
    /// The store's clock of the values.
    pub clock: u64,
    /// Unix time in milliseconds.
    pub at: u64,
    /// Key, amount, value after it.
    pub deltas: Vec<(String, i64, i64)>,
    /// As above, the key in base64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deltas_b64: Vec<(String, i64, i64)>,
}

impl Message {
    /// Adds one delta.
    pub fn push(&mut self, key: &[u8], amount: i64, value: i64) {
        match std::str::from_utf8(key) {
            Ok(text) => self.deltas.push((text.to_owned(), amount, value)),
            Err(_) => self.deltas_b64.push((STANDARD.encode(key), amount, value)),
        }
    }
}

/// A message as it was received, its keys where they lie in it.
#[derive(Debug, Deserialize)]
pub struct Received<'a> {
    v: u32,
    /// The sender's node id.
    #[serde(borrow)]
    pub node: Cow<'a, str>,
    /// The sender's run.
    #[serde(borrow)]
    pub run: Cow<'a, str>,
    /// Number of the message in its run.
    pub seq: u64,
    /// The store's clock of the values.
    pub clock: u64,
    /// Unix time in milliseconds.
    pub at: u64,
    #[serde(borrow)]
    deltas: Vec<Delta<'a>>,
    #[serde(borrow, default)]
    deltas_b64: Vec<Delta<'a>>,
}

#[derive(Debug, Deserialize)]
struct Delta<'a>(#[serde(borrow)] Text<'a>, #[allow(dead_code)] i64, i64);

// In a tuple only a type of its own borrows.
#[derive(Debug, Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Why a message is not used.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// It is no such JSON.
    #[error("not understood: {0}")]
    Malformed(#[source] serde_json::Error),
    /// It was written by a newer tallyd.
    #[error("version {0}, and this tallyd reads version {VERSION}")]
    Version(u32),
    /// A key's base64 is none.
    #[error("a key is no base64")]
    Key,
}

impl<'a> Received<'a> {
    /// Reads a message. Fields that are not known are passed over.
    ///
    /// # Errors
    /// See [`MessageError`].
    pub fn decode(text: &'a [u8]) -> Result<Self, MessageError> {
        match serde_json::from_slice::<Self>(text) {
            Ok(message) if message.v == VERSION => Ok(message),
            Ok(message) => Err(MessageError::Version(message.v)),
            Err(error) => Err(match serde_json::from_slice::<OnlyVersion>(text) {
                Ok(OnlyVersion { v }) if v != VERSION => MessageError::Version(v),
                _ => MessageError::Malformed(error),
            }),
        }
    }

    /// Whether it carries no value: a heartbeat.
    pub fn is_empty(&self) -> bool {
        self.deltas.is_empty() && self.deltas_b64.is_empty()
    }

    /// Its values.
    ///
    /// # Errors
    /// [`MessageError::Key`]
    pub fn announced(&self) -> Result<Announced, MessageError> {
        let count = self.deltas.len() + self.deltas_b64.len();
        let mut announced = Announced {
            keys: Vec::with_capacity(count * 24),
            values: Vec::with_capacity(count),
            clock: self.clock,
        };
        for Delta(key, _, value) in &self.deltas {
            announced.keys.extend_from_slice(key.0.as_bytes());
            announced.values.push((key.0.len() as u32, *value));
        }
        for Delta(key, _, value) in &self.deltas_b64 {
            let key = STANDARD.decode(&*key.0).map_err(|_| MessageError::Key)?;
            announced.keys.extend_from_slice(&key);
            announced.values.push((key.len() as u32, *value));
        }
        Ok(announced)
    }
}

#[derive(Deserialize)]
struct OnlyVersion {
    v: u32,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> Message {
        Message {
            v: VERSION,
            node: "n".to_owned(),
            name: "web".to_owned(),
            run: "r".to_owned(),
            seq: 7,
            clock: 9,
            at: 1,
            deltas: Vec::new(),
            deltas_b64: Vec::new(),
        }
    }

    proptest! {
        #[test]
        fn what_is_sent_is_received(
            deltas in proptest::collection::vec((any::<Vec<u8>>(), any::<i64>(), any::<i64>()), 0..20)
        ) {
            let mut message = message();
            for (key, amount, value) in &deltas {
                message.push(key, *amount, *value);
            }
            let text = serde_json::to_vec(&message).unwrap();
            let received = Received::decode(&text).unwrap();
            prop_assert_eq!(received.is_empty(), deltas.is_empty());
            prop_assert_eq!((received.seq, received.clock), (7, 9));
            let announced = received.announced().unwrap();
            let mut at = 0;
            let mut found: Vec<(Vec<u8>, i64)> = announced.values.iter().map(|&(len, value)| {
                let key = announced.keys[at..at + len as usize].to_vec();
                at += len as usize;
                (key, value)
            }).collect();
            let mut expected: Vec<_> =
                deltas.into_iter().map(|(key, _, value)| (key, value)).collect();
            found.sort();
            expected.sort();
            prop_assert_eq!(found, expected);
        }

        /// Guards against panics and unbounded memory: what comes from the channel is anyone's.
        #[test]
        fn any_bytes_are_received_or_refused(bytes in any::<Vec<u8>>(), cut in any::<prop::sample::Index>()) {
            let _ = Received::decode(&bytes).map(|message| message.announced());
            let whole = serde_json::to_vec(&message()).unwrap();
            let cut = cut.index(whole.len());
            prop_assert!(Received::decode(&whole[..cut]).is_err());
        }
    }

    #[test]
    fn a_newer_version_is_told_apart_from_nonsense() {
        for (text, newer) in [
            (&br#"{"v":2,"node":"n","what":"ever"}"#[..], true),
            (br#"{"v":1,"node":"n"}"#, false),
            (b"likes:42 +1", false),
            (b"", false),
        ] {
            let error = Received::decode(text).unwrap_err();
            assert_eq!(matches!(error, MessageError::Version(2)), newer, "{error}");
        }
    }
}
