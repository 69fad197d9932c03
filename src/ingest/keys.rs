//! Which keys clients may use: `limits.allow_keys`.
//!
//! A pattern that only says how a key begins, the usual one, costs a comparison of that beginning.
//! Without patterns nothing is asked at all: see [`AllowedKeys::is_all`].

use super::glob::{Glob, TooLong};
use super::hub::KEY_CHANNEL;

/// See the module's documentation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedKeys(Vec<Glob>);

impl AllowedKeys {
    /// By patterns in Redis' glob style; none: every key.
    ///
    /// # Errors
    /// A pattern that is too long, and its place.
    pub fn new(patterns: &[String]) -> Result<Self, (usize, TooLong)> {
        let glob = |(place, text): (usize, &String)| {
            Glob::new(text.as_bytes()).map_err(|error| (place, error))
        };
        patterns
            .iter()
            .enumerate()
            .map(glob)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether every key is allowed.
    pub fn is_all(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether this key is.
    #[inline]
    pub fn allow(&self, key: &[u8]) -> bool {
        self.is_all() || self.0.iter().any(|pattern| pattern.matches(key))
    }

    /// Whether a client may subscribe to a channel. The channel of deltas tells of every key, so
    /// it is served only where every key is allowed.
    pub fn allow_channel(&self, channel: &[u8]) -> bool {
        self.is_all()
            || channel
                .strip_prefix(KEY_CHANNEL)
                .is_some_and(|key| self.allow(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(patterns: &[&str]) -> AllowedKeys {
        let patterns: Vec<String> = patterns.iter().map(|&text| text.to_owned()).collect();
        AllowedKeys::new(&patterns).unwrap()
    }

    #[test]
    fn without_patterns_every_key_is_allowed() {
        let all = allowed(&[]);
        assert!(all.is_all());
        assert!(all.allow(b"anything"));
        assert!(all.allow_channel(b"tallyd:deltas"));
    }

    #[test]
    fn a_channel_is_allowed_as_its_key_is() {
        let some = allowed(&["likes:*"]);
        assert!(some.allow_channel(b"tallyd:key:likes:7"));
        for channel in [
            "tallyd:key:views:7",
            "tallyd:deltas",
            "likes:7",
            "tallyd:key:",
        ] {
            assert!(!some.allow_channel(channel.as_bytes()), "{channel}");
        }
    }
}
