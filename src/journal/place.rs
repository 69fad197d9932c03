//! Whether the state directory is still where it was.
//!
//! Open files outlive their names: a daemon whose directory was removed, moved or replaced goes on
//! writing to a journal that its successor will not find. What is asked is the identity of the
//! directory and of its segments' directory; what happens in them is no matter of this.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// See the module's documentation.
#[derive(Debug, Clone)]
pub struct Place {
    path: PathBuf,
    ids: [(PathBuf, Id); 2],
}

/// Device and inode.
type Id = (u64, u64);

impl Place {
    /// As it is now.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn of(state_dir: &Path) -> io::Result<Self> {
        let known = |path: PathBuf| Ok::<_, io::Error>((id(&path)?, path));
        let (own, path) = known(state_dir.to_owned())?;
        let (segments, below) = known(state_dir.join("segments"))?;
        Ok(Self {
            path: path.clone(),
            ids: [(path, own), (below, segments)],
        })
    }

    /// The state directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether one of them is not there any more, or is another one. Asks the file system, which may
    /// take its time; one that does not answer has not lost it.
    pub fn is_gone(&self) -> bool {
        self.ids.iter().any(|(path, known)| match id(path) {
            Ok(found) => found != *known,
            Err(error) => matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ),
        })
    }
}

fn id(path: &Path) -> io::Result<Id> {
    let metadata = fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}
