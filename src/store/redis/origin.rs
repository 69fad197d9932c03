//! Where connections come from: a server with a fixed address, or the master that Sentinels name.
//!
//! Sentinels are asked in turn for every connection, the one that was right last comes first. A server
//! that a Sentinel names is used only after it said itself that it is a master. What the Sentinels tell
//! afterwards is followed: connections to a master of before end at once, wherever they are.
//!
//! Invariants:
//! 1. No connection is handed out to a server whose `ROLE` is not master.
//! 2. The connections that were handed out lead to one address: when another is learnt, those to the
//!    former one fail before they send or take another byte. A batch in the middle is then in doubt, and
//!    the token on the new master tells.
//! 3. A search ends: each Sentinel is asked once, each address tried once, and each has a time limit.
//!
//! A majority is not asked for: Sentinels have theirs before they name another master, and the role is
//! verified.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ::redis::{ConnectionAddr, RedisConnectionInfo};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::exchange::{Peer, Wire};
use super::feed::RedisFeed;
use super::sentinel::{Address, Sentinel, SentinelConfig, master_only, switched};
use super::shown::Shown;
use super::stream::Connector;
use super::tls::Tls;
use super::{Place, RedisConfig, handshake};
use crate::repeats::Repeats;
use crate::store::{Feed, StoreError};

/// Between two looks at what a Sentinel says, besides what it tells unasked.
const LOOK_INTERVAL: Duration = Duration::from_secs(3);
/// Before a Sentinel that closed a subscription is asked for another.
const RESUBSCRIBE_PAUSE: Duration = Duration::from_millis(500);
/// What an error says of all Sentinels together, in bytes.
const SAID_BYTES_MAX: usize = 1024;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Origin {
    place: Where,
    shown: Arc<Shown>,
    /// For a connection, and the handshake on it.
    limit: Duration,
}

#[derive(Debug)]
enum Where {
    Server(Connector),
    Sentinels(Box<Master>),
}

impl Origin {
    pub(super) fn new(config: &RedisConfig) -> Self {
        let limit = config.timeouts.connect;
        let place = match &config.place {
            Place::Server(address) => {
                let insecure = matches!(address, ConnectionAddr::TcpTls { insecure: true, .. });
                let tls = Arc::new(Tls::new(insecure));
                Where::Server(Connector::new(address.clone(), limit, tls))
            }
            Place::Sentinels(sentinels) => {
                let tls = Arc::new(Tls::new(false));
                Where::Sentinels(Box::new(Master {
                    sentinels: Sentinel::all(sentinels, &tls),
                    config: sentinels.clone(),
                    login: config.login.clone(),
                    tls,
                    first: AtomicUsize::new(0),
                    known: Mutex::default(),
                }))
            }
        };
        Self {
            place,
            shown: Arc::new(Shown::without(config.login.password())),
            limit,
        }
    }

    /// Who is spoken to, for errors.
    pub(super) fn peer(&self) -> Peer {
        let address = match &self.place {
            Where::Server(connector) => connector.address().clone(),
            Where::Sentinels(master) => match &master.known().address {
                Some(address) => address.to_string().into(),
                None => master.config.master.as_str().into(),
            },
        };
        self.peer_at(address)
    }

    fn peer_at(&self, address: Arc<str>) -> Peer {
        let shown = Arc::clone(&self.shown);
        Peer { address, shown }
    }

    /// A new connection.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) async fn wire(&self) -> Result<Wire, StoreError> {
        match &self.place {
            Where::Server(connector) => self.open(connector).await,
            Where::Sentinels(master) => master.wire(self).await,
        }
    }

    async fn open(&self, connector: &Connector) -> Result<Wire, StoreError> {
        let stream = connector.connect().await?;
        let peer = self.peer_at(connector.address().clone());
        Ok(Wire::new(stream, peer, self.limit))
    }

    /// Follows what the Sentinels tell. Does not end.
    pub(super) async fn follow(&self) {
        match &self.place {
            Where::Server(_) => std::future::pending().await,
            Where::Sentinels(master) => master.follow().await,
        }
    }
}

/// The master of a group that Sentinels watch.
#[derive(Debug)]
struct Master {
    config: SentinelConfig,
    sentinels: Vec<Sentinel>,
    login: RedisConnectionInfo,
    tls: Arc<Tls>,
    /// Which Sentinel is asked first.
    first: AtomicUsize,
    known: Mutex<Known>,
}

/// The master that connections lead to.
#[derive(Debug, Default)]
struct Known {
    address: Option<Address>,
    /// Ends the connections to it.
    left: CancellationToken,
}

impl Master {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The Sentinels in the order in which they are asked.
    fn turn(&self) -> impl Iterator<Item = (usize, &Sentinel)> {
        let first = self.first.load(Ordering::Relaxed);
        let all = self.sentinels.iter().enumerate();
        all.clone().skip(first).chain(all.take(first))
    }

    /// This is the master: connections to another end. What ends those to this one.
    fn learn(&self, address: &Address) -> CancellationToken {
        let mut known = self.known();
        if known.address.as_ref() != Some(address)
            && let Some(former) = known.address.replace(address.clone())
        {
            known.left.cancel();
            known.left = CancellationToken::new();
            let name = &self.config.master;
            info!("the master {name:?} is {address} now, before {former}");
        }
        known.left.clone()
    }

