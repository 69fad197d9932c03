//! `tallyd journal rejected` and `replay`: the deltas that the store refused for good.
//!
//! The daemon holds its rejected file open and may append to it at any time, so neither command
//! writes to it: what was replayed is listed in a file of its own, and subtracted.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::ReplayArgs;
use super::check::{self, one_line, written};
use super::exit::ExitCode;
use super::journal::rfc3339;
use crate::config::{Config, Environment, Flags};
use crate::journal::rejected::{
    Outstanding, REJECTED_FILE, REPLAYED_FILE, Rejected, ReplayedFile, outstanding,
};
use crate::time::unix_ms;

/// An answer that takes longer does not come.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// A daemon that knows a key's value as no integer looks at it anew when it is asked, and answers
/// from what it knew: so what it refuses is sent again, so often in all.
const ROUNDS: u32 = 6;
/// Between two rounds.
const ROUND_PAUSE: Duration = Duration::from_millis(100);
/// An answer to `INCRBY` is one short line.
const ANSWER_BYTES_MAX: u64 = 4096;

/// Lists what was rejected and not replayed, a line each.
pub fn list(state_dir: &Path, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let outstanding = match read(state_dir) {
        Ok(outstanding) => outstanding,
        Err(error) => return fail(&error, err),
    };
    let mut print = || {
        for (key, line) in &outstanding.deltas {
            let time = rfc3339(line.at);
            let reason = one_line(&line.reason);
            let key = Key(key);
            writeln!(
                out,
                "{time}\t{}\t{}\t{key}\t{reason}",
                line.batch, line.delta
            )?;
        }
        out.flush()
    };
    let printed = print();
    tell_torn(&outstanding, err);
    written(printed, "the list", err)
}

/// Sends what was rejected to the running daemon again.
pub fn replay(args: &ReplayArgs, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let socket = match &args.socket {
        Some(socket) => socket.clone(),
        None => match configured_socket(args) {
            Ok(socket) => socket,
            Err(error) => return check::report(&error, err),
        },
    };
    match replay_to(&args.directory, &socket, err) {
        Ok(done) => {
            let printed = writeln!(out, "{done}").and_then(|()| out.flush());
            match written(printed, "the result", err) {
                ExitCode::Success if done.refused > 0 => ExitCode::Io,
                code => code,
            }
        }
        Err(error) => fail(&error, err),
    }
}

fn configured_socket(args: &ReplayArgs) -> Result<PathBuf, crate::config::ConfigError> {
    let flags = Flags {
        config: args.config.clone(),
        ..Flags::default()
    };
    Ok(Config::load(&flags, &Environment::of_process())?
        .config
        .listen
        .socket)
}

/// Why neither can go on.
#[derive(Debug, thiserror::Error)]
enum ReplayError {
    #[error("{}: not a state directory: there is no node.json", .0.display())]
    NoDirectory(PathBuf),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{}: another replay is at work", .0.display())]
    Busy(PathBuf),
    #[error("{}: {source}; the daemon must be running", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error(
        "no answer for {}: {}; it may have been counted, and the next replay sends it again: \
         compare its value first",
        .0, .0.source
    )]
    Unanswered(Named),
    #[error(
        "{named} was counted but cannot be noted in {}: {}; the next replay would count it again: \
         take it off first",
        path.display(), named.source
    )]
    Unnoted { path: PathBuf, named: Named },
}

/// The delta that an error is about.
#[derive(Debug)]
struct Named {
    key: String,
    delta: i64,
    batch: u64,
    source: io::Error,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, batch {})", self.key, self.delta, self.batch)
    }
}

/// What a replay did.
#[derive(Debug, PartialEq, Eq)]
struct Done {
    sent: usize,
    refused: usize,
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} replayed, {} refused", self.sent, self.refused)
    }
}

