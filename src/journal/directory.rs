//! The state directory: who it belongs to, and what a former process left in it.
//!
//! ```text
//! lock                      held for as long as a daemon runs here
//! node.json                 the node id, and the runs that have written here
//! segments/0000000000000042.seg
//! rejected.jsonl            see `rejected`
//! damaged/                  copies of what recovery could not read; never deleted
//! ```
//!
//! Invariants:
//! 1. Segments are numbered without gaps; batches too. A segment is removed only when all its
//!    batches are in the store, so everything below the first segment's first batch is applied.
//! 2. The highest segment is always there: it carries the batch number on.
//! 3. Nothing that cannot be read is deleted: it is moved or copied to `damaged/`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::examine::{ExamineError, Examined, examine};
use super::format::{Header, HeaderError, RECORDS_AT};
use super::segment::{Sealed, SealedParts, Writer, map_read};
use crate::fail_point::fail_point;
use crate::store::{Identity, NodeId, RunId};

/// So many runs are remembered: a store that was rolled back may carry the token of an older one.
const RUNS_MAX: usize = 64;

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system says no.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another daemon runs here.
    #[error(
        "{}: another tallyd holds this state directory; give each daemon its own node.state_dir",
        path.display()
    )]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// `node.json` is no such file.
    #[error("{}: not a node file: {reason}; restore it, or move the whole directory away to begin anew", path.display())]
    Node {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A segment of another node.
    #[error(
        "{}: belongs to node {found}, this directory is node {own}: it was copied here by hand; move it away",
        path.display()
    )]
    Foreign {
        /// Which file.
        path: PathBuf,
        /// Its node.
        found: NodeId,
        /// Ours.
        own: NodeId,
    },
    /// A segment of a newer format.
    #[error("{}: {source}: start the newer tallyd again, or let it flush before going back", path.display())]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Which format.
        #[source]
        source: HeaderError,
    },
}

#[derive(Serialize, Deserialize)]
struct NodeFile {
    format: u32,
    node: String,
    runs: Vec<String>,
    /// Whether a token of this node may be in the store.
    #[serde(default)]
    claimed: bool,
}

/// A locked state directory.
pub struct Directory {
    path: PathBuf,
    identity: Identity,
    runs: Vec<RunId>,
    ever_claimed: bool,
    next_segment: u64,
    batch_keys: u32,
    _lock: File,
}

/// What a former process left.
pub struct Recovery {
    /// Sealed segments, in order, some of them applied.
    pub segments: Vec<Sealed>,
    /// Number of the first batch of the segment to be opened next.
    pub next_batch: u64,
    /// The last batch known to be in the store.
    pub applied: u64,
    /// What was not sound, in words, with the file.
    pub damage: Vec<String>,
}

impl Directory {
    /// Locks the directory, making it if it is not there, recovers its segments and opens a new one
    /// with room for `bytes_max` bytes of records.
    ///
    /// # Errors
    /// See [`JournalError`]; what was acknowledged is left as it was.
    pub fn open(
        path: &Path,
        batch_keys: u32,
        bytes_max: usize,
    ) -> Result<(Self, Recovery, Writer), JournalError> {
        let segments = path.join("segments");
        fs::create_dir_all(&segments).map_err(io_error(&segments, "create"))?;
        let lock = lock(path)?;
        let (node, mut runs, ever_claimed) =
            read_node(path)?.unwrap_or_else(|| (NodeId(random()), Vec::new(), false));
        let run = RunId(random() as u64);
        runs.push(run);
        runs.drain(..runs.len().saturating_sub(RUNS_MAX));
        let mut directory = Directory {
            path: path.to_owned(),
            identity: Identity { node, run },
            runs,
            ever_claimed,
            next_segment: 1,
            batch_keys,
            _lock: lock,
        };
        let (recovery, unneeded) = directory.recover()?;
        fail_point("recover.adopted");
        // On disk before a segment or a token can carry them.
        directory.write_node()?;
        fail_point("recover.named");
        let mut open = directory.create_segment(bytes_max)?;
        fail_point("recover.created");
        open.begin(recovery.next_batch);
        fail_point("recover.begun");
        // Only now: these may have been the last to carry the batch number on.
        for path in unneeded {
            fs::remove_file(&path).map_err(io_error(&path, "remove"))?;
        }
        Ok((directory, recovery, open))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who writes here.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Every run known to have written here, this one last.
    pub fn runs(&self) -> &[RunId] {
        &self.runs
    }

    /// Whether a token of this node may be in the store.
    pub fn ever_claimed(&self) -> bool {
        self.ever_claimed
    }

    /// Notes, durably, that a token of this node is about to be written to the store: from now on
    /// its absence means something.
    ///
    /// # Errors
    /// What the file system says.
    pub fn note_claim(&mut self) -> Result<(), JournalError> {
        self.ever_claimed = true;
        self.write_node()
    }

    /// Creates the next segment, not yet begun.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create_segment(&mut self, bytes_max: usize) -> Result<Writer, JournalError> {
        let number = self.next_segment;
        let path = segment_path(&self.path, number);
        let header = Header {
            node: self.identity.node,
            number,
            batch_keys: self.batch_keys,
            created_ms: unix_ms(),
        };
        let writer = Writer::create(path.clone(), header, bytes_max)
            .map_err(io_error(&path, "create and preallocate"))?;
        self.next_segment += 1;
        fail_point("segment.created");
        Ok(writer)
    }

