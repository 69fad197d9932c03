//! Deltas that the store refused for good, one JSON object a line, for a person to look at and to
//! replay when the cause is mended.
//!
//! A line is durable before its batch counts as applied, so a rejected delta is never lost; after a
//! crash in between it may stand here twice, with the same batch and key, and readers drop the
//! second.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// One refused delta.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// The key, if it is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The key in base64, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_b64: Option<String>,
    /// What was to be added.
    pub delta: i64,
    /// Why not, in the store's words.
    pub reason: String,
    /// The batch that it was part of.
    pub batch: u64,
    /// Unix time in milliseconds.
    pub at: u64,
}

impl Rejected {
    /// A line for `key`.
    pub fn new(key: &[u8], delta: i64, reason: String, batch: u64, at: u64) -> Self {
        let text = std::str::from_utf8(key).ok().map(str::to_owned);
        let key_b64 = text.is_none().then(|| STANDARD.encode(key));
        Rejected {
            key: text,
            key_b64,
            delta,
            reason,
            batch,
            at,
        }
    }

    /// The key's bytes; `None` when the line's base64 is none.
    pub fn key_bytes(&self) -> Option<Vec<u8>> {
        match (&self.key, &self.key_b64) {
            (Some(key), _) => Some(key.clone().into_bytes()),
            (None, Some(b64)) => STANDARD.decode(b64).ok(),
            (None, None) => None,
        }
    }
}

/// The file, opened for appending.
pub struct RejectedFile {
    file: File,
    path: PathBuf,
}

/// Its name in the state directory.
pub const REJECTED_FILE: &str = "rejected.jsonl";

impl RejectedFile {
    /// Opens or creates it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(REJECTED_FILE);
        let file = File::options().append(true).create(true).open(&path)?;
        Ok(RejectedFile { file, path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends and makes durable.
    ///
    /// # Errors
    /// What the file system says; then the deltas do not count as rejected.
    pub fn append(&mut self, rejected: &[Rejected]) -> io::Result<()> {
        let mut lines = Vec::new();
        for one in rejected {
            serde_json::to_writer(&mut lines, one)?;
            lines.push(b'\n');
        }
        self.file.write_all(&lines)?;
        self.file.sync_data()
    }
}

/// Reads all lines. A line that is no such object (a torn last one) is returned as its text.
///
/// # Errors
/// What the file system says; no file is an empty list.
pub fn read(state_dir: &Path) -> io::Result<Vec<Result<Rejected, String>>> {
    let file = match File::open(state_dir.join(REJECTED_FILE)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    BufReader::new(file)
        .split(b'\n')
        .map(|line| {
            let line = line?;
            Ok(serde_json::from_slice(&line)
                .map_err(|_| String::from_utf8_lossy(&line).into_owned()))
        })
        .collect()
}
