//! The state directory: who it belongs to, and what a former process left in it.
//!
//! ```text
//! lock                      held for as long as a daemon runs here
//! node.json                 the node id, and the runs that have written here
//! segments/0000000000000042.seg
//! rejected.jsonl            see `rejected`
//! damaged/                  copies of what recovery could not read; never deleted
//! reserve/                  see `reserve`
//! ```
//!
//! Invariants:
//! 1. Segments are numbered without gaps; batches too. A segment is removed only when all its
//!    batches are in the store, so everything below the first segment's first batch is applied.
//! 2. The highest segment is always there: it carries the batch number on.
//! 3. Nothing that cannot be read is deleted: it is moved or copied to `damaged/`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::examine::{ExamineError, Examined, Expected, examine};
use super::format::{Header, HeaderError, RECORDS_AT};
use super::place::Place;
use super::plan::{Circumstances, Fate, Found, plan};
use super::power::Boot;
use super::reserve::{Purpose, RESERVE_BYTES, Reserve};
use super::segment::{BYTES_INITIAL, Sealed, SealedParts, Writer, map_read};
use crate::fail_point::fail_point;
use crate::private::{self, Narrowed};
use crate::small_file;
use crate::store::{Identity, NodeId, RunId};
use crate::time::unix_ms;

/// `node.json` at most, in bytes: it has a line of 20 for each run.
const NODE_BYTES_MAX: u64 = 64 << 10;
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

impl JournalError {
    /// Whether room on the disk, or in a quota, would mend it.
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_disk_full(source))
    }
}

fn is_disk_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

#[derive(Serialize, Deserialize)]
struct NodeFile {
    format: u32,
    node: String,
    runs: Vec<String>,
    /// Whether a token of this node may be in the store.
    #[serde(default)]
    claimed: bool,
    /// The server that has it, or was to get the first one.
    #[serde(default)]
    server: Option<String>,
    /// Which store that is, and where it was.
    #[serde(default)]
    store: Option<String>,
    #[serde(default)]
    store_url: Option<String>,
    /// Batches up to this one went to another store.
    #[serde(default)]
    floor: u64,
    /// When the last run was at work.
    #[serde(default)]
    last: Boot,
}

/// A locked state directory.
pub struct Directory {
    path: PathBuf,
    identity: Identity,
    runs: Vec<RunId>,
    ever_claimed: bool,
    server: Option<String>,
    store: Option<(String, String)>,
    floor: u64,
    boot: Boot,
    next_segment: u64,
    /// Every batch number that a former process may have used is at most this.
    numbered: u64,
    batch_keys: u32,
    segment_bytes: usize,
    reserve: Reserve,
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
    /// What other users could read until now.
    pub narrowed: Narrowed,
    /// Why the open segment has no room for records yet, if so: the disk is full.
    pub cramped: Option<JournalError>,
}

/// A segment without a record, which only carries the batch number on.
struct Unneeded {
    path: PathBuf,
    header: Header,
}

impl Directory {
    /// Locks the directory, making it if it is not there, recovers its segments and opens a new one
    /// with room for `bytes_max` bytes of records, less what is pending already.
    ///
    /// On a full disk the last one goes on if it is empty; else the new one begins without room, from
    /// the reserve: what is pending leaves the disk only if the daemon starts.
    ///
    /// # Errors
    /// See [`JournalError`]; what was acknowledged is left as it was.
    pub fn open(
        path: &Path,
        batch_keys: u32,
        bytes_max: usize,
    ) -> Result<(Self, Recovery, Writer), JournalError> {
        Self::open_sized(path, batch_keys, bytes_max, BYTES_INITIAL)
    }

