//! Room for a start on a full disk: two files of one page, taken while there is room.
//!
//! What is pending leaves the disk only through a daemon that runs, and a start must write two things:
//! the run's id, which is in `node.json` before a token can carry it, and the next segment's header,
//! which carries the batch number on. Both are renamed into place, over pages that are there already.
//!
//! 1. A file of the reserve is used up by a rename, and made anew as soon as there is room.
//! 2. That of the segment is never written here: it is a blank segment.
//! 3. To have a reserve is no condition of anything: without it a start on a full disk says so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::segment::preallocate;
use crate::private;

/// Bytes of each file: a page, which is a block of all file systems in use.
pub(super) const RESERVE_BYTES: usize = 4096;

/// What a file of the reserve is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The next `node.json`.
    Node,
    /// The header of the next segment.
    Segment,
}

const PURPOSES: [Purpose; 2] = [Purpose::Node, Purpose::Segment];

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
}

impl Reserve {
    /// Of this state directory; looks at nothing yet.
    pub(super) fn of(state_dir: &Path) -> Self {
        Self {
            path: state_dir.join("reserve"),
        }
    }

    /// Makes what is missing, as far as there is room.
    pub(super) fn fill(&self) {
        for purpose in PURPOSES {
            if !self.is_there(purpose) {
                // Whoever needs it and does not find it says what is wrong.
                let _ = self.make(purpose);
            }
        }
    }

    /// Gives a file's room to `to`, which is replaced if it is there. `false`: there is none.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn give(&self, purpose: Purpose, to: &Path) -> io::Result<bool> {
        if !self.is_there(purpose) {
            return Ok(false);
        }
        fs::rename(self.file(purpose), to)?;
        Ok(true)
    }

    fn file(&self, purpose: Purpose) -> PathBuf {
        self.path.join(match purpose {
            Purpose::Node => "node",
            Purpose::Segment => "segment",
        })
    }

    /// Whole: a process may have ended while it made it.
    fn is_there(&self, purpose: Purpose) -> bool {
        let metadata = fs::metadata(self.file(purpose));
        metadata.is_ok_and(|metadata| metadata.len() == RESERVE_BYTES as u64)
    }

    fn make(&self, purpose: Purpose) -> io::Result<()> {
        private::create_directory(&self.path)?;
        let path = self.file(purpose);
        let made = private::options()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .and_then(|file| preallocate(&file, RESERVE_BYTES));
        if made.is_err() {
            let _ = fs::remove_file(&path);
        }
        made
    }
}
