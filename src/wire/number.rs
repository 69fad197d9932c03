//! Integers as Redis reads them: plain decimal, no sign but `-`, no leading zero, no space.

/// Reads a 64-bit integer that is the whole of `text`; `None`: it is not one.
#[inline]
pub fn parse_i64(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    let magnitude = match digits {
        [b'0'] if !negative => return Some(0),
        [b'1'..=b'9', ..] if digits.len() <= 19 => {
            let mut sum = 0_u64;
            for digit in digits {
                if !digit.is_ascii_digit() {
                    return None;
                }
                // 19 digits stay below 10^19, which is below 2^64.
                sum = sum * 10 + u64::from(digit - b'0');
            }
            sum
        }
        _ => return None,
    };
    if negative {
        0_i64.checked_sub_unsigned(magnitude)
    } else {
        i64::try_from(magnitude).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::parse_i64;

    #[test]
    fn the_ends_of_the_range_are_read_and_their_neighbours_refused() {
        assert_eq!(parse_i64(b"9223372036854775807"), Some(i64::MAX));
        assert_eq!(parse_i64(b"-9223372036854775808"), Some(i64::MIN));
        for text in [
            "9223372036854775808",
            "-9223372036854775809",
            "99999999999999999999",
        ] {
            assert_eq!(parse_i64(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn what_redis_refuses_is_refused() {
        for text in [
            "", "-", "+1", " 1", "1 ", "01", "-0", "1.0", "1e3", "0x1", "one",
        ] {
            assert_eq!(parse_i64(text.as_bytes()), None, "{text:?}");
        }
        assert_eq!(parse_i64(b"0"), Some(0));
        assert_eq!(parse_i64(b"-17"), Some(-17));
    }
}