    /// The same with new segments of `segment_bytes`. Smaller ones than [`BYTES_INITIAL`] are for a
    /// simulation with a dozen keys: to preallocate and map a segment takes longer than all that is done
    /// to it.
    ///
    /// # Errors
    /// As [`Directory::open`].
    pub fn open_sized(
        path: &Path,
        batch_keys: u32,
        bytes_max: usize,
        segment_bytes: usize,
    ) -> Result<(Self, Recovery, Writer), JournalError> {
        let segments = path.join("segments");
        private::create_directory(&segments).map_err(io_error(&segments, "create"))?;
        let lock = lock(path)?;
        let narrowed = private::narrow(path).map_err(io_error(path, "close to other users"))?;
        let known = match read_node(path)? {
            Some(known) => known,
            None if segment_files(path)?.is_empty() => NodeFacts {
                node: NodeId(random()),
                runs: Vec::new(),
                claimed: false,
                server: None,
                store: None,
                floor: 0,
                last: Boot::default(),
            },
            // A new id would make orphans of them.
            None => {
                return Err(JournalError::Node {
                    path: path.join("node.json"),
                    reason: "it is missing, and there are segments".to_owned(),
                });
            }
        };
        let NodeFacts {
            node,
            mut runs,
            claimed,
            server,
            store,
            floor,
            last,
        } = known;
        let run = RunId(random() as u64);
        runs.push(run);
        runs.drain(..runs.len().saturating_sub(RUNS_MAX));
        let mut directory = Directory {
            path: path.to_owned(),
            identity: Identity { node, run },
            runs,
            ever_claimed: claimed,
            server,
            store,
            floor,
            boot: Boot::now(),
            next_segment: 1,
            numbered: 0,
            batch_keys,
            segment_bytes,
            reserve: Reserve::of(path),
            _lock: lock,
        };
        let (mut recovery, mut unneeded) = directory.recover(&last)?;
        recovery.narrowed = narrowed;
        directory.numbered = recovery.next_batch - 1;
        fail_point("recover.adopted");
        // On disk before a segment or a token can carry them.
        directory.write_node()?;
        fail_point("recover.named");
        // What a former process left pending counts against the limit too.
        let pending = recovery.segments.iter();
        let pending = pending.filter(|segment| segment.last_batch() > recovery.applied);
        let pending: usize = pending.map(Sealed::bytes).sum();
        let bytes_max = bytes_max.saturating_sub(pending);
        let mut open = match directory.create_segment(bytes_max) {
            Err(full) if full.is_disk_full() => {
                let cramped = match directory.reuse_last(&mut unneeded, bytes_max)? {
                    Some(last) => Some(last),
                    None => directory.create_cramped(bytes_max)?,
                };
                let Some(cramped) = cramped else {
                    return Err(full);
                };
                if cramped.is_cramped() {
                    recovery.cramped = Some(full);
                }
                cramped
            }
            created => created?,
        };
        fail_point("recover.created");
        open.begin(recovery.next_batch);
        fail_point("recover.begun");
        directory.names().sync()?;
        // Only now: these may have been the last to carry the batch number on.
        for Unneeded { path, .. } in unneeded {
            fs::remove_file(&path).map_err(io_error(&path, "remove"))?;
        }
        // For the next start; where there is little room, it comes before further records.
        directory.reserve.fill();
        Ok((directory, recovery, open))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// To ask whether it is still there, from any thread.
    ///
    /// # Errors
    /// What the file system says.
    pub fn place(&self) -> Result<Place, JournalError> {
        Place::of(&self.path).map_err(io_error(&self.path, "look at"))
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

    /// The server that has this node's token, or was to get the first one, if that is known.
    pub fn server(&self) -> Option<&str> {
        self.server.as_deref()
    }

    /// The store that has what was applied, and where it was, if that is known.
    pub fn store(&self) -> Option<(&str, &str)> {
        let store = self.store.as_ref();
        store.map(|(id, url)| (id.as_str(), url.as_str()))
    }

    /// Every batch number that a former process may have used is at most this.
    pub fn numbered(&self) -> u64 {
        self.numbered
    }

    /// Notes, durably, that this server has this node's token, or is about to get the first one: from
    /// now on its absence means something.
    ///
    /// # Errors
    /// What the file system says.
    pub fn note_server(&mut self, server: &str) -> Result<(), JournalError> {
        self.ever_claimed = true;
        self.server = Some(server.to_owned());
        self.write_node()
    }

    /// Batches up to this one went to another store than the one that is known.
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// Notes, durably, which store gets what is flushed from now on, and where it is. `another`: it is not the
    /// one that was known, which has the batches up to this one; this node's token is not there yet.
    ///
    /// # Errors
    /// What the file system says.
    pub fn note_store(
        &mut self,
        id: &str,
        url: &str,
        another: Option<u64>,
    ) -> Result<(), JournalError> {
        if let Some(applied) = another {
            self.floor = applied;
            self.ever_claimed = false;
            self.server = None;
        }
        self.store = Some((id.to_owned(), url.to_owned()));
        self.write_node()
    }

    /// Creates the next segment, not yet begun.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create_segment(&mut self, bytes_max: usize) -> Result<Writer, JournalError> {
        let (path, header) = self.next_header();
        let writer = Writer::create(&path, header, bytes_max, self.segment_bytes)
            .map_err(io_error(&path, "create and preallocate"))?;
        self.next_segment += 1;
        fail_point("segment.created");
        // What a start on a full disk has used up.
        self.reserve.fill();
        Ok(writer)
    }

    /// Creates the next segment without room for records, from the reserve if there is none at all.
    /// `None`: the reserve is used up.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create_cramped(&mut self, bytes_max: usize) -> Result<Option<Writer>, JournalError> {
        let (path, header) = self.next_header();
        // What was given up since is for the next start, first of all.
        self.reserve.fill();
        let created = || {
            let given = self.reserve.give(Purpose::Segment, &path)?;
            let reuse = || Writer::reuse(&path, header, bytes_max, self.segment_bytes);
            given.then(reuse).transpose()
        };
        let writer = created().map_err(io_error(&path, "create"))?;
        self.next_segment += u64::from(writer.is_some());
        self.reserve.fill();
        Ok(writer)
    }

