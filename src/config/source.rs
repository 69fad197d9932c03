//! Where values come from: the process's environment, the flags, and the origin that is kept for
//! each key.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

/// Where the configuration file is looked for when no flag names one.
const SYSTEM_FILE: &str = "/etc/tallyd/tallyd.toml";

/// What the names of tallyd's own variables begin with.
pub(super) const PREFIX: &str = "TALLYD_";

/// The variables that defaults are taken from.
const DIRECTORY_VARIABLES: [&str; 6] = [
    "STATE_DIRECTORY",
    "RUNTIME_DIRECTORY",
    "CREDENTIALS_DIRECTORY",
    "XDG_STATE_HOME",
    "XDG_RUNTIME_DIR",
    "HOME",
];

/// What the configuration takes from the process and the host. A value, so that a test needs not
/// change the process's own.
#[derive(Debug, Clone)]
pub struct Environment {
    /// Environment variables: those that may matter.
    pub variables: BTreeMap<String, String>,
    /// Names of variables that may matter and are not UTF-8.
    pub not_text: Vec<String>,
    /// Whether the process runs as root.
    pub root: bool,
    /// The host's name.
    pub host_name: String,
    /// The file that is read when no flag names one, if it exists.
    pub system_file: PathBuf,
}

/// An empty environment of an ordinary user; no file.
impl Default for Environment {
    fn default() -> Self {
        Self {
            variables: BTreeMap::new(),
            not_text: Vec::new(),
            root: false,
            host_name: "localhost".to_owned(),
            system_file: PathBuf::from("/nonexistent/tallyd.toml"),
        }
    }
}

impl Environment {
    /// That of this process.
    pub fn of_process() -> Self {
        let mut environment = Self {
            variables: BTreeMap::new(),
            not_text: Vec::new(),
            root: rustix::process::geteuid().is_root(),
            host_name: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            system_file: PathBuf::from(SYSTEM_FILE),
        };
        for (name, value) in std::env::vars_os() {
            environment.take(name, value);
        }
        environment
    }

    fn take(&mut self, name: OsString, value: OsString) {
        // A name that is not UTF-8 is none of ours.
        let Ok(name) = name.into_string() else { return };
        if !name.starts_with(PREFIX) && !DIRECTORY_VARIABLES.contains(&name.as_str()) {
            return;
        }
        match value.into_string() {
            Ok(value) => {
                self.variables.insert(name, value);
            }
            Err(_) => self.not_text.push(name),
        }
    }

    /// A directory from a variable; systemd separates several by colons, and the first is ours.
    pub(super) fn directory(&self, variable: &str) -> Option<&Path> {
        let first = self.variables.get(variable)?.split(':').next()?;
        (!first.is_empty()).then(|| Path::new(first))
    }

    /// An absolute path from a variable; the XDG specification has relative ones ignored.
    fn xdg(&self, variable: &str) -> Option<&Path> {
        let path = Path::new(self.variables.get(variable)?);
        path.is_absolute().then_some(path)
    }

    /// The default of `node.state_dir`, and the variable that it came from.
    pub(super) fn state_dir(&self) -> (PathBuf, Option<&'static str>) {
        if let Some(directory) = self.directory("STATE_DIRECTORY") {
            return (directory.to_owned(), Some("STATE_DIRECTORY"));
        }
        if self.root {
            return (PathBuf::from("/var/lib/tallyd"), None);
        }
        if let Some(home) = self.xdg("XDG_STATE_HOME") {
            return (home.join("tallyd"), Some("XDG_STATE_HOME"));
        }
        if let Some(home) = self.xdg("HOME") {
            return (home.join(".local/state/tallyd"), Some("HOME"));
        }
        (PathBuf::new(), None)
    }

    /// The default of `listen.socket`, and the variable that it came from.
    pub(super) fn socket(&self) -> (PathBuf, Option<&'static str>) {
        if let Some(directory) = self.directory("RUNTIME_DIRECTORY") {
            return (directory.join("tallyd.sock"), Some("RUNTIME_DIRECTORY"));
        }
        if self.root {
            return (PathBuf::from("/run/tallyd/tallyd.sock"), None);
        }
        if let Some(directory) = self.xdg("XDG_RUNTIME_DIR") {
            return (
                directory.join("tallyd/tallyd.sock"),
                Some("XDG_RUNTIME_DIR"),
            );
        }
        (PathBuf::new(), None)
    }
}

