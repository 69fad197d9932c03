//! A small HTTP client that hides nothing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::resp::REPLY_LIMIT;

/// Where a server listens.
#[derive(Debug, Clone)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// A connection of either kind.
pub trait Stream: Read + Write + Send {}
impl Stream for TcpStream {}
impl Stream for UnixStream {}

impl Address {
    /// A new connection.
    #[track_caller]
    pub fn connect(&self) -> Box<dyn Stream> {
        let limit = Some(REPLY_LIMIT);
        match self {
            Self::Tcp(address) => {
                let stream = TcpStream::connect(address).expect("the server accepts");
                stream.set_read_timeout(limit).expect("not zero");
                stream.set_write_timeout(limit).expect("not zero");
                Box::new(stream)
            }
            Self::Unix(path) => {
                let stream = UnixStream::connect(path).expect("the server accepts");
                stream.set_read_timeout(limit).expect("not zero");
                stream.set_write_timeout(limit).expect("not zero");
                Box::new(stream)
            }
        }
    }

    /// One request on a connection of its own; `head` is its first line and further headers.
    #[track_caller]
    pub fn ask(&self, head: &str) -> Response {
        let mut stream = self.connect();
        let request = format!("{}\r\nConnection: close\r\n\r\n", head.trim_end());
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).expect("an answer");
        Response::of(&bytes)
    }

    /// `GET`, as a client of good manners does it.
    #[track_caller]
    pub fn get(&self, path: &str) -> Response {
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: localhost"))
    }
}

/// An answer.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    head: String,
    pub body: String,
}

impl Response {
    /// From all the bytes that came.
    #[track_caller]
    pub fn of(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("no answer: {text:?}"));
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        Response {
            status: status.unwrap_or_else(|| panic!("no status: {head:?}")),
            head: head.to_owned(),
            body: body.to_owned(),
        }
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(": ")?;
            found.eq_ignore_ascii_case(name).then_some(value)
        })
    }
}
