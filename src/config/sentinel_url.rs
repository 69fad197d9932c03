//! A master that Sentinels watch, as a URL:
//! `redis+sentinel://[USER:PASSWORD@]HOST:PORT,HOST:PORT/NAME[/DB]`, with `rediss+sentinel` for TLS.
//!
//! User and password are the master's. No error repeats what was written: it may be a password.

use std::fmt;
use std::net::Ipv6Addr;

use redis::RedisConnectionInfo;

use super::percent::encode;
use super::secret::MASK;

/// The port of a Sentinel where none is written.
const PORT: u16 = 26379;
/// Each is asked in turn when a master is looked for, and may keep the others waiting.
const SENTINELS_MAX: usize = 16;
/// The bytes of a host, and of a master's name.
const NAME_BYTES_MAX: usize = 255;

/// Where the Sentinels are, and what they are asked for.
#[derive(Clone)]
pub struct SentinelUrl {
    /// Host and port of each, in the order written.
    pub sentinels: Vec<(String, u16)>,
    /// The name that the Sentinels know the master by.
    pub master: String,
    /// Whether Sentinels and master are spoken to by TLS.
    pub is_tls: bool,
    /// User, password and database of the master.
    pub login: RedisConnectionInfo,
}

impl SentinelUrl {
    /// Reads a URL; `None` where it is of another scheme. The error goes on "a URL of Sentinels in which".
    pub(super) fn parse(text: &str) -> Option<Result<Self, &'static str>> {
        let (scheme, rest) = text.split_once("://")?;
        let is_tls = match scheme {
            "redis+sentinel" | "valkey+sentinel" => false,
            "rediss+sentinel" | "valkeys+sentinel" => true,
            _ => return None,
        };
        Some(parse_rest(rest, is_tls))
    }
}

fn parse_rest(rest: &str, is_tls: bool) -> Result<SentinelUrl, &'static str> {
    if rest.contains(['?', '#']) {
        return Err("there is something behind the database number");
    }
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (credentials, hosts) = match authority.rsplit_once('@') {
        Some((credentials, hosts)) => (Some(credentials), hosts),
        None => (None, authority),
    };
    let sentinels = hosts.split(',').map(host).collect::<Result<Vec<_>, _>>()?;
    if sentinels.len() > SENTINELS_MAX {
        return Err("there are more than 16 Sentinels");
    }
    let (master, db) = match path.split_once('/') {
        Some((master, db)) => (master, Some(db).filter(|db| !db.is_empty())),
        None => (path, None),
    };
    let master = decode(master).ok_or("the master's name is not well encoded")?;
    if master.is_empty() {
        return Err("the master's name is missing behind the Sentinels");
    }
    if master.len() > NAME_BYTES_MAX || master.contains(|c: char| c.is_control() || c == ' ') {
        return Err("the master's name cannot be one");
    }
    let mut login = RedisConnectionInfo::default();
    if let Some(db) = db {
        let number = db.parse::<u32>().ok().and_then(|db| i32::try_from(db).ok());
        login = login.set_db(number.ok_or("the database is not a number")?.into());
    }
    if let Some(credentials) = credentials {
        let (user, password) = match credentials.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (credentials, None),
        };
        let encoded = "user or password is not well encoded";
        if !user.is_empty() {
            login = login.set_username(decode(user).ok_or(encoded)?);
        }
        if let Some(password) = password {
            login = login.set_password(decode(password).ok_or(encoded)?);
        }
    }
    Ok(SentinelUrl {
        sentinels,
        master,
        is_tls,
        login,
    })
}

/// `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`.
fn host(text: &str) -> Result<(String, u16), &'static str> {
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, port) = rest
            .split_once(']')
            .ok_or("a bracket of an IPv6 address is not closed")?;
        host.parse::<Ipv6Addr>()
            .map_err(|_| "what is in brackets is not an IPv6 address")?;
        let port = match port {
            "" => None,
            port => Some(
                port.strip_prefix(':')
                    .ok_or("there is something between an IPv6 address and its port")?,
            ),
        };
        (host, port)
    } else {
        match text.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return Err("an IPv6 address belongs in brackets, such as [::1]:26379");
            }
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    if host.is_empty() {
        return Err("the host of a Sentinel is missing");
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || ".-_:".contains(c);
    if host.len() > NAME_BYTES_MAX || !host.chars().all(is_plain) {
        return Err("the host of a Sentinel cannot be one");
    }
    let port = match port {
        None => PORT,
        Some(port) => port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or("the port of a Sentinel is not a number from 1 to 65535")?,
    };
    Ok((host.to_owned(), port))
}

/// What was percent-encoded; `None` where it is not well encoded, or no UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(if byte == b'%' {
            let mut digit = || char::from(rest.next()?).to_digit(16);
            let (high, low) = (digit()?, digit()?);
            (high * 16 + low) as u8
        } else {
            byte
        });
    }
    String::from_utf8(bytes).ok()
}