    /// The next segment, in memory and without room for records, where the directory is gone: it lets
    /// the open one be sealed and flushed.
    ///
    /// # Errors
    /// What the system says.
    pub fn create_nowhere(&mut self, bytes_max: usize) -> Result<Writer, JournalError> {
        let (path, header) = self.next_header();
        let writer = Writer::nowhere(&path, header, bytes_max, self.segment_bytes)
            .map_err(io_error(&path, "create in memory"))?;
        self.next_segment += 1;
        Ok(writer)
    }

    /// Takes up the last segment if a former process left it without a record: nobody has heard of it.
    fn reuse_last(
        &mut self,
        unneeded: &mut Vec<Unneeded>,
        bytes_max: usize,
    ) -> Result<Option<Writer>, JournalError> {
        let is_last = |last: &mut Unneeded| last.header.number + 1 == self.next_segment;
        let Some(last) = unneeded.pop_if(is_last) else {
            return Ok(None);
        };
        Writer::reuse(&last.path, last.header, bytes_max, self.segment_bytes)
            .map(Some)
            .map_err(io_error(&last.path, "take up"))
    }

    fn next_header(&self) -> (PathBuf, Header) {
        let number = self.next_segment;
        let header = Header {
            node: self.identity.node,
            number,
            batch_keys: self.batch_keys,
            created_ms: unix_ms(),
        };
        (segment_path(&self.path, number), header)
    }

    /// To make the names of new segments durable, from any thread.
    pub fn names(&self) -> Names {
        Names(self.path.join("segments"))
    }

