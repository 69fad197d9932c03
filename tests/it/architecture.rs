//! The order of the rooms: each may use itself and those that the table names, none further down.
//! Within a room the files go one way, too.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A room, and what it may use besides itself.
struct Room {
    name: &'static str,
    uses: &'static [&'static str],
}

const fn room(name: &'static str, uses: &'static [&'static str]) -> Room {
    Room { name, uses }
}

/// The rooms whose files do not all use each other in one direction: the owner of the counters and
/// the connections know each other. What a room itself (`mod.rs`) says is not counted: a parent and
/// its children know each other.
const WITH_CIRCLES: &[&str] = &["ingest"];

/// The rooms, in the order in which an increment passes through them, then what assembles them.
///
/// A room stands below all that it uses, so there are no circles. Beyond that each names what it
/// needs, so that a new dependency is a decision: the hot path (`wire`, `counters`) is pure and can
/// be tested and measured alone; the journal and the stores do not know of each other's work; the
/// edges never read the configuration, only what was made of it for them.
const ROOMS: &[Room] = &[
    room("time", &[]),
    room("stats", &[]),
    room("health", &[]),
    // Fed by the flush stage, shown by the admin server and `TALLY.HOT`.
    room("hot", &[]),
    // When something is told; the words are those of the room where it happens.
    room("repeats", &[]),
    // Nothing at all but in builds for tests.
    room("fail_point", &[]),
    // Of the applications and of the admin server.
    room("socket", &[]),
    // What is kept on disk, from whom, and how much of it is read.
    room("small_file", &[]),
    room("private", &[]),
    room("wire", &[]),
    room("counters", &[]),
    // What a batch is, who writes it, and how a store answers: the words of all that come after.
    room("store", &["private", "repeats"]),
    // Records on behalf of the table; carries the ids that the store knows a node by.
    room(
        "journal",
        &[
            "time",
            "fail_point",
            "small_file",
            "private",
            "counters",
            "store",
        ],
    ),
    room(
        "flush",
        &[
            "time",
            "stats",
            "hot",
            "health",
            "repeats",
            "fail_point",
            "counters",
            "store",
            "journal",
        ],
    ),
    room(
        "sync",
        &["time", "stats", "repeats", "counters", "store", "flush"],
    ),
    room(
        "ingest",
        &[
            "time",
            "stats",
            "hot",
            "repeats",
            "fail_point",
            "socket",
            "wire",
            "counters",
            "store",
            "journal",
            "flush",
        ],
    ),
    room("admin", &["time", "stats", "health", "hot", "socket"]),
    // What the service manager hands over and is told.
    room("systemd", &["stats", "health"]),
    // Typed and checked; each room gets a struct of its own made of it, by `daemon`.
    room("config", &["small_file"]),
    room("log", &["config"]),
    // Alone sees all rooms.
    room(
        "daemon",
        &[
            "stats", "health", "hot", "counters", "store", "journal", "flush", "sync", "ingest",
            "socket", "private", "admin", "systemd", "config", "log",
        ],
    ),
    // `journal show` and its kin read segments, `demo` and `top` are clients.
    room(
        "cli",
        &[
            "time", "stats", "hot", "wire", "counters", "store", "journal", "ingest", "socket",
            "admin", "systemd", "config", "log", "daemon",
        ],
    ),
];

/// What a source text names behind `path` (`crate::`), or in a list behind it, with the line.
fn uses(source: &str, path: &str) -> Vec<(usize, String)> {
    let list = format!("{path}{{");
    let mut found = Vec::new();
    for (index, line) in source.lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for (at, _) in code.match_indices(path) {
            // `$crate::`, `mycrate::`, `super::super::`
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || "_$:".contains(c)) {
                continue;
            }
            let rest = &code[at + path.len()..];
            if rest.starts_with('{') {
                // The list may go on over the lines that follow.
                let from: String = source.lines().skip(index).collect::<Vec<_>>().join("\n");
                let from = from.split_once(&list).map_or("", |(_, list)| list);
                found.extend(listed(from).map(|name| (index + 1, name)));
            } else {
                found.push((index + 1, first_name(rest)));
            }
        }
    }
    found
}

/// The first names of the members of a list whose opening brace has been read.
fn listed(list: &str) -> impl Iterator<Item = String> {
    let mut depth = 0_i32;
    let mut members = vec![String::new()];
    for c in list.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => members.push(String::new()),
            _ => {}
        }
        if let Some(last) = members.last_mut()
            && c != ','
        {
            last.push(c);
        }
    }
    members
        .into_iter()
        .map(|member| first_name(member.trim()))
        .filter(|name| !name.is_empty())
}

