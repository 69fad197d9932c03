//! `tallyd journal show` and `verify`: a state directory as it lies on the disk.
//!
//! Both work beside a running daemon: they take no lock, write nothing, and read again what the
//! daemon was writing to just then.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::check::{one_line, written};
use super::exit::ExitCode;
use crate::journal::JournalError;
use crate::journal::directory::{NodeFacts, damaged_files, read_node, segment_files};
use crate::journal::examine::{ExamineError, Examined, Expected, examine_live};
use crate::journal::format::RECORDS_AT;
use crate::journal::plan::{Circumstances, Fate, Found, Plan, plan};
use crate::journal::power::Boot;
use crate::journal::rejected;
use crate::time::unix_ms;

/// Batch size to go by where a header that tells it is lost.
const BATCH_KEYS: u32 = 1000;
/// A running daemon may open and remove segments while they are read one after another: so often
/// all is read anew before the whole is called damaged.
const SURVEYS_MAX: u32 = 3;

/// Lists the segments, and what a recovery would do with each.
pub fn show(state_dir: &Path, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let survey = match Survey::of(state_dir) {
        Ok(survey) => survey,
        Err(error) => return report(&error, err),
    };
    let printed = survey.show(out).and_then(|()| out.flush());
    written(printed, "the list", err)
}

/// Checks every record; names each damage.
pub fn verify(state_dir: &Path, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let survey = match Survey::of(state_dir) {
        Ok(survey) => survey,
        Err(error) => return report(&error, err),
    };
    let printed = survey.verify(out).and_then(|()| out.flush());
    match written(printed, "the findings", err) {
        ExitCode::Success if !survey.is_sound() => ExitCode::Io,
        code => code,
    }
}

/// Tells why a directory cannot be looked into.
pub(super) fn report(error: &JournalError, err: &mut dyn Write) -> ExitCode {
    // Nowhere left to report to when this fails; the exit code says it.
    let _ = writeln!(err, "tallyd: {}", one_line(&error.to_string()));
    match error {
        JournalError::Node { .. } => ExitCode::Configuration,
        _ => ExitCode::Io,
    }
}

/// Everything there is to see.
struct Survey {
    node: Option<NodeFacts>,
    files: Vec<(Found, PathBuf)>,
    plan: Plan,
    set_aside: Vec<PathBuf>,
    outstanding: rejected::Outstanding,
}

impl Survey {
    fn of(state_dir: &Path) -> Result<Self, JournalError> {
        let mut survey = Self::once(state_dir)?;
        for _ in 1..SURVEYS_MAX {
            if survey.is_sound() {
                break;
            }
            survey = Self::once(state_dir)?;
        }
        Ok(survey)
    }

    fn once(state_dir: &Path) -> Result<Self, JournalError> {
        let node = read_node(state_dir)?;
        let listed = segment_files(state_dir)?;
        if node.is_none() && !listed.is_empty() {
            return Err(JournalError::Node {
                path: state_dir.join("node.json"),
                reason: "it is missing, and there are segments".to_owned(),
            });
        }
        let id = node
            .as_ref()
            .map_or(crate::store::NodeId(0), |facts| facts.node);
        let mut found = Vec::new();
        let mut paths = Vec::new();
        for (number, path) in listed {
            let expected = Expected {
                node: id,
                number,
                batch_keys: BATCH_KEYS,
            };
            let examined = examine_live(&path, expected);
            if let Err(ExamineError::Io(error)) = &examined
                && error.kind() == io::ErrorKind::NotFound
            {
                continue; // The daemon has just removed it.
            }
            found.push(Found { number, examined });
            paths.push(path);
        }
        let circumstances = Circumstances {
            node: id,
            claimed: node.as_ref().is_some_and(|facts| facts.claimed),
            power_cut: node
                .as_ref()
                .is_some_and(|facts| Boot::now().follows(&facts.last)),
            unix_ms: unix_ms(),
        };
        let plan = plan(&found, circumstances);
        let outstanding = rejected::outstanding(state_dir).map_err(|source| JournalError::Io {
            path: state_dir.join(rejected::REJECTED_FILE),
            action: "read",
            source,
        })?;
        Ok(Survey {
            node,
            files: found.into_iter().zip(paths).collect(),
            plan,
            set_aside: damaged_files(state_dir)?,
            outstanding,
        })
    }

    /// What is wrong with each file.
    fn damage(&self) -> impl Iterator<Item = (&Path, String)> {
        self.files
            .iter()
            .zip(&self.plan.fates)
            .filter_map(|((found, path), fate)| {
                let words = match (fate, &found.examined) {
                    (Fate::SetAside(reason), _) => reason.clone(),
                    (Fate::Refuse, examined) => refusal(examined),
                    (_, Ok(examined)) if !examined.damage.is_empty() => examined.damage.join("; "),
                    _ => return None,
                };
                Some((path.as_path(), words))
            })
    }