/// What was set on the command line, as it was written there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// `--config`: the file to read instead of the system's.
    pub config: Option<PathBuf>,
    /// `--state-dir`
    pub state_dir: Option<String>,
    /// `--socket`
    pub socket: Option<String>,
    /// `--store`
    pub store: Option<String>,
    /// `--flush-interval`
    pub flush_interval: Option<String>,
    /// `--admin`
    pub admin: Option<String>,
    /// `--log-level`
    pub log_level: Option<String>,
}

impl Flags {
    /// Key, flag and value of each that was set.
    pub(super) fn set(&self) -> impl Iterator<Item = (&'static str, &'static str, &str)> {
        [
            ("node.state_dir", "--state-dir", &self.state_dir),
            ("listen.socket", "--socket", &self.socket),
            ("store.url", "--store", &self.store),
            ("flush.interval", "--flush-interval", &self.flush_interval),
            ("admin.listen", "--admin", &self.admin),
            ("log.level", "--log-level", &self.log_level),
        ]
        .into_iter()
        .filter_map(|(key, flag, value)| Some((key, flag, value.as_deref()?)))
    }
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nothing set it; some defaults follow a variable of the environment.
    Default {
        /// That variable's name.
        variable: Option<&'static str>,
    },
    /// The configuration file.
    File {
        /// Its path.
        path: PathBuf,
        /// The line, from 1, where it could be told.
        line: Option<usize>,
    },
    /// An environment variable.
    Variable {
        /// Its name.
        name: String,
    },
    /// A flag.
    Flag {
        /// Its name, with the dashes.
        name: &'static str,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default { variable: None } => f.write_str("default"),
            Self::Default {
                variable: Some(name),
            } => write!(f, "default, from ${name}"),
            Self::File { path, line: None } => write!(f, "file {}", path.display()),
            Self::File {
                path,
                line: Some(line),
            } => write!(f, "file {}:{line}", path.display()),
            Self::Variable { name } => write!(f, "env {name}"),
            Self::Flag { name } => write!(f, "flag {name}"),
        }
    }
}

/// The origin of each key, by `section.key`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins(pub(super) BTreeMap<String, Origin>);

impl Origins {
    /// Where a key's value came from.
    pub fn of(&self, key: &str) -> Origin {
        self.0
            .get(key)
            .cloned()
            .unwrap_or(Origin::Default { variable: None })
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn environment(root: bool, variables: &[(&str, &str)]) -> Environment {
        Environment {
            root,
            variables: variables
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            ..Environment::default()
        }
    }

    #[test]
    fn the_state_directory_follows_the_environment() {
        let all = [
            ("STATE_DIRECTORY", "/s/one:/s/two"),
            ("XDG_STATE_HOME", "/x"),
            ("HOME", "/h"),
        ];
        for (root, variables, path) in [
            (true, &all[..], "/s/one"),
            (false, &all[..], "/s/one"),
            (true, &all[1..], "/var/lib/tallyd"),
            (false, &all[1..], "/x/tallyd"),
            (false, &all[2..], "/h/.local/state/tallyd"),
            (
                false,
                &[("XDG_STATE_HOME", "relative"), ("HOME", "/h")][..],
                "/h/.local/state/tallyd",
            ),
            (true, &[("STATE_DIRECTORY", "")][..], "/var/lib/tallyd"),
            (false, &[][..], ""),
        ] {
            assert_eq!(environment(root, variables).state_dir().0, Path::new(path));
        }
    }

    #[test]
    fn the_socket_follows_the_environment() {
        let all = [
            ("RUNTIME_DIRECTORY", "/r"),
            ("XDG_RUNTIME_DIR", "/run/user/7"),
        ];
        for (root, variables, path) in [
            (true, &all[..], "/r/tallyd.sock"),
            (true, &all[1..], "/run/tallyd/tallyd.sock"),
            (false, &all[1..], "/run/user/7/tallyd/tallyd.sock"),
            (false, &[][..], ""),
        ] {
            assert_eq!(environment(root, variables).socket().0, Path::new(path));
        }
    }

    #[test]
    fn only_variables_that_may_matter_are_taken() {
        let mut environment = Environment::default();
        environment.take("PATH".into(), "/bin".into());
        environment.take("TALLYD_LOG__LEVEL".into(), "debug".into());
        let bytes = OsStr::from_bytes(b"\xff").to_owned();
        environment.take("HOME".into(), bytes.clone());
        environment.take("EDITOR".into(), bytes);
        assert_eq!(environment.variables.len(), 1);
        assert_eq!(environment.not_text, ["HOME"]);
    }

    #[test]
    fn the_environment_of_this_process_has_the_host_s_name() {
        assert!(!Environment::of_process().host_name.is_empty());
    }
}
