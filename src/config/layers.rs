//! The sources on top of each other, and all that is wrong with them.
//!
//! The layers are kept flat (`section.key`), because that is what origins and errors speak of.
//! figment merges them and turns the result into a [`Config`]. It stops at the first bad value, so a
//! bad value is reported, taken out of its layer, and the rest tried again.
//!
//! figment's own provider for the environment is not used: it reads the process's, guesses types
//! from the text (`0660` is a number to it), and cannot name the variable in an error.

use std::collections::BTreeMap;
use std::io;

use figment::error::{Actual, Kind};
use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::fault::Fault;
use super::source::{Environment, Flags, Origin, Origins, PREFIX};
use super::{Config, written};
use crate::small_file;

/// A longer file is no configuration, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The values of one source, by `section.key`.
struct Layer {
    name: &'static str,
    values: BTreeMap<String, (Value, Origin)>,
}

impl Provider for &Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name)
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        let mut sections: BTreeMap<String, Dict> = BTreeMap::new();
        for (key, (value, _)) in &self.values {
            if let Some((section, key)) = key.split_once('.') {
                sections
                    .entry(section.to_owned())
                    .or_default()
                    .insert(key.to_owned(), value.clone());
            }
        }
        let root = sections
            .into_iter()
            .map(|(section, values)| (section, Value::from(values)))
            .collect();
        Ok(Profile::Default.collect(root))
    }
}

/// All sources, the weakest first. The first one is the defaults, and has every key.
pub(super) struct Layers(Vec<Layer>);

impl Layers {
    pub fn new(environment: &Environment) -> Self {
        let values = written::keys(&Config::defaults(environment))
            .into_iter()
            .map(|(key, value)| {
                let variable = match key.as_str() {
                    "node.state_dir" => environment.state_dir().1,
                    "listen.socket" => environment.socket().1,
                    _ => None,
                };
                (key, (value, Origin::Default { variable }))
            })
            .collect();
        Self(vec![Layer {
            name: "defaults",
            values,
        }])
    }

