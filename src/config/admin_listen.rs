//! Where the admin server listens: `"127.0.0.1:9464"`, `"unix:PATH"`, or nowhere.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserializer, Serializer};

/// What an error says would be right.
const EXPECTED: &str =
    "an address and port such as \"127.0.0.1:9464\", \"unix:PATH\", or \"\" for none";

/// An address of the admin server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminListen {
    /// TCP; the port may be 0, for one that is free.
    Tcp(SocketAddr),
    /// A Unix socket at this path.
    Unix(PathBuf),
}

impl AdminListen {
    /// Reads an address as it is written; `None` if it is not one.
    pub fn parse(text: &str) -> Option<Self> {
        match text.strip_prefix("unix:") {
            Some("") => None,
            Some(path) => Some(Self::Unix(PathBuf::from(path))),
            None => text.parse().ok().map(Self::Tcp),
        }
    }
}

impl fmt::Display for AdminListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

// The shape is serde's.
#[allow(clippy::ref_option)]
pub(super) fn serialize<S: Serializer>(
    listen: &Option<AdminListen>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match listen {
        None => serializer.serialize_str(""),
        Some(listen) => serializer.collect_str(listen),
    }
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<AdminListen>, D::Error> {
    super::text::deserialize(deserializer, EXPECTED, |text| match text {
        "" | "none" => Some(None),
        text => AdminListen::parse(text).map(Some),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_back_from_how_it_is_written() {
        for text in ["127.0.0.1:9464", "[::1]:0", "unix:/run/tallyd/admin.sock"] {
            assert_eq!(AdminListen::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_not_an_address_is_refused() {
        for text in [
            "",
            "9464",
            "localhost",
            ":9464",
            "unix:",
            "127.0.0.1",
            "127.0.0.1:99999",
        ] {
            assert_eq!(AdminListen::parse(text), None, "{text:?}");
        }
    }
}