    fn recover(&mut self, before: &Boot) -> Result<(Recovery, Vec<Unneeded>), JournalError> {
        let node = self.identity.node;
        let files = segment_files(&self.path)?;
        // A number that is in damaged/ is never given again: it salts the checks.
        let last = damaged_files(&self.path)?
            .iter()
            .filter_map(|path| path.file_stem()?.to_str()?.split('.').next()?.parse().ok())
            .chain(files.iter().map(|(number, _)| *number))
            .max();
        self.next_segment = last.unwrap_or(0) + 1;
        let found: Vec<Found> = files
            .iter()
            .map(|(number, path)| Found {
                number: *number,
                examined: examine(
                    path,
                    Expected {
                        node,
                        number: *number,
                        batch_keys: self.batch_keys,
                    },
                ),
            })
            .collect();
        let circumstances = Circumstances {
            node,
            claimed: self.ever_claimed,
            power_cut: self.boot.follows(before),
            unix_ms: unix_ms(),
        };
        let plan = plan(&found, circumstances);
        // Before anything is touched.
        for ((found, fate), (_, path)) in found.iter().zip(&plan.fates).zip(&files) {
            if *fate == Fate::Refuse {
                return Err(refusal(found, path, node));
            }
        }
        let mut recovery = Recovery {
            segments: Vec::new(),
            next_batch: plan.next_batch,
            applied: plan.applied,
            damage: Vec::new(),
            narrowed: Narrowed::default(),
            cramped: None,
        };
        let mut unneeded = Vec::new();
        for ((found, fate), (_, path)) in found.into_iter().zip(plan.fates).zip(files) {
            match (fate, found.examined) {
                (Fate::Use { first_batch }, Ok(found)) => {
                    if !found.damage.is_empty() {
                        let words = found.damage.join("; ");
                        self.set_aside(&path, &words, true, &mut recovery.damage)?;
                    }
                    recovery.segments.push(adopt(&path, found, first_batch)?);
                }
                (Fate::SetAside(reason), _) => {
                    self.set_aside(&path, &reason, false, &mut recovery.damage)?;
                }
                // It tells no number. Gone before a later one is opened, which would make it suspect.
                (Fate::Remove, Err(ExamineError::Blank)) => {
                    fs::remove_file(&path).map_err(io_error(&path, "remove"))?;
                }
                (_, Ok(found)) => unneeded.push(Unneeded {
                    path,
                    header: found.header,
                }),
                // Refused before.
                (_, Err(_)) => {}
            }
        }
        if plan.numbers_lost {
            recovery.damage.push(format!(
                "{}: nothing tells the number of the last batch; new ones begin at {}",
                self.path.join("segments").display(),
                recovery.next_batch
            ));
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
        private::create_directory(&to).map_err(io_error(&to, "create"))?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let kind = if copy { "partly" } else { "whole" };
        let mut target = to.join(format!("{stem}.{kind}.seg"));
        if !copy {
            // A number comes here twice only if somebody copied files around. Keep all of them.
            let mut more = 2..;
            while target.exists()
                && let Some(nth) = more.next()
            {
                target = to.join(format!("{stem}.{kind}-{nth}.seg"));
            }
        }
        damage.push(format!(
            "{}: {reason}; kept as {}",
            path.display(),
            target.display()
        ));
        if !copy {
            fs::rename(path, &target).map_err(io_error(path, "move to damaged/"))?;
        } else if !target.exists() {
            // Under its name only when it is whole, and durable before the file is mended.
            let partial = to.join(format!("{stem}.{kind}.new"));
            let keep = || {
                fs::copy(path, &partial)?;
                File::open(&partial)?.sync_all()?;
                fs::rename(&partial, &target)?;
                sync_dir(&to)
            };
            keep().map_err(io_error(path, "copy to damaged/"))?;
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
            server: self.server.clone(),
            store: self.store.as_ref().map(|(id, _)| id.clone()),
            store_url: self.store.as_ref().map(|(_, url)| url.clone()),
            floor: self.floor,
            last: self.boot.clone(),
        })
        .map_err(io::Error::from)
        .map_err(io_error(&path, "encode"))?;
        let write = || {
            // Not truncated before, because the reserve's pages are to be written over.
            let file = private::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&new)?;
            file.write_all_at(&text, 0)?;
            file.set_len(text.len() as u64)?;
            file.sync_all()?;
            fail_point("node.written");
            fs::rename(&new, &path)?;
            sync_dir(&self.path)
        };
        let written = match write() {
            Err(full)
                if is_disk_full(&full)
                    && text.len() <= RESERVE_BYTES
                    && self.reserve.give(Purpose::Node, &new).unwrap_or(false) =>
            {
                let written = write();
                // The old file's page is free now.
                self.reserve.fill();
                written
            }
            written => written,
        };
        written.map_err(io_error(&path, "write"))
    }
}

