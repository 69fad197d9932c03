//! Lists of names: a list in the file, text with commas in the environment.
//!
//! A name that is a number may be written as one (`allow_uids = [33, "deploy"]`); it is kept as text
//! either way.

use serde::de::{Deserialize, Deserializer, Error};
use serde::ser::Serializer;
use toml::Value;

use super::text::found;

/// What an error says would be right.
const EXPECTED: &str =
    "a list of names, such as [\"a\", \"b\"], or text with commas, such as \"a,b\"";

pub(super) fn serialize<S: Serializer>(list: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(list)
}

pub(super) fn deserialize<'de, D>(deserializer: D) -> Result<Vec<String>, D::Error>
where
    D: Deserializer<'de>,
{
    let refused = |value: &Value| D::Error::invalid_type(found(value), &EXPECTED);
    match Value::deserialize(deserializer)? {
        Value::String(text) => {
            // A variable can be set to nothing, which is a list of none.
            let names = text.split(',').map(str::trim);
            let names = names.filter(|name| !name.is_empty());
            Ok(names.map(str::to_owned).collect())
        }
        Value::Array(list) => {
            let names = list.into_iter().map(|name| match name {
                Value::String(name) => Ok(name),
                // A negative one is no number of a user: whoever looks it up says so.
                Value::Integer(number) => Ok(number.to_string()),
                other => Err(refused(&other)),
            });
            names.collect()
        }
        other => Err(refused(&other)),
    }
}

#[cfg(test)]
mod tests {
    use figment::value::Value;

    use super::*;

    fn read(value: impl Into<Value>) -> Result<Vec<String>, String> {
        deserialize(&value.into()).map_err(|error: figment::Error| error.kind.to_string())
    }

    #[test]
    fn a_list_may_hold_names_and_numbers() {
        let list = vec![Value::from("deploy"), Value::from(33_u32)];
        assert_eq!(read(list).unwrap(), ["deploy", "33"]);
        assert_eq!(read(Vec::<Value>::new()).unwrap(), [""; 0]);
    }

    #[test]
    fn text_is_split_at_commas() {
        assert_eq!(read("likes:*, views:*,").unwrap(), ["likes:*", "views:*"]);
        assert_eq!(read("33").unwrap(), ["33"]);
        assert_eq!(read(" ").unwrap(), [""; 0]);
    }

    #[test]
    fn anything_else_is_refused() {
        for value in [
            Value::from(7),
            Value::from(true),
            Value::from(vec![Value::from(true)]),
            Value::from(vec![Value::from(vec!["a"])]),
        ] {
            let error = read(value).unwrap_err();
            assert!(error.contains(EXPECTED), "{error}");
        }
    }
}
