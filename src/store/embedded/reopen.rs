//! The database's file, opened again after it failed.
//!
//! After an error of the disk `redb` refuses everything until the file is opened again, which finds
//! out by check sums what of the last transaction is there. A disk that was full for a moment would
//! otherwise end all flushing until somebody restarts the daemon.
//!
//! 1. A file that failed is opened again by whoever needs it next. The failed one is closed before,
//!    because it holds the file's lock; so nobody keeps it beyond one piece of work.
//! 2. What is read after that is what the disk has, not what the kernel would have liked to write.
//! 3. The log hears that the file failed, and that it works only when something is written again: a
//!    file on a full disk can be opened.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use tracing::{info, warn};

use super::super::StoreError;
use super::file::File;
use crate::repeats::Repeats;

/// Between two tries to open it: each may read all of it.
const PAUSE: Duration = Duration::from_millis(500);

/// See the module's documentation.
#[derive(Debug)]
pub struct Reopened {
    path: PathBuf,
    /// Shared by those who work with it.
    file: RwLock<State>,
    /// The file that is open is of no more use.
    has_failed: AtomicBool,
    failures: Mutex<Repeats>,
}

#[derive(Debug)]
enum State {
    Open(File),
    Closed {
        why: Arc<redb::Error>,
        tried: Instant,
    },
}

impl Reopened {
    /// Opens the file at `path` for the first time, or makes it.
    ///
    /// # Errors
    /// See [`File::open`].
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let file = File::open(path).map_err(|source| embedded(path, Arc::new(source)))?;
        Ok(Self {
            path: path.to_owned(),
            file: RwLock::new(State::Open(file)),
            has_failed: AtomicBool::new(false),
            failures: Mutex::default(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Does something with the open file. Blocks, also while others open it.
    ///
    /// # Errors
    /// Whatever `work` says, and why the file cannot be opened.
    pub fn with<T>(
        &self,
        work: impl FnOnce(&File) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let state = self.opened();
        match &*state {
            // While it is shared, so that it is this file that has failed, and not its successor.
            State::Open(file) => work(file).map_err(|error| {
                if is_final(&error) {
                    self.failed(error)
                } else {
                    embedded(&self.path, Arc::new(error))
                }
            }),
            State::Closed { why, .. } => Err(embedded(&self.path, Arc::clone(why))),
        }
    }

    /// The open file is of no more use, for this reason.
    pub fn failed(&self, why: redb::Error) -> StoreError {
        self.has_failed.store(true, Ordering::Release);
        self.tell(&why);
        embedded(&self.path, Arc::new(why))
    }

    /// Something was written, and is on the disk.
    pub fn works(&self) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(told) = failures.over() {
            info!(
                failures = told.count,
                seconds = told.seconds(),
                "the embedded store was opened again and works"
            );
        }
    }

    fn opened(&self) -> RwLockReadGuard<'_, State> {
        let state = self.file.read().unwrap_or_else(PoisonError::into_inner);
        if !self.is_due(&state) {
            return state;
        }
        drop(state);
        let mut state = self.file.write().unwrap_or_else(PoisonError::into_inner);
        // Who waited for the lock may find it done.
        if self.is_due(&state) {
            *state = State::Closed {
                why: Arc::new(redb::Error::PreviousIo),
                tried: Instant::now(),
            };
            forget_cached(&self.path);
            *state = match File::open(&self.path) {
                Ok(file) => State::Open(file),
                Err(why) => {
                    self.tell(&why);
                    State::Closed {
                        why: Arc::new(why),
                        tried: Instant::now(),
                    }
                }
            };
            self.has_failed.store(false, Ordering::Release);
        }
        drop(state);
        self.file.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is to be opened again.
    fn is_due(&self, state: &State) -> bool {
        match state {
            State::Open(_) => self.has_failed.load(Ordering::Acquire),
            State::Closed { tried, .. } => tried.elapsed() >= PAUSE,
        }
    }

    /// Once for each failure, however often it is tried: who waits for the store tells of that.
    fn tell(&self, error: &redb::Error) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.again().is_some_and(|told| told.first) {
            let path = self.path.display();
            warn!(%path, %error, "the embedded store failed; its file is opened again until it works");
        }
    }
}

/// Whether the database answers nothing any more after such an error.
fn is_final(error: &redb::Error) -> bool {
    use redb::Error;
    matches!(
        error,
        Error::Io(_) | Error::PreviousIo | Error::LockPoisoned(_) | Error::DatabaseClosed
    )
}

/// After a sync that failed the kernel takes for written what the disk does not have. Read from
/// there, the token would vouch for a batch that the next power cut takes back; so what is cached
/// goes, as far as it is not still to be written.
fn forget_cached(path: &Path) {
    if let Ok(file) = std::fs::File::open(path) {
        // Advice: a file system that does not take it has no better answer.
        let _ = fadvise(file, 0, None, Advice::DontNeed);
    }
}

fn embedded(path: &Path, source: Arc<redb::Error>) -> StoreError {
    StoreError::Embedded {
        path: path.display().to_string(),
        source,
    }
}
