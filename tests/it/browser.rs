//! The live page in a real Chromium, as somebody sees it who operates the daemon: numbers that move
//! under load and equal `/metrics` after it, and plain words when the store or the daemon is away.
//!
//! `tests/browser/page.mjs` drives the browser (playwright-core, pinned in `tests/clients`); this
//! drives everything else. Skipped only where `TALLYD_NO_BROWSER` is set.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value as Json, json};

use crate::clients::{installed, node};
use crate::support::daemon::Daemon;
use crate::support::load::Load;
use crate::support::redis::RedisServer;
use crate::support::wait_exit;

/// A step waits for several things, each with a limit of its own.
const STEP_LIMIT: Duration = Duration::from_secs(120);
/// Looks like markup; a page that took it for that would run it.
const HOSTILE: &str = "<img src=x onerror=window.hacked=1>";

/// The script, and through it the browser.
struct Browser {
    script: Child,
    steps: Option<ChildStdin>,
    answers: Receiver<String>,
}

impl Browser {
    fn open(url: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let screenshots = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .parent()
            .unwrap()
            .join("screenshots");
        assert!(
            Path::new("/usr/bin/chromium").exists(),
            "chromium is missing. Run tests/run once, which installs it, or set TALLYD_NO_BROWSER to do without this test."
        );
        let mut script = node()
            .arg(root.join("tests/browser/page.mjs"))
            .arg(installed("node"))
            .arg(url)
            .arg(screenshots)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = script.stdout.take().unwrap();
        let (answer, answers) = sync_channel(1);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if answer.send(line).is_err() {
                    return;
                }
            }
        });
        Self {
            steps: script.stdin.take(),
            script,
            answers,
        }
    }

    #[track_caller]
    fn step(&mut self, name: &str, argument: &Json) {
        let steps = self.steps.as_mut().unwrap();
        writeln!(steps, "{}", json!([name, argument])).unwrap();
        let answer = self.answers.recv_timeout(STEP_LIMIT);
        assert_eq!(answer.as_deref(), Ok("ok"), "step {name}");
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It closes the browser and ends with its input.
        drop(self.steps.take());
        if !thread::panicking() {
            let status = wait_exit(&mut self.script, STEP_LIMIT, "the browser's script");
            assert!(status.success(), "the browser's script: {status}");
        } else {
            let _ = self.script.wait();
        }
    }
}

/// What the page shows must be what a scrape says.
const SHOWN: [&str; 6] = [
    "increments_total",
    "flushed_keys_total",
    "batches_total",
    "rejected_total",
    "view_keys",
    "retries_total",
];

fn stats(daemon: &Daemon) -> Json {
    let fields = daemon.client().command(&["TALLY.STATS"]).fields();
    SHOWN
        .iter()
        .map(|name| ((*name).to_owned(), json!(fields[*name].number())))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

#[test]
fn the_page_shows_what_is_so() {
    if std::env::var_os("TALLYD_NO_BROWSER").is_some() {
        println!("skipped: TALLYD_NO_BROWSER is set");
        return;
    }
    let mut redis = RedisServer::start(&[]);
    let address = format!("127.0.0.1:{}", crate::store_support::free_port());
    let mut daemon = Daemon::builder(redis.url())
        .set("admin.listen", &address)
        .set("node.name", "web-7")
        .start();
    let name = json!({ "name": "web-7" });
    let mut browser = Browser::open(&format!("http://{address}/"));
    browser.step("open", &name);

    let keys = (0..30).map(|n| format!("likes:{n}"));
    let load = Load::on_keys(daemon.socket(), keys.chain([HOSTILE.into()]), 20);
    browser.step("moving", &json!({}));
    browser.step("key", &json!({ "key": HOSTILE }));
    browser.step("keyboard", &json!({}));
    browser.step("still", &json!({}));
    browser.step("pictures", &json!({}));
    load.stop();
    daemon.flush();
    let numbers = stats(&daemon);
    browser.step("equal", &json!({ "numbers": numbers, "pending": 0 }));

    redis.kill9();
    daemon.client().command(&["INCR", "likes:0"]);
    browser.step("store_away", &json!({ "error": "refused" }));
    redis.restart();
    browser.step("well", &name);

    browser.step("expect_away", &json!({}));
    daemon.kill9();
    browser.step("away", &json!({}));
    daemon.restart();
    daemon.client().command(&["INCR", "likes:0"]);
    browser.step("well", &name);
    browser.step(
        "equal",
        &json!({ "numbers": { "increments_total": 1 }, "pending": 0 }),
    );

    // Stopped in its tracks, it breaks no connection.
    daemon.signal(Signal::STOP);
    browser.step("away", &json!({}));
    daemon.signal(Signal::CONT);
    browser.step("well", &name);

    redis.cli(&["SET", "text", "no number"]);
    daemon.client().command(&["INCR", "text"]);
    browser.step("rejected", &json!({ "count": 1 }));

    browser.step("expect_away", &json!({}));
    assert_eq!(daemon.term().code(), Some(0));
    browser.step("away", &json!({}));
}
