//! File modes as they are written: octal digits in a string (`"0660"`).
//!
//! TOML's integers are decimal: `mode = 660` would mean something that nobody wants, so a bare
//! number is refused.

use serde::{Deserializer, Serializer};

/// What an error says would be right.
const EXPECTED: &str = "permissions as octal digits in quotes, such as \"0660\"";

/// Reads permission bits as they are written; `None` if they are not octal or beyond `0777`.
pub fn parse(text: &str) -> Option<u32> {
    let octal = (1..=4).contains(&text.len()) && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
    let mode = octal.then(|| u32::from_str_radix(text, 8).ok())??;
    (mode <= 0o777).then_some(mode)
}

/// Writes permission bits as four octal digits.
pub fn format(mode: u32) -> String {
    format!("{mode:04o}")
}

// The shape is serde's.
#[allow(clippy::trivially_copy_pass_by_ref)]
pub(super) fn serialize<S: Serializer>(mode: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format(*mode))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    super::text::deserialize(deserializer, EXPECTED, parse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_digits_are_a_mode() {
        assert_eq!(parse("0660"), Some(0o660));
        assert_eq!(parse("660"), Some(0o660));
        assert_eq!(parse("0"), Some(0));
        assert_eq!(format(0o660), "0660");
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "0o660",
            "0680",
            "rw-rw----",
            "+660",
            "1777",
            "00660",
            " 660",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
    }
}
