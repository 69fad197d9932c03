//! The Redis protocol, pure: bytes to commands and replies to bytes. No I/O, no clock.
//!
//! - [`decode`]: RESP arrays and inline commands, resumed where the bytes ended
//! - [`encode`]: replies in RESP2 and RESP3
//! - [`number`]: integers as Redis reads them

pub mod decode;
pub mod encode;
pub mod number;
