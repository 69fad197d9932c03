//! One Sentinel: what it is asked, and what its answers mean.
//!
//! It is not trusted further than for a hint: whoever it names is asked for its role ([`master_only`])
//! before anything else is done there.
//!
//! A Sentinel is asked on a connection of its own, within [`ASK_LIMIT`]; what it says is bounded and
//! cleaned where all servers' words are ([`shown`](super::shown)).

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ::redis::{ConnectionAddr, RedisConnectionInfo};
use tokio::time::timeout;

use super::codec::{Reply, put_whole};
use super::exchange::{Encoded, Peer, Replies, Wire};
use super::feed::RedisFeed;
use super::handshake;
use super::replies::{Frame, Frames, text, unexpected};
use super::shown::Shown;
use super::stream::Connector;
use super::tls::Tls;
use crate::store::StoreError;

/// The longest that one Sentinel may take, connection and login included: the next one may know.
const ASK_LIMIT: Duration = Duration::from_secs(1);
/// The bytes of a host's name.
const HOST_BYTES_MAX: usize = 255;
/// Parts of the answer to `ROLE`: three for each replica.
const ROLE_PARTS_MAX: usize = 30_000;
/// Where Sentinels tell of a new master.
const CHANNEL: &[u8] = b"+switch-master";
/// Bytes of such a message.
const MESSAGE_BYTES_MAX: usize = 4096;

/// Where the Sentinels are, and what they are asked for.
#[derive(Clone)]
pub struct SentinelConfig {
    /// Host and port of each.
    pub sentinels: Vec<(String, u16)>,
    /// The name that they know the master by.
    pub master: String,
    /// Whether Sentinels and master are spoken to by TLS.
    pub is_tls: bool,
    /// The password of the Sentinels.
    pub password: Option<String>,
}

/// Leaves out the password.
impl fmt::Debug for SentinelConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SentinelConfig")
            .field("sentinels", &self.sentinels)
            .field("master", &self.master)
            .field("is_tls", &self.is_tls)
            .finish_non_exhaustive()
    }
}

/// Host and port of a server, as a Sentinel names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    host: String,
    port: u16,
}