fn replay_to(state_dir: &Path, socket: &Path, err: &mut dyn Write) -> Result<Done, ReplayError> {
    let path = state_dir.join(REPLAYED_FILE);
    let file = |source| ReplayError::File {
        path: path.clone(),
        source,
    };
    let mut done = Done {
        sent: 0,
        refused: 0,
    };
    if read(state_dir)?.deltas.is_empty() {
        return Ok(done);
    }
    let mut replayed = ReplayedFile::open(state_dir)
        .map_err(file)?
        .ok_or_else(|| ReplayError::Busy(path.clone()))?;
    // Again, under the lock: another replay may just have ended.
    let outstanding = read(state_dir)?;
    tell_torn(&outstanding, err);
    let mut daemon = Daemon::connect(socket).map_err(|source| ReplayError::Connect {
        path: socket.to_owned(),
        source,
    })?;
    let mut left: Vec<&(Vec<u8>, Rejected)> = outstanding.deltas.iter().collect();
    for round in 1..=ROUNDS {
        let mut refused = Vec::new();
        for delta in left {
            let (key, line) = delta;
            let named = |source| Named {
                key: Key(key).to_string(),
                delta: line.delta,
                batch: line.batch,
                source,
            };
            let answer = daemon
                .increment(key, line.delta)
                .map_err(|source| ReplayError::Unanswered(named(source)))?;
            match answer {
                Ok(()) => {
                    // Durable before the next one is sent: at most this one can be sent twice.
                    replayed.append(line, unix_ms()).map_err(|source| {
                        let path = path.clone();
                        let named = named(source);
                        ReplayError::Unnoted { path, named }
                    })?;
                    done.sent += 1;
                }
                Err(words) if round == ROUNDS => {
                    done.refused += 1;
                    let (shown, words) = (Key(key), one_line(&words));
                    // Nowhere left to report to when this fails; the exit code says it.
                    let _ = writeln!(err, "tallyd: {shown} ({}): {words}", line.delta);
                }
                Err(_) => refused.push(delta),
            }
        }
        left = refused;
        if left.is_empty() {
            break;
        }
        std::thread::sleep(ROUND_PAUSE);
    }
    Ok(done)
}

fn read(state_dir: &Path) -> Result<Outstanding, ReplayError> {
    if !state_dir.join("node.json").exists() {
        return Err(ReplayError::NoDirectory(state_dir.to_owned()));
    }
    outstanding(state_dir).map_err(|source| ReplayError::File {
        path: state_dir.join(REJECTED_FILE),
        source,
    })
}

fn fail(error: &ReplayError, err: &mut dyn Write) -> ExitCode {
    // Nowhere left to report to when this fails; the exit code says it.
    let _ = writeln!(err, "tallyd: {}", one_line(&error.to_string()));
    ExitCode::Io
}

fn tell_torn(outstanding: &Outstanding, err: &mut dyn Write) {
    for line in &outstanding.torn {
        // As above.
        let _ = writeln!(
            err,
            "tallyd: a line is torn, and left out: {}",
            one_line(line)
        );
    }
}

/// A key on one line: as text where it is text, with what cannot be seen escaped.
struct Key<'a>(&'a [u8]);

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match std::str::from_utf8(self.0) {
            Ok(text) => text.escape_debug().fmt(f),
            Err(_) => self.0.escape_ascii().fmt(f),
        }
    }
}

/// A connection that sends one increment at a time.
struct Daemon {
    stream: BufReader<UnixStream>,
}

