//! The listener, its thread, and the bounds of each connection.

use std::convert::Infallible;
use std::io;
use std::net::TcpListener as StdTcp;
use std::os::unix::net::UnixListener as StdUnix;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::oneshot;
use tokio::task::LocalSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::DropGuard;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::feed::{self, Feed};
use super::guard::Hosts;
use super::places::{Place, Places};
use super::routes::{self, Asks};
use super::stream::{Stream, TakenWithin};
use super::{Address, Context};
use crate::socket::{self, ListenError};

/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Lines of it.
const HEADERS_MAX: usize = 64;
/// A request's head must be there in so long; as long may a connection be idle.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// The same where only health may be asked: a probe asks at once, and others want its place.
const HEALTH_HEAD_WITHIN: Duration = Duration::from_secs(2);
/// A client must take its answer in so long.
const TAKEN_WITHIN: Duration = Duration::from_secs(10);
/// When the server ends, answers that are under way get so long.
const END_WITHIN: Duration = Duration::from_secs(1);
/// Pause after the system refused to give a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// To one connection too many; the rest of it is not worth a parser.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\n\
Content-Length: 21\r\nConnection: close\r\n\r\ntoo many connections\n";

/// Why there is no admin server.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The address cannot be had.
    #[error("admin.listen {address}: {source}")]
    Tcp {
        /// As configured.
        address: std::net::SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The Unix socket.
    #[error(transparent)]
    Unix(#[from] ListenError),
    /// A thread or a runtime could not be had.
    #[error("cannot start the admin server: {0}")]
    Thread(#[source] io::Error),
}

/// A listener that nobody serves yet: connections wait.
pub struct Bound {
    listener: Listener<StdTcp, StdUnix>,
    socket: Option<SocketFile>,
}

enum Listener<T, U> {
    Tcp(T),
    Unix(U),
}

/// A socket's file, removed with its value. It may have been replaced by a successor's: the path is
/// all that can be compared.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Bound {
    /// Binds the address.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn bind(address: &Address) -> Result<Self, AdminError> {
        match address {
            Address::Tcp(address) => {
                let failed = |source| AdminError::Tcp {
                    address: *address,
                    source,
                };
                let listener = StdTcp::bind(address).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let bound = listener.local_addr().map_err(failed)?;
                if bound.ip().is_loopback() {
                    info!(address = %bound, "the admin server listens");
                } else {
                    warn!(address = %bound, "the admin server has no authentication, and listens beyond this host");
                }
                Ok(Self {
                    listener: Listener::Tcp(listener),
                    socket: None,
                })
            }
            Address::Unix { path, mode, group } => {
                let listener = socket::bind("admin.listen", path, *mode, group.as_deref())?;
                info!(socket = %path.display(), "the admin server listens");
                Ok(Self {
                    listener: Listener::Unix(listener),
                    socket: Some(SocketFile(path.clone())),
                })
            }
        }
    }

    /// Serves it on a thread of its own, at most so many connections at a time.
    ///
    /// # Errors
    /// When the system gives none.
    pub fn start(
        self,
        context: Arc<Context>,
        connections_max: usize,
    ) -> Result<Server, AdminError> {
        let (ended, on_ended) = oneshot::channel();
        let served = Arc::clone(&context);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(AdminError::Thread)?;
        let hosts = match &self.listener {
            Listener::Tcp(_) => Hosts::Known(context.name.clone()),
            Listener::Unix(_) => Hosts::Any,
        };
        let listener = self.listener;
        std::thread::Builder::new()
            .name("tallyd-admin".to_owned())
            .spawn(move || {
                LocalSet::new().block_on(&runtime, async {
                    match listener.into_tokio() {
                        Ok(listener) => serve(listener, served, hosts, connections_max).await,
                        Err(error) => warn!(%error, "the admin server cannot listen"),
                    }
                });
                // Whether anyone still listens does not matter.
                let _ = ended.send(());
            })
            .map_err(AdminError::Thread)?;
        Ok(Server {
            ended: on_ended,
            stop: context.stop.clone().drop_guard(),
            context,
            socket: self.socket,
        })
    }
}

