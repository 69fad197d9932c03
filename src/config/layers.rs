//! The sources on top of each other, and all that is wrong with them.
//!
//! The layers are kept flat (`section.key`), because that is what origins and errors speak of.
//! figment turns the strongest values into a [`Config`]. It stops at the first bad one, so a bad
//! value is reported, taken away, and the rest tried again.
//!
//! figment's own providers are not used. That for TOML knows no lines. That for the environment
//! reads the process's, guesses types from the text (`0660` is a number to it), and cannot name the
//! variable in an error.

use std::io;

use figment::Figment;
use figment::error::{Actual, Kind};
use serde::Deserialize;
use serde::de::IntoDeserializer;
use toml::Value;
use toml::de::{DeTable, DeValue};

use super::fault::Fault;
use super::source::{Environment, Flags, Origin, Origins, PREFIX};
use super::{Config, written};
use crate::small_file;

/// A longer file is no configuration, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A key, and what the sources say of it.
struct Key {
    /// `section.key`.
    name: String,
    /// The default.
    default: (Value, Origin),
    /// What was set, the weakest source first.
    set: Vec<(Value, Origin)>,
}

impl Key {
    /// What holds, and where it came from.
    fn strongest(&self) -> &(Value, Origin) {
        self.set.last().unwrap_or(&self.default)
    }

    /// What the name has before and behind its dot.
    fn parts(&self) -> (&str, &str) {
        self.name.split_once('.').unwrap_or((&self.name, ""))
    }

    /// The environment variable that sets it.
    fn variable(&self) -> String {
        format!("{PREFIX}{}", self.name.replace('.', "__").to_uppercase())
    }

    /// Takes text from a place that knows nothing but text, as the type that the key has by
    /// default. What does not fit stays text, for the error to show.
    fn set_text(&mut self, text: &str, origin: Origin) {
        let parsed = match self.default.0 {
            Value::Boolean(_) => text.parse().ok().map(Value::Boolean),
            Value::Integer(_) => text.parse().ok().map(Value::Integer),
            _ => None,
        };
        let value = parsed.unwrap_or_else(|| Value::from(text));
        self.set.push((value, origin));
    }
}

/// Every key that there is, in the order of the documentation.
pub(super) struct Layers(Vec<Key>);

impl Layers {
    /// The defaults, with nothing on top.
    pub fn new(environment: &Environment) -> Self {
        let keys = written::keys(&Config::defaults(environment)).into_iter();
        let keys = keys.map(|(name, value)| {
            let variable = match name.as_str() {
                "node.state_dir" => environment.state_dir().1,
                "listen.socket" => environment.socket().1,
                _ => None,
            };
            Key {
                name,
                default: (value, Origin::Default { variable }),
                set: Vec::new(),
            }
        });
        Self(keys.collect())
    }

    fn find(&mut self, name: &str) -> Option<&mut Key> {
        self.0.iter_mut().find(|key| key.name == name)
    }

    fn sections(&self) -> Vec<&str> {
        let mut sections: Vec<_> = self.0.iter().map(|key| key.parts().0).collect();
        sections.dedup();
        sections
    }

    /// Every key of the file that can be told; what is wrong is added to `faults`.
    pub fn push_file(&mut self, flags: &Flags, environment: &Environment, faults: &mut Vec<Fault>) {
        let path = flags.config.as_ref().unwrap_or(&environment.system_file);
        let text = match small_file::read_text(path, FILE_BYTES_MAX) {
            Ok(text) => text,
            // Only a file that was asked for has to be there.
            Err(error) if error.kind() == io::ErrorKind::NotFound && flags.config.is_none() => {
                return;
            }
            Err(source) => {
                faults.push(Fault::UnreadableFile {
                    path: path.clone(),
                    source,
                });
                return;
            }
        };
        let origin = |offset: Option<usize>| Origin::File {
            path: path.clone(),
            line: offset.map(|offset| line_at(&text, offset)),
        };
        let root = match DeTable::parse(&text) {
            Ok(root) => root.into_inner(),
            Err(error) => {
                // Not the error's own display: it shows the line, which may hold a password.
                return faults.push(Fault::Syntax {
                    problem: error.message().replace('\n', ", "),
                    origin: origin(error.span().map(|span| span.start)),
                });
            }
        };
        for (section, value) in root {
            let at = origin(Some(section.span().start));
            if !self.sections().contains(&section.as_ref().as_ref()) {
                faults.push(self.unknown(section.as_ref(), at));
                continue;
            }
            let DeValue::Table(keys) = value.into_inner() else {
                faults.push(Fault::BadValue {
                    key: section.as_ref().to_string(),
                    // Not the value: `store = "redis://:password@host"` holds a secret.
                    found: "a single value".to_owned(),
                    expected: format!("a table, [{}]", section.as_ref()),
                    origin: at,
                });
                continue;
            };
            for (key, value) in keys {
                let at = origin(Some(key.span().start));
                let name = format!("{}.{}", section.as_ref(), key.as_ref());
                let Some(known) = self.find(&name) else {
                    faults.push(self.unknown(&name, at));
                    continue;
                };
                match Value::deserialize(value.into_deserializer()) {
                    Ok(value) => known.set.push((value, at)),
                    // All else that is TOML is a value.
                    Err(_) => faults.push(Fault::BadValue {
                        key: name,
                        found: "a number beyond 64 bits".to_owned(),
                        expected: "a smaller number".to_owned(),
                        origin: at,
                    }),
                }
            }
        }
    }