/// The names of the segments.
#[derive(Debug, Clone)]
pub struct Names(PathBuf);

impl Names {
    /// Makes those durable that are there now.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sync(&self) -> Result<(), JournalError> {
        sync_dir(&self.0).map_err(io_error(&self.0, "sync"))
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

/// Why a directory with this file in it is not opened.
fn refusal(found: &Found, path: &Path, own: NodeId) -> JournalError {
    let path = path.to_owned();
    match &found.examined {
        Ok(examined) => JournalError::Foreign {
            path,
            found: examined.header.node,
            own,
        },
        Err(ExamineError::Header(source)) => JournalError::Newer {
            path,
            source: source.clone(),
        },
        Err(ExamineError::Io(source)) => JournalError::Io {
            path,
            action: "read",
            source: match source.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => source.kind().into(),
            },
        },
        Err(ExamineError::Blank) => unreachable!("a blank segment is removed"),
    }
}

/// Files in `damaged/`.
///
/// # Errors
/// What the file system says.
pub fn damaged_files(state_dir: &Path) -> Result<Vec<PathBuf>, JournalError> {
    let path = state_dir.join("damaged");
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error(&path, "list")(error)),
    };
    let files: Result<Vec<_>, _> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut files = files.map_err(io_error(&path, "list"))?;
    files.sort_unstable();
    Ok(files)
}

/// Turns what was found into a sealed segment, sealing it if its process could not, and mending what
/// can be mended: its records stay where they are.
fn adopt(path: &Path, found: Examined, first_batch: u64) -> Result<Sealed, JournalError> {
    let last_batch = found.last_batch(first_batch);
    let applied = found.applied.unwrap_or(0);
    let parts = SealedParts {
        header: found.header,
        first_batch,
        applied: applied.clamp(first_batch - 1, last_batch),
        end: found.end,
        // So many were sealed, however many are sound: a second look still sees the difference.
        records: found.records_sealed.unwrap_or(found.records.into()) as u32,
        batch_starts: found.batch_starts,
    };
    let adopt = || {
        let file = File::options().read(true).write(true).open(path)?;
        if found.sealed && found.damage.is_empty() {
            let bytes = file.metadata()?.len() as usize;
            let map = map_read(&file, bytes.max(RECORDS_AT))?;
            return Ok(Sealed::from_parts(path.to_owned(), map, parts));
        }
        let sealed = Writer::reopen(file, path.to_owned(), parts)?.seal()?;
        sealed.sync()?;
        Ok(sealed)
    };
    adopt().map_err(io_error(path, "recover"))
}

fn lock(state_dir: &Path) -> Result<File, JournalError> {
    let path = state_dir.join("lock");
    let file = private::options()
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

/// What `node.json` tells.
#[derive(Debug, Clone)]
pub struct NodeFacts {
    /// Whose directory it is.
    pub node: NodeId,
    /// Every run known to have written here.
    pub runs: Vec<RunId>,
    /// Whether a token of this node may be in the store.
    pub claimed: bool,
    /// The server that has it, or was to get the first one, if that is known.
    pub server: Option<String>,
    /// Which store that is, and where it was, if that is known.
    pub store: Option<(String, String)>,
    /// Batches up to this one went to another store.
    pub floor: u64,
    /// When the last of these runs was at work.
    pub last: Boot,
}

/// Reads `node.json`; `None`: there is none.
///
/// # Errors
/// [`JournalError::Io`] or [`JournalError::Node`].
pub fn read_node(state_dir: &Path) -> Result<Option<NodeFacts>, JournalError> {
    let path = state_dir.join("node.json");
    let text = match small_file::read(&path, NODE_BYTES_MAX) {
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
    Ok(Some(NodeFacts {
        node: NodeId(node),
        runs: runs?,
        claimed: file.claimed,
        server: file.server,
        store: file.store.zip(file.store_url),
        floor: file.floor,
        last: file.last,
    }))
}

fn random() -> u128 {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).expect("the system has a source of randomness");
    u128::from_le_bytes(bytes)
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
