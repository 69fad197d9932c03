//! The socket and the start: who gets in, and what is said when it cannot run.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use tempfile::TempDir;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::resp::{Client, Value};
use crate::support::wait_until;

/// The exit code, and one line that contains `word`.
#[track_caller]
fn assert_gives_up((code, said): (Option<i32>, String), expected: i32, word: &str) {
    assert_eq!(code, Some(expected), "{said}");
    assert!(
        said.lines().any(|line| line.contains(word)),
        "no line contains {word:?}:\n{said}"
    );
    assert!(!said.contains("panicked"), "{said}");
}

fn embedded() -> crate::support::daemon::Settings {
    Daemon::builder("embedded").flush_interval(NEVER)
}

#[test]
fn the_socket_of_a_dead_daemon_is_replaced() {
    let mut daemon = embedded().start();
    assert_eq!(daemon.client().number(&["INCR", "k"]), 1);
    daemon.kill9();
    assert!(daemon.socket().exists(), "a kill leaves it behind");
    daemon.restart();
    assert_eq!(daemon.client().number(&["INCR", "k"]), 2);
}

#[test]
fn the_socket_of_a_living_daemon_is_refused() {
    let daemon = embedded().start();
    let socket = daemon.socket().to_path_buf();
    let second = embedded().socket(&socket).run_to_exit();
    assert_gives_up(second, 74, socket.to_str().unwrap());
    assert_eq!(
        daemon.client().number(&["INCR", "k"]),
        1,
        "the first one is still there"
    );
}

#[test]
fn a_file_in_the_place_of_the_socket_is_not_deleted() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    assert_gives_up(
        embedded().socket(&path).run_to_exit(),
        74,
        path.to_str().unwrap(),
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
}

#[test]
fn the_mode_of_the_socket_is_as_configured() {
    let mode = |path: &Path| {
        let metadata = std::fs::metadata(path).unwrap();
        assert!(metadata.file_type().is_socket());
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode(embedded().start().socket()), 0o660);
    assert_eq!(
        mode(embedded().set("listen.mode", "0600").start().socket()),
        0o600
    );
    assert_eq!(
        mode(embedded().set("listen.mode", "0666").start().socket()),
        0o666
    );
}

#[test]
fn a_socket_path_too_long_for_the_system_is_a_configuration_error() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("s".repeat(120));
    assert_gives_up(embedded().socket(&path).run_to_exit(), 78, "listen.socket");
}

#[test]
fn a_state_directory_that_cannot_be_made_is_an_io_error() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let path = file.join("state");
    assert_gives_up(
        embedded().state_dir(&path).run_to_exit(),
        74,
        path.to_str().unwrap(),
    );
}

#[test]
fn a_state_directory_in_use_is_refused_and_left_alone() {
    let daemon = embedded().start();
    let state = daemon.state_dir().to_path_buf();
    assert_gives_up(
        embedded().state_dir(&state).run_to_exit(),
        74,
        state.to_str().unwrap(),
    );
    assert_eq!(daemon.client().number(&["INCR", "k"]), 1);
    daemon.flush();
    drop(daemon);
}

#[test]
fn wrong_configuration_is_named_with_its_origin() {
    for (key, value, named) in [
        ("flush.intervall", "1s", "intervall"),
        ("nonsense.key", "1", "nonsense"),
        ("flush.interval", "soon", "flush.interval"),
        ("flush.max_keys", "many", "flush.max_keys"),
        ("flush.max_keys", "-1", "flush.max_keys"),
        ("flush.delivery", "perhaps", "flush.delivery"),
        ("reply.cold", "warm", "reply.cold"),
        ("reply.load_timeout", "5 parsecs", "reply.load_timeout"),
        ("listen.mode", "rw-rw----", "listen.mode"),
        ("journal.sync", "sometimes", "journal.sync"),
        ("log.level", "loud", "log.level"),
    ] {
        // The flag would hide the variable.
        let (code, said) = if key == "flush.interval" {
            embedded().flush_interval(value).run_to_exit()
        } else {
            embedded().set(key, value).run_to_exit()
        };
        assert_eq!(code, Some(78), "{key}={value}: {said}");
        assert!(said.contains(named), "{key}={value}: {said}");
        let origin = if key == "flush.interval" {
            "--flush-interval"
        } else {
            "TALLYD_"
        };
        assert!(
            said.contains(origin),
            "{key}={value} does not say where it came from: {said}"
        );
    }
}

#[test]
fn a_wrong_store_url_is_a_configuration_error_and_shows_no_password() {
    for url in [
        "http://127.0.0.1",
        "redis://user:topsecret@",
        "redis://:topsecret@127.0.0.1:notaport",
        "no url",
    ] {
        let (code, said) = Daemon::builder(url).run_to_exit();
        assert_eq!(code, Some(78), "{url}: {said}");
        assert!(said.contains("store.url"), "{url}: {said}");
        assert!(!said.contains("topsecret"), "{url}: {said}");
    }
}

#[test]
fn a_connection_too_many_is_told_so_as_redis_does() {
    let daemon = embedded().set("listen.max_connections", 3).start();
    // The connection that saw the daemon ready may not be gone yet.
    let mut kept: Vec<Client> = Vec::new();
    wait_until("three connections are open", || {
        let mut client = daemon.client();
        if client
            .try_command(&["PING"])
            .is_ok_and(|reply| reply == Value::Status("PONG".into()))
        {
            kept.push(client);
        }
        kept.len() == 3
    });
    let mut fourth = daemon.client();
    assert_eq!(
        fourth.read().unwrap().error(),
        "ERR max number of clients reached"
    );
    assert_eq!(fourth.read_to_end().unwrap(), b"", "and is closed");
    assert_eq!(kept[0].number(&["INCR", "k"]), 1, "the others go on");
    kept.pop();
    wait_until("a closed connection makes room", || {
        daemon
            .client()
            .try_command(&["PING"])
            .is_ok_and(|reply| reply == Value::Status("PONG".into()))
    });
}

#[test]
fn limits_of_memory_are_errors_that_name_them_and_nothing_is_dropped() {
    let daemon = embedded()
        .set("limits.max_pending_bytes", "1MiB")
        .set("flush.max_keys", 10_000_000)
        .set("reply.cold", "delta")
        .start();
    let mut client = daemon.client();
    let mut taken = 0;
    let refused = loop {
        assert!(taken < 1_000_000, "a megabyte holds no million keys");
        match client.command(&["INCR", &format!("{}:{taken}", "k".repeat(100))]) {
            Value::Integer(1) => taken += 1,
            other => break other,
        }
    };
    assert!(refused.error().contains("max_pending_bytes"), "{refused:?}");
    assert!(taken > 100, "{taken}");
    let present = (0..taken)
        .filter(|n| client.number(&["EXISTS", &format!("{}:{n}", "k".repeat(100))]) == 1)
        .count();
    assert_eq!(present, taken);
    daemon.flush();
    assert_eq!(client.number(&["INCR", "room again"]), 1);
}