    /// Makes the names of new segments durable.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sync_names(&self) -> Result<(), JournalError> {
        let path = self.path.join("segments");
        sync_dir(&path).map_err(io_error(&path, "sync"))
    }

    fn recover(&mut self) -> Result<(Recovery, Vec<PathBuf>), JournalError> {
        let mut recovery = Recovery {
            segments: Vec::new(),
            next_batch: 1,
            applied: 0,
            damage: Vec::new(),
        };
        let mut unneeded = Vec::new();
        for (number, path) in segment_files(&self.path)? {
            self.next_segment = self.next_segment.max(number + 1);
            let found = match examine(&path) {
                Ok(found) => found,
                Err(ExamineError::Header(source @ HeaderError::Format(_))) => {
                    return Err(JournalError::Newer { path, source });
                }
                Err(error) => {
                    self.set_aside(&path, &error.to_string(), false, &mut recovery.damage)?;
                    continue;
                }
            };
            if found.header.node != self.identity.node {
                let (found, own) = (found.header.node, self.identity.node);
                return Err(JournalError::Foreign { path, found, own });
            }
            if found.records == 0 && found.damage.is_empty() {
                // The standby, or an epoch in which nothing happened: only its number matters.
                if let Some(first) = found.first_batch {
                    recovery.next_batch = recovery.next_batch.max(first);
                    if recovery.segments.is_empty() {
                        recovery.applied = recovery.applied.max(first - 1);
                    }
                }
                unneeded.push(path);
                continue;
            }
            if !found.damage.is_empty() {
                let words = found.damage.join("; ");
                self.set_aside(&path, &words, !found.unusable, &mut recovery.damage)?;
                if found.unusable {
                    continue;
                }
            }
            let sealed = adopt(&path, found, recovery.next_batch)?;
            // After a roll-back an earlier segment may be unapplied in part: the cells of later ones
            // say nothing then. Numbers that are missing in between were set aside.
            if recovery
                .segments
                .last()
                .is_none_or(|last| last.last_batch() <= recovery.applied)
            {
                recovery.applied = sealed.applied().max(sealed.first_batch() - 1);
            }
            recovery.next_batch = sealed.last_batch() + 1;
            recovery.segments.push(sealed);
        }
        Ok((recovery, unneeded))
    }

    /// Keeps what could not be read under a name of its own: moved, or copied when the sound part
    /// of it is still used.
    fn set_aside(
        &self,
        path: &Path,
        reason: &str,
        copy: bool,
        damage: &mut Vec<String>,
    ) -> Result<(), JournalError> {
        let to = self.path.join("damaged");
        fs::create_dir_all(&to).map_err(io_error(&to, "create"))?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let kind = if copy { "partly" } else { "whole" };
        let to = to.join(format!("{stem}.{kind}.seg"));
        damage.push(format!(
            "{}: {reason}; kept as {}",
            path.display(),
            to.display()
        ));
        if !copy {
            fs::rename(path, &to).map_err(io_error(path, "move to damaged/"))?;
        } else if !to.exists() {
            fs::copy(path, &to).map_err(io_error(path, "copy to damaged/"))?;
        }
        Ok(())
    }

    fn write_node(&self) -> Result<(), JournalError> {
        let path = self.path.join("node.json");
        let new = self.path.join("node.json.new");
        let text = serde_json::to_vec_pretty(&NodeFile {
            format: 1,
            node: self.identity.node.to_string(),
            runs: self.runs.iter().map(RunId::to_string).collect(),
            claimed: self.ever_claimed,
        })
        .map_err(io::Error::from)
        .map_err(io_error(&path, "encode"))?;
        let write = || {
            fs::write(&new, &text)?;
            File::open(&new)?.sync_all()?;
            fail_point("node.written");
            fs::rename(&new, &path)?;
            sync_dir(&self.path)
        };
        write().map_err(io_error(&path, "write"))
    }
}

