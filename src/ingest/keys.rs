//! Which keys clients may use: `limits.allow_keys`.
//!
//! A pattern that only says how a key begins, the usual one, costs a comparison of that beginning.
//! Without patterns nothing is asked at all: see [`AllowedKeys::is_all`].

use super::hub::{KEY_CHANNEL, glob};

/// See the module's documentation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AllowedKeys(Vec<Pattern>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Exact(Box<[u8]>),
    Prefix(Box<[u8]>),
    Glob(Box<[u8]>),
}

impl Pattern {
    fn new(pattern: &str) -> Self {
        let special = |text: &str| text.contains(['*', '?', '[', '\\']);
        match pattern.strip_suffix('*') {
            Some(prefix) if !special(prefix) => Self::Prefix(prefix.as_bytes().into()),
            None if !special(pattern) => Self::Exact(pattern.as_bytes().into()),
            _ => Self::Glob(pattern.as_bytes().into()),
        }
    }

    #[inline]
    fn matches(&self, key: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => **exact == *key,
            Self::Prefix(prefix) => key.starts_with(prefix),
            Self::Glob(pattern) => glob(pattern, key),
        }
    }
}

impl AllowedKeys {
    /// By patterns in Redis' glob style; none: every key.
    pub fn new(patterns: &[String]) -> Self {
        Self(patterns.iter().map(|text| Pattern::new(text)).collect())
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
        AllowedKeys::new(&patterns)
    }

    #[test]
    fn without_patterns_every_key_is_allowed() {
        let all = allowed(&[]);
        assert!(all.is_all());
        assert!(all.allow(b"anything"));
        assert!(all.allow_channel(b"tallyd:deltas"));
    }

    #[test]
    fn a_pattern_is_taken_for_the_cheapest_thing_that_it_can_be() {
        let of = |text: &str| Pattern::new(text);
        let bytes = |text: &str| text.as_bytes().into();
        assert_eq!(of("likes:*"), Pattern::Prefix(bytes("likes:")));
        assert_eq!(of("*"), Pattern::Prefix(bytes("")));
        assert_eq!(of("total"), Pattern::Exact(bytes("total")));
        for text in ["a*b", "a?", "[ab]c", "\\*", "a\\*", "a**"] {
            assert_eq!(of(text), Pattern::Glob(bytes(text)), "{text}");
        }
    }

    #[test]
    fn each_kind_of_pattern_matches_as_the_glob_does() {
        let patterns = ["likes:*", "*", "total", "a*b", "a?", "[ab]c", "a\\*", "**"];
        let keys = [
            "likes:", "likes:1", "like", "total", "totals", "ab", "axb", "a", "bc", "a*", "",
        ];
        for pattern in patterns {
            let one = allowed(&[pattern]);
            for key in keys {
                assert_eq!(
                    one.allow(key.as_bytes()),
                    glob(pattern.as_bytes(), key.as_bytes()),
                    "{pattern} {key:?}"
                );
            }
        }
        let two = allowed(&["likes:*", "total"]);
        assert!(two.allow(b"likes:7") && two.allow(b"total") && !two.allow(b"views:7"));
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