    /// Every variable of tallyd's; what is wrong is added to `faults`.
    pub fn push_environment(&mut self, environment: &Environment, faults: &mut Vec<Fault>) {
        for variable in &environment.not_text {
            faults.push(Fault::NotText {
                variable: variable.clone(),
            });
        }
        for (name, text) in &environment.variables {
            let Some(rest) = name.strip_prefix(PREFIX) else {
                continue;
            };
            let origin = Origin::Variable { name: name.clone() };
            if let Some(key) = self.0.iter_mut().find(|key| key.variable() == *name) {
                key.set_text(text, origin);
            } else if rest.contains("__") {
                let key = rest.replacen("__", ".", 1).to_lowercase();
                faults.push(self.unknown(&key, origin));
            } else if let Some(key) = self.0.iter().find(|key| {
                // One underscore where two belong is a slip worth an error. Other variables of
                // this prefix are not ours: an orchestrator sets TALLYD_PORT and its like for a
                // service of our name.
                key.variable().replace("__", "_") == *name
            }) {
                faults.push(Fault::UnknownKey {
                    key: key.name.clone(),
                    expected: format!("the variable is {}", key.variable()),
                    origin,
                });
            }
        }
    }

    /// Every flag that was set.
    pub fn push_flags(&mut self, flags: &Flags) {
        for (name, flag, text) in flags.set() {
            self.find(name)
                .expect("each flag names a key that there is")
                .set_text(text, Origin::Flag { name: flag });
        }
    }

    fn unknown(&self, key: &str, origin: Origin) -> Fault {
        let section = key.split('.').next().unwrap_or_default();
        let parts = self.0.iter().map(Key::parts);
        let keys: Vec<_> = parts.filter(|of| of.0 == section).map(|of| of.1).collect();
        Fault::UnknownKey {
            key: key.to_owned(),
            expected: if keys.is_empty() {
                format!("the sections are {}", self.sections().join(", "))
            } else {
                format!("[{section}] has {}", keys.join(", "))
            },
            origin,
        }
    }

    /// Where what holds came from.
    pub fn origins(&self) -> Origins {
        let keys = self.0.iter();
        let origins = keys.map(|key| (key.name.clone(), key.strongest().1.clone()));
        Origins(origins.collect())
    }

    /// Converts the strongest values; bad ones are reported and replaced by what the weaker layers
    /// say.
    pub fn extract(&mut self, environment: &Environment, faults: &mut Vec<Fault>) -> Config {
        loop {
            let figment = self.0.iter().fold(Figment::new(), |figment, key| {
                figment.merge((&key.name, &key.strongest().0))
            });
            let error = match figment.extract::<Config>() {
                Ok(config) => return config,
                Err(error) => error,
            };
            // Within a list the path goes on, to the place in it.
            let name = error.path[..error.path.len().min(2)].join(".");
            let (found, expected) = explain(error.kind);
            // Each turn takes a value away, so the loop ends; without one there is nothing to
            // try again with.
            let taken = self.find(&name).and_then(|key| key.set.pop());
            let ends = taken.is_none();
            faults.push(Fault::BadValue {
                key: name,
                found,
                expected,
                origin: taken.map_or(Origin::Default { variable: None }, |(_, origin)| origin),
            });
            if ends {
                return Config::defaults(environment);
            }
        }
    }
}

/// What figment's error found, and what it expected.
fn explain(kind: Kind) -> (String, String) {
    match kind {
        Kind::InvalidType(actual, expected) | Kind::InvalidValue(actual, expected) => {
            (found(&actual), plain(expected))
        }
        Kind::ISizeOutOfRange(number) => (number.to_string(), "a smaller number".to_owned()),
        Kind::USizeOutOfRange(number) => (number.to_string(), "a smaller number".to_owned()),
        other => (other.to_string(), "another value".to_owned()),
    }
}

fn found(actual: &Actual) -> String {
    match actual {
        Actual::Str(text) => format!("{text:?}"),
        Actual::Bool(bool) => bool.to_string(),
        Actual::Unsigned(number) => number.to_string(),
        Actual::Signed(number) => number.to_string(),
        Actual::Float(number) => number.to_string(),
        Actual::Seq => "a list".to_owned(),
        Actual::Map => "a table".to_owned(),
        other => other.to_string(),
    }
}

/// The names of Rust's types, for people who set a daemon up.
fn plain(expected: String) -> String {
    match expected.as_str() {
        "usize" => "a whole number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a string" | "path string" => "text in quotes".to_owned(),
        _ => expected,
    }
}

/// The line of an offset, from 1.
fn line_at(text: &str, offset: usize) -> usize {
    1 + text
        .bytes()
        .take(offset)
        .filter(|byte| *byte == b'\n')
        .count()
}