impl Address {
    fn parse(host: &str, port: &str) -> Option<Self> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || ".-_:%".contains(c);
        let is_host = (1..=HOST_BYTES_MAX).contains(&host.len()) && host.chars().all(is_plain);
        let port = port.parse().ok().filter(|port| *port != 0)?;
        let host = host.to_owned();
        is_host.then_some(Self { host, port })
    }

    pub(super) fn target(&self, is_tls: bool) -> ConnectionAddr {
        target(&self.host, self.port, is_tls)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

fn target(host: &str, port: u16, is_tls: bool) -> ConnectionAddr {
    let host = host.to_owned();
    if is_tls {
        ConnectionAddr::TcpTls {
            host,
            port,
            insecure: false,
            tls_params: None,
        }
    } else {
        ConnectionAddr::Tcp(host, port)
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Sentinel {
    connector: Connector,
    peer: Peer,
}

impl Sentinel {
    /// All that are configured.
    pub(super) fn all(config: &SentinelConfig, tls: &Arc<Tls>) -> Vec<Self> {
        let shown = Arc::new(Shown::without(config.password.as_deref()));
        let sentinel = |(host, port): &(String, u16)| {
            let target = target(host, *port, config.is_tls);
            let connector = Connector::new(target, ASK_LIMIT, Arc::clone(tls));
            let address = connector.address().clone();
            let shown = Arc::clone(&shown);
            let peer = Peer { address, shown };
            Self { connector, peer }
        };
        config.sentinels.iter().map(sentinel).collect()
    }

    /// Its address, for people.
    pub(super) fn address(&self) -> &str {
        self.connector.address()
    }

    /// Where the master is, as far as it knows.
    ///
    /// # Errors
    /// It is away, refuses, or does not know.
    pub(super) async fn ask(&self, config: &SentinelConfig) -> Result<Address, StoreError> {
        let asking = async {
            let mut wire = self.open(config).await?;
            let mut request = Vec::new();
            let name = config.master.as_bytes();
            put_whole(
                &mut request,
                &[b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name],
            );
            let mut frames = Frames::new(1);
            let asked = wire.exchange(&mut Encoded(request), &mut frames).await;
            asked.map_err(|failure| failure.error)?;
            named(frames.seen.first()).map_err(|why| wire.refused(why))
        };
        self.in_time(asking).await
    }

    /// Subscribes to what it tells of new masters.
    ///
    /// # Errors
    /// As [`Sentinel::ask`].
    pub(super) async fn hear(&self, config: &SentinelConfig) -> Result<RedisFeed, StoreError> {
        let subscribing = async {
            let wire = self.open(config).await?;
            RedisFeed::on(wire, CHANNEL, MESSAGE_BYTES_MAX).await
        };
        self.in_time(subscribing).await
    }

    async fn open(&self, config: &SentinelConfig) -> Result<Wire, StoreError> {
        let stream = self.connector.connect().await?;
        let mut wire = Wire::new(stream, self.peer.clone(), ASK_LIMIT);
        let mut login = RedisConnectionInfo::default();
        if let Some(password) = &config.password {
            login = login.set_password(password);
        }
        handshake::log_in(&mut wire, &login).await?;
        Ok(wire)
    }

    async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        match timeout(ASK_LIMIT, work).await {
            Ok(done) => done,
            Err(_) => Err(StoreError::Timeout {
                address: self.peer.address.to_string(),
                seconds: ASK_LIMIT.as_secs(),
            }),
        }
    }
}

/// The answer to `SENTINEL GET-MASTER-ADDR-BY-NAME`.
fn named(answer: Option<&Frame>) -> Result<Address, String> {
    match answer {
        Some(Frame::Nil) => Err("it knows no master of this name".to_owned()),
        Some(Frame::Error(message)) => Err(message.clone()),
        Some(Frame::Array(pair)) => match pair.as_slice() {
            [Frame::Bulk(host), Frame::Bulk(port)] => std::str::from_utf8(host)
                .ok()
                .zip(std::str::from_utf8(port).ok())
                .and_then(|(host, port)| Address::parse(host, port))
                .ok_or_else(|| "it names an address that is none".to_owned()),
            _ => Err("its answer is not a host and a port".to_owned()),
        },
        _ => Err("its answer is not an address".to_owned()),
    }
}

/// The new address in a message of [`CHANNEL`], if it is about `master`:
/// `name old-host old-port new-host new-port`.
pub(super) fn switched(master: &str, message: &[u8]) -> Option<Address> {
    let text = std::str::from_utf8(message).ok()?;
    let mut parts = text.strip_prefix(master)?.strip_prefix(' ')?.split(' ');
    let (_, _) = (parts.next()?, parts.next()?);
    let address = Address::parse(parts.next()?, parts.next()?)?;
    parts.next().is_none().then_some(address)
}

/// Makes sure that the server on a connection, which is logged in, is a master.
///
/// # Errors
/// It is not, or does not say.
pub(super) async fn master_only(wire: &mut Wire) -> Result<(), StoreError> {
    let mut request = Vec::new();
    put_whole(&mut request, &[b"ROLE"]);
    let mut role = Role::default();
    let asked = wire.exchange(&mut Encoded(request), &mut role).await;
    asked.map_err(|failure| failure.error)?;
    match role.said {
        Said::Role(role) if role == b"master" => Ok(()),
        Said::Role(role) if role == b"slave" => {
            Err(wire.refused("this is a replica, not the master"))
        }
        Said::Role(role) => Err(wire.refused(format!(
            "this is no master: its role is \"{}\"",
            role.escape_ascii()
        ))),
        Said::Refused(message) => Err(wire.refused(format!(
            "{message} (ROLE must be allowed, to tell a master from a replica)"
        ))),
        Said::Nothing => Err(wire.protocol("ROLE says nothing")),
    }
}

/// Follows the reply to `ROLE`, an array of arrays, of which only the first part matters.
#[derive(Debug, Default)]
struct Role {
    said: Said,
    begun: bool,
    /// Parts that are still to come.
    left: usize,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Said {
    #[default]
    Nothing,
    Role(Vec<u8>),
    Refused(String),
}

impl Replies for Role {
    fn take(&mut self, reply: Reply<'_>) -> Result<bool, String> {
        if !std::mem::replace(&mut self.begun, true) {
            match reply {
                Reply::Array(parts) => self.left = parts,
                Reply::Error(message) => self.said = Said::Refused(text(message)),
                other => return Err(unexpected("a role", other)),
            }
            return Ok(self.left == 0);
        }
        self.left -= 1;
        match reply {
            Reply::Array(parts) => self.left = self.left.saturating_add(parts),
            Reply::Bulk(role) if self.said == Said::Nothing => {
                let shown = role.get(..HOST_BYTES_MAX).unwrap_or(role);
                self.said = Said::Role(shown.to_vec());
            }
            _ if self.said == Said::Nothing => return Err(unexpected("a role", reply)),
            _ => {}
        }
        if self.left > ROLE_PARTS_MAX {
            return Err(format!("a role of {} parts", self.left));
        }
        Ok(self.left == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Frame {
        Frame::Bulk(text.as_bytes().to_vec())
    }

    #[test]
    fn an_answer_is_an_address_or_says_why_not() {
        let pair = |host, port| named(Some(&Frame::Array(vec![bulk(host), bulk(port)])));
        let address = pair("10.0.0.1", "6379").unwrap();
        assert_eq!(address.to_string(), "10.0.0.1:6379");
        assert_eq!(
            address.target(false),
            ConnectionAddr::Tcp("10.0.0.1".to_owned(), 6379)
        );
        assert!(matches!(
            pair("redis-1.local", "1").unwrap().target(true),
            ConnectionAddr::TcpTls {
                insecure: false,
                ..
            }
        ));
        assert!(pair("::1", "6379").is_ok());
        for (host, port) in [
            ("", "6379"),
            ("a b", "1"),
            ("a\n", "1"),
            ("a", "0"),
            ("a", "65536"),
            ("a", "x"),
            (&"a".repeat(256), "1"),
        ] {
            assert!(pair(host, port).unwrap_err().contains("none"), "{host}");
        }
        for other in [
            Frame::Nil,
            Frame::Error("NOAUTH".to_owned()),
            Frame::Integer(1),
            Frame::Array(vec![bulk("a")]),
        ] {
            assert!(named(Some(&other)).is_err(), "{other:?}");
        }
    }

    #[test]
    fn a_switch_of_this_master_alone_is_heard() {
        let new = |message: &[u8]| switched("m", message).map(|address| address.to_string());
        assert_eq!(new(b"m 10.0.0.1 1 ::2 7"), Some("::2:7".to_owned()));
        for other in [
            &b"mm 10.0.0.1 1 10.0.0.2 7"[..],
            b"n 10.0.0.1 1 10.0.0.2 7",
            b"m 10.0.0.1 1 10.0.0.2",
            b"m 10.0.0.1 1 10.0.0.2 7 8",
            b"m 10.0.0.1 1 10.0.0.2 x",
            b"m",
            b"\xff",
        ] {
            assert_eq!(new(other), None, "{}", other.escape_ascii());
        }
    }

    fn role(replies: &[Reply<'_>]) -> Result<Said, String> {
        let mut role = Role::default();
        for (at, &reply) in replies.iter().enumerate() {
            assert_eq!(role.take(reply)?, at + 1 == replies.len(), "part {at}");
        }
        Ok(role.said)
    }

    #[test]
    fn a_role_is_followed_through_its_arrays() {
        let (one, offset) = (Reply::Bulk(b"1"), Reply::Integer(7));
        let said = role(&[
            Reply::Array(3),
            Reply::Bulk(b"master"),
            offset,
            Reply::Array(2),
            Reply::Array(3),
            one,
            one,
            one,
            Reply::Array(3),
            one,
            one,
            one,
        ]);
        assert_eq!(said, Ok(Said::Role(b"master".to_vec())));
        let alone = role(&[
            Reply::Array(3),
            Reply::Bulk(b"master"),
            offset,
            Reply::Array(0),
        ]);
        assert_eq!(alone, Ok(Said::Role(b"master".to_vec())));
        let refused = role(&[Reply::Error(b"NOPERM")]);
        assert_eq!(refused, Ok(Said::Refused("NOPERM".to_owned())));
        assert_eq!(role(&[Reply::Array(0)]), Ok(Said::Nothing));
        assert!(role(&[Reply::Array(2), offset]).is_err());
        assert!(role(&[Reply::Array(usize::MAX), Reply::Bulk(b"master")]).is_err());
        assert!(role(&[offset]).is_err());
    }
}
