//! Values that are written as text in every source: one visitor for all of them, so that a wrong
//! type and a wrong text give errors of the same shape (what was found, what would be right).

use std::fmt;

use serde::de::{Deserializer, Error, Unexpected, Visitor};

/// Takes a string and parses it; anything else, or a string that `parse` refuses, is an error
/// that says `expected`.
pub(super) fn deserialize<'de, D, T>(
    deserializer: D,
    expected: &'static str,
    parse: fn(&str) -> Option<T>,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
{
    deserializer.deserialize_str(Text { expected, parse })
}

struct Text<T> {
    expected: &'static str,
    parse: fn(&str) -> Option<T>,
}

impl<T> Visitor<'_> for Text<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self.expected))
    }
}

/// `serde(with)` for an optional piece of text, where the empty string means none: TOML has no
/// null, and an environment variable can be set to nothing.
pub(super) mod optional {
    use std::path::PathBuf;

    use serde::de::Deserializer;
    use serde::ser::{Error, Serializer};

    /// What can be written as text, or left empty.
    pub trait Optional: Sized {
        /// As it is written.
        fn text(&self) -> Option<&str>;
        /// From what is written; never the empty string.
        fn from_text(text: &str) -> Self;
    }

    impl Optional for String {
        fn text(&self) -> Option<&str> {
            Some(self)
        }

        fn from_text(text: &str) -> Self {
            text.to_owned()
        }
    }

    impl Optional for PathBuf {
        fn text(&self) -> Option<&str> {
            self.to_str()
        }

        fn from_text(text: &str) -> Self {
            Self::from(text)
        }
    }

    // The shape is serde's.
    #[allow(clippy::ref_option)]
    pub fn serialize<T: Optional, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let text = match value {
            None => "",
            Some(value) => value
                .text()
                .ok_or_else(|| S::Error::custom("a path that is not UTF-8"))?,
        };
        serializer.serialize_str(text)
    }

    pub fn deserialize<'de, T: Optional, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<T>, D::Error> {
        super::deserialize(deserializer, "text, or \"\" for none", |text| {
            Some((!text.is_empty()).then(|| T::from_text(text)))
        })
    }
}
