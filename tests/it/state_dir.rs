//! The state directory. Promise 8, closed: it is its owner's alone, whatever the umask, and also if an
//! earlier daemon or somebody's `chmod` had left it open. Promise 2, crash: where it is gone, nothing is
//! acknowledged any more.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::daemon::Daemon;
use crate::support::http::Address;
use crate::support::redis::RedisServer;
use crate::support::resp::Value;
use crate::support::wait_until;

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

/// Takes the directory away from under a daemon: what it acknowledged until it noticed is in the
/// store, and from then on nothing is acknowledged. Seen to fail when nobody looked: increments went
/// on into files without a name.
fn taken_away(how: impl Fn(&Path)) {
    let redis = RedisServer::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let admin = dir.path().join("admin.sock");
    let daemon = Daemon::builder(redis.url())
        .flush_interval("200ms")
        .set("admin.listen", format!("unix:{}", admin.display()))
        .start();
    let admin = Address::Unix(admin);
    let mut client = daemon.client();
    let mut total = 0;
    let begin = Instant::now();
    // Longer than it takes to look.
    while begin.elapsed() < Duration::from_secs(2) {
        total += 1;
        assert_eq!(client.number(&["INCR", "k"]), total, "all is well");
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(admin.get("/readyz").status, 200);
    how(daemon.state_dir());
    let gone = format!(
        "the state directory {} is gone",
        daemon.state_dir().display()
    );
    wait_until("it notices", || match client.command(&["INCR", "k"]) {
        Value::Integer(n) => {
            total += 1;
            assert_eq!(n, total);
            false
        }
        Value::Error(text) => {
            assert!(text.starts_with(&format!("ERR {gone}: ")), "{text}");
            assert!(text.contains("restart"), "{text}");
            true
        }
        other => panic!("{other:?}"),
    });
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(2) {
        for command in [&["INCR", "k"][..], &["DECRBY", "new", "2"]] {
            let said = client.command(command);
            assert!(said.error().contains(&gone), "{said:?}");
        }
        client.command(&["MULTI"]);
        client.command(&["INCR", "k"]);
        let said = client.command(&["EXEC"]);
        assert!(said.items()[0].error().contains(&gone), "{said:?}");
        thread::sleep(Duration::from_millis(50));
    }
    // Reads go on, and what was acknowledged is flushed.
    assert_eq!(client.number(&["GET", "k"]), total);
    wait_until("what was acknowledged is in the store", || {
        redis.counter("k") == total
    });
    assert_eq!(redis.counter("new"), 0);
    let ready = admin.get("/readyz");
    assert_eq!(ready.status, 503);
    assert!(ready.body.contains(&gone), "{}", ready.body);
    assert_eq!(daemon.log().matches(&gone).count(), 1, "{}", daemon.log());
}

#[test]
fn a_state_directory_that_is_removed_ends_acknowledging() {
    taken_away(|path| fs::remove_dir_all(path).unwrap());
}

/// Neither another one in its place nor its contents' removal is any better.
#[test]
fn a_state_directory_that_is_replaced_or_emptied_ends_acknowledging() {
    taken_away(|path| {
        fs::rename(path, path.with_extension("away")).unwrap();
        fs::create_dir_all(path.join("segments")).unwrap();
    });
    taken_away(|path| fs::remove_dir_all(path.join("segments")).unwrap());
}

/// What is done to a directory that stays is none of its business.
#[test]
fn a_state_directory_that_is_only_touched_goes_on() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url()).start();
    let path = daemon.state_dir();
    fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    fs::write(path.join("notes"), "mine").unwrap();
    fs::remove_file(path.join("notes")).unwrap();
    let mut client = daemon.client();
    for n in 1..=50 {
        assert_eq!(client.number(&["INCR", "k"]), n);
        thread::sleep(Duration::from_millis(50));
    }
    daemon.flush();
    assert_eq!(redis.counter("k"), 50);
}
