//! Whole numbers with a unit, such as `"50ms"` and `"256MiB"`: no sign, no fraction, no blanks, and
//! one unit, so that each has one meaning.

/// Units and what one of them is of the smallest, the largest first.
pub(super) type Units = [(&'static str, u64)];

/// Reads a number with its unit; `None` if it is not one.
pub(super) fn parse(text: &str, units: &Units) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, unit) = text.split_at(digits);
    let (_, one) = units.iter().find(|(name, _)| *name == unit)?;
    digits.parse::<u64>().ok()?.checked_mul(*one)
}

/// Writes a number in the largest unit that divides it, so that [`parse`] gives it back.
pub(super) fn format(number: u64, units: &Units) -> String {
    let divides = |(_, one): &&(&str, u64)| number.is_multiple_of(*one);
    let (unit, one) = units.iter().find(divides).unwrap_or(&("", 1));
    format!("{}{unit}", number / one)
}
