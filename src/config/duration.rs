//! Durations as they are written: a whole number and its unit (`"1s"`, `"50ms"`, `"2m"`).
//!
//! A bare number is refused: nobody can tell what the unit of `interval = 5` is.

use std::time::Duration;

use serde::{Deserializer, Serializer};

use super::units::{self, Units};

/// What an error says would be right.
pub(super) const EXPECTED: &str =
    "a duration of at most \"365d\" with its unit, such as \"1s\", \"50ms\" or \"2m\"";

/// The longest duration taken, so that adding one to a clock's reading can never overflow.
const LONGEST: Duration = Duration::from_secs(365 * 86_400);

/// In nanoseconds.
const UNITS: &Units = &[
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Reads a duration as it is written; `None` if it is not one.
pub fn parse(text: &str) -> Option<Duration> {
    let duration = Duration::from_nanos(units::parse(text, UNITS)?);
    (duration <= LONGEST).then_some(duration)
}

/// Writes a duration in the longest unit that divides it, so that [`parse`] gives it back.
pub fn format(duration: Duration) -> String {
    if duration.is_zero() {
        return "0s".to_owned();
    }
    // 64 bits of nanoseconds are 584 years.
    units::format(duration.as_nanos() as u64, UNITS)
}

pub(super) fn serialize<S: Serializer>(
    duration: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format(*duration))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Duration, D::Error> {
    super::text::deserialize(deserializer, EXPECTED, parse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_with_a_unit_is_a_duration() {
        for (text, duration) in [
            ("1s", Duration::from_secs(1)),
            ("50ms", Duration::from_millis(50)),
            ("2m", Duration::from_secs(120)),
            ("3h", Duration::from_secs(10_800)),
            ("365d", LONGEST),
            ("7us", Duration::from_micros(7)),
            ("0s", Duration::ZERO),
        ] {
            assert_eq!(parse(text), Some(duration), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_number_with_a_unit_is_refused() {
        for text in [
            "",
            "5",
            "s",
            "1.5s",
            "-1s",
            "+1s",
            "1 s",
            "1S",
            "1s ",
            "1m30s",
            "366d",
            "99999999999999999999s",
            "18446744073709551615d",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for nanos in [0, 1, 999, 1_000, 1_500_000, 1_000_000_000, 90_000_000_000] {
            let duration = Duration::from_nanos(nanos);
            assert_eq!(parse(&format(duration)), Some(duration));
        }
        assert_eq!(format(Duration::from_millis(1500)), "1500ms");
        assert_eq!(format(Duration::from_secs(60)), "1m");
        assert_eq!(format(Duration::from_secs(30)), "30s");
    }
}
