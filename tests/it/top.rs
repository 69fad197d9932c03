//! `tallyd top` as its user sees it: in a real terminal, and as lines where there is none.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use rustix::process::Signal;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::{LIMIT, finish, signal, wait_exit};

const TALLYD: &str = env!("CARGO_BIN_EXE_tallyd");

/// `tallyd top` in a terminal of its own.
struct Terminal {
    driver: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Terminal {
    fn start(socket: &Path) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/terminal.py");
        let mut driver = Command::new("python3")
            .arg(script)
            .args([TALLYD, "top", "--interval", "100ms", "--socket"])
            .arg(socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Terminal {
            orders: driver.stdin.take(),
            answers: BufReader::new(driver.stdout.take().unwrap()),
            driver,
        }
    }

    fn order(&mut self, order: &str) -> String {
        writeln!(self.orders.as_mut().unwrap(), "{order}").unwrap();
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    #[track_caller]
    fn shows(&mut self, text: &str) {
        let answer = self.order(&format!("wait {text}"));
        assert_eq!(answer, "ok", "{text}");
    }

    /// Waits for its end: it was orderly, and the terminal is as it was.
    #[track_caller]
    fn assert_ends(&mut self, why: &str) {
        assert_eq!(self.order("end"), "0 restored", "{why}");
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Its input ends: it goes, and its terminal with it.
        self.orders = None;
        wait_exit(&mut self.driver, LIMIT, "the terminal");
    }
}

/// Seen to fail when the terminal was not given back.
#[test]
fn it_shows_the_daemon_and_every_way_out_gives_the_terminal_back() {
    let daemon = Daemon::builder("embedded").flush_interval("50ms").start();
    daemon.client().command(&["INCRBY", "k", "5"]);
    daemon.flush();
    let mut client = daemon.client();
    for (why, order) in [
        ("q", "send 71".to_owned()),
        ("Esc", "send 1b".to_owned()),
        ("Ctrl-C", "send 03".to_owned()),
        ("TERM", format!("signal {}", Signal::TERM.as_raw())),
        ("HUP", format!("signal {}", Signal::HUP.as_raw())),
    ] {
        let mut top = Terminal::start(daemon.socket());
        top.shows("increments in: ");
        top.shows("q quit   p pause");
        client.command(&["INCR", "k"]);
        top.shows("up");
        assert_eq!(top.order(&order), "ok");
        top.assert_ends(why);
    }
}

#[test]
fn it_says_that_the_daemon_is_away_and_that_it_is_back() {
    let mut daemon = Daemon::builder("embedded").start();
    let mut top = Terminal::start(daemon.socket());
    top.shows("increments in: ");
    daemon.kill9();
    top.shows("AWAY for ");
    daemon.restart();
    top.shows("tallyd 0.");
    // A size that shows hardly anything, and back.
    assert_eq!(top.order("size 3 8"), "ok");
    top.shows("q quit");
    assert_eq!(top.order("size 50 200"), "ok");
    top.shows("errors answered");
    assert_eq!(top.order("send 70"), "ok");
    top.shows("PAUSED");
    assert_eq!(top.order("send 71"), "ok");
    top.assert_ends("q");
}

#[test]
fn without_a_terminal_it_prints_a_line_for_each_interval() {
    let daemon = Daemon::builder("embedded").flush_interval(NEVER).start();
    let mut top = Command::new(TALLYD)
        .args(["top", "--interval", "100ms", "--socket"])
        .arg(daemon.socket())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(top.stdout.take().unwrap()).lines();
    let first = lines.next().unwrap().unwrap();
    assert!(
        first.starts_with("in 0/s, out 0/s, nothing sent yet;"),
        "{first}"
    );
    daemon.client().command(&["INCR", "k"]);
    let seen = lines
        .by_ref()
        .take(600)
        .map(Result::unwrap)
        .find(|line| line.contains("pending: 1 keys"));
    assert!(!seen.unwrap().contains('\u{1b}'));
    signal(&top, Signal::TERM);
    assert!(wait_exit(&mut top, LIMIT, "top").success());
}

#[test]
fn once_prints_one_block_and_ends() {
    let mut daemon = Daemon::builder("embedded").start();
    daemon.client().command(&["INCR", "k"]);
    daemon.flush();
    let once = |socket: &Path| {
        let mut top = Command::new(TALLYD);
        top.args(["top", "--once", "--interval", "100ms", "--socket"]);
        finish(top.arg(socket), b"")
    };
    let (status, output) = once(daemon.socket());
    assert!(status.success(), "{output}");
    for line in [
        "store                 up",
        "ratio                 1.0 increments a command",
        "pending               0 keys",
        "hottest keys          k (1)",
    ] {
        assert!(output.lines().any(|l| l == line), "{line:?}: {output}");
    }
    let socket = daemon.socket().to_owned();
    daemon.term();
    let (status, output) = once(&socket);
    assert_eq!(status.code(), Some(74), "{output}");
    assert!(output.contains(socket.to_str().unwrap()), "{output}");
}
