//! Settings that are one of a few words.
//!
//! Their words are strum's, not those of serde's derive: figment lets a number stand for a derived
//! enum's variant, and `delivery = 0` must be an error.

use std::fmt;
use std::str::FromStr;

use serde::{Deserializer, Serializer};
use strum::{EnumString, IntoStaticStr, VariantNames};

/// How a batch reaches the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumString, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "kebab-case")]
pub enum Delivery {
    /// In a transaction that carries the node's token: no retry counts twice.
    ExactlyOnce,
    /// As a plain pipeline, for proxies that refuse `MULTI`: a retry after a lost reply may
    /// count twice.
    AtLeastOnce,
}

/// When the journal is forced to the disk. It survives `kill -9` with any of them; this is
/// about power cuts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumString, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "kebab-case")]
pub enum SyncPolicy {
    /// With each seal: a power cut loses at most one `flush.interval`.
    Interval,
    /// Before the reply, one sync for a group of commands: a power cut loses nothing
    /// acknowledged.
    Always,
    /// When the kernel likes.
    Never,
}

/// What the reply to the first `INCR` of a key on this node counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumString, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "kebab-case")]
pub enum Cold {
    /// The store's value, read first; waits at most `reply.load_timeout`.
    Load,
    /// What is pending here alone; never waits.
    Delta,
}

/// What a read is answered when the store has not told the value in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumString, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "kebab-case")]
pub enum OnTimeout {
    /// An error that clients try again after.
    Error,
    /// As if there were no such key.
    Nil,
}

/// The least severe lines that are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumString, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "kebab-case")]
pub enum LogLevel {
    /// Something failed and needs somebody.
    Error,
    /// Something is wrong, and is being dealt with.
    Warn,
    /// Rare events of the daemon's life.
    Info,
    /// What each stage does.
    Debug,
    /// Everything.
    Trace,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumString, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "kebab-case")]
pub enum LogFormat {
    /// Coloured text on a terminal, lines with a priority under systemd, plain text else.
    Auto,
    /// Text, coloured on a terminal.
    Text,
    /// One JSON object a line.
    Json,
}

// The shape is serde's.
#[allow(clippy::trivially_copy_pass_by_ref)]
pub(super) fn serialize<T, S>(choice: &T, serializer: S) -> Result<S::Ok, S::Error>
where
    T: Copy + Into<&'static str>,
    S: Serializer,
{
    serializer.serialize_str((*choice).into())
}

pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromStr + VariantNames,
    D: Deserializer<'de>,
{
    super::text::deserialize(deserializer, OneOf(T::VARIANTS), |word| word.parse().ok())
}

/// What an error says would be right.
struct OneOf(&'static [&'static str]);

impl fmt::Display for OneOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, word) in self.0.iter().enumerate() {
            let between = match index {
                0 => "",
                _ if index + 1 == self.0.len() => " or ",
                _ => ", ",
            };
            write!(f, "{between}{word:?}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use figment::value::Value;

    use super::*;

    #[test]
    fn a_choice_is_read_from_its_word_and_nothing_else() {
        let read = |value: Value| deserialize::<Delivery, _>(&value).map_err(|e| e.to_string());
        for word in Delivery::VARIANTS {
            let choice = read((*word).into()).unwrap();
            assert_eq!(<&str>::from(choice), *word);
        }
        assert_eq!(Delivery::VARIANTS, ["exactly-once", "at-least-once"]);
        for value in [
            0.into(),
            "".into(),
            "ExactlyOnce".into(),
            "exactly_once".into(),
        ] {
            let error = read(value).unwrap_err();
            assert!(
                error.contains("\"exactly-once\" or \"at-least-once\""),
                "{error}"
            );
        }
    }
}