impl Daemon {
    fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Daemon {
            stream: BufReader::new(stream),
        })
    }

    /// The inner error is the daemon's, in its words: it did not take the increment.
    fn increment(&mut self, key: &[u8], delta: i64) -> io::Result<Result<(), String>> {
        let amount = delta.to_string();
        let mut request = format!("*3\r\n$6\r\nINCRBY\r\n${}\r\n", key.len()).into_bytes();
        request.extend_from_slice(key);
        request.extend_from_slice(format!("\r\n${}\r\n{amount}\r\n", amount.len()).as_bytes());
        self.stream.get_mut().write_all(&request)?;
        let mut answer = Vec::new();
        self.stream
            .by_ref()
            .take(ANSWER_BYTES_MAX)
            .read_until(b'\n', &mut answer)?;
        match answer.strip_suffix(b"\r\n") {
            Some([b':', ..]) => Ok(Ok(())),
            Some([b'-', words @ ..]) => Ok(Err(String::from_utf8_lossy(words).into_owned())),
            Some(_) => Err(io::Error::other("the answer is not in the Redis protocol")),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use super::*;
    use crate::journal::rejected::RejectedFile;

    const AT: u64 = 1_763_835_000_123;

    fn state(lines: &[(&[u8], i64, u64)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("node.json"), "").unwrap();
        reject(dir.path(), lines);
        dir
    }

    fn reject(dir: &Path, lines: &[(&[u8], i64, u64)]) {
        let lines: Vec<Rejected> = lines
            .iter()
            .map(|&(key, delta, batch)| {
                Rejected::new(key, delta, "WRONGTYPE not a number".to_owned(), batch, AT)
            })
            .collect();
        RejectedFile::open(dir).unwrap().append(&lines).unwrap();
    }

    /// Answers one connection, and returns what it was sent. An empty answer: it hangs up.
    fn daemon(socket: &Path, answers: &'static [&'static str]) -> JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(socket).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut stream = BufReader::new(stream);
            let mut seen = Vec::new();
            for answer in answers {
                let mut request = Vec::new();
                // No key in these tests holds a line break.
                for _ in 0..7 {
                    if stream.read_until(b'\n', &mut request).unwrap() == 0 {
                        return seen;
                    }
                }
                seen.push(String::from_utf8_lossy(&request).replace("\r\n", " "));
                if answer.is_empty() {
                    return seen;
                }
                stream.get_mut().write_all(answer.as_bytes()).unwrap();
            }
            seen
        })
    }

    fn replay_into(dir: &Path, socket: &Path) -> (u8, String, String) {
        let args = ReplayArgs {
            directory: dir.to_owned(),
            socket: Some(socket.to_owned()),
            config: None,
        };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = replay(&args, &mut out, &mut err).code();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (code, text(out), text(err))
    }

    fn listed(dir: &Path) -> (u8, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = list(dir, &mut out, &mut err).code();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (code, text(out), text(err))
    }

    #[test]
    fn each_rejected_delta_is_one_line_and_torn_ones_are_mentioned() {
        let dir = state(&[
            (b"likes:42", -7, 3),
            (b"likes:42", -7, 3),
            ("a\tb\nü".as_bytes(), 1, 3),
            (b"\xff\x00", i64::MIN, 4),
        ]);
        let path = dir.path().join(REJECTED_FILE);
        let mut text = fs::read(&path).unwrap();
        text.extend_from_slice(b"{\"key\":\"torn");
        fs::write(&path, text).unwrap();
        let (code, out, err) = listed(dir.path());
        assert_eq!(code, 0);
        assert_eq!(
            out,
            "2025-11-22T18:10:00.123Z\t3\t-7\tlikes:42\tWRONGTYPE not a number\n\
             2025-11-22T18:10:00.123Z\t3\t1\ta\\tb\\nü\tWRONGTYPE not a number\n\
             2025-11-22T18:10:00.123Z\t4\t-9223372036854775808\t\\xff\\x00\tWRONGTYPE not a number\n"
        );
        assert_eq!(
            err,
            "tallyd: a line is torn, and left out: {\"key\":\"torn\n"
        );
    }

    #[test]
    fn nothing_rejected_is_an_empty_list_and_no_state_directory_an_error() {
        let dir = state(&[]);
        assert_eq!(listed(dir.path()), (0, String::new(), String::new()));
        let (code, out, _) = replay_into(dir.path(), Path::new("/nonexistent"));
        assert_eq!((code, out.as_str()), (0, "0 replayed, 0 refused\n"));
        let none = tempfile::tempdir().unwrap();
        let (code, _, err) = listed(none.path());
        assert_eq!(code, 74);
        assert!(err.contains("not a state directory"), "{err}");
    }

    #[test]
    fn replay_sends_each_delta_once_and_a_second_one_sends_nothing() {
        let dir = state(&[(b"a", 5, 1), (b"\xff", -2, 1), (b"a", 5, 1), (b"a", 1, 2)]);
        let socket = dir.path().join("s");
        let seen = daemon(&socket, &[":5\r\n", ":-2\r\n", ":6\r\n"]);
        let answer = replay_into(dir.path(), &socket);
        assert_eq!(
            answer,
            (0, "3 replayed, 0 refused\n".to_owned(), String::new())
        );
        assert_eq!(
            seen.join().unwrap(),
            [
                "*3 $6 INCRBY $1 a $1 5 ",
                "*3 $6 INCRBY $1 \u{fffd} $2 -2 ",
                "*3 $6 INCRBY $1 a $1 1 ",
            ]
        );
        assert_eq!(listed(dir.path()), (0, String::new(), String::new()));
        assert_eq!(replay_into(dir.path(), &socket).0, 0);
        // Rejected once more, in a later batch: that is another delta.
        reject(dir.path(), &[(b"a", 5, 9)]);
        assert_eq!(listed(dir.path()).1.lines().count(), 1);
    }

    /// Protection: the note of each delta before the next one is sent. Without it a replay that is
    /// cut off sends all of them again.
    #[test]
    fn a_replay_that_is_cut_off_repeats_at_most_the_delta_without_an_answer() {
        let dir = state(&[(b"a", 1, 1), (b"b", 2, 1), (b"c", 3, 1)]);
        let socket = dir.path().join("s");
        let seen = daemon(&socket, &[":1\r\n", ""]);
        let (code, out, err) = replay_into(dir.path(), &socket);
        assert_eq!((code, out.as_str()), (74, ""));
        assert!(err.contains("no answer for b (2, batch 1)"), "{err}");
        assert!(err.contains("it may have been counted"), "{err}");
        assert_eq!(seen.join().unwrap().len(), 2);
        let left: Vec<_> = listed(dir.path())
            .1
            .lines()
            .map(|l| l.split('\t').nth(3).unwrap().to_owned())
            .collect();
        assert_eq!(left, ["b", "c"]);
    }

    #[test]
    fn what_the_daemon_refuses_stays_and_the_rest_goes_on() {
        const NO: &str = "-OOM limits.max_pending_bytes\r\n";
        let dir = state(&[(b"a", 1, 1), (b"b", 2, 1)]);
        let socket = dir.path().join("s");
        let seen = daemon(&socket, &[NO, ":2\r\n", NO, NO, NO, NO, NO]);
        let (code, out, err) = replay_into(dir.path(), &socket);
        assert_eq!((code, out.as_str()), (74, "1 replayed, 1 refused\n"));
        assert_eq!(err, "tallyd: a (1): OOM limits.max_pending_bytes\n");
        seen.join().unwrap();
        assert_eq!(listed(dir.path()).1.lines().count(), 1);
    }

    /// A daemon answers from what it knew of the key, and looks at it anew.
    #[test]
    fn what_was_refused_is_sent_again_before_it_counts_as_refused() {
        let dir = state(&[(b"a", 1, 1)]);
        let socket = dir.path().join("s");
        let seen = daemon(&socket, &["-WRONGTYPE as before\r\n", ":1\r\n"]);
        let answer = replay_into(dir.path(), &socket);
        assert_eq!(
            answer,
            (0, "1 replayed, 0 refused\n".to_owned(), String::new())
        );
        assert_eq!(seen.join().unwrap().len(), 2);
    }

    #[test]
    fn without_a_daemon_and_beside_another_replay_nothing_is_sent() {
        let dir = state(&[(b"a", 1, 1)]);
        let socket = dir.path().join("s");
        let (code, _, err) = replay_into(dir.path(), &socket);
        assert_eq!(code, 74);
        assert!(err.contains("the daemon must be running"), "{err}");
        let _held = ReplayedFile::open(dir.path()).unwrap().unwrap();
        let (code, _, err) = replay_into(dir.path(), &socket);
        assert_eq!(code, 74);
        assert!(err.contains("another replay is at work"), "{err}");
    }
}