/// Segment files by number. Other names are left alone.
///
/// # Errors
/// What the file system says.
pub fn segment_files(state_dir: &Path) -> Result<Vec<(u64, PathBuf)>, JournalError> {
    let path = state_dir.join("segments");
    let entries = fs::read_dir(&path).map_err(io_error(&path, "list"))?;
    let mut files = Vec::new();
    for entry in entries {
        let file = entry.map_err(io_error(&path, "list"))?.path();
        if file.extension().is_some_and(|extension| extension == "seg")
            && let Some(number) = file
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse().ok())
        {
            files.push((number, file));
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn segment_path(state_dir: &Path, number: u64) -> PathBuf {
    state_dir.join("segments").join(format!("{number:016}.seg"))
}

/// Turns what was found into a sealed segment, sealing it if its process could not.
fn adopt(path: &Path, found: Examined, next_batch: u64) -> Result<Sealed, JournalError> {
    let first_batch = found.first_batch.unwrap_or(next_batch);
    let parts = SealedParts {
        header: found.header,
        first_batch,
        applied: found.applied.unwrap_or(first_batch - 1),
        end: found.end,
        records: found.records,
        batch_starts: found.batch_starts,
    };
    let adopt = || {
        let file = File::options().read(true).write(true).open(path)?;
        if found.sealed {
            let bytes = file.metadata()?.len() as usize;
            let map = map_read(&file, bytes.max(RECORDS_AT))?;
            return Ok(Sealed::from_parts(file, path.to_owned(), map, parts));
        }
        let sealed = Writer::reopen(file, path.to_owned(), parts)?.seal()?;
        sealed.sync()?;
        Ok(sealed)
    };
    adopt().map_err(io_error(path, "recover"))
}

fn lock(state_dir: &Path) -> Result<File, JournalError> {
    let path = state_dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(io_error(&path, "open"))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(JournalError::Locked { path }),
        Err(error) => Err(io_error(&path, "lock")(error.into())),
    }
}

fn read_node(state_dir: &Path) -> Result<Option<(NodeId, Vec<RunId>, bool)>, JournalError> {
    let path = state_dir.join("node.json");
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(&path, "read")(error)),
    };
    let bad = |reason: String| JournalError::Node {
        path: path.clone(),
        reason,
    };
    let file: NodeFile = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    if file.format != 1 {
        return Err(bad(format!(
            "format {}, and this tallyd reads format 1",
            file.format
        )));
    }
    let node = u128::from_str_radix(&file.node, 16).map_err(|e| bad(format!("node: {e}")))?;
    let runs: Result<Vec<RunId>, JournalError> = file
        .runs
        .iter()
        .map(|run| {
            u64::from_str_radix(run, 16)
                .map(RunId)
                .map_err(|e| bad(format!("runs: {e}")))
        })
        .collect();
    Ok(Some((NodeId(node), runs?, file.claimed)))
}

fn random() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system has a source of randomness");
    u128::from_le_bytes(bytes)
}

fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn io_error<'a>(path: &'a Path, action: &'static str) -> impl Fn(io::Error) -> JournalError + 'a {
    move |source| JournalError::Io {
        path: path.to_owned(),
        action,
        source,
    }
}