    /// A connection to the master, whoever that is now.
    async fn wire(&self, origin: &Origin) -> Result<Wire, StoreError> {
        let mut said = Vec::new();
        let mut tried = Vec::new();
        for (index, sentinel) in self.turn() {
            let address = match sentinel.ask(&self.config).await {
                Ok(address) => address,
                Err(error) => {
                    said.push(error.to_string());
                    continue;
                }
            };
            if tried.contains(&address) {
                said.push(format!("{} names it too", sentinel.address()));
                continue;
            }
            match self.enter(origin, &address).await {
                Ok(wire) => {
                    self.first.store(index, Ordering::Relaxed);
                    return Ok(wire);
                }
                Err(error) => said.push(format!("{} names {error}", sentinel.address())),
            }
            tried.push(address);
        }
        Err(StoreError::NoMaster {
            name: self.config.master.clone(),
            said: bounded(&said),
        })
    }

    /// A connection to a server that says that it is a master.
    async fn enter(&self, origin: &Origin, address: &Address) -> Result<Wire, StoreError> {
        let target = address.target(self.config.is_tls);
        let connector = Connector::new(target, origin.limit, Arc::clone(&self.tls));
        let entering = async {
            let mut wire = origin.open(&connector).await?;
            handshake::log_in(&mut wire, &self.login).await?;
            master_only(&mut wire).await?;
            Ok(wire)
        };
        // A server that is gone may keep one waiting for longer than its successor needs.
        let left = self.known().left.clone();
        let mut wire = tokio::select! {
            biased;
            () = left.cancelled() => {
                let source = io::Error::new(io::ErrorKind::ConnectionAborted, super::LEFT);
                let address = address.to_string();
                return Err(StoreError::Io { address, source });
            }
            wire = entering => wire?,
        };
        wire.end_with(self.learn(address));
        Ok(wire)
    }

    /// Hears what a Sentinel tells, and looks every now and then, as what it tells may be missed.
    async fn follow(&self) {
        let mut silence = Repeats::default();
        let mut heard: Option<(usize, RedisFeed)> = None;
        loop {
            match self.look().await {
                Ok(index) => {
                    if let Some(told) = silence.over() {
                        info!(seconds = told.seconds(), "a Sentinel answers again");
                    }
                    // Whoever answers is heard: another may be gone without a sign.
                    if heard.as_ref().is_none_or(|(of, _)| *of != index) {
                        heard = self.hear(index).await;
                        if heard.is_some() {
                            // What was told in between is not missed.
                            continue;
                        }
                    }
                }
                Err(said) => {
                    heard = None;
                    if let Some(told) = silence.again() {
                        warn!(
                            count = told.count,
                            "no Sentinel answers, so a fail-over would not be noticed: {said}"
                        );
                    }
                }
            }
            let due = Instant::now() + LOOK_INTERVAL;
            let telling = async {
                match &mut heard {
                    Some((_, feed)) => loop {
                        match feed.next().await {
                            Ok(message) => {
                                if let Some(address) = switched(&self.config.master, &message) {
                                    self.learn(&address);
                                }
                            }
                            Err(_) => return,
                        }
                    },
                    None => std::future::pending().await,
                }
            };
            if timeout_at(due, telling).await.is_ok() {
                heard = None;
                sleep(RESUBSCRIBE_PAUSE).await;
            }
        }
    }

    async fn hear(&self, index: usize) -> Option<(usize, RedisFeed)> {
        let feed = self.sentinels.get(index)?.hear(&self.config).await;
        Some((index, feed.ok()?))
    }

    /// Takes the word of the first Sentinel that answers; which one, or what all said.
    async fn look(&self) -> Result<usize, String> {
        let mut said = Vec::new();
        for (index, sentinel) in self.turn() {
            let left = self.known().left.clone();
            match sentinel.ask(&self.config).await {
                Ok(address) => {
                    // The answer may be older than what was learnt meanwhile.
                    if !left.is_cancelled() {
                        self.learn(&address);
                    }
                    self.first.store(index, Ordering::Relaxed);
                    return Ok(index);
                }
                Err(error) => said.push(error.to_string()),
            }
        }
        Err(bounded(&said))
    }
}

/// What the Sentinels said, one after the other.
fn bounded(said: &[String]) -> String {
    let mut text = said.join("; ");
    if text.len() > SAID_BYTES_MAX {
        let end = (0..=SAID_BYTES_MAX).rfind(|&at| text.is_char_boundary(at));
        text.truncate(end.unwrap_or_default());
        text.push_str("... (cut)");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_sentinels_said_is_bounded() {
        let two = ["a: x".to_owned(), "b: y".to_owned()];
        assert_eq!(bounded(&two), "a: x; b: y");
        let long = bounded(&vec!["ä".repeat(256); 16]);
        assert!(long.len() < SAID_BYTES_MAX + 10 && long.ends_with("ä... (cut)"));
    }
}
