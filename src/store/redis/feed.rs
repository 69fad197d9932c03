//! A subscription to the channel of deltas, on a connection of its own.
//!
//! Own code on the lane's wire, because the `redis` crate hands messages on through a queue without
//! a bound: here a receiver that is slow is felt by the server, which cuts it off at its own limit,
//! and the view is read anew.

use bytes::Bytes;

use super::codec::{Reply, put_whole};
use super::exchange::{Encoded, Replies, Wire};
use super::replies::Frames;
use super::{RedisConfig, handshake};
use crate::store::{Feed, StoreError};

/// Longest message taken, in bytes; a longer one ends the connection.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// See the module's documentation.
pub struct RedisFeed {
    wire: Wire,
    message: Pushed,
}

impl RedisFeed {
    /// Subscribes on a fresh connection.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) async fn open(mut wire: Wire, config: &RedisConfig) -> Result<Self, StoreError> {
        handshake::log_in(&mut wire, &config.login).await?;
        Self::on(wire, config.channel.as_bytes(), MESSAGE_BYTES_MAX).await
    }

    /// Subscribes to `channel` on a connection that is logged in.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) async fn on(
        mut wire: Wire,
        channel: &[u8],
        message_bytes_max: usize,
    ) -> Result<Self, StoreError> {
        let mut request = Vec::new();
        put_whole(&mut request, &[b"SUBSCRIBE", channel]);
        let mut confirmed = Confirmed {
            frames: Frames::new(1),
            refused: None,
        };
        wire.exchange(&mut Encoded(request), &mut confirmed)
            .await
            .map_err(|failure| failure.error)?;
        if let Some(message) = confirmed.refused {
            return Err(wire.refused(message));
        }
        wire.set_reply_limit(message_bytes_max);
        Ok(RedisFeed {
            wire,
            message: Pushed::default(),
        })
    }
}

impl Feed for RedisFeed {
    async fn next(&mut self) -> Result<Bytes, StoreError> {
        self.wire.listen(&mut self.message).await?;
        Ok(std::mem::take(&mut self.message).payload)
    }
}

/// The reply to `SUBSCRIBE`.
struct Confirmed {
    frames: Frames,
    refused: Option<String>,
}

impl Replies for Confirmed {
    fn take(&mut self, reply: Reply<'_>) -> Result<bool, String> {
        if let Reply::Error(message) = reply {
            self.refused = Some(String::from_utf8_lossy(message).into_owned());
            return Ok(true);
        }
        self.frames.take(reply)
    }
}

/// `message`, channel, payload.
#[derive(Default)]
struct Pushed {
    taken: usize,
    payload: Bytes,
}

impl Replies for Pushed {
    fn take(&mut self, reply: Reply<'_>) -> Result<bool, String> {
        match (self.taken, reply) {
            (0, Reply::Array(3)) | (1, Reply::Bulk(b"message")) | (2, Reply::Bulk(_)) => {}
            (3, Reply::Bulk(payload)) => self.payload = Bytes::copy_from_slice(payload),
            (taken, _) => return Err(format!("no message: its part {taken} is something else")),
        }
        self.taken += 1;
        Ok(self.taken == 4)
    }
}
