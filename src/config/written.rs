//! A configuration as flat keys and values: for the layer of defaults, to compare two of them, and
//! to print one.

use figment::value::{Num, Value};

use super::Config;

/// The sections in the order of the documentation.
pub(super) const SECTIONS: [&str; 12] = [
    "node", "listen", "store", "flush", "journal", "publish", "reply", "view", "limits", "admin",
    "log", "shutdown",
];

/// Every key (`section.key`) with its value, sections in the order of the documentation. What is
/// secret is masked.
pub(super) fn keys(config: &Config) -> Vec<(String, Value)> {
    let root = Value::serialize(config)
        .expect("paths came from text, so a configuration always serialises");
    let mut keys = Vec::new();
    for section in SECTIONS {
        let values = root
            .find_ref(section)
            .and_then(Value::as_dict)
            .expect("each section is a struct of the configuration");
        for (key, value) in values {
            keys.push((format!("{section}.{key}"), value.clone()));
        }
    }
    keys
}

/// A value as TOML.
pub(super) fn toml(value: &Value) -> String {
    match value {
        Value::String(_, text) => quote(text),
        Value::Char(_, char) => quote(&char.to_string()),
        Value::Bool(_, bool) => bool.to_string(),
        Value::Num(_, Num::F32(float)) => float.to_string(),
        Value::Num(_, Num::F64(float)) => float.to_string(),
        Value::Num(_, num) => match (num.to_u128(), num.to_i128()) {
            (Some(number), _) => number.to_string(),
            (None, Some(number)) => number.to_string(),
            (None, None) => String::new(),
        },
        Value::Array(_, list) => {
            let list: Vec<String> = list.iter().map(toml).collect();
            format!("[{}]", list.join(", "))
        }
        // No key holds one of these.
        Value::Empty(..) | Value::Dict(..) => quote(""),
    }
}

/// A TOML basic string.
fn quote(text: &str) -> String {
    use std::fmt::Write as _;

    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for char in text.chars() {
        match char {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            char if char.is_control() => {
                // Writing to a `String` cannot fail.
                let _ = write!(quoted, "\\u{:04X}", u32::from(char));
            }
            char => quoted.push(char),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::super::source::Environment;
    use super::*;

    #[test]
    fn every_section_of_the_configuration_is_listed() {
        let config = Config::defaults(&Environment::default());
        let root = Value::serialize(&config).unwrap();
        let mut fields: Vec<_> = root.as_dict().unwrap().keys().cloned().collect();
        let mut sections = SECTIONS.map(str::to_owned).to_vec();
        fields.sort();
        sections.sort();
        assert_eq!(fields, sections);
    }

    #[test]
    fn text_is_quoted_so_that_it_is_read_back() {
        use figment::providers::{Format, Toml};
        use figment::value::Dict;

        let list = ["a,b", "[\"c\"]", ""];
        let shown = toml(&Value::from(list.to_vec()));
        let dict: Dict = Toml::from_str(&format!("v = {shown}")).unwrap();
        assert_eq!(dict["v"], Value::from(list.to_vec()));

        for text in ["plain", "a\"b\\c", "a\nb\tc\u{7f}\u{1b}[0m", "ü✓"] {
            let dict: Dict = Toml::from_str(&format!("v = {}", quote(text))).unwrap();
            assert_eq!(dict["v"].as_str(), Some(text));
        }
    }
}