    fn known(&self) -> &BTreeMap<String, (Value, Origin)> {
        &self
            .0
            .first()
            .expect("the defaults are always there")
            .values
    }

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
        let root: Dict = match Toml::from_str(&text) {
            Ok(root) => root,
            Err(error) => {
                // Not the error's own display: it shows the line, which may hold a password.
                faults.push(Fault::Syntax {
                    problem: error.message().replace('\n', ", "),
                    origin: Origin::File {
                        path: path.clone(),
                        line: error.span().map(|span| line_at(&text, span.start)),
                    },
                });
                return;
            }
        };
        let mut values = BTreeMap::new();
        for (section, value) in root {
            let origin = |key: Option<&str>| Origin::File {
                path: path.clone(),
                line: line_of(&text, &section, key),
            };
            let Some(dict) = value.as_dict() else {
                if written::SECTIONS.contains(&section.as_str()) {
                    faults.push(Fault::BadValue {
                        key: section.clone(),
                        // Not the value: `store = "redis://:password@host"` holds a secret.
                        found: "a single value".to_owned(),
                        expected: format!("a table, [{section}]"),
                        origin: origin(None),
                    });
                } else {
                    faults.push(self.unknown(&section, origin(None)));
                }
                continue;
            };
            if !written::SECTIONS.contains(&section.as_str()) {
                faults.push(self.unknown(&section, origin(None)));
                continue;
            }
            for (key, value) in dict {
                let name = format!("{section}.{key}");
                if self.known().contains_key(&name) {
                    values.insert(name, (value.clone(), origin(Some(key))));
                } else {
                    faults.push(self.unknown(&name, origin(Some(key))));
                }
            }
        }
        self.0.push(Layer {
            name: "file",
            values,
        });
    }

    pub fn push_environment(&mut self, environment: &Environment, faults: &mut Vec<Fault>) {
        for variable in &environment.not_text {
            faults.push(Fault::NotText {
                variable: variable.clone(),
            });
        }
        let mut values = BTreeMap::new();
        for (name, text) in &environment.variables {
            let Some(rest) = name.strip_prefix(PREFIX) else {
                continue;
            };
            let origin = Origin::Variable { name: name.clone() };
            let key = self.known().keys().find(|key| variable(key) == *name);
            if let Some(key) = key {
                let value = self.typed(key, text);
                values.insert(key.clone(), (value, origin));
            } else if rest.contains("__") {
                let key = rest.replacen("__", ".", 1).to_lowercase();
                faults.push(self.unknown(&key, origin));
            } else if let Some(key) = self.known().keys().find(|key| {
                // One underscore where two belong is a slip worth an error. Other variables of
                // this prefix are not ours: an orchestrator sets TALLYD_PORT and its like for a
                // service of our name.
                variable(key).replace("__", "_") == *name
            }) {
                faults.push(Fault::UnknownKey {
                    key: key.clone(),
                    expected: format!("the variable is {}", variable(key)),
                    origin,
                });
            }
        }
        self.0.push(Layer {
            name: "environment",
            values,
        });
    }

    pub fn push_flags(&mut self, flags: &Flags) {
        let values = flags
            .set()
            .map(|(key, name, text)| {
                let value = (self.typed(key, text), Origin::Flag { name });
                (key.to_owned(), value)
            })
            .collect();
        self.0.push(Layer {
            name: "flags",
            values,
        });
    }

    /// Text from a place that knows nothing but text, as the type that the key has by default.
    /// What does not fit stays text, for the error to show.
    fn typed(&self, key: &str, text: &str) -> Value {
        let parsed = match self.known().get(key) {
            Some((Value::Bool(..), _)) => text.parse::<bool>().ok().map(Value::from),
            Some((Value::Num(..), _)) => text.parse::<i64>().ok().map(Value::from),
            _ => None,
        };
        parsed.unwrap_or_else(|| Value::from(text))
    }

    fn unknown(&self, key: &str, origin: Origin) -> Fault {
        let section = key.split('.').next().unwrap_or_default();
        let expected = if written::SECTIONS.contains(&section) {
            let keys: Vec<_> = self
                .known()
                .keys()
                .filter_map(|key| key.strip_prefix(section)?.strip_prefix('.'))
                .collect();
            format!("[{section}] has {}", keys.join(", "))
        } else {
            format!("the sections are {}", written::SECTIONS.join(", "))
        };
        Fault::UnknownKey {
            key: key.to_owned(),
            expected,
            origin,
        }
    }

    fn origin(&self, key: &str) -> Origin {
        self.0
            .iter()
            .rev()
            .find_map(|layer| Some(layer.values.get(key)?.1.clone()))
            .unwrap_or(Origin::Default { variable: None })
    }

    pub fn origins(&self) -> Origins {
        let keys = self.known().keys();
        Origins(keys.map(|key| (key.clone(), self.origin(key))).collect())
    }

    /// Merges and converts; bad values are reported and replaced by what the weaker layers say.
    pub fn extract(&mut self, environment: &Environment, faults: &mut Vec<Fault>) -> Config {
        loop {
            let figment = self.0.iter().fold(Figment::new(), Figment::merge);
            let error = match figment.extract::<Config>() {
                Ok(config) => return config,
                Err(error) => error,
            };
            // Within a list the path goes on, to the place in it.
            let key = error.path[..error.path.len().min(2)].join(".");
            let (found, expected) = explain(error.kind);
            faults.push(Fault::BadValue {
                origin: self.origin(&key),
                key: key.clone(),
                found,
                expected,
            });
            // Each turn takes a value away, so the loop ends; without one there is nothing to
            // try again with.
            let strongest = self
                .0
                .iter_mut()
                .skip(1)
                .rev()
                .find_map(|layer| layer.values.remove(&key));
            if strongest.is_none() {
                return Config::defaults(environment);
            }
        }
    }
}

/// The environment variable of a key.
fn variable(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_uppercase())
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

/// The line that sets a key, or begins a section; `None` when it is written in a way that this
/// does not know (a quoted key, an inline table).
fn line_of(text: &str, section: &str, key: Option<&str>) -> Option<usize> {
    let mut current = "";
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        let name = if let Some(rest) = line.strip_prefix('[') {
            current = rest.split(']').next().unwrap_or_default().trim();
            ""
        } else {
            line.split('=').next().unwrap_or_default().trim()
        };
        let here = match key {
            None => {
                (name.is_empty() && current == section) || (current.is_empty() && name == section)
            }
            Some(key) if current == section => name == key,
            Some(key) => {
                let dotted = (!current.is_empty(), name.split_once('.'));
                matches!(dotted, (false, Some((s, k))) if s.trim() == section && k.trim() == key)
                    || current
                        .split_once('.')
                        .is_some_and(|(s, k)| s.trim() == section && k.trim() == key)
            }
        };
        if here {
            return Some(index + 1);
        }
    }
    None
}
