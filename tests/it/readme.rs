//! The README says only what is so: each command in it is run, here or by the checks that run this,
//! and its tables name what the code has.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use tallyd::admin::{Context, metrics};
use tallyd::config::{Config, Environment};
use tallyd::ingest::commands::COMMANDS;

use crate::clients::installed;
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value};
use crate::support::{LIMIT, finish, signal, wait_exit, wait_until};

/// Who runs a command of the README.
enum By {
    /// A test below.
    Here,
    /// This file, by a line that contains this.
    Script(&'static str, &'static str),
}

const START: &str = "target/release/tallyd run --store redis://127.0.0.1:6379 \
                     --socket /tmp/tallyd.sock --state-dir /tmp/tallyd";

const CONTAINER: &str = "podman run --detach --name tallyd --hostname web-7 --network host \
                         --read-only --cap-drop all --stop-timeout 30 \
                         --volume tallyd-state:/var/lib/tallyd --volume tallyd-socket:/run/tallyd \
                         --env TALLYD_STORE__URL=redis://127.0.0.1:6379 tallyd:0.1.0";

/// Every line of the README's `sh` blocks, in its order.
const COMMANDS_RUN: [(&str, By); 16] = [
    (
        "cargo run --release -- demo",
        By::Script("tests/run", "cargo run --locked --release --quiet -- demo"),
    ),
    ("tests/run", By::Script(".ci/run", "tests/run")),
    (
        "cargo build --release",
        By::Script("tests/run", "cargo run --locked --release"),
    ),
    (START, By::Here),
    ("redis-cli -s /tmp/tallyd.sock INCR likes:42", By::Here),
    ("redis-cli -s /tmp/tallyd.sock TALLY.FLUSH", By::Here),
    ("redis-cli -p 6379 GET likes:42", By::Here),
    ("tests/package", By::Script("tests/run", "tests/package")),
    (
        "sudo dpkg --install target/debian/tallyd_*.deb",
        By::Script("tests/machine/probe", "dpkg --install /out/1.deb"),
    ),
    (
        "sudo usermod --append --groups tallyd application",
        By::Script(
            "tests/machine/probe",
            "usermod --append --groups tallyd application",
        ),
    ),
    (
        "redis-cli -s /run/tallyd/tallyd.sock INCR likes:42",
        By::Script(
            "tests/machine/probe",
            "redis-cli -s \"$socket\" INCR likes:42",
        ),
    ),
    (
        "tests/container",
        By::Script("tests/run", "tests/container"),
    ),
    (
        "podman load --input target/container/tallyd.tar",
        By::Script(
            "tests/pod/probe",
            "podman load --input target/container/tallyd.tar",
        ),
    ),
    (CONTAINER, By::Script("tests/pod/probe", CONTAINER)),
    (
        "podman stop tallyd",
        By::Script("tests/pod/probe", "podman stop tallyd"),
    ),
    ("benches/compare", By::Here),
];

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The fenced blocks: language and text.
fn blocks(text: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(language) = line.trim_start().strip_prefix("```") else {
            continue;
        };
        let body: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        blocks.push((language.to_owned(), body.join("\n") + "\n"));
    }
    blocks
}

fn blocks_in(language: &str) -> Vec<String> {
    blocks(&read("README.md"))
        .into_iter()
        .filter_map(|(of, text)| (of == language).then_some(text))
        .collect()
}

/// The part below a heading, up to the next one.
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let from = text
        .find(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("no heading {heading:?}"));
    let body = &text[from + heading.len() + 2..];
    &body[..body.find("\n#").unwrap_or(body.len())]
}

/// What stands in backquotes in a table's first column.
fn first_column(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" |").next())
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect()
}

#[test]
fn each_command_of_the_readme_is_run_by_something() {
    for (language, text) in blocks(&read("README.md")) {
        let known = ["sh", "python", "text"].contains(&language.as_str());
        assert!(known, "a block of {language:?} is not looked at:\n{text}");
    }
    let lines = blocks_in("sh").concat();
    let expected: Vec<&str> = COMMANDS_RUN.iter().map(|(line, _)| *line).collect();
    assert_eq!(lines.lines().collect::<Vec<_>>(), expected);
    for (command, by) in COMMANDS_RUN {
        if let By::Script(file, fragment) = by {
            let runs = read(file)
                .lines()
                .any(|line| !line.trim_start().starts_with('#') && line.contains(fragment));
            assert!(runs, "{command}: {file} no longer runs {fragment:?}");
        }
    }
}

