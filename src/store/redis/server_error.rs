//! What a server's error says about the rest: does it concern one key, or everything?
//!
//! Judged by the code, the first word of an error. Where that is not enough the place of the error
//! decides (see [`replies`](super::replies)); the text decides only between the two errors of
//! `INCRBY` that share the code `ERR` since the first Redis.

use crate::store::KeyError;

/// The first word of an error.
pub(super) fn code(message: &str) -> &str {
    message.split(' ').next().unwrap_or_default()
}

/// Whether the server refuses every write, or everything, for a reason that may pass, or that is
/// about where the server stands rather than about a key.
pub(super) fn concerns_all(message: &str) -> bool {
    matches!(
        code(message),
        "OOM"
            | "READONLY"
            | "LOADING"
            | "MISCONF"
            | "NOREPLICAS"
            | "BUSY"
            | "MASTERDOWN"
            | "CLUSTERDOWN"
            | "TRYAGAIN"
            | "MOVED"
            | "ASK"
            | "CROSSSLOT"
            | "NOAUTH"
            | "WRONGPASS"
            | "DENIED"
            | "EXECABORT"
    )
}

/// An error that came instead of one key's new value.
pub(super) fn of_key(message: &str) -> KeyError {
    match code(message) {
        "WRONGTYPE" => KeyError::WrongType,
        "NOPERM" => KeyError::NoPermission(message.to_owned()),
        _ if message == "ERR value is not an integer or out of range" => KeyError::NotInteger,
        _ if message == "ERR increment or decrement would overflow" => KeyError::Overflow,
        _ if concerns_all(message) => KeyError::Retry(message.to_owned()),
        _ => KeyError::Other(message.to_owned()),
    }
}
