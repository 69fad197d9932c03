//! A disk of the test's own, small enough to be filled.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// A small file system of its own.
#[derive(Debug)]
pub struct Disk {
    dir: TempDir,
}

impl Disk {
    /// `None`, and a line that says so, where mounting is not permitted.
    pub fn mount(size: &str) -> Option<Self> {
        let dir = TempDir::with_prefix("tallyd-disk-").unwrap();
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tallyd-test"])
            .arg(dir.path())
            .output();
        if done.is_ok_and(|output| output.status.success()) {
            return Some(Self { dir });
        }
        eprintln!("SKIPPED: mounting a tmpfs is not permitted here (run it as root)");
        None
    }

    /// A place for a state directory.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    #[track_caller]
    pub fn filler(&self) -> PathBuf {
        self.dir.path().join("filler")
    }

    /// Takes all the room that is left.
    #[track_caller]
    pub fn fill(&self) {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(self.filler())
            .unwrap();
        for size in [64 * 1024, 4096] {
            let block = vec![1; size];
            while file.write_all(&block).is_ok() {}
        }
    }

    /// Gives back what [`fill`](Self::fill) took.
    #[track_caller]
    pub fn free(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: whoever still has files open keeps them until it ends.
        let _ = Command::new("umount")
            .arg("-l")
            .arg(self.dir.path())
            .status();
    }
}
