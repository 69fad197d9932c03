//! Files and directories that only their owner may read: they hold key names, and what counts.
//!
//! 1. Modes do not hang on the process's umask.
//! 2. What an earlier version, or somebody's `chmod`, left open to others is narrowed before it is used.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Of directories.
const DIRECTORY_MODE: u32 = 0o700;
/// Of files.
const FILE_MODE: u32 = 0o600;
/// What is nobody else's.
const OTHERS: u32 = 0o077;

/// To create files with.
pub fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(FILE_MODE);
    options
}

/// Creates a directory, and those above it that are missing; one that is there is left as it is.
///
/// # Errors
/// What the file system says.
pub fn create_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(path)
}

/// What others could read, and can no longer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Narrowed {
    /// How many files and directories.
    pub count: usize,
    /// The first of them, and the mode that it had.
    pub first: Option<(PathBuf, u32)>,
    /// What stays open, because it belongs to another user, and its mode.
    pub left: Option<(PathBuf, u32)>,
}

/// Takes a directory, and all in it, from everybody but its owner. Links are not followed.
///
/// # Errors
/// What the file system says, but that something belongs to another user, which is told.
pub fn narrow(directory: &Path) -> io::Result<Narrowed> {
    let mut narrowed = Narrowed::default();
    // The directory itself may be a link: it is the one that was configured.
    narrow_one(directory, &fs::metadata(directory)?, &mut narrowed)?;
    narrow_all_in(directory, &mut narrowed)?;
    Ok(narrowed)
}

fn narrow_all_in(directory: &Path, narrowed: &mut Narrowed) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        // Another user's, such as `lost+found`.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_file() || metadata.is_dir() {
            narrow_one(&entry.path(), &metadata, narrowed)?;
        }
        if metadata.is_dir() {
            narrow_all_in(&entry.path(), narrowed)?;
        }
    }
    Ok(())
}

fn narrow_one(path: &Path, metadata: &fs::Metadata, narrowed: &mut Narrowed) -> io::Result<()> {
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & OTHERS == 0 {
        return Ok(());
    }
    match fs::set_permissions(path, fs::Permissions::from_mode(mode & !OTHERS)) {
        Ok(()) => {
            narrowed.count += 1;
            narrowed
                .first
                .get_or_insert_with(|| (path.to_owned(), mode));
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            narrowed.left.get_or_insert_with(|| (path.to_owned(), mode));
        }
        Err(error) => return Err(error),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn what_is_created_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        create_directory(&deep).unwrap();
        assert_eq!((mode(&deep), mode(&dir.path().join("a"))), (0o700, 0o700));
        let file = deep.join("f");
        options().write(true).create(true).open(&file).unwrap();
        assert_eq!(mode(&file), 0o600);
    }

    #[test]
    fn what_was_open_to_others_is_narrowed_and_told_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let theirs = outside.path().join("theirs");
        fs::write(&theirs, "").unwrap();
        fs::set_permissions(&theirs, fs::Permissions::from_mode(0o644)).unwrap();
        symlink(&theirs, dir.path().join("link")).unwrap();
        symlink(outside.path(), dir.path().join("links")).unwrap();
        let state = dir.path().join("state");
        create_directory(&state.join("segments")).unwrap();
        fs::set_permissions(&state, fs::Permissions::from_mode(0o755)).unwrap();
        let file = state.join("segments/1.seg");
        fs::write(&file, "").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
        symlink(&theirs, state.join("link")).unwrap();

        let link = dir.path().join("state-link");
        symlink(&state, &link).unwrap();
        let narrowed = narrow(&link).unwrap();
        assert_eq!((narrowed.count, narrowed.left), (2, None));
        assert_eq!(narrowed.first, Some((link, 0o755)));
        assert_eq!((mode(&state), mode(&file)), (0o700, 0o600));
        assert_eq!(mode(&theirs), 0o644);
        assert_eq!(narrow(&state).unwrap(), Narrowed::default());
    }
}
