//! Deltas that the store refused for good, one JSON object a line, for a person to look at and to
//! replay when the cause is mended.
//!
//! A line is durable before its batch counts as applied, so a rejected delta is never lost; after a
//! crash in between it may stand here twice, with the same batch and key, and readers drop the
//! second.
//!
//! The daemon holds the file open for as long as it runs, so nobody else rewrites it. What was
//! replayed is noted in a second file, and readers subtract it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::private;

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
        let (key, key_b64) = written_key(key);
        Rejected {
            key,
            key_b64,
            delta,
            reason,
            batch,
            at,
        }
    }

    /// The key's bytes; `None` when the line's base64 is none.
    pub fn key_bytes(&self) -> Option<Vec<u8>> {
        key_bytes(self.key.as_deref(), self.key_b64.as_deref())
    }
}

fn written_key(key: &[u8]) -> (Option<String>, Option<String>) {
    match std::str::from_utf8(key) {
        Ok(text) => (Some(text.to_owned()), None),
        Err(_) => (None, Some(STANDARD.encode(key))),
    }
}

fn key_bytes(key: Option<&str>, key_b64: Option<&str>) -> Option<Vec<u8>> {
    match (key, key_b64) {
        (Some(key), _) => Some(key.as_bytes().to_vec()),
        (None, Some(b64)) => STANDARD.decode(b64).ok(),
        (None, None) => None,
    }
}

/// A file of lines, opened for appending.
///
/// A write that was cut short leaves a line without its end; the next one must not continue it.
struct Lines {
    file: File,
    torn: bool,
}

impl Lines {
    fn open(path: &Path) -> io::Result<Self> {
        let mut file = private::options()
            .read(true)
            .append(true)
            .create(true)
            .open(path)?;
        let mut last = [b'\n'];
        if file.seek(SeekFrom::End(0))? > 0 {
            file.seek(SeekFrom::End(-1))?;
            file.read_exact(&mut last)?;
        }
        let torn = last != [b'\n'];
        Ok(Lines { file, torn })
    }

    fn append<T: Serialize>(&mut self, lines: &[T]) -> io::Result<()> {
        let mut bytes = Vec::new();
        if self.torn {
            bytes.push(b'\n');
        }
        for line in lines {
            serde_json::to_writer(&mut bytes, line)?;
            bytes.push(b'\n');
        }
        self.torn = true;
        self.file.write_all(&bytes)?;
        self.torn = false;
        self.file.sync_data()
    }
}

fn read_lines<T: DeserializeOwned>(path: &Path) -> io::Result<Vec<Result<T, String>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut lines = Vec::new();
    for line in BufReader::new(file).split(b'\n') {
        let line = line?;
        if !line.is_empty() {
            lines.push(
                serde_json::from_slice(&line)
                    .map_err(|_| String::from_utf8_lossy(&line).into_owned()),
            );
        }
    }
    Ok(lines)
}

/// The file, opened for appending.
pub struct RejectedFile {
    lines: Lines,
    path: PathBuf,
}

/// Its name in the state directory.
pub const REJECTED_FILE: &str = "rejected.jsonl";
/// Name of the list of what was replayed.
pub const REPLAYED_FILE: &str = "rejected.replayed.jsonl";

impl RejectedFile {
    /// Opens or creates it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(REJECTED_FILE);
        let lines = Lines::open(&path)?;
        Ok(RejectedFile { lines, path })
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
        self.lines.append(rejected)
    }
}

/// Reads all lines. A line that is no such object (a torn one) is returned as its text.
///
/// # Errors
/// What the file system says; no file is an empty list.
pub fn read(state_dir: &Path) -> io::Result<Vec<Result<Rejected, String>>> {
    read_lines(&state_dir.join(REJECTED_FILE))
}

/// What of the rejected file is still to be dealt with.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outstanding {
    /// Each delta once, in the file's order, with its key.
    pub deltas: Vec<(Vec<u8>, Rejected)>,
    /// Lines of either file that cannot be read.
    pub torn: Vec<String>,
    /// How many were replayed.
    pub replayed: usize,
}

/// Reads what was rejected and not replayed.
///
/// # Errors
/// What the file system says; no file is an empty list.
pub fn outstanding(state_dir: &Path) -> io::Result<Outstanding> {
    let mut outstanding = Outstanding::default();
    let mut replayed = HashSet::new();
    for line in read_lines::<Replayed>(&state_dir.join(REPLAYED_FILE))? {
        match line.map(|line| (line.key_bytes(), line)) {
            Ok((Some(key), line)) => {
                replayed.insert((line.batch, key));
            }
            Ok((None, line)) => outstanding.torn.push(format!("{line:?}")),
            Err(text) => outstanding.torn.push(text),
        }
    }
    let mut seen = HashSet::new();
    for line in read(state_dir)? {
        match line.map(|line| (line.key_bytes(), line)) {
            Ok((Some(key), line)) => {
                let id = (line.batch, key);
                if replayed.contains(&id) {
                    outstanding.replayed += usize::from(seen.insert(id));
                } else if seen.insert(id.clone()) {
                    outstanding.deltas.push((id.1, line));
                }
            }
            Ok((None, line)) => outstanding.torn.push(format!("{line:?}")),
            Err(text) => outstanding.torn.push(text),
        }
    }
    Ok(outstanding)
}

