//! A configuration as flat keys and values: for the layer of defaults, to compare two of them, and
//! to print one.

use toml::{Table, Value};

use super::Config;

/// Every key (`section.key`) with its value, in the order of the documentation. What is secret is
/// masked.
pub(super) fn keys(config: &Config) -> Vec<(String, Value)> {
    let root = Table::try_from(config)
        .expect("paths came from text, and sizes are bounded, so a configuration serialises");
    let mut keys = Vec::new();
    for (section, values) in root {
        let Value::Table(values) = values else {
            unreachable!("each section is a struct of the configuration");
        };
        keys.extend(
            values
                .into_iter()
                .map(|(key, value)| (format!("{section}.{key}"), value)),
        );
    }
    keys
}

/// A value as TOML, in one line: JSON's text is TOML's once every control character is escaped.
/// (toml itself would write text of several lines as such.)
pub(super) fn toml(value: &Value) -> String {
    use std::fmt::Write as _;

    if let Value::Array(list) = value {
        let list: Vec<String> = list.iter().map(toml).collect();
        return format!("[{}]", list.join(", "));
    }
    let json = serde_json::to_string(value).expect("text, numbers and booleans are JSON");
    json.chars().fold(String::new(), |mut toml, char| {
        // Writing to a `String` cannot fail.
        let _ = if char.is_control() {
            write!(toml, "\\u{:04X}", u32::from(char))
        } else {
            write!(toml, "{char}")
        };
        toml
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_fills_one_line() {
        for value in [
            Value::from(vec!["a,b", "[\"c\"]", "a\nb\tc\u{7f}\u{1b}[0m\u{9b}"]),
            Value::from("plain"),
            Value::from("a\"b\\c, 'd' ü✓"),
            Value::from(-7),
            Value::from(true),
        ] {
            let written = format!("v = {}", toml(&value));
            assert!(!written.contains(char::is_control), "{written:?}");
            assert_eq!(written.parse::<Table>().unwrap()["v"], value);
        }
    }
}