/// A running server; ends with its value.
pub struct Server {
    context: Arc<Context>,
    ended: oneshot::Receiver<()>,
    stop: DropGuard,
    socket: Option<SocketFile>,
}

impl Server {
    /// Tells it the node's id.
    pub fn node_is(&self, id: String) {
        // It is told once.
        let _ = self.context.node.set(id);
    }

    /// Resolves when the server has ended, which it does not by itself.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn ended(&mut self) {
        // A sender that is gone has ended, too.
        let _ = (&mut self.ended).await;
    }

    /// Ends it: answers that are under way are finished, within a second.
    pub async fn stop(mut self) {
        drop(self.socket.take());
        drop(self.stop);
        let _ = (&mut self.ended).await;
    }
}

impl Listener<StdTcp, StdUnix> {
    fn into_tokio(self) -> io::Result<Listener<TcpListener, UnixListener>> {
        Ok(match self {
            Self::Tcp(listener) => Listener::Tcp(TcpListener::from_std(listener)?),
            Self::Unix(listener) => Listener::Unix(UnixListener::from_std(listener)?),
        })
    }
}

impl Listener<TcpListener, UnixListener> {
    async fn accept(&self) -> io::Result<Stream> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // An event of the page is small, and is to be seen at once.
                let _ = stream.set_nodelay(true);
                Stream::Tcp(stream)
            }
            Self::Unix(listener) => Stream::Unix(listener.accept().await?.0),
        })
    }
}

/// Accepts until told to stop.
async fn serve(
    listener: Listener<TcpListener, UnixListener>,
    context: Arc<Context>,
    hosts: Hosts,
    connections_max: usize,
) {
    let connections = TaskTracker::new();
    let places = Rc::new(Places::new(connections_max));
    let mut refused = false;
    let mut seconds = tokio::time::interval(feed::EVERY);
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let accepted = tokio::select! {
            biased;
            () = context.stop.cancelled() => break,
            _ = seconds.tick() => {
                Feed::tick(&context);
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(stream) => {
                refused = false;
                if let Some(place) = places.take() {
                    let connection = connection(stream, place, Arc::clone(&context), hosts.clone());
                    connections.spawn_local(connection);
                } else {
                    // The socket's buffer is empty, so this does not wait.
                    let _ = stream.try_write(FULL);
                }
            }
            Err(error) => {
                if !refused {
                    warn!(%error, "the admin server cannot accept a connection; trying on");
                }
                refused = true;
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    connections.close();
    let _ = tokio::time::timeout(END_WITHIN, connections.wait()).await;
}

/// Serves one client until it goes, is too slow, is idle while its place is wanted, or the server
/// ends.
async fn connection(stream: Stream, place: Place, context: Arc<Context>, hosts: Hosts) {
    let stop = context.stop.clone();
    let stream = TokioIo::new(place.watch(TakenWithin::new(stream, TAKEN_WITHIN)));
    let (asks, head_within) = if place.only_health() {
        (Asks::Health, HEALTH_HEAD_WITHIN)
    } else {
        (Asks::Anything, HEAD_WITHIN)
    };
    let service = service_fn(|request| {
        let response = routes::answer(&request, asks, &context, &hosts);
        let response = response.map(|body| place.answer(body));
        async move { Ok::<_, Infallible>(response) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(head_within)
        .keep_alive(asks == Asks::Anything)
        .max_header_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .max_buf_size(4 * HEAD_BYTES_MAX)
        .serve_connection(stream, service);
    tokio::pin!(serving);
    let ended = tokio::select! {
        // First what the client has sent by now, then whether it must go.
        biased;
        ended = &mut serving => ended,
        () = place.given_up() => return,
        () = stop.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "an admin connection ended");
    }
}