    fn is_sound(&self) -> bool {
        !self.plan.numbers_lost && self.damage().next().is_none()
    }

    fn totals(&self) -> (u64, i128) {
        let examined = || {
            self.files
                .iter()
                .filter_map(|(found, _)| found.examined.as_ref().ok())
        };
        let records = examined().map(|examined| u64::from(examined.records)).sum();
        (records, examined().map(|examined| examined.sum).sum())
    }

    fn show(&self, out: &mut dyn Write) -> io::Result<()> {
        if let Some(node) = &self.node {
            let last = node.runs.last().map(ToString::to_string);
            writeln!(out, "node      {}", node.node)?;
            writeln!(
                out,
                "runs      {}, the last one {}",
                node.runs.len(),
                last.as_deref().unwrap_or("not known")
            )?;
        } else {
            writeln!(out, "node      none yet: no daemon has run here")?;
        }
        writeln!(
            out,
            "in store  batches up to {} at least",
            self.plan.applied
        )?;
        writeln!(out, "next      batch {}", self.plan.next_batch)?;
        if self.plan.numbers_lost {
            writeln!(
                out,
                "          nothing tells the number of the last batch: far above any"
            )?;
        }
        writeln!(out, "rejected  {}", self.outstanding.deltas.len())?;
        writeln!(out, "damaged/  {}", self.set_aside.len())?;
        let heads = [
            "SEGMENT", "STATE", "BATCHES", "RECORDS", "SUM", "BYTES", "CREATED", "RECOVERY",
        ];
        let mut rows = vec![heads.map(str::to_owned)];
        for ((found, _), fate) in self.files.iter().zip(&self.plan.fates) {
            rows.push(self.row(found, fate));
        }
        let mut widths = [0; 8];
        for row in &rows {
            for (width, text) in widths.iter_mut().zip(row) {
                *width = text.len().max(*width);
            }
        }
        writeln!(out)?;
        for row in &rows {
            let cells: Vec<String> = row
                .iter()
                .zip(widths)
                .enumerate()
                .map(|(index, (text, width))| match index {
                    3..=5 => format!("{text:>width$}"), // Amounts.
                    _ => format!("{text:width$}"),
                })
                .collect();
            let line = cells.join("  ");
            writeln!(out, "{}", one_line(line.trim_end()))?;
        }
        Ok(())
    }

    fn row(&self, found: &Found, fate: &Fate) -> [String; 8] {
        let none = || "-".to_owned();
        let number = found.number.to_string();
        let Ok(examined) = &found.examined else {
            let state = match &found.examined {
                Err(ExamineError::Blank) => "standby",
                _ => "unreadable",
            };
            return [
                number,
                state.to_owned(),
                none(),
                none(),
                none(),
                none(),
                none(),
                self.recovery(fate, &found.examined),
            ];
        };
        let first = match fate {
            Fate::Use { first_batch } => Some(*first_batch),
            _ => examined.first_batch,
        };
        let batches = match first {
            Some(first) if !examined.batch_starts.is_empty() => {
                format!("{first}..{}", examined.last_batch(first))
            }
            _ => none(),
        };
        [
            number,
            state(examined, first).to_owned(),
            batches,
            examined.records.to_string(),
            examined.sum.to_string(),
            (examined.end - RECORDS_AT).to_string(),
            rfc3339(examined.header.created_ms),
            self.recovery(fate, &found.examined),
        ]
    }

    /// What a recovery would do with a file.
    fn recovery(&self, fate: &Fate, examined: &Result<Examined, ExamineError>) -> String {
        match (fate, examined) {
            (Fate::Use { first_batch }, Ok(examined)) => {
                let last = examined.last_batch(*first_batch);
                let next = self.plan.applied.max(first_batch - 1) + 1;
                let send = if next > last {
                    "none to send, in the store".to_owned()
                } else {
                    format!("sends {next}..{last}, unless the token says they are in")
                };
                if examined.damage.is_empty() {
                    send
                } else {
                    let words = examined.damage.join("; ");
                    format!("{send}; keeps a copy in damaged/: {words}")
                }
            }
            (Fate::SetAside(reason), _) => format!("moved to damaged/: {reason}"),
            (Fate::Refuse, examined) => format!("refuses to start: {}", refusal(examined)),
            (Fate::Remove | Fate::Use { .. }, _) => "removed, it holds nothing".to_owned(),
        }
    }

