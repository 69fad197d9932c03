//! Where the passwords of the store and of its Sentinels come from, when they are not in the URL.

use std::io;
use std::path::Path;

use super::fault::Fault;
use super::source::{Environment, Origin, Origins};
use super::{Config, Secret, StoreUrl};
use crate::small_file;

/// A password that a file may hold.
struct Kind {
    /// What names the file.
    key: &'static str,
    /// The credential of a systemd service that holds the password.
    credential: &'static str,
}

const STORE: Kind = Kind {
    key: "store.password_file",
    credential: "tallyd-store-password",
};

const SENTINELS: Kind = Kind {
    key: "store.sentinel_password_file",
    credential: "tallyd-sentinel-password",
};

/// A longer file is no password's, in bytes.
const PASSWORD_BYTES_MAX: u64 = 64 << 10;

/// The store's password: the file that was named, else the one in the URL, else the credential
/// that the service manager handed over.
pub(super) fn find(
    config: &Config,
    origins: &Origins,
    environment: &Environment,
) -> Result<Option<Secret>, Fault> {
    if config.store.url == StoreUrl::Embedded {
        return Ok(None);
    }
    if let Some(path) = &config.store.password_file {
        return STORE.of_file(path, origins).map(Some);
    }
    if let Some(password) = config.store.url.password() {
        return Ok(Some(password));
    }
    STORE.of_credentials(environment)
}

/// The password of the Sentinels: the file that was named, else the credential.
pub(super) fn find_of_sentinels(
    config: &Config,
    origins: &Origins,
    environment: &Environment,
) -> Result<Option<Secret>, Fault> {
    if !matches!(config.store.url, StoreUrl::Sentinel(_)) {
        return Ok(None);
    }
    match &config.store.sentinel_password_file {
        Some(path) => SENTINELS.of_file(path, origins).map(Some),
        None => SENTINELS.of_credentials(environment),
    }
}

impl Kind {
    fn of_file(&self, path: &Path, origins: &Origins) -> Result<Secret, Fault> {
        read_password(path).map_err(|source| Fault::UnreadablePassword {
            key: self.key,
            path: path.to_owned(),
            origin: origins.of(self.key),
            source,
        })
    }

    fn of_credentials(&self, environment: &Environment) -> Result<Option<Secret>, Fault> {
        let Some(directory) = environment.directory("CREDENTIALS_DIRECTORY") else {
            return Ok(None);
        };
        let path = directory.join(self.credential);
        match read_password(&path) {
            Ok(password) => Ok(Some(password)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Fault::UnreadablePassword {
                key: self.key,
                path,
                origin: Origin::Default {
                    variable: Some("CREDENTIALS_DIRECTORY"),
                },
                source,
            }),
        }
    }
}

/// The file without its last line break.
fn read_password(path: &Path) -> io::Result<Secret> {
    let mut text = small_file::read_text(path, PASSWORD_BYTES_MAX)?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    if text.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is empty"));
    }
    Ok(Secret::new(text))
}
