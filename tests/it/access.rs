//! Promise 8, closed: which users get in beyond the socket's mode, and which keys they may use.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::daemon::{Daemon, NEVER, Settings};
use crate::support::resp::{Client, Value, encode_into};
use crate::support::{finish, wait_until};

const NO_KEY: &str = "NOPERM this user has no permissions to access one of the keys used as \
                      arguments (limits.allow_keys)";
const NO_CHANNEL: &str = "NOPERM this user has no permissions to access one of the channels used as \
                          arguments (limits.allow_keys)";

/// A user and a group that no system uses.
const STRANGER: (u32, u32) = (54_321, 54_322);

/// Connects as another user, sends `INCR k`, and prints all that comes until the end or one line.
const CONNECT: &str = r"
import os, socket, sys
path, uid, gid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.setgroups([])
os.setgid(gid)
os.setuid(uid)
peer = socket.socket(socket.AF_UNIX)
peer.settimeout(60)
try:
    peer.connect(path)
except PermissionError:
    sys.exit('permission denied')
try:
    peer.sendall(b'INCR k\r\n')
except BrokenPipeError:
    pass  # Refused already; the answer waits.
answer = b''
while not answer.endswith(b'\r\n'):
    answer += peer.recv(1000)
print(answer.decode().strip())
if b'to connect' in answer:
    try:
        assert peer.recv(1) == b'', 'it is not closed'
    except ConnectionResetError:
        pass  # Closed with our command unread.
";

/// Whether this test may become another user; says so if not.
fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped, because it is not run by root: {test}");
    }
    root
}

/// A daemon on the embedded store whose socket everybody may reach and write to.
fn open_to_all() -> (TempDir, Settings) {
    let dir = TempDir::with_prefix("tallyd-access-").unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let socket = dir.path().join("tallyd.sock");
    let settings = Daemon::builder("embedded")
        .flush_interval(NEVER)
        .socket(&socket)
        .set("listen.mode", "0666");
    (dir, settings)
}

/// What a user is answered to `INCR k`.
fn answer(daemon: &Daemon, (uid, gid): (u32, u32)) -> String {
    let mut python = Command::new("python3");
    python.args(["-c", CONNECT]).arg(daemon.socket());
    python.args([uid.to_string(), gid.to_string()]);
    let (status, output) = finish(&mut python, b"");
    assert!(
        status.success() || output.contains("permission denied"),
        "{output}"
    );
    output.trim().to_owned()
}

fn refused((uid, gid): (u32, u32)) -> String {
    format!(
        "-NOPERM this user has no permissions to connect: uid {uid}, gid {gid} is not in \
         listen.allow_uids or listen.allow_gids"
    )
}

fn stat(daemon: &Daemon, name: &str) -> i64 {
    daemon.client().command(&["TALLY.STATS"]).fields()[name].number()
}

/// Seen to fail when nobody's credentials were asked for.
#[test]
fn only_the_users_that_are_listed_get_in() {
    if !is_root("only_the_users_that_are_listed_get_in") {
        return;
    }
    let (_dir, settings) = open_to_all();
    let daemon = settings.set("listen.allow_uids", "54001, nobody").start();
    assert_eq!(answer(&daemon, (54_001, 1)), ":1", "by number");
    assert_eq!(answer(&daemon, (65_534, 1)), ":2", "by name");
    assert_eq!(answer(&daemon, (0, 0)), ":3", "root");
    for _ in 0..5 {
        assert_eq!(answer(&daemon, STRANGER), refused(STRANGER));
    }
    let group = (54_003, 54_001);
    assert_eq!(answer(&daemon, group), refused(group), "a group is no user");
    assert_eq!(daemon.client().number(&["GET", "k"]), 3);
    assert_eq!(stat(&daemon, "connections_refused_peer_total"), 6);
    assert_eq!(stat(&daemon, "connections_refused_total"), 6);
    let log = daemon.log();
    let told: Vec<_> = log.lines().filter(|l| l.contains("allow_uids")).collect();
    assert_eq!(told.len(), 1, "{log}");
    assert!(told[0].contains("uid=54321 gid=54322"), "{log}");
}

#[test]
fn only_the_groups_that_are_listed_get_in() {
    if !is_root("only_the_groups_that_are_listed_get_in") {
        return;
    }
    let (_dir, settings) = open_to_all();
    let daemon = settings.set("listen.allow_gids", "54002,nogroup").start();
    assert_eq!(answer(&daemon, (54_321, 54_002)), ":1", "by number");
    assert_eq!(answer(&daemon, (54_321, 65_534)), ":2", "by name");
    assert_eq!(answer(&daemon, STRANGER), refused(STRANGER));
    let user = (54_002, 1);
    assert_eq!(answer(&daemon, user), refused(user), "a user is no group");
}