/// A child that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_example_and_the_first_steps_do_what_the_readme_says() {
    let redis = RedisServer::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    // What differs from one machine to the next, and nothing else.
    let here = |text: &str| {
        text.replace("redis://127.0.0.1:6379", &redis.url())
            .replace("-p 6379", &format!("-p {}", redis.address().port()))
            .replace("/tmp/tallyd.sock", &path("tallyd.sock"))
            .replace(
                "--state-dir /tmp/tallyd",
                &format!("--state-dir {}", path("state")),
            )
            .replace("target/release/tallyd", env!("CARGO_BIN_EXE_tallyd"))
    };
    let shell = |text: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &here(text)]);
        command
    };

    let mut daemon = Running(
        shell(&format!("exec {START}"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    wait_until("the daemon of the README answers", || {
        Client::unix(Path::new(&path("tallyd.sock")))
            .and_then(|mut client| client.try_command(&["PING"]))
            .is_ok_and(|answer| answer == Value::Status("PONG".into()))
    });

    let [example, two_nodes] = &blocks_in("python")[..] else {
        panic!("two examples in Python were expected");
    };
    // That one is run with the clients.
    assert!(read("tests/clients/two_nodes.py").contains(two_nodes));
    let mut python = Command::new(installed("venv").join("bin/python"));
    let (status, output) = finish(python.args(["-c", &here(example)]), b"");
    assert!(status.success(), "{output}");
    assert_eq!(output, "[2, 10]\nb'2'\n");
    for line in output.lines() {
        assert!(
            example.contains(&format!("# {line}")),
            "not as it says: {line}"
        );
    }

    let answers = COMMANDS_RUN
        .iter()
        .filter(|(line, by)| line.starts_with("redis-cli") && matches!(by, By::Here))
        .map(|(line, _)| {
            let (status, output) = finish(&mut shell(line), b"");
            assert!(status.success(), "{line}: {output}");
            output
        });
    assert_eq!(answers.collect::<Vec<_>>(), ["3\n", "OK\n", "3\n"]);
    assert_eq!(redis.counter("views:42"), 10);

    signal(&daemon.0, Signal::TERM);
    assert!(wait_exit(&mut daemon.0, LIMIT, "the daemon").success());
}

#[test]
fn the_comparison_runs_and_measures_what_the_readme_lists() {
    let bin = Path::new(env!("CARGO_BIN_EXE_tallyd")).parent().unwrap();
    let mut compare = Command::new("benches/compare");
    compare
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["--rounds", "1", "--ops", "20000", "--bin"])
        .arg(bin);
    let (status, output) = finish(&mut compare, b"");
    assert!(status.success(), "{output}");
    // Two rounds with the first, half as many again for the warm-up, a tenth with pipeline 1.
    assert!(
        output.contains("186000 increments through tallyd; the store has exactly as many."),
        "{output}"
    );

    let readme = read("README.md");
    let measured = section(&readme, "## Measured");
    let (script, rows) = (read("benches/compare"), |text: &str| {
        text.lines()
            .filter(|line| line.starts_with("| ") && !line.starts_with("| ---"))
            .map(|line| line.split('|').map(str::trim).map(str::to_owned).collect())
            .collect::<Vec<Vec<String>>>()
    });
    let (printed, listed) = (rows(&output), rows(measured));
    assert_eq!(printed.len(), 5, "{output}");
    assert_eq!(printed[0], listed[0], "the columns differ");
    for (printed, listed) in printed.iter().zip(&listed) {
        assert_eq!(printed[1], listed[1], "the loads differ");
    }
    for row in &listed[6..] {
        let flags = row[2].trim_matches('`');
        let line = format!("\"{}|", row[1]);
        let has =
            |text: &str| text.trim().starts_with(&line) && text.contains(&format!("|{flags}\""));
        assert!(script.lines().any(has), "{row:?} is not what is run");
    }
}

#[test]
fn starts_with_pending_keys_are_measured() {
    let bin = Path::new(env!("CARGO_BIN_EXE_tallyd")).parent().unwrap();
    let mut start = Command::new("benches/start");
    start
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["--starts", "2", "--keys", "500", "--bin"])
        .arg(bin);
    let (status, output) = finish(&mut start, b"");
    assert!(status.success(), "{output}");
    let pending: Vec<u32> = output
        .lines()
        .filter_map(|line| line.split_once(" keys pending: ")?.0.parse().ok())
        .collect();
    assert_eq!(pending.len(), 2, "{output}");
    assert!(
        pending.iter().all(|keys| (400..=500).contains(keys)),
        "{output}"
    );
    assert!(
        read("README.md").contains("(`benches/start`)"),
        "the README's figure has its command"
    );
}

#[test]
fn the_tables_name_what_the_code_has() {
    let readme = read("README.md");

    let commands = section(&readme, "## Commands").to_lowercase();
    for spec in COMMANDS {
        let named = commands
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '.'))
            .any(|word| word == spec.name);
        assert!(named, "the README does not name {}", spec.name);
    }

    let keys: BTreeMap<_, _> = Config::defaults(&Environment::default())
        .written()
        .into_iter()
        .collect();
    for line in section(&readme, "## Configuration").lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if cells.len() < 4 {
            continue;
        }
        let defaults = cells[2].replace("none", "\"\"").replace('`', "");
        for (key, default) in first_column(line).iter().zip(defaults.split(", ")) {
            let value = keys
                .get(*key)
                .unwrap_or_else(|| panic!("{key} is no key of the configuration"));
            // Where it depends on the user, it is told for root.
            assert!(
                value == default || default.ends_with(" as root"),
                "{key}: {value}"
            );
        }
    }

    let metrics = metrics::render(&Context::default());
    let numbers = first_column(section(&readme, "## Operation"));
    let watched = numbers
        .iter()
        .filter(|name| name.contains('_') && !name.contains('.'));
    assert!(watched.clone().count() > 10);
    for name in watched {
        let known = metrics.contains(&format!("\n# TYPE {name} "));
        assert!(known, "{name} is no metric");
    }
}

/// `src/lib.rs` is the first thing that the README sends a reader to.
#[test]
fn the_map_names_every_room() {
    let map = read("src/lib.rs");
    for line in map.lines() {
        if let Some(room) = line.strip_prefix("pub mod ") {
            let entry = format!("//! - [`{}`]: ", room.trim_end_matches(';'));
            assert!(map.contains(&entry), "the map in src/lib.rs misses {room}");
        }
    }
}