    fn verify(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut damaged = 0;
        for (path, words) in self.damage() {
            damaged += 1;
            let line = format!("damaged: {}: {words}", path.display());
            writeln!(out, "{}", one_line(&line))?;
        }
        if self.plan.numbers_lost {
            writeln!(out, "damaged: nothing tells the number of the last batch")?;
        }
        for path in &self.set_aside {
            let line = format!("note: {} was set aside by a recovery", path.display());
            writeln!(out, "{}", one_line(&line))?;
        }
        for line in &self.outstanding.torn {
            writeln!(out, "note: a rejected line is torn: {}", one_line(line))?;
        }
        let (records, sum) = self.totals();
        let segments = self.files.len();
        writeln!(
            out,
            "{segments} segments, {records} sound records, sum {sum}; {damaged} segments damaged"
        )
    }
}

fn state(examined: &Examined, first: Option<u64>) -> &'static str {
    match first {
        None if examined.records == 0 => "standby",
        Some(first)
            if examined.sealed
                && examined
                    .applied
                    .is_some_and(|applied| applied >= examined.last_batch(first)) =>
        {
            "applied"
        }
        _ if examined.sealed => "sealed",
        _ => "open",
    }
}

fn refusal(examined: &Result<Examined, ExamineError>) -> String {
    match examined {
        Ok(examined) => format!("it belongs to node {}", examined.header.node),
        Err(error) => error.to_string(),
    }
}

