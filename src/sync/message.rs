//! The message that tells every node what one batch did. Pure.
//!
//! ```json
//! {"v":1,"node":"3f6c…","name":"web-7","run":"a91e…","seq":1734,"clock":90211,
//!  "at":1763835000123,"deltas":[["likes:42",8731,1204113]]}
//! ```
//!
//! Each delta: key, amount, value after it. Keys that are not UTF-8 stand in `deltas_b64`, in
//! base64. `seq` counts a run's messages without gaps, from 1; an empty message repeats the last.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// The version written here.
pub const VERSION: u32 = 1;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// [`VERSION`].
    pub v: u32,
    /// The sender's node id.
    pub node: String,
    /// The sender's name.
    pub name: String,
    /// The sender's run.
    pub run: String,
    /// Number of the message in its run.
    pub seq: u64,
    /// The store's clock of the values.
    pub clock: u64,
    /// Unix time in milliseconds.
    pub at: u64,
    /// Key, amount, value after it.
    pub deltas: Vec<(String, i64, i64)>,
    /// As above, the key in base64.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deltas_b64: Vec<(String, i64, i64)>,
}

impl Message {
    /// Adds one delta.
    pub fn push(&mut self, key: &[u8], amount: i64, value: i64) {
        match std::str::from_utf8(key) {
            Ok(text) => self.deltas.push((text.to_owned(), amount, value)),
            Err(_) => self.deltas_b64.push((STANDARD.encode(key), amount, value)),
        }
    }
}
