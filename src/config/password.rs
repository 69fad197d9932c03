//! Where the store's password comes from, when it is not in the URL.

use std::io;
use std::path::Path;

use super::fault::Fault;
use super::source::{Environment, Origin, Origins};
use super::{Config, Secret, StoreUrl};
use crate::small_file;

/// The credential of a systemd service that holds the store's password.
const CREDENTIAL: &str = "tallyd-store-password";

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
        return read_password(path)
            .map(Some)
            .map_err(|source| Fault::UnreadablePassword {
                key: "store.password_file",
                path: path.clone(),
                origin: origins.of("store.password_file"),
                source,
            });
    }
    if let Some(password) = config.store.url.password() {
        return Ok(Some(password));
    }
    let Some(directory) = environment.directory("CREDENTIALS_DIRECTORY") else {
        return Ok(None);
    };
    let path = directory.join(CREDENTIAL);
    match read_password(&path) {
        Ok(password) => Ok(Some(password)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Fault::UnreadablePassword {
            key: "store.password_file",
            path,
            origin: Origin::Default {
                variable: Some("CREDENTIALS_DIRECTORY"),
            },
            source,
        }),
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