/// A Unix time in milliseconds as `2025-11-22T18:10:00.123Z`.
///
/// Days to a civil date as in Howard Hinnant, "chrono-compatible low-level date algorithms".
pub(super) fn rfc3339(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let shifted = days + 719_468; // Days since 0000-03-01: leap days come last in a year.
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = (shifted_month + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (ms / 3_600_000, ms / 60_000 % 60);
    let (second, ms) = (ms / 1_000 % 60, ms % 1_000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::counters::Recorder;
    use crate::journal::{Directory, Sealed, Writer};

    const SEGMENT: &str = "segments/0000000000000002.seg";

    fn seal(directory: &mut Directory, writer: &mut Writer) -> Sealed {
        let mut next = directory.create_segment(1 << 20).unwrap();
        next.begin(writer.next_first_batch());
        std::mem::replace(writer, next).seal().unwrap()
    }

    /// Of a running daemon: segment 1 applied, 2 sealed, 3 open, 4 standby.
    fn running(dir: &Path) -> (Directory, Writer) {
        let (mut directory, _, mut writer) = Directory::open(dir, 2, 1 << 20).unwrap();
        directory.note_server("a server").unwrap();
        for key in ["a", "b", "c"] {
            writer.append(key.as_bytes(), 5).unwrap();
        }
        seal(&mut directory, &mut writer).set_applied(2).unwrap();
        writer.append(b"a", -7).unwrap();
        seal(&mut directory, &mut writer);
        writer.append(b"likes:42", 100).unwrap();
        directory.create_segment(1 << 20).unwrap();
        (directory, writer)
    }

    type Command = fn(&Path, &mut dyn Write, &mut dyn Write) -> ExitCode;

    fn run(command: Command, dir: &Path) -> (u8, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = command(dir, &mut out, &mut err).code();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (code, text(out), text(err))
    }

    fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut all = Vec::new();
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                all.extend(contents(&path));
            } else {
                all.push((path.clone(), fs::read(&path).unwrap()));
            }
        }
        all.sort();
        all
    }

    fn words(text: &str) -> Vec<String> {
        text.lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }

    #[test]
    fn show_lists_every_segment_beside_a_daemon_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (directory, _writer) = running(dir.path());
        let before = contents(dir.path());
        let (code, out, err) = run(show, dir.path());
        assert_eq!((code, err.as_str()), (0, ""));
        let lines = words(&out);
        assert_eq!(lines[0], format!("node {}", directory.identity().node));
        assert_eq!(
            lines[1],
            format!("runs 1, the last one {}", directory.identity().run)
        );
        assert_eq!(lines[2], "in store batches up to 2 at least");
        assert_eq!(lines[3], "next batch 5");
        assert_eq!(lines[4..6], ["rejected 0", "damaged/ 0"]);
        let rows: Vec<(String, String)> = lines[8..]
            .iter()
            .map(|line| {
                let mut parts: Vec<&str> = line.split(' ').collect();
                let created = parts.remove(6);
                assert!(
                    created.starts_with("20") && created.ends_with('Z'),
                    "{line}"
                );
                (parts[..6].join(" "), parts[6..].join(" "))
            })
            .collect();
        let sends = |batches| format!("sends {batches}, unless the token says they are in");
        assert_eq!(
            rows,
            [
                (
                    "1 applied 1..2 3 15 96".to_owned(),
                    "none to send, in the store".to_owned()
                ),
                ("2 sealed 3..3 1 -7 32".to_owned(), sends("3..3")),
                ("3 open 4..4 1 100 32".to_owned(), sends("4..4")),
                (
                    "4 standby - 0 0 0".to_owned(),
                    "removed, it holds nothing".to_owned()
                ),
            ]
        );
        assert_eq!(contents(dir.path()), before);
    }

    #[test]
    fn verify_of_a_sound_directory_exits_with_0() {
        let dir = tempfile::tempdir().unwrap();
        let _running = running(dir.path());
        let before = contents(dir.path());
        let (code, out, err) = run(verify, dir.path());
        assert_eq!((code, err.as_str()), (0, ""));
        assert_eq!(
            out,
            "4 segments, 5 sound records, sum 108; 0 segments damaged\n"
        );
        assert_eq!(contents(dir.path()), before);
    }

    /// Protection: the check sums, and the exit code that scripts look at.
    #[test]
    fn damage_is_named_with_its_file_and_exits_with_74() {
        let dir = tempfile::tempdir().unwrap();
        drop(running(dir.path()));
        let path = dir.path().join(SEGMENT);
        let mut bytes = fs::read(&path).unwrap();
        bytes[RECORDS_AT] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let before = contents(dir.path());
        let (code, out, err) = run(verify, dir.path());
        assert_eq!((code, err.as_str()), (74, ""));
        let named = format!(
            "damaged: {}: no sound record in bytes 4096 to 4128; 1 records were sealed, 0 of them \
             are sound",
            path.display()
        );
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(
            lines,
            [
                &named,
                "4 segments, 4 sound records, sum 115; 1 segments damaged"
            ]
        );
        // To look is no error.
        let (code, out, _) = run(show, dir.path());
        assert_eq!(code, 0);
        assert!(
            out.contains("keeps a copy in damaged/: no sound record"),
            "{out}"
        );
        assert_eq!(contents(dir.path()), before);
    }

    #[test]
    fn what_an_earlier_recovery_set_aside_is_a_note() {
        let dir = tempfile::tempdir().unwrap();
        drop(running(dir.path()));
        let mut bytes = fs::read(dir.path().join(SEGMENT)).unwrap();
        bytes[50] ^= 1; // The header's check: it is mended.
        fs::write(dir.path().join(SEGMENT), &bytes).unwrap();
        assert_eq!(run(verify, dir.path()).0, 74);
        drop(Directory::open(dir.path(), 2, 1 << 20).unwrap());
        let (code, out, _) = run(verify, dir.path());
        assert_eq!(code, 0, "{out}");
        let kept = dir.path().join("damaged/0000000000000002.partly.seg");
        let note = format!("note: {} was set aside by a recovery\n", kept.display());
        assert!(out.contains(&note), "{out}");
    }

    #[test]
    fn a_renamed_segment_and_another_nodes_are_named() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        drop(running(dir.path()));
        drop(running(other.path()));
        let segment = |dir: &Path, number: u64| dir.join(format!("segments/{number:016}.seg"));
        fs::copy(segment(dir.path(), 2), segment(dir.path(), 8)).unwrap();
        fs::copy(segment(other.path(), 2), segment(dir.path(), 9)).unwrap();
        let (code, out, _) = run(verify, dir.path());
        assert_eq!(code, 74);
        assert!(
            out.contains("0000000000000008.seg: it is segment 2, renamed"),
            "{out}"
        );
        assert!(
            out.contains("0000000000000009.seg: it belongs to node "),
            "{out}"
        );
        let (_, out, _) = run(show, dir.path());
        assert!(
            out.contains("moved to damaged/: it is segment 2, renamed"),
            "{out}"
        );
        assert!(
            out.contains("refuses to start: it belongs to node "),
            "{out}"
        );
    }

    #[test]
    fn no_state_directory_is_74_and_a_broken_node_file_78() {
        let dir = tempfile::tempdir().unwrap();
        for command in [show as Command, verify] {
            let (code, out, err) = run(command, dir.path());
            assert_eq!((code, out.as_str()), (74, ""));
            assert!(err.contains("cannot list"), "{err}");
        }
        drop(running(dir.path()));
        fs::write(dir.path().join("node.json"), "{").unwrap();
        for command in [show as Command, verify] {
            let (code, out, err) = run(command, dir.path());
            assert_eq!((code, out.as_str()), (78, ""));
            assert!(err.contains("node.json: not a node file"), "{err}");
        }
    }

    #[test]
    fn dates_are_civil_ones() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (1_763_835_000_123, "2025-11-22T18:10:00.123Z"),
            (4_102_444_800_000, "2100-01-01T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
        }
    }
}
