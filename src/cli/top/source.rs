//! Asks the daemon for its numbers and its hottest keys: `INFO` and `TALLY.HOT` over the socket,
//! again after each interval. Connects anew whenever the connection broke or an answer does not come.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use crate::hot::readable;
use crate::time::unix_ms;

/// A daemon that has not answered for so long is taken for away.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// No answer to `INFO` is longer, in bytes.
const ANSWER_BYTES_MAX: u64 = 1 << 20;
/// What is asked. More keys than the tallest terminal has lines for are of no use.
const QUESTION: &[u8] = b"*1\r\n$4\r\nINFO\r\n*2\r\n$9\r\nTALLY.HOT\r\n$2\r\n50\r\n";
/// No answer has more elements.
const ELEMENTS_MAX: u64 = 1000;
/// Answers that may wait to be shown.
const QUEUE: usize = 16;

/// The daemon's numbers at one moment.
#[derive(Debug, Clone)]
pub struct Sample {
    /// When they came.
    pub at: Instant,
    /// The same by the clock that the daemon's times are by.
    pub unix_ms: u64,
    /// The hottest first; none if the daemon does not tell.
    pub hot: Vec<HotKey>,
    fields: BTreeMap<String, String>,
}

/// A key that changes much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotKey {
    /// For a reader: nothing in it moves the cursor.
    pub key: String,
    /// By how much it changed, at most.
    pub change: u64,
    /// And at least by so much less.
    pub error: u64,
}

impl Sample {
    /// From the text of `INFO`.
    pub fn parse(text: &str) -> Self {
        let fields = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        Self {
            at: Instant::now(),
            unix_ms: unix_ms(),
            hot: Vec::new(),
            fields,
        }
    }

    /// A number of the daemon, by its name in `TALLY.STATS`; 0 if it has none of this name, which
    /// an older daemon may not.
    pub fn number(&self, name: &str) -> u64 {
        self.text(&format!("tallyd_{name}")).parse().unwrap_or(0)
    }

    /// Any field of `INFO`, empty if there is none of this name.
    pub fn text(&self, name: &str) -> &str {
        self.fields.get(name).map_or("", String::as_str)
    }
}

/// What came of asking.
#[derive(Debug, Clone)]
pub enum Answer {
    /// The numbers.
    Numbers(Box<Sample>),
    /// The daemon did not answer: why.
    Away(String),
}

/// A connection to the daemon, or none yet.
pub struct Source {
    socket: PathBuf,
    stream: Option<BufReader<UnixStream>>,
}

impl Source {
    /// Connects when it is first asked.
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            stream: None,
        }
    }

    /// The numbers now.
    pub fn ask(&mut self) -> Answer {
        match self.try_ask() {
            Ok((text, hot)) => {
                let mut sample = Sample::parse(&text);
                sample.hot = hot;
                Answer::Numbers(Box::new(sample))
            }
            Err(error) => {
                self.stream = None;
                Answer::Away(format!("{}: {error}", self.socket.display()))
            }
        }
    }

    fn try_ask(&mut self) -> io::Result<(String, Vec<HotKey>)> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => connect(&self.socket)?,
        };
        // A daemon that refuses the connection says why, and may have closed it already.
        let sent = stream.get_mut().write_all(QUESTION);
        let answer = String::from_utf8_lossy(&read_bulk(&mut stream)?).into_owned();
        let hot = read_hot(&mut stream)?;
        sent?;
        self.stream = Some(stream);
        Ok((answer, hot))
    }
}

fn connect(socket: &Path) -> io::Result<BufReader<UnixStream>> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(BufReader::new(stream))
}

/// The rest of a line of this kind, or the daemon's words why there is none.
fn read_line(stream: &mut impl BufRead, kind: char) -> io::Result<String> {
    let mut line = String::new();
    stream.take(ANSWER_BYTES_MAX).read_line(&mut line)?;
    let line = line.trim_end();
    if line.is_empty() {
        return Err(io::Error::other("the connection was closed"));
    }
    if let Some(words) = line.strip_prefix('-') {
        return Err(io::Error::other(words.to_owned()));
    }
    match line.strip_prefix(kind) {
        Some(rest) => Ok(rest.to_owned()),
        None => Err(not_redis()),
    }
}

fn not_redis() -> io::Error {
    io::Error::other("the answer is not in the Redis protocol")
}

fn read_number(stream: &mut impl BufRead, kind: char, max: u64) -> io::Result<u64> {
    let number = read_line(stream, kind)?.parse().ok();
    number.filter(|number| *number <= max).ok_or_else(not_redis)
}

fn read_bulk(stream: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let bytes = read_number(stream, '$', ANSWER_BYTES_MAX)? as usize;
    let mut text = vec![0; bytes + 2];
    stream.read_exact(&mut text)?;
    text.truncate(bytes);
    Ok(text)
}

