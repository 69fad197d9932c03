//! A small client of the Redis protocol that hides nothing: raw bytes go out, whole replies come
//! back, and every wait has a limit.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// No reply takes longer than this, unless something is broken.
pub const REPLY_LIMIT: Duration = Duration::from_secs(60);

/// A reply, RESP2 or RESP3.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    Status(String),
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Nil,
    Array(Vec<Value>),
    Map(Vec<(Value, Value)>),
    Set(Vec<Value>),
    Push(Vec<Value>),
    Boolean(bool),
    Double(String),
    Verbatim(Vec<u8>),
    BigNumber(String),
}

impl Value {
    /// The bulk string `text`.
    pub fn bulk(text: &str) -> Self {
        Self::Bulk(text.as_bytes().to_vec())
    }

    /// `OK`.
    pub fn ok() -> Self {
        Self::Status("OK".into())
    }

    /// The number in an integer reply or a bulk string.
    #[track_caller]
    pub fn number(&self) -> i64 {
        match self {
            Self::Integer(n) => Some(*n),
            Self::Bulk(text) => std::str::from_utf8(text).ok().and_then(|t| t.parse().ok()),
            _ => None,
        }
        .unwrap_or_else(|| panic!("a number was expected, not {self:?}"))
    }

    /// The text of a bulk string, a status or a verbatim string.
    #[track_caller]
    pub fn text(&self) -> String {
        match self {
            Self::Bulk(bytes) | Self::Verbatim(bytes) => {
                String::from_utf8_lossy(bytes).into_owned()
            }
            Self::Status(text) => text.clone(),
            _ => panic!("a string was expected, not {self:?}"),
        }
    }

    /// The message of an error.
    #[track_caller]
    pub fn error(&self) -> &str {
        match self {
            Self::Error(text) => text,
            _ => panic!("an error was expected, not {self:?}"),
        }
    }

    /// The members of an array, a set or a push.
    #[track_caller]
    pub fn items(&self) -> &[Value] {
        match self {
            Self::Array(items) | Self::Set(items) | Self::Push(items) => items,
            _ => panic!("an array was expected, not {self:?}"),
        }
    }

    /// A map, or an array of pairs, by its keys.
    #[track_caller]
    pub fn fields(&self) -> BTreeMap<String, Value> {
        match self {
            Self::Map(pairs) => pairs.iter().map(|(k, v)| (k.text(), v.clone())).collect(),
            Self::Array(flat) => flat
                .chunks(2)
                .map(|pair| (pair[0].text(), pair[1].clone()))
                .collect(),
            _ => panic!("a map was expected, not {self:?}"),
        }
    }
}

/// A command as an array of bulk strings.
pub fn encode<A: AsRef<[u8]>>(args: &[A]) -> Vec<u8> {
    let mut out = Vec::new();
    encode_into(&mut out, args);
    out
}

/// The same, appended.
pub fn encode_into<A: AsRef<[u8]>>(out: &mut Vec<u8>, args: &[A]) {
    out.extend_from_slice(format!("*{}\r\n", args.len()).as_bytes());
    for arg in args {
        let arg = arg.as_ref();
        out.extend_from_slice(format!("${}\r\n", arg.len()).as_bytes());
        out.extend_from_slice(arg);
        out.extend_from_slice(b"\r\n");
    }
}