#[derive(Debug, Serialize, Deserialize)]
struct Replayed {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_b64: Option<String>,
    batch: u64,
    /// Unix time in milliseconds.
    at: u64,
}

impl Replayed {
    fn key_bytes(&self) -> Option<Vec<u8>> {
        key_bytes(self.key.as_deref(), self.key_b64.as_deref())
    }
}

/// The list of what was replayed, held by one process at a time.
pub struct ReplayedFile {
    lines: Lines,
}

impl ReplayedFile {
    /// Opens or creates it; `None`: another process is replaying.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(state_dir: &Path) -> io::Result<Option<Self>> {
        let lines = Lines::open(&state_dir.join(REPLAYED_FILE))?;
        match flock(&lines.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(ReplayedFile { lines })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Notes one delta as replayed, durably.
    ///
    /// # Errors
    /// What the file system says; then another replay sends it again.
    pub fn append(&mut self, rejected: &Rejected, at: u64) -> io::Result<()> {
        self.lines.append(&[Replayed {
            key: rejected.key.clone(),
            key_b64: rejected.key_b64.clone(),
            batch: rejected.batch,
            at,
        }])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rejected(key: &[u8], batch: u64) -> Rejected {
        Rejected::new(
            key,
            -7,
            "WRONGTYPE \"x\"\n".to_owned(),
            batch,
            1_763_835_000_123,
        )
    }

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn lines_read_back_as_written_whatever_the_key() {
        let dir = directory();
        assert_eq!(read(dir.path()).unwrap(), []);
        let keys: [&[u8]; 5] = [
            b"",
            b"likes:42",
            "ü\n\"\0".as_bytes(),
            b"\xff\x00\n",
            &[b'k'; 1100],
        ];
        let lines: Vec<Rejected> = keys.iter().map(|key| rejected(key, 3)).collect();
        let mut file = RejectedFile::open(dir.path()).unwrap();
        file.append(&lines[..2]).unwrap();
        file.append(&lines[2..]).unwrap();
        let read: Vec<Rejected> = read(dir.path())
            .unwrap()
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert_eq!(read, lines);
        for (line, key) in read.iter().zip(keys) {
            assert_eq!(line.key_bytes().unwrap(), key);
        }
    }

    /// Protection: the line break that is put behind a torn line. Without it, the next rejected
    /// delta continues the torn line, and is lost with it.
    #[test]
    fn a_torn_last_line_is_returned_as_text_and_does_not_swallow_the_next() {
        let dir = directory();
        RejectedFile::open(dir.path())
            .unwrap()
            .append(&[rejected(b"a", 1)])
            .unwrap();
        let path = dir.path().join(REJECTED_FILE);
        let whole = std::fs::read(&path).unwrap();
        for cut in 1..whole.len() - 1 {
            std::fs::write(&path, [&whole[..], &whole[..cut]].concat()).unwrap();
            let text = String::from_utf8_lossy(&whole[..cut]).into_owned();
            assert_eq!(
                read(dir.path()).unwrap(),
                [Ok(rejected(b"a", 1)), Err(text.clone())]
            );
            RejectedFile::open(dir.path())
                .unwrap()
                .append(&[rejected(b"b", 2)])
                .unwrap();
            assert_eq!(
                read(dir.path()).unwrap(),
                [Ok(rejected(b"a", 1)), Err(text), Ok(rejected(b"b", 2))],
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn each_delta_is_outstanding_once_until_it_is_replayed() {
        let dir = directory();
        let mut file = RejectedFile::open(dir.path()).unwrap();
        let (a, b, binary) = (rejected(b"a", 1), rejected(b"b", 1), rejected(b"\xff", 1));
        file.append(&[a.clone(), b.clone(), binary.clone()])
            .unwrap();
        file.append(&[a.clone(), rejected(b"a", 2)]).unwrap();
        let keys = |outstanding: &Outstanding| -> Vec<(Vec<u8>, u64)> {
            outstanding
                .deltas
                .iter()
                .map(|(key, line)| (key.clone(), line.batch))
                .collect()
        };
        let (bytes_a, bytes_b, bytes_x) = (b"a".to_vec(), b"b".to_vec(), b"\xff".to_vec());
        assert_eq!(
            keys(&outstanding(dir.path()).unwrap()),
            [
                (bytes_a.clone(), 1),
                (bytes_b.clone(), 1),
                (bytes_x, 1),
                (bytes_a.clone(), 2)
            ]
        );
        let mut replayed = ReplayedFile::open(dir.path()).unwrap().unwrap();
        replayed.append(&a, 5).unwrap();
        replayed.append(&binary, 6).unwrap();
        let left = outstanding(dir.path()).unwrap();
        assert_eq!(keys(&left), [(bytes_b, 1), (bytes_a, 2)]);
        assert_eq!((left.replayed, left.torn.len()), (2, 0));
    }

    /// Protection: the lock. Two replays at once would send each delta twice.
    #[test]
    fn one_process_replays_at_a_time() {
        let dir = directory();
        let held = ReplayedFile::open(dir.path()).unwrap();
        assert!(held.is_some());
        assert!(ReplayedFile::open(dir.path()).unwrap().is_none());
        drop(held);
        assert!(ReplayedFile::open(dir.path()).unwrap().is_some());
    }
}
