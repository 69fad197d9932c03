//! Opens byte streams to the server: TCP, TLS over TCP, or a Unix socket.
//!
//! It knows addresses and nothing of Redis' protocol or credentials, so whatever it reports can be
//! shown.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ::redis::ConnectionAddr;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::tls::Tls;
use crate::store::StoreError;

/// Both directions of a connection.
pub(super) trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for S {}

/// A connection of any kind: one indirect call per system call, which costs nothing beside it.
pub(super) type Stream = Box<dyn ByteStream>;

/// Opens streams to one address.
#[derive(Debug)]
pub(super) struct Connector {
    target: ConnectionAddr,
    address: Arc<str>,
    limit: Duration,
    tls: Arc<Tls>,
}

impl Connector {
    /// `tls` is used only where the address asks for it.
    pub(super) fn new(target: ConnectionAddr, limit: Duration, tls: Arc<Tls>) -> Self {
        Self {
            address: target.to_string().into(),
            target,
            limit,
            tls,
        }
    }

    /// The address for people: host and port, or the socket's path.
    pub(super) fn address(&self) -> &Arc<str> {
        &self.address
    }

    /// Opens a stream that nothing else uses.
    ///
    /// # Errors
    /// `Io` or `Timeout`.
    pub(super) async fn connect(&self) -> Result<Stream, StoreError> {
        match timeout(self.limit, self.open()).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(source)) => Err(StoreError::Io {
                address: self.address.to_string(),
                source,
            }),
            Err(_) => Err(StoreError::Timeout {
                address: self.address.to_string(),
                seconds: self.limit.as_secs(),
            }),
        }
    }

    async fn open(&self) -> io::Result<Stream> {
        match &self.target {
            ConnectionAddr::Tcp(host, port) => Ok(Box::new(tcp(host, *port).await?)),
            ConnectionAddr::TcpTls { host, port, .. } => {
                let plain = tcp(host, *port).await?;
                Ok(Box::new(self.tls.wrap(host, plain).await?))
            }
            ConnectionAddr::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
            other => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("{other} is of a kind that is not supported"),
            )),
        }
    }
}

async fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    // A batch ends in a short segment that must not wait for an acknowledgement.
    stream.set_nodelay(true)?;
    Ok(stream)
}
