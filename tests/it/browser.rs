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
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value as Json, json};

use crate::clients::{installed, node};
use crate::support::daemon::Daemon;
use crate::support::http::Address;
use crate::support::load::Load;
use crate::support::redis::RedisServer;
use crate::support::{LIMIT, wait_exit, wait_until};

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
        if thread::panicking() {
            // No second panic, which would end all tests.
            let begin = Instant::now();
            while matches!(self.script.try_wait(), Ok(None)) && begin.elapsed() < LIMIT {
                thread::sleep(Duration::from_millis(20));
            }
            let _ = self.script.kill();
            let _ = self.script.wait();
        } else {
            let status = wait_exit(&mut self.script, LIMIT, "the browser's script");
            assert!(status.success(), "the browser's script: {status}");
        }
    }
}

/// What of a scrape the page shows: where, the metric, and a label if only that value is shown.
const SHOWN: [(&str, &str, &str); 10] = [
    ("increments_total", "tallyd_increments_total", ""),
    ("flushed_keys_total", "tallyd_flushed_keys_total", ""),
    ("batches_total", "tallyd_batches_total", "\"applied\""),
    ("retries_total", "tallyd_retries_total", ""),
    ("rejected_total", "tallyd_rejected_total", ""),
    ("view_keys", "tallyd_view_keys", ""),
    ("loads_total", "tallyd_loads_total", ""),
    ("messages_total", "tallyd_messages_total", ""),
    ("damaged_files", "tallyd_damaged_files", ""),
    ("pending-keys", "tallyd_pending_keys", ""),
];

/// The values of [`SHOWN`], summed up over the labels.
fn scrape(admin: &Address) -> Json {
    let text = admin.get("/metrics").body;
    let value = |metric: &str, label: &str| -> f64 {
        let is_it = |line: &&str| {
            let rest = line.strip_prefix(metric);
            rest.is_some_and(|rest| rest.starts_with(['{', ' ']) && rest.contains(label))
        };
        let lines: Vec<&str> = text.lines().filter(is_it).collect();
        assert!(!lines.is_empty(), "no {metric} in\n{text}");
        let values = lines.iter().map(|line| line.rsplit(' ').next().unwrap());
        values.map(|value| value.parse::<f64>().unwrap()).sum()
    };
    SHOWN
        .iter()
        .map(|&(shown, metric, label)| (shown.to_owned(), json!(value(metric, label) as i64)))
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
    let admin = Address::Tcp(address.parse().unwrap());
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
    let acknowledged: i64 = load.stop().iter().map(|done| done.acknowledged).sum();
    daemon.flush();
    wait_until("gauges say that all is in the store", || {
        scrape(&admin)["pending-keys"] == 0
    });
    let numbers = scrape(&admin);
    assert!(numbers["increments_total"].as_i64() >= Some(acknowledged));
    browser.step("equal", &numbers);

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
        &json!({ "increments_total": 1, "pending-keys": 0 }),
    );

    // Stopped in its tracks, it breaks no connection.
    daemon.signal(Signal::STOP);
    browser.step("away", &json!({}));
    daemon.signal(Signal::CONT);
    browser.step("well", &name);

    // The daemon knows it as a number; the store does not.
    daemon.client().command(&["INCR", "text"]);
    daemon.flush();
    redis.cli(&["SET", "text", "no number"]);
    daemon.client().command(&["INCR", "text"]);
    browser.step("rejected", &json!({ "count": 1 }));

    browser.step("expect_away", &json!({}));
    assert_eq!(daemon.term().code(), Some(0));
    browser.step("away", &json!({}));
}