/// The lists let in nobody whom the mode keeps out.
#[test]
fn the_mode_of_the_socket_counts_before_the_lists() {
    if !is_root("the_mode_of_the_socket_counts_before_the_lists") {
        return;
    }
    let (_dir, settings) = open_to_all();
    let daemon = settings
        .set("listen.mode", "0600")
        .set("listen.allow_uids", "54001")
        .start();
    assert_eq!(answer(&daemon, (54_001, 1)), "permission denied");
}

#[test]
fn a_name_that_the_system_does_not_know_is_a_configuration_error() {
    for key in ["listen.allow_uids", "listen.allow_gids"] {
        let (code, said) = Daemon::builder("embedded")
            .set(key, "0,nobody-of-this-name")
            .run_to_exit();
        assert_eq!(code, Some(78), "{said}");
        assert!(
            said.contains(&format!("{key} nobody-of-this-name")),
            "{said}"
        );
    }
}

/// A configuration file that can be changed while the daemon runs.
struct File(PathBuf);

impl File {
    fn write(&self, text: &str) {
        std::fs::write(&self.0, text).unwrap();
    }

    /// Has the daemon read it, and waits until it has said so once more.
    fn reload(&self, daemon: &Daemon, text: &str) {
        let reloads = |daemon: &Daemon| daemon.log().matches(": reloaded").count();
        let before = reloads(daemon);
        self.write(text);
        daemon.signal(Signal::HUP);
        wait_until("it is reloaded", || reloads(daemon) > before);
    }
}

#[test]
fn users_and_keys_can_be_changed_while_it_runs() {
    if !is_root("users_and_keys_can_be_changed_while_it_runs") {
        return;
    }
    let (dir, settings) = open_to_all();
    let file = File(dir.path().join("tallyd.toml"));
    file.write("listen.allow_uids = [54001]\n");
    let daemon = settings.config(&file.0).start();
    let mut before = daemon.client();
    assert_eq!(answer(&daemon, STRANGER), refused(STRANGER));
    file.reload(
        &daemon,
        "listen.allow_uids = [54001, 54321]\nlimits.allow_keys = [\"j\"]\n",
    );
    // The log tells before the ingest thread has heard.
    wait_until("the new user is let in", || {
        answer(&daemon, STRANGER) == format!("-{NO_KEY}")
    });
    assert_eq!(
        before.command(&["INCR", "k"]).error(),
        NO_KEY,
        "an old connection"
    );
    file.reload(&daemon, "listen.allow_uids = [\"nobody-of-this-name\"]\n");
    wait_until("it is told that it cannot be", || {
        daemon
            .log()
            .contains("listen.allow_uids nobody-of-this-name")
    });
    assert_eq!(answer(&daemon, STRANGER), format!("-{NO_KEY}"), "as before");
    file.reload(&daemon, "");
    wait_until("everybody may use every key", || {
        answer(&daemon, (54_999, 54_999)).starts_with(':')
    });
}

fn likes_only() -> Settings {
    Daemon::builder("embedded")
        .flush_interval(NEVER)
        .set("limits.allow_keys", "likes:*,total,v?ews:[0-9]")
}

/// Seen to fail when the short way of increments did not ask.
#[test]
fn only_the_keys_that_are_listed_can_be_used() {
    let daemon = likes_only().start();
    let mut client = daemon.client();
    for key in ["likes:", "likes:42", "total", "views:7"] {
        assert_eq!(client.number(&["INCR", key]), 1, "{key}");
        assert_eq!(client.number(&["GET", key]), 1, "{key}");
    }
    for key in ["like", "totals", "views:77", "", "Likes:42"] {
        for command in [
            &["INCR", key][..],
            &["DECR", key],
            &["INCRBY", key, "7"],
            &["DECRBY", key, "7"],
            &["GET", key],
            &["MGET", "likes:42", key],
            &["EXISTS", "likes:42", key],
            &["TALLY.PENDING", key],
        ] {
            assert_eq!(client.command(command).error(), NO_KEY, "{command:?}");
        }
    }
    // In the middle of a pipeline, each in its place.
    let mut burst = Vec::new();
    for n in 0..300 {
        encode_into(&mut burst, &["INCR", ["likes:1", "views:x"][n % 2]]);
    }
    client.send_raw(&burst).unwrap();
    for n in 0..300 {
        let answer = client.read().unwrap();
        if n % 2 == 0 {
            assert_eq!(answer, Value::Integer(n / 2 + 1));
        } else {
            assert_eq!(answer.error(), NO_KEY);
        }
    }
    assert_eq!(stat(&daemon, "increments_total"), 4 + 150);
    assert_eq!(
        stat(&daemon, "view_keys"),
        5,
        "nothing is kept of the others"
    );
}

