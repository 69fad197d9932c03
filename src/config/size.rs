//! Sizes as they are written: a number of bytes, or `"256MiB"`.

use std::fmt;

use serde::de::{Deserializer, Error, Unexpected, Visitor};
use serde::ser::{Error as _, Serializer};

/// What an error says would be right.
const EXPECTED: &str = "a size in bytes, such as 65536, \"1KiB\" or \"256MiB\"";

/// Units and their length in bytes, the largest first.
const UNITS: [(&str, u64); 5] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

/// Reads a size as it is written; `None` if it is not one.
pub fn parse(text: &str) -> Option<u64> {
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let unit_bytes = match unit {
        "" => 1,
        unit => UNITS.into_iter().find(|(name, _)| *name == unit)?.1,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit_bytes)
}

/// Writes a size in the largest unit that divides it, so that [`parse`] gives it back.
pub fn format(bytes: u64) -> String {
    let (unit, unit_bytes) = UNITS
        .into_iter()
        .find(|(_, unit_bytes)| bytes != 0 && bytes.is_multiple_of(*unit_bytes))
        .unwrap_or(("B", 1));
    format!("{}{unit}", bytes / unit_bytes)
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
    let bytes = deserializer.deserialize_any(Bytes)?;
    T::try_from(bytes)
        .map_err(|_| D::Error::invalid_value(Unexpected::Unsigned(bytes), &"a smaller size"))
}

struct Bytes;

impl Visitor<'_> for Bytes {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<u64, E> {
        Ok(bytes)
    }

    fn visit_i64<E: Error>(self, bytes: i64) -> Result<u64, E> {
        u64::try_from(bytes).map_err(|_| E::invalid_value(Unexpected::Signed(bytes), &EXPECTED))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<u64, E> {
        parse(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &EXPECTED))
    }
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
