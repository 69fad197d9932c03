//! Which store, as a URL.
//!
//! The URL may hold a password, so nothing here prints what was written: not `Display`, not
//! `Debug`, and no error.

use std::fmt;

use redis::{
    ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, RedisConnectionInfo,
};
use serde::de::{Error, Unexpected};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::Value;

use super::percent::encode;
use super::secret::{MASK, Secret};
use super::sentinel_url::SentinelUrl;
use super::text::found;

/// What an error says would be right.
const EXPECTED: &str = "\"embedded\", \"redis://HOST:PORT/DB\", \"rediss://HOST:PORT/DB\", \
                        \"redis+unix:///PATH?db=DB\" or \
                        \"redis+sentinel://HOST:PORT,HOST:PORT/NAME/DB\"";

/// The store that counters are flushed to.
#[derive(Clone)]
pub enum StoreUrl {
    /// The one in the state directory.
    Embedded,
    /// Redis or Valkey, by TCP, TLS or a Unix socket; with its user and password.
    Redis(Box<ConnectionInfo>),
    /// The master that Sentinels name.
    Sentinel(Box<SentinelUrl>),
}

/// Why a store's URL was refused. Says nothing of what was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreUrlError {
    /// Not a URL, or of a scheme that is not a store's.
    #[error("not the URL of a store")]
    Scheme,
    /// A URL of a store, but the rest of it makes no sense.
    #[error("a store's URL with a mistake ({0})")]
    Part(String),
    /// A password that was not encoded, as far as can be told.
    #[error(
        "a URL with an @ behind its address: in a password, # / ? @ and % are written %23 %2F %3F %40 \
         and %25, or it is put into store.password_file"
    )]
    Password,
    /// `#insecure` was asked for.
    #[error("a URL that asks for TLS without checking the certificate")]
    Insecure,
    /// A URL of Sentinels with a mistake.
    #[error("a URL of Sentinels in which {0}")]
    Sentinel(&'static str),
    /// A negative database number.
    #[error("a URL with a negative database number")]
    Database,
}

impl StoreUrl {
    /// Reads a URL as it is written; `unix://` is taken for `redis+unix://`, and Valkey's
    /// schemes for Redis'.
    ///
    /// # Errors
    ///
    /// When it is not the URL of a store.
    pub fn parse(text: &str) -> Result<Self, StoreUrlError> {
        if text == "embedded" {
            return Ok(Self::Embedded);
        }
        if has_raw_password(text) {
            return Err(StoreUrlError::Password);
        }
        if let Some(sentinel) = SentinelUrl::parse(text) {
            return sentinel
                .map(|url| Self::Sentinel(Box::new(url)))
                .map_err(StoreUrlError::Sentinel);
        }
        let url = redis::parse_redis_url(text).ok_or(StoreUrlError::Scheme)?;
        let info = url.into_connection_info().map_err(|error| {
            // "what - kind: detail"; the kind is always the same, and a detail may be a piece of
            // the URL.
            let text = error.to_string();
            let what = text.split(" - ").next().unwrap_or_default();
            StoreUrlError::Part(what.to_lowercase())
        })?;
        if matches!(info.addr(), ConnectionAddr::TcpTls { insecure: true, .. }) {
            return Err(StoreUrlError::Insecure);
        }
        if info.redis_settings().db() < 0 {
            return Err(StoreUrlError::Database);
        }
        Ok(Self::Redis(Box::new(info)))
    }

    /// User, password and database; `None` for the embedded store.
    pub fn login(&self) -> Option<&RedisConnectionInfo> {
        match self {
            Self::Embedded => None,
            Self::Redis(info) => Some(info.redis_settings()),
            Self::Sentinel(url) => Some(&url.login),
        }
    }

    /// The password in the URL, or the one that was put in by [`StoreUrl::set_password`].
    pub fn password(&self) -> Option<Secret> {
        let password = self.login()?.password()?;
        Some(Secret::new(password.to_owned()))
    }

    /// Connects with this password from now on; no effect on the embedded store.
    pub(super) fn set_password(&mut self, password: &Secret) {
        match self {
            Self::Embedded => {}
            Self::Redis(info) => {
                let settings = info.redis_settings().clone();
                let settings = settings.set_password(password.expose());
                **info = ConnectionInfo::clone(info).set_redis_settings(settings);
            }
            Self::Sentinel(url) => url.login = url.login.clone().set_password(password.expose()),
        }
    }
}

/// Whether the address ends before the credentials do: at a character of the password that should
/// have been encoded. What such a URL names is another host, or none.
fn has_raw_password(text: &str) -> bool {
    let Some((scheme, rest)) = text.split_once("://") else {
        return false;
    };
    let is_path = scheme.ends_with("unix");
    let address = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let behind = &rest[address.len()..];
    !is_path && behind.contains('@')
}

/// The same store for the same user: what is shown, and the password that is not.
impl PartialEq for StoreUrl {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string() && self.password() == other.password()
    }
}

