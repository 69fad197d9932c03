//! `tallyd demo` as a newcomer runs it.

use std::collections::HashMap;
use std::process::Command;

use crate::support::finish;

fn demo(arguments: &[&str]) -> (Option<i32>, String) {
    // The temporary directory is the demo's own, so that what it leaves is seen.
    let dir = tempfile::tempdir().unwrap();
    let (status, output) = finish(
        Command::new(env!("CARGO_BIN_EXE_tallyd"))
            .arg("demo")
            .args(arguments)
            .env("TMPDIR", dir.path()),
        b"",
    );
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.is_empty(), "the demo left {left:?}");
    (status.code(), output)
}

/// The numbers by the first words of their line.
fn numbers(output: &str) -> HashMap<&str, u64> {
    output
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.split_at_checked(14)?;
            let number = rest.split_whitespace().next()?.replace(',', "");
            Some((name.trim(), number.parse().ok()?))
        })
        .collect()
}

#[test]
fn the_demo_counts_for_a_second_and_finds_the_totals_equal() {
    let (code, output) = demo(&["--seconds", "1"]);
    assert_eq!(code, Some(0), "{output}");
    assert!(output.ends_with("\ntotals equal\n"), "{output}");
    // A log line would carry a level.
    assert!(
        !output.contains("INFO") && !output.contains("WARN"),
        "{output}"
    );
    assert!(
        output.contains("commands to the store\n"),
        "no progress: {output}"
    );
    let numbers = numbers(&output);
    let [increments, keys, commands, epochs, ratio, live] = [
        "increments",
        "distinct keys",
        "commands",
        "epochs",
        "ratio",
        "live read",
    ]
    .map(|name| {
        *numbers
            .get(name)
            .unwrap_or_else(|| panic!("no {name}: {output}"))
    });
    assert!((keys..=increments).contains(&commands), "{output}");
    assert!(commands <= keys * epochs, "{output}");
    assert!((1..=3_000).contains(&keys) && epochs >= 1, "{output}");
    assert_eq!(ratio, (increments as f64 / commands as f64).round() as u64);
    assert!((1..=increments).contains(&live), "{output}");
}

#[test]
fn the_demo_stops_after_the_increments_that_were_asked_for() {
    let (code, output) = demo(&["--ops", "5000", "--seconds", "60"]);
    assert_eq!(code, Some(0), "{output}");
    assert_eq!(numbers(&output)["increments"], 5_000, "{output}");
    assert!(output.ends_with("\ntotals equal\n"), "{output}");
}

#[test]
fn a_demo_that_finds_no_room_says_so_and_exits_with_74() {
    let (status, output) = finish(
        Command::new(env!("CARGO_BIN_EXE_tallyd"))
            .arg("demo")
            .env("TMPDIR", "/nonexistent"),
        b"",
    );
    assert_eq!(status.code(), Some(74), "{output}");
    assert!(
        output.starts_with("tallyd: demo: cannot make a temporary directory: "),
        "{output}"
    );
}
