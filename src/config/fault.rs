//! What can be wrong with a configuration. No message holds a secret.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::source::Origin;

/// All that is wrong; never empty.
#[derive(Debug)]
pub struct ConfigError {
    faults: Vec<Fault>,
}

impl ConfigError {
    /// `None` when nothing is wrong.
    pub(super) fn of(faults: Vec<Fault>) -> Option<Self> {
        (!faults.is_empty()).then_some(Self { faults })
    }

    /// Each thing that is wrong.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.faults.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            fault.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// One thing that is wrong.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// A value that cannot be taken.
    #[error("{key}: is {found}; expected {expected} ({origin})")]
    BadValue {
        /// The key, as `section.key`.
        key: String,
        /// What is there, for people.
        found: String,
        /// What would be right, for people.
        expected: String,
        /// Where it was set.
        origin: Origin,
    },
    /// A key that does not exist.
    #[error("{key}: unknown key; {expected} ({origin})")]
    UnknownKey {
        /// As it was written, as `section.key`.
        key: String,
        /// What there is, for people.
        expected: String,
        /// Where it was set.
        origin: Origin,
    },
    /// The configuration file cannot be read.
    #[error("{}: cannot read the configuration file", path.display())]
    UnreadableFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The configuration file is not TOML.
    #[error("not TOML: {problem} ({origin})")]
    Syntax {
        /// What the parser says; never the text of the file.
        problem: String,
        /// The file and line.
        origin: Origin,
    },
    /// A file with a password cannot be read.
    #[error("{key}: cannot read {} ({origin})", path.display())]
    UnreadablePassword {
        /// What names it, in the configuration.
        key: &'static str,
        /// The file.
        path: PathBuf,
        /// Where its path was set.
        origin: Origin,
        /// Why.
        source: io::Error,
    },
    /// An environment variable that is not UTF-8.
    #[error("{variable}: the environment variable's value is not UTF-8")]
    NotText {
        /// Its name.
        variable: String,
    },
}