/// The URL with its password masked; what it means rather than how it was written.
impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = match self {
            Self::Embedded => return f.write_str("embedded"),
            Self::Sentinel(url) => return url.fmt(f),
            Self::Redis(info) => info,
        };
        let settings = info.redis_settings();
        let user = encode(settings.username().unwrap_or_default().as_bytes(), b"");
        let resp3 = settings.protocol() == ProtocolVersion::RESP3;
        if let ConnectionAddr::Unix(path) = info.addr() {
            let path = encode(path.as_os_str().as_encoded_bytes(), b"/");
            write!(f, "redis+unix://{path}")?;
            let mut parts = Vec::new();
            if settings.db() != 0 {
                parts.push(format!("db={}", settings.db()));
            }
            if !user.is_empty() {
                parts.push(format!("user={user}"));
            }
            if settings.password().is_some() {
                parts.push(format!("pass={MASK}"));
            }
            if resp3 {
                parts.push("protocol=resp3".to_owned());
            }
            if !parts.is_empty() {
                write!(f, "?{}", parts.join("&"))?;
            }
            return Ok(());
        }
        let (scheme, host, port) = match info.addr() {
            ConnectionAddr::TcpTls { host, port, .. } => ("rediss", host, port),
            ConnectionAddr::Tcp(host, port) => ("redis", host, port),
            // The enum may grow; no URL that is parsed here gives another address.
            _ => return f.write_str(MASK),
        };
        write!(f, "{scheme}://{user}")?;
        if settings.password().is_some() {
            write!(f, ":{MASK}")?;
        }
        if settings.password().is_some() || !user.is_empty() {
            f.write_str("@")?;
        }
        if host.contains(':') {
            write!(f, "[{host}]:{port}")?;
        } else {
            write!(f, "{host}:{port}")?;
        }
        if settings.db() != 0 {
            write!(f, "/{}", settings.db())?;
        }
        if resp3 {
            f.write_str("?protocol=resp3")?;
        }
        Ok(())
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for StoreUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for StoreUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let Some(text) = value.as_str() else {
            return Err(D::Error::invalid_type(found(&value), &EXPECTED));
        };
        Self::parse(text).map_err(|error| {
            D::Error::invalid_value(Unexpected::Other(&error.to_string()), &EXPECTED)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_shown_as_what_it_means_with_its_password_masked() {
        for (written, shown) in [
            ("embedded", "embedded"),
            ("redis://h", "redis://h:6379"),
            ("redis://h:1/3", "redis://h:1/3"),
            ("redis://:hunter2@h:1", "redis://:***@h:1"),
            ("rediss://joe:hunter2@h/0", "rediss://joe:***@h:6379"),
            ("redis://jo%40e@[::1]:7", "redis://jo%40e@[::1]:7"),
            ("valkey://h", "redis://h:6379"),
            ("unix:///run/r.sock", "redis+unix:///run/r.sock"),
            (
                "redis+unix:///run/r.sock?db=2&user=joe&pass=hunter2&protocol=3",
                "redis+unix:///run/r.sock?db=2&user=joe&pass=***&protocol=resp3",
            ),
        ] {
            let url = StoreUrl::parse(written).unwrap();
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), shown);
            if url.password().is_none() {
                assert_eq!(StoreUrl::parse(shown).unwrap(), url);
            }
        }
    }

    #[test]
    fn no_error_repeats_what_was_written() {
        for written in [
            "joe:hunter2@h",
            "http://joe:hunter2@h",
            "redis://joe:hunter2@h:port",
            "redis://joe:hunter2@h/db",
            "redis://joe:hunter2@h/-1",
            "redis://joe:hunter2@",
            "redis://joe:hunter2@h/?protocol=9",
            "rediss://joe:hunter2@h/#insecure",
            "redis+unix://joe:hunter2@h",
            "",
        ] {
            let error = StoreUrl::parse(written).unwrap_err();
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_password_that_was_not_encoded_gets_a_hint_and_is_not_repeated() {
        for password in [
            "hun#ter2", "hun/ter2", "hun?ter2", "12/34", "12#34", "12?34",
        ] {
            let error = StoreUrl::parse(&format!("redis://joe:{password}@h")).unwrap_err();
            assert_eq!(error, StoreUrlError::Password, "{password}");
            let text = error.to_string();
            assert!(text.contains("%23") && text.contains("store.password_file"));
        }
        let at = StoreUrl::parse("redis://joe:hun@ter2@h").unwrap();
        assert_eq!(at.password().unwrap().expose(), "hun@ter2");
        assert!(StoreUrl::parse("redis+unix:///run/a@b.sock").is_ok());
    }

    #[test]
    fn a_password_that_is_put_in_is_the_one_used() {
        let mut url = StoreUrl::parse("redis://joe@h/2").unwrap();
        url.set_password(&Secret::new("hunter2".to_owned()));
        let settings = url.login().unwrap();
        assert_eq!(settings.password(), Some("hunter2"));
        assert_eq!(settings.username(), Some("joe"));
        assert_eq!(settings.db(), 2);
        assert_ne!(url, StoreUrl::parse("redis://joe@h/2").unwrap());
    }
}