/// Seen to fail when every key was told.
#[test]
fn the_hottest_keys_are_told_as_far_as_they_are_listed() {
    let dir = TempDir::new().unwrap();
    let file = File(dir.path().join("tallyd.toml"));
    file.write("");
    let daemon = Daemon::builder("embedded")
        .flush_interval(NEVER)
        .config(&file.0)
        .start();
    let mut client = daemon.client();
    let mut hot = |words: &[&str]| -> Vec<(String, i64, i64)> {
        let told = client.command(&[&["TALLY.HOT"], words].concat());
        let told = told.items().iter().map(|key| {
            let [key, change, error] = key.items() else {
                panic!("{key:?}");
            };
            (key.text(), change.number(), error.number())
        });
        told.collect()
    };
    assert_eq!(hot(&[]), []);
    let amounts = (1..=20).map(|n| if n % 2 == 0 { -n } else { n });
    for (n, amount) in (1..=20).zip(amounts) {
        let key = format!("likes:{n}");
        daemon
            .client()
            .command(&["INCRBY", &key, &amount.to_string()]);
    }
    daemon.client().command(&["INCRBY", "secret", "100"]);
    daemon
        .client()
        .command(&["INCRBY", &"likes:long".repeat(40), "50"]);
    daemon.flush();
    let likes: Vec<_> = (1..=20)
        .rev()
        .map(|n| (format!("likes:{n}"), n, 0))
        .collect();
    let cut = "likes:long".repeat(40)[..256].to_owned();
    let all = [&[("secret".to_owned(), 100, 0), (cut, 50, 0)], &likes[..]].concat();
    assert_eq!(hot(&["100"]), all);
    assert_eq!(hot(&["3"]), all[..3]);
    assert_eq!(hot(&[]), all[..10]);
    for wrong in ["0", "101", "-1", "x", ""] {
        assert_eq!(
            daemon.client().command(&["TALLY.HOT", wrong]).error(),
            "ERR count must be an integer from 1 to 100"
        );
    }
    assert_eq!(
        daemon.client().command(&["TALLY.HOT", "1", "2"]).error(),
        "ERR wrong number of arguments for 'tally.hot' command"
    );
    file.reload(&daemon, "limits.allow_keys = [\"likes:*\"]\n");
    // The log tells before the ingest thread has heard.
    wait_until("only what is listed is told", || hot(&["100"]) == likes);
    assert_eq!(hot(&["1"]), likes[..1]);
}

#[test]
fn a_key_that_is_not_listed_spoils_a_transaction() {
    let daemon = likes_only().start();
    let mut client = daemon.client();
    assert_eq!(client.command(&["MULTI"]), Value::ok());
    assert_eq!(client.command(&["INCR", "likes:1"]).text(), "QUEUED");
    assert_eq!(client.command(&["INCR", "other"]).error(), NO_KEY);
    assert!(client.command(&["EXEC"]).error().starts_with("EXECABORT"));
    assert_eq!(client.number(&["EXISTS", "likes:1"]), 0);
}

#[test]
fn subscribers_hear_of_the_keys_that_are_listed_alone() {
    let daemon = likes_only().start();
    let mut client = daemon.client();
    for channel in ["tallyd:key:other", "tallyd:deltas"] {
        let answer = client.command(&["SUBSCRIBE", "tallyd:key:total", channel]);
        assert_eq!(answer.error(), NO_CHANNEL, "{channel}");
    }
    assert_eq!(
        client.command(&["PING"]).text(),
        "PONG",
        "subscribed to nothing"
    );

    let mut one = daemon.client();
    one.command(&["SUBSCRIBE", "tallyd:key:total"]);
    let mut all = daemon.client();
    all.command(&["PSUBSCRIBE", "*"]);
    client.command(&["INCR", "total"]);
    daemon.flush();
    let heard = |client: &mut Client| -> Vec<String> {
        let message = client.read().unwrap();
        message.items().iter().map(Value::text).collect()
    };
    assert_eq!(heard(&mut one), ["message", "tallyd:key:total", "1"]);
    assert_eq!(heard(&mut all), ["pmessage", "*", "tallyd:key:total", "1"]);
    client.command(&["INCRBY", "likes:1", "5"]);
    daemon.flush();
    // What was published of the first flush besides would stand before it.
    assert_eq!(
        heard(&mut all),
        ["pmessage", "*", "tallyd:key:likes:1", "5"]
    );
}

/// Other nodes have other keys: a subscriber with a pattern is told of none of them.
#[test]
fn subscribers_hear_nothing_of_other_nodes_keys_that_are_not_listed() {
    let redis = crate::support::redis::RedisServer::start(&[]);
    let here = Daemon::builder(redis.url())
        .set("limits.allow_keys", "likes:*")
        .start();
    let there = Daemon::builder(redis.url()).flush_interval(NEVER).start();
    wait_until("they hear each other", || stat(&here, "subscribed") == 1);
    let mut all = here.client();
    all.command(&["PSUBSCRIBE", "*"]);
    for (n, key) in ["other", "likes:1"].iter().enumerate() {
        there
            .client()
            .command(&["INCRBY", key, &format!("{}", n + 1)]);
        there.flush();
    }
    let message = all.read().unwrap();
    let heard: Vec<String> = message.items().iter().map(Value::text).collect();
    assert_eq!(heard, ["pmessage", "*", "tallyd:key:likes:1", "2"]);
}
