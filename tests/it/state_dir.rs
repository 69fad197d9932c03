//! Promise 8, closed: the state directory is its owner's alone, whatever the umask, and also if an
//! earlier daemon or somebody's `chmod` had left it open.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use crate::support::daemon::Daemon;
use crate::support::redis::RedisServer;

/// Everything below a directory, itself included, with its mode.
fn modes(path: &Path) -> Vec<(PathBuf, u32)> {
    let metadata = fs::symlink_metadata(path).unwrap();
    let mut all = vec![(path.to_owned(), metadata.permissions().mode() & 0o777)];
    if metadata.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            all.extend(modes(&entry.unwrap().path()));
        }
    }
    all
}

fn open_to_others(path: &Path) -> Vec<(PathBuf, u32)> {
    let mut open = modes(path);
    open.retain(|(_, mode)| mode & 0o077 != 0);
    open
}

#[test]
fn nobody_else_can_read_what_a_daemon_keeps() {
    let redis = RedisServer::start(&[]);
    redis.cli(&["LPUSH", "wrong", "x"]);
    for store in [redis.url(), "embedded".into()] {
        let mut daemon = Daemon::builder(&store).start();
        let mut client = daemon.client();
        client.command(&["INCR", "secret-key-name"]);
        client.command(&["INCR", "wrong"]);
        daemon.flush();
        let files = modes(daemon.state_dir());
        assert!(files.len() > 5, "{files:?}");
        assert_eq!(open_to_others(daemon.state_dir()), [], "{store}");

        // As an earlier version left it.
        daemon.kill9();
        for (path, mode) in modes(daemon.state_dir()) {
            let open = if path.is_dir() { 0o755 } else { 0o644 };
            fs::set_permissions(path, PermissionsExt::from_mode(mode | open)).unwrap();
        }
        let before = daemon.log().len();
        daemon.restart();
        assert_eq!(open_to_others(daemon.state_dir()), [], "{store}");
        let log = daemon.log()[before..].to_owned();
        let told = "the state directory was open to other users, and is no longer";
        assert_eq!(log.matches(told).count(), 1, "{log}");
        assert!(log.contains("had mode 755"), "{log}");
        assert!(
            log.contains(&daemon.state_dir().display().to_string()),
            "{log}"
        );

        let before = daemon.log().len();
        daemon.restart();
        assert!(!daemon.log()[before..].contains("open to other users"));
        daemon.signal(Signal::TERM);
        assert!(daemon.wait_exit().success());
        assert_eq!(open_to_others(daemon.state_dir()), [], "{store}");
    }
}