/// What `TALLY.HOT` answers; nothing from a daemon that does not know it.
fn read_hot(stream: &mut impl BufRead) -> io::Result<Vec<HotKey>> {
    if stream.fill_buf()?.first() == Some(&b'-') {
        stream.take(ANSWER_BYTES_MAX).skip_until(b'\n')?;
        return Ok(Vec::new());
    }
    let count = read_number(stream, '*', ELEMENTS_MAX)?;
    let read = |_| {
        if read_number(stream, '*', ELEMENTS_MAX)? != 3 {
            return Err(not_redis());
        }
        Ok(HotKey {
            key: readable(&read_bulk(stream)?),
            change: read_number(stream, ':', u64::MAX)?,
            error: read_number(stream, ':', u64::MAX)?,
        })
    };
    (0..count).map(read).collect()
}

/// Asks for ever, in a thread that ends when nobody listens any more.
pub fn start(socket: PathBuf, interval: Duration) -> io::Result<Receiver<Answer>> {
    let (answers, received) = sync_channel(QUEUE);
    std::thread::Builder::new()
        .name("tallyd-top".to_owned())
        .spawn(move || ask_for_ever(Source::new(socket), interval, &answers))?;
    Ok(received)
}

fn ask_for_ever(mut source: Source, interval: Duration, answers: &SyncSender<Answer>) {
    let mut due = Instant::now();
    loop {
        // A terminal that is stopped misses some, and goes on with what is new.
        if let Err(TrySendError::Disconnected(_)) = answers.try_send(source.ask()) {
            return;
        }
        let now = Instant::now();
        due = (due + interval).max(now);
        std::thread::sleep(due - now);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_bulk_string_is_read_whole_and_what_is_none_is_an_error() {
        let read = |bytes: &[u8]| read_bulk(&mut &bytes[..]).map_err(|error| error.to_string());
        assert_eq!(read(b"$4\r\na\r\nb\r\n").unwrap(), b"a\r\nb");
        assert_eq!(read(b"-NOPERM no\r\n").unwrap_err(), "NOPERM no");
        assert!(read(b"").unwrap_err().contains("closed"));
        for bytes in [&b"+OK\r\n"[..], b"$-1\r\n", b"$9999999999\r\n", b"$x\r\n"] {
            assert!(read(bytes).unwrap_err().contains("protocol"), "{bytes:?}");
        }
        assert!(read(b"$10\r\nabc").is_err());
    }

    #[test]
    fn hot_keys_are_read_for_a_reader_and_an_older_daemon_has_none() {
        let read = |bytes: &[u8]| read_hot(&mut &bytes[..]).map_err(|error| error.to_string());
        let two = b"*2\r\n*3\r\n$3\r\na\x1b\n\r\n:12\r\n:1\r\n*3\r\n$1\r\nb\r\n:3\r\n:0\r\n";
        let key = |key: &str, change, error| HotKey {
            key: key.to_owned(),
            change,
            error,
        };
        assert_eq!(
            read(two).unwrap(),
            [key("a\\u{1b}\\n", 12, 1), key("b", 3, 0)]
        );
        assert_eq!(read(b"*0\r\n").unwrap(), []);
        assert_eq!(read(b"-ERR unknown command\r\n").unwrap(), []);
        for bytes in [
            &b"*1\r\n*2\r\n"[..],
            b"*9999\r\n",
            b":1\r\n",
            b"*1\r\n*3\r\n$1\r\na\r\n:-1\r\n:0\r\n",
        ] {
            assert!(read(bytes).unwrap_err().contains("protocol"), "{bytes:?}");
        }
        assert!(read(b"").is_err());
    }

    #[test]
    fn a_daemon_that_comes_back_is_asked_again() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let mut source = Source::new(socket.clone());
        let away = |answer: Answer| match answer {
            Answer::Away(reason) => reason,
            Answer::Numbers(_) => panic!("it is away"),
        };
        let reason = away(source.ask());
        assert!(reason.contains(socket.to_str().unwrap()), "{reason}");
        for round in 0..2 {
            let _ = std::fs::remove_file(&socket);
            let listener = UnixListener::bind(&socket).unwrap();
            let daemon = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; QUESTION.len()];
                stream.read_exact(&mut request).unwrap();
                assert_eq!(request, QUESTION);
                stream
                    .write_all(b"$19\r\ntallyd_peers:3\r\nx:y\r\n*0\r\n")
                    .unwrap();
            });
            match source.ask() {
                Answer::Numbers(sample) => {
                    assert_eq!(sample.number("peers"), 3, "{round}");
                    assert_eq!(sample.number("none of this name"), 0);
                    assert_eq!(sample.text("x"), "y");
                }
                Answer::Away(reason) => panic!("{round}: {reason}"),
            }
            daemon.join().unwrap();
            away(source.ask());
        }
    }
}
