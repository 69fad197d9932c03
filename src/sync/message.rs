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
use serde::Deserialize;

use crate::counters::Announced;
use crate::store::{Identity, NodeId, RunId};

/// What is shown of a text that makes no sense, in characters.
const SHOWN_CHARS_MAX: usize = 64;

/// The version written here.
pub const VERSION: u32 = 1;

/// What all messages of one run begin with.
#[derive(Debug, Clone)]
pub struct Head {
    node: String,
    run: String,
    text: String,
}

impl Head {
    /// Of the messages of this run, with the label that its node has.
    pub fn new(identity: Identity, name: &str) -> Self {
        let (node, run) = (identity.node.to_string(), identity.run.to_string());
        let name = serde_json::Value::from(name);
        let text = format!(r#"{{"v":{VERSION},"node":"{node}","name":{name},"run":"{run}","#);
        Head { node, run, text }
    }

    /// A message with these deltas: key, amount, value after it. Without any it is a heartbeat.
    pub fn message<'k>(
        &self,
        seq: u64,
        clock: u64,
        at: u64,
        deltas: impl Iterator<Item = (&'k [u8], i64, i64)>,
    ) -> Vec<u8> {
        let mut out =
            Vec::with_capacity(self.text.len() + 64 + deltas.size_hint().1.unwrap_or(0) * 40);
        out.extend_from_slice(self.text.as_bytes());
        for (name, number) in [("seq", seq), ("clock", clock), ("at", at)] {
            put_text(&mut out, name);
            out.push(b':');
            out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
            out.push(b',');
        }
        out.extend_from_slice(b"\"deltas\":[");
        let begin = out.len();
        let mut others = Vec::new();
        for (key, amount, value) in deltas {
            match std::str::from_utf8(key) {
                Ok(key) => put_delta(&mut out, begin, key, amount, value),
                Err(_) => others.push((STANDARD.encode(key), amount, value)),
            }
        }
        out.push(b']');
        if !others.is_empty() {
            out.extend_from_slice(b",\"deltas_b64\":[");
            let begin = out.len();
            for (key, amount, value) in others {
                put_delta(&mut out, begin, &key, amount, value);
            }
            out.push(b']');
        }
        out.push(b'}');
        out
    }

    /// Whether this run has written the message, so far as its first bytes tell.
    pub fn begins(&self, text: &[u8]) -> bool {
        text.starts_with(self.text.as_bytes())
    }

    /// Whether this run has sent the message.
    pub fn is_of(&self, message: &Received<'_>) -> bool {
        message.node == self.node && message.run == self.run
    }
}

/// One more of the list that began there.
fn put_delta(out: &mut Vec<u8>, begin: usize, key: &str, amount: i64, value: i64) {
    if out.len() > begin {
        out.push(b',');
    }
    out.push(b'[');
    put_text(out, key);
    for number in [amount, value] {
        out.push(b',');
        out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }
    out.push(b']');
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("text is JSON, and a Vec takes it");
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
    /// It names no node, or no run.
    #[error("{0} is no {1}")]
    Id(String, &'static str),
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

    /// Who sent it: the ids as they are written, in hexadecimal digits.
    ///
    /// # Errors
    /// [`MessageError::Id`]
    pub fn sender(&self) -> Result<(NodeId, RunId), MessageError> {
        let bad = |text: &str, what| MessageError::Id(shown(text), what);
        let node = hex(&self.node, 32).ok_or_else(|| bad(&self.node, "node id"))?;
        let run = hex(&self.run, 16).ok_or_else(|| bad(&self.run, "run id"))?;
        Ok((NodeId(node), RunId(run as u64)))
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

/// A number of exactly so many hexadecimal digits, as nodes write it.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let plain = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() != digits || !text.bytes().all(plain) {
        return None;
    }
    u128::from_str_radix(text, 16).ok()
}

/// A stranger's text, as a log line may have it.
fn shown(text: &str) -> String {
    let cut: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    let more = if cut.len() < text.len() {
        "... (cut)"
    } else {
        ""
    };
    format!("\"{}\"{more}", cut.escape_debug())
}

#[derive(Deserialize)]
struct OnlyVersion {
    v: u32,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head() -> Head {
        let identity = Identity {
            node: NodeId(0x77),
            run: RunId(0x99),
        };
        Head::new(identity, "web \"7\"\n")
    }

    proptest! {
        #[test]
        fn what_is_sent_is_received(
            deltas in proptest::collection::vec((any::<Vec<u8>>(), any::<i64>(), any::<i64>()), 0..20),
            texts in proptest::collection::vec((any::<String>(), any::<i64>(), any::<i64>()), 0..20),
        ) {
            let deltas: Vec<(Vec<u8>, i64, i64)> = texts
                .into_iter()
                .map(|(key, amount, value)| (key.into_bytes(), amount, value))
                .chain(deltas)
                .collect();
            let given = deltas.iter().map(|(key, amount, value)| (&key[..], *amount, *value));
            let text = head().message(7, 9, 1, given);
            let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
            prop_assert_eq!(&json["node"], "00000000000000000000000000000077");
            prop_assert_eq!(&json["name"], "web \"7\"\n");
            prop_assert_eq!(&json["run"], "0000000000000099");
            prop_assert_eq!(&json["at"], 1);
            let sum: i128 = ["deltas", "deltas_b64"].iter()
                .flat_map(|list| json[*list].as_array().into_iter().flatten())
                .map(|delta| i128::from(delta[1].as_i64().unwrap()))
                .sum();
            prop_assert_eq!(sum, deltas.iter().map(|(_, amount, _)| i128::from(*amount)).sum());
            prop_assert!(head().begins(&text));
            let received = Received::decode(&text).unwrap();
            prop_assert!(head().is_of(&received));
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
            let whole = head().message(7, 9, 1, std::iter::empty());
            let cut = cut.index(whole.len());
            prop_assert!(Received::decode(&whole[..cut]).is_err());
        }
    }

    #[test]
    fn a_message_is_as_documented() {
        let deltas: [(&[u8], i64, i64); 3] = [
            (b"likes:42", 8731, 1_204_113),
            (b"\xff", -1, 2),
            ("ü\"".as_bytes(), 3, 4),
        ];
        let text = head().message(1734, 90211, 5, deltas.into_iter());
        assert_eq!(
            String::from_utf8(text).unwrap(),
            r#"{"v":1,"node":"00000000000000000000000000000077","name":"web \"7\"\n","run":"0000000000000099","seq":1734,"clock":90211,"at":5,"deltas":[["likes:42",8731,1204113],["ü\"",3,4]],"deltas_b64":[["/w==",-1,2]]}"#
        );
    }

    #[test]
    fn a_sender_is_named_by_ids_and_nothing_else_is_one() {
        let text = head().message(1, 1, 1, std::iter::empty());
        let sender = Received::decode(&text).unwrap().sender().unwrap();
        assert_eq!(sender, (NodeId(0x77), RunId(0x99)));
        let text = String::from_utf8(text).unwrap();
        for (own, other) in [
            ("00000000000000000000000000000077", "77"),
            (
                "00000000000000000000000000000077",
                "+0000000000000000000000000000077",
            ),
            (
                "00000000000000000000000000000077",
                "0000000000000000000000000000007A",
            ),
            ("0000000000000099", "x"),
        ] {
            let forged = text.replace(own, other);
            let error = Received::decode(forged.as_bytes())
                .unwrap()
                .sender()
                .unwrap_err();
            assert!(matches!(error, MessageError::Id(..)), "{error}");
        }
        let long = text.replace("00000000000000000000000000000077", &"n\\n".repeat(1000));
        let error = Received::decode(long.as_bytes())
            .unwrap()
            .sender()
            .unwrap_err()
            .to_string();
        assert!(error.len() < 300 && !error.contains('\n'), "{error}");
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
