//! Lists of names: a list in the file, text with commas in the environment.
//!
//! A name that is a number may be written as one (`allow_uids = [33, "deploy"]`); it is kept as text
//! either way.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::Serializer;

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
    deserializer.deserialize_any(ListVisitor)
}

struct ListVisitor;

impl<'de> Visitor<'de> for ListVisitor {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<String>, E> {
        // A variable can be set to nothing, which is a list of none.
        let names = text.split(',').map(str::trim);
        Ok(names
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<String>, A::Error> {
        let mut names = Vec::new();
        while let Some(Name(name)) = list.next_element()? {
            names.push(name);
        }
        Ok(names)
    }
}

/// One of a list.
struct Name(String);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NameVisitor).map(Name)
    }
}

struct NameVisitor;

impl Visitor<'_> for NameVisitor {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(EXPECTED)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<String, E> {
        Ok(number.to_string())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<String, E> {
        // A negative one is no number of a user: whoever looks it up says so.
        Ok(number.to_string())
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