/// One end of a connection.
#[derive(Debug)]
pub enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    /// A second handle on the same connection, to write from another thread.
    pub fn duplicate(&self) -> Self {
        match self {
            Self::Unix(s) => Self::Unix(s.try_clone().expect("a descriptor")),
            Self::Tcp(s) => Self::Tcp(s.try_clone().expect("a descriptor")),
        }
    }

    /// Sends an end of file, and still reads.
    pub fn finish_writing(&self) {
        // The peer may have closed already: then there is nothing to shut down.
        let _ = match self {
            Self::Unix(s) => s.shutdown(std::net::Shutdown::Write),
            Self::Tcp(s) => s.shutdown(std::net::Shutdown::Write),
        };
    }

    fn set_limits(&self, limit: Duration) {
        match self {
            Self::Unix(s) => s
                .set_read_timeout(Some(limit))
                .and_then(|()| s.set_write_timeout(Some(limit))),
            Self::Tcp(s) => s
                .set_read_timeout(Some(limit))
                .and_then(|()| s.set_write_timeout(Some(limit))),
        }
        .expect("a limit that is not zero");
    }
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Unix(s) => s.read(buf),
                Self::Tcp(s) => s.read(buf),
            };
            match read {
                // A process that was stopped for a moment comes back with this.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(s) => s.write(buf),
            Self::Tcp(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection. Bytes that were read and belong to the next reply wait in `buffer`.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    buffer: Vec<u8>,
    start: usize,
}

impl Client {
    /// Connects to a Unix socket.
    pub fn unix(path: &Path) -> io::Result<Self> {
        Ok(Self::over(Stream::Unix(UnixStream::connect(path)?)))
    }

    /// Connects over TCP.
    pub fn tcp(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, REPLY_LIMIT)?;
        stream.set_nodelay(true)?;
        Ok(Self::over(Stream::Tcp(stream)))
    }

    fn over(stream: Stream) -> Self {
        stream.set_limits(REPLY_LIMIT);
        Self {
            stream,
            buffer: Vec::new(),
            start: 0,
        }
    }

    /// How long a read waits before it is an error.
    pub fn set_limit(&self, limit: Duration) {
        self.stream.set_limits(limit);
    }

    /// The connection itself.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends one command.
    pub fn send<A: AsRef<[u8]>>(&mut self, args: &[A]) -> io::Result<()> {
        self.send_raw(&encode(args))
    }

    /// Sends one command and reads its reply.
    pub fn try_command<A: AsRef<[u8]>>(&mut self, args: &[A]) -> io::Result<Value> {
        self.send(args)?;
        self.read()
    }

    /// The same, where a broken connection fails the test.
    #[track_caller]
    pub fn command<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Value {
        match self.try_command(args) {
            Ok(value) => value,
            Err(error) => {
                let words: Vec<_> = args
                    .iter()
                    .map(|a| String::from_utf8_lossy(a.as_ref()))
                    .collect();
                panic!("{}: {error}", words.join(" "))
            }
        }
    }

    /// One command whose reply is a number.
    #[track_caller]
    pub fn number<A: AsRef<[u8]>>(&mut self, args: &[A]) -> i64 {
        self.command(args).number()
    }

    /// Reads one whole reply.
    pub fn read(&mut self) -> io::Result<Value> {
        let line = self.line()?;
        let (kind, rest) = line.split_first().ok_or_else(|| broken("an empty line"))?;
        let text = String::from_utf8_lossy(rest).into_owned();
        let number = || -> io::Result<i64> {
            text.parse()
                .map_err(|_| broken(&format!("a length {text:?}")))
        };
        Ok(match kind {
            b'+' => Value::Status(text),
            b'-' => Value::Error(text),
            b':' => Value::Integer(number()?),
            b'_' => Value::Nil,
            b'#' => Value::Boolean(text == "t"),
            b',' => Value::Double(text),
            b'(' => Value::BigNumber(text),
            b'$' => match usize::try_from(number()?) {
                Ok(len) => Value::Bulk(self.exact(len)?),
                Err(_) => Value::Nil,
            },
            b'!' => {
                Value::Error(String::from_utf8_lossy(&self.exact(number()? as usize)?).into_owned())
            }
            b'=' => Value::Verbatim(self.exact(number()? as usize)?.split_off(4)),
            b'*' => match usize::try_from(number()?) {
                Ok(len) => Value::Array(self.several(len)?),
                Err(_) => Value::Nil,
            },
            b'~' => Value::Set(self.several(number()? as usize)?),
            b'>' => Value::Push(self.several(number()? as usize)?),
            b'%' => {
                let mut flat = self.several(2 * number()? as usize)?.into_iter();
                let mut pairs = Vec::new();
                while let (Some(key), Some(value)) = (flat.next(), flat.next()) {
                    pairs.push((key, value));
                }
                Value::Map(pairs)
            }
            other => return Err(broken(&format!("a reply of type {:?}", char::from(*other)))),
        })
    }

    /// Reads on until the bytes end with `end` (true) or the peer has closed (false), and gives
    /// all that was read.
    pub fn read_raw_until(&mut self, end: &[u8]) -> io::Result<(Vec<u8>, bool)> {
        while !self.buffer[self.start..].ends_with(end) {
            if self.fill()? == 0 {
                return Ok((self.buffer.split_off(self.start), false));
            }
        }
        Ok((self.buffer.split_off(self.start), true))
    }

    /// Everything up to the end of the connection. Sends nothing more.
    pub fn read_to_end(&mut self) -> io::Result<Vec<u8>> {
        while self.fill()? > 0 {}
        Ok(self.buffer.split_off(self.start))
    }

    fn several(&mut self, len: usize) -> io::Result<Vec<Value>> {
        (0..len).map(|_| self.read()).collect()
    }

    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut searched = self.start;
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|b| *b == b'\n') {
                let end = searched + at;
                let line = self.buffer[self.start..end].to_vec();
                self.start = end + 1;
                return line
                    .strip_suffix(b"\r")
                    .map(<[u8]>::to_vec)
                    .ok_or_else(|| broken("a line without CR"));
            }
            let unread = self.buffer.len() - self.start;
            self.need_more()?;
            searched = self.start + unread;
        }
    }

    fn exact(&mut self, len: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() - self.start < len + 2 {
            self.need_more()?;
        }
        let end = self.start + len;
        if &self.buffer[end..end + 2] != b"\r\n" {
            return Err(broken("a string without CRLF"));
        }
        let bytes = self.buffer[self.start..end].to_vec();
        self.start = end + 2;
        Ok(bytes)
    }

    fn need_more(&mut self) -> io::Result<()> {
        match self.fill()? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// Reads once; 0 at the end of the connection.
    fn fill(&mut self) -> io::Result<usize> {
        self.buffer.drain(..self.start);
        self.start = 0;
        let before = self.buffer.len();
        self.buffer.resize(before + 64 * 1024, 0);
        let got = match self.stream.read(&mut self.buffer[before..]) {
            // How a Unix socket says that the peer closed with bytes of ours unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(0),
            other => other,
        };
        self.buffer.truncate(before + *got.as_ref().unwrap_or(&0));
        got
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("not the protocol: {what}"),
    )
}
