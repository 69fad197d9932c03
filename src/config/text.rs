//! Values that are written as text in every source: read by one function, so that a wrong type and a
//! wrong text give errors of the same shape (what was found, what would be right).

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, Unexpected};
use toml::Value;

/// Takes a string and parses it; anything else, or a string that `parse` refuses, is an error
/// that says `expected`.
pub(super) fn deserialize<'de, D, T>(
    deserializer: D,
    expected: impl fmt::Display,
    parse: fn(&str) -> Option<T>,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
{
    let value = Value::deserialize(deserializer)?;
    let parsed = value.as_str().and_then(parse);
    parsed.ok_or_else(|| D::Error::invalid_value(found(&value), &expected.to_string().as_str()))
}

/// What an error says was there.
pub(super) fn found(value: &Value) -> Unexpected<'_> {
    match value {
        Value::String(text) => Unexpected::Str(text),
        Value::Integer(number) => Unexpected::Signed(*number),
        Value::Float(number) => Unexpected::Float(*number),
        Value::Boolean(bool) => Unexpected::Bool(*bool),
        Value::Datetime(_) => Unexpected::Other("a date"),
        Value::Array(_) => Unexpected::Seq,
        Value::Table(_) => Unexpected::Map,
    }
}

/// `serde(with)` for an optional piece of text, where the empty string means none: TOML has no
/// null, and an environment variable can be set to nothing.
pub(super) mod optional {
    use std::ffi::OsStr;

    use serde::de::Deserializer;
    use serde::ser::{Error, Serializer};

    // The shape is serde's.
    #[allow(clippy::ref_option)]
    pub fn serialize<T: AsRef<OsStr>, S: Serializer>(
        value: &Option<T>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let text = value
            .as_ref()
            .map_or(Some(""), |value| value.as_ref().to_str());
        serializer.serialize_str(text.ok_or_else(|| S::Error::custom("a path that is not UTF-8"))?)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
    where
        T: for<'a> From<&'a str>,
        D: Deserializer<'de>,
    {
        super::deserialize(deserializer, "text, or \"\" for none", |text| {
            Some((!text.is_empty()).then(|| T::from(text)))
        })
    }
}
