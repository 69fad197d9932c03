//! Sizes as they are written: a number of bytes, or `"256MiB"`.

use serde::de::{Deserialize, Deserializer, Error, Unexpected};
use serde::ser::{Error as _, Serializer};
use toml::Value;

use super::text::found;
use super::units::{self, Units};

/// What an error says would be right.
const EXPECTED: &str = "a size in bytes, such as 65536, \"1KiB\" or \"256MiB\"";

/// In bytes; what has no unit is bytes, too.
const UNITS: &Units = &[
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
    ("", 1),
];

/// Reads a size as it is written; `None` if it is not one.
pub fn parse(text: &str) -> Option<u64> {
    units::parse(text, UNITS)
}

/// Writes a size in the largest unit that divides it, so that [`parse`] gives it back.
pub fn format(bytes: u64) -> String {
    units::format(bytes, UNITS)
}

pub(super) fn serialize<T, S>(bytes: &T, serializer: S) -> Result<S::Ok, S::Error>
where
    T: Copy + TryInto<u64>,
    S: Serializer,
{
    let bytes = (*bytes)
        .try_into()
        .map_err(|_| S::Error::custom("a size beyond 64 bits"))?;
    serializer.serialize_str(&format(bytes))
}

pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: TryFrom<u64>,
    D: Deserializer<'de>,
{
    let value = Value::deserialize(deserializer)?;
    let bytes = match &value {
        Value::Integer(bytes) => u64::try_from(*bytes).ok(),
        Value::String(text) => parse(text),
        _ => None,
    };
    let bytes = bytes.ok_or_else(|| D::Error::invalid_value(found(&value), &EXPECTED))?;
    T::try_from(bytes)
        .map_err(|_| D::Error::invalid_value(Unexpected::Unsigned(bytes), &"a smaller size"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_with_or_without_a_unit_is_a_size() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65_536),
            ("12B", 12),
            ("1KiB", 1_024),
            ("256MiB", 268_435_456),
            ("64GiB", 68_719_476_736),
        ] {
            assert_eq!(parse(text), Some(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in [
            "",
            "MiB",
            "-1",
            "1.5MiB",
            "1MB",
            "1 KiB",
            "1kib",
            "99999999TiB",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for bytes in [0, 1, 1_000, 1_024, 1_536, 268_435_456, u64::MAX] {
            assert_eq!(parse(&format(bytes)), Some(bytes));
        }
        assert_eq!(format(268_435_456), "256MiB");
        assert_eq!(format(1_000), "1000B");
    }
}