fn first_name(path: &str) -> String {
    path.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

/// What of `source`, a file of room `room`, points the wrong way.
fn wrong_ways(room: &str, source: &str) -> Vec<String> {
    let Some(own) = ROOMS.iter().find(|known| known.name == room) else {
        return vec![format!("{room} is no room of the table")];
    };
    uses(source, "crate::")
        .into_iter()
        .filter(|(_, used)| used != room && !own.uses.contains(&used.as_str()))
        .map(|(line, used)| format!("line {line}: {room} must not use {used}"))
        .collect()
}

/// For each file directly in a room's folder, the others that it uses, its tests apart.
fn uses_within(room: &str, folder: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut uses_of = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("sources are there") {
        let path = entry.expect("listed").path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if let Some(name) = name.strip_suffix(".rs")
            && name != "mod"
        {
            let source = fs::read_to_string(&path).expect("text");
            let source = source.split("#[cfg(test)]").next().unwrap_or_default();
            let mut used = BTreeSet::new();
            for path in ["super::", &format!("crate::{room}::")] {
                used.extend(uses(source, path).into_iter().map(|(_, used)| used));
            }
            uses_of.insert(name.to_owned(), used);
        }
    }
    uses_of
}

/// The files of which each uses another one and is used by another one: those of the circles, and
/// those between two circles.
fn in_circles(mut uses_of: BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    loop {
        let known = uses_of.len();
        let names: BTreeSet<String> = uses_of.keys().cloned().collect();
        uses_of.retain(|_, used| !used.is_disjoint(&names));
        let used: BTreeSet<String> = uses_of.values().flatten().cloned().collect();
        uses_of.retain(|name, _| used.contains(name));
        if uses_of.len() == known {
            return uses_of.into_keys().collect();
        }
    }
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("sources are there") {
        let path = entry.expect("listed").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_room_uses_only_rooms_above_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let inner = file.strip_prefix(&src).expect("it was found there");
        let Some(first) = inner.iter().next().and_then(|first| first.to_str()) else {
            continue;
        };
        let room = first.trim_end_matches(".rs");
        // The map and the programs use the library from outside or not at all.
        if ["lib", "main", "bin"].contains(&room) {
            continue;
        }
        let source = fs::read_to_string(&file).expect("text");
        let found = wrong_ways(room, &source);
        wrong.extend(
            found
                .iter()
                .map(|what| format!("{}: {what}", inner.display())),
        );
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn files_of_a_room_use_each_other_in_one_direction() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for Room { name, .. } in ROOMS {
        let folder = src.join(name);
        if folder.is_dir() && !WITH_CIRCLES.contains(name) {
            assert_eq!(in_circles(uses_within(name, &folder)), [""; 0], "{name}");
        }
    }
}

#[test]
fn circles_between_files_are_found() {
    let files = [
        // A list over several lines, a path in the body, the room by its name.
        ("a", "use super::{\n    Context,\n    b::{self, B},\n};"),
        ("b", "fn f() { crate::room::c::g() }"),
        ("c", "// super::d\nuse super::a::A;"),
        ("d", "use super::{a, e};"),
        (
            "e",
            "use super::super::d;\n#[cfg(test)]\nmod tests { use super::d; }",
        ),
    ];
    let folder = tempfile::tempdir().expect("a directory");
    for (name, source) in files {
        fs::write(folder.path().join(name).with_extension("rs"), source).expect("written");
    }
    let uses_of = uses_within("room", folder.path());
    assert_eq!(in_circles(uses_of.clone()), ["a", "b", "c"]);
    let mut opened = uses_of;
    opened.remove("c");
    assert_eq!(in_circles(opened), [""; 0]);
}

#[test]
fn the_table_itself_goes_one_way() {
    for (index, room) in ROOMS.iter().enumerate() {
        for used in room.uses {
            assert!(
                ROOMS[..index].iter().any(|above| above.name == *used),
                "{} does not stand below {used}",
                room.name
            );
        }
    }
}

#[test]
fn every_room_of_the_library_is_in_the_table() {
    let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs");
    let lib = fs::read_to_string(lib).expect("text");
    let modules = lib.lines().filter_map(|line| {
        let line = line.trim().trim_start_matches("pub ");
        line.strip_prefix("mod ")?.strip_suffix(';')
    });
    for module in modules {
        assert!(ROOMS.iter().any(|room| room.name == module), "{module}");
    }
}

#[test]
fn what_points_the_wrong_way_is_found() {
    for (room, source) in [
        ("counters", "use crate::journal::Writer;"),
        ("wire", "fn f() -> crate::store::Token {"),
        (
            "ingest",
            "\nuse crate::{\n    wire::{decode, encode},\n    config::Config,\n};",
        ),
        ("store", "pub(crate) use crate::flush;"),
        ("journal", "    let x = (crate::stats::new(), 1);"),
        ("attic", ""),
    ] {
        assert_eq!(wrong_ways(room, source).len(), 1, "{room}: {source}");
    }
    for (room, source) in [
        (
            "journal",
            "use crate::counters::Recorder; // not crate::flush",
        ),
        ("wire", "use crate::wire::number; use self::super::x;"),
        ("wire", "$crate::store::f!(); mycrate::store::f();"),
        (
            "flush",
            "use crate::{stats, store::{Lane, Store}, journal};",
        ),
    ] {
        assert_eq!(wrong_ways(room, source), [""; 0], "{source}");
    }
}