impl PartialEq for SentinelUrl {
    fn eq(&self, other: &Self) -> bool {
        let (x, y) = (&self.login, &other.login);
        self.sentinels == other.sentinels
            && self.master == other.master
            && self.is_tls == other.is_tls
            && x.db() == y.db()
            && x.username() == y.username()
            && x.password() == y.password()
    }
}

/// The URL with its password masked.
impl fmt::Display for SentinelUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_tls { "rediss" } else { "redis" };
        write!(f, "{scheme}+sentinel://")?;
        let user = self.login.username().unwrap_or_default();
        f.write_str(&encode(user.as_bytes(), b""))?;
        let has_password = self.login.password().is_some();
        if has_password {
            write!(f, ":{MASK}")?;
        }
        if has_password || !user.is_empty() {
            f.write_str("@")?;
        }
        for (index, (host, port)) in self.sentinels.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if host.contains(':') {
                write!(f, "{comma}[{host}]:{port}")?;
            } else {
                write!(f, "{comma}{host}:{port}")?;
            }
        }
        write!(f, "/{}", encode(self.master.as_bytes(), b""))?;
        if self.login.db() != 0 {
            write!(f, "/{}", self.login.db())?;
        }
        Ok(())
    }
}

impl fmt::Debug for SentinelUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{StoreUrl, StoreUrlError};
    use super::*;

    fn sentinel(text: &str) -> SentinelUrl {
        match StoreUrl::parse(text) {
            Ok(StoreUrl::Sentinel(url)) => *url,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn hosts_name_and_database_are_read_and_shown_with_the_password_masked() {
        for (written, shown) in [
            (
                "redis+sentinel://a/mymaster",
                "redis+sentinel://a:26379/mymaster",
            ),
            (
                "redis+sentinel://a:1,b,[::1],[fe80::1]:7/m/3",
                "redis+sentinel://a:1,b:26379,[::1]:26379,[fe80::1]:7/m/3",
            ),
            (
                "rediss+sentinel://joe:hunter2@a,10.0.0.1:5/my.master-1_x/0",
                "rediss+sentinel://joe:***@a:26379,10.0.0.1:5/my.master-1_x",
            ),
            (
                "redis+sentinel://:hunter2@a/m/",
                "redis+sentinel://:***@a:26379/m",
            ),
            (
                "valkey+sentinel://jo%40e@a/m",
                "redis+sentinel://jo%40e@a:26379/m",
            ),
            (
                "redis+sentinel://a/my%2fmaster",
                "redis+sentinel://a:26379/my%2Fmaster",
            ),
        ] {
            let url = sentinel(written);
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{:?}", StoreUrl::parse(written).unwrap()), shown);
            if url.login.password().is_none() {
                assert_eq!(sentinel(shown), url);
            }
        }
        let url = sentinel("redis+sentinel://jo%40e:p%3a%2F%25@a:1,b/m/12");
        let port = |name: &str, port| (name.to_owned(), port);
        assert_eq!(url.sentinels, [port("a", 1), port("b", PORT)]);
        assert_eq!((url.master.as_str(), url.is_tls), ("m", false));
        assert_eq!(url.login.username(), Some("jo@e"));
        assert_eq!(url.login.password(), Some("p:/%"));
        assert_eq!(url.login.db(), 12);
        assert!(sentinel("rediss+sentinel://a/m").is_tls);
    }

    #[test]
    fn a_mistake_is_named_without_what_was_written() {
        let many = vec!["h"; 17].join(",");
        for (written, named) in [
            ("a,b", "name is missing"),
            ("a/", "name is missing"),
            ("/m", "host of a Sentinel is missing"),
            ("a,/m", "host of a Sentinel is missing"),
            ("a,,b/m", "host of a Sentinel is missing"),
            ("a:0/m", "port"),
            ("a:/m", "port"),
            ("a:65536/m", "port"),
            ("a:hunter2/m", "port"),
            ("::1/m", "brackets"),
            ("[::1/m", "not closed"),
            ("[a]/m", "not an IPv6"),
            ("[::1]7/m", "between"),
            ("a b/m", "cannot be one"),
            ("a/m/x", "database"),
            ("a/m/-1", "database"),
            ("a/m/4294967296", "database"),
            ("a/m/0/0", "database"),
            ("a/m?db=1", "behind the database"),
            ("a/m#insecure", "behind the database"),
            ("a/%0a", "cannot be one"),
            ("a/%zz", "not well encoded"),
            ("joe:hunter2%@a/m", "not well encoded"),
            (&format!("{many}/m"), "more than 16"),
        ] {
            let text = format!("redis+sentinel://{written}");
            let error = StoreUrl::parse(&text).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(named), "{written}: {text}");
            assert!(!text.contains("hunter2"), "{written}: {text}");
        }
        let raw = StoreUrl::parse("redis+sentinel://joe:hun/ter2@a/m");
        assert_eq!(raw.unwrap_err(), StoreUrlError::Password);
    }
}
