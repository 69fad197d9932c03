//! A shared connection for what may be asked by many at once: reads, and publishing.
//!
//! The `redis` crate's multiplexed connection, on a stream of our own that has logged in already,
//! so that TLS, credentials and what errors reveal are the same as on a lane.
//!
//! Invariants:
//! 1. A connection that gave an error, or whose driver has ended, is never used again; the next
//!    request opens another.
//! 2. The driver's task belongs to the connection and ends with it.
//! 3. A read may be sent twice, a message never.

use std::sync::Arc;

use ::redis::aio::MultiplexedConnection;
use ::redis::{
    AsyncConnectionConfig, Cmd, Pipeline, ProtocolVersion, RedisConnectionInfo, RedisError, Value,
    pipe,
};
use bytes::Bytes;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::exchange::Wire;
use super::stream::Connector;
use super::{RedisConfig, handshake, server_error};
use crate::store::{KeyError, Reading, StoreError, clock_key};

/// A connection, and the task that moves its bytes.
#[derive(Debug)]
struct Live {
    connection: MultiplexedConnection,
    driver: JoinSet<()>,
    /// Tells this connection from those before and after it.
    number: u64,
}

impl Live {
    fn is_over(&mut self) -> bool {
        self.driver.try_join_next().is_some()
    }
}

#[derive(Debug, Default)]
struct Slot {
    live: Option<Live>,
    opened: u64,
}

/// A connection that is opened when it is needed, and again after it broke.
#[derive(Debug)]
pub(super) struct Shared {
    config: Arc<RedisConfig>,
    connector: Arc<Connector>,
    // Held while connecting: the others who need it wait for the same connection.
    slot: Mutex<Slot>,
}

/// Why a request has no answer.
enum Failed {
    /// The server answered, by an error.
    Server(String),
    /// No connection, or it broke: whether a request was sent is not known.
    Lost(StoreError),
}

impl Shared {
    pub(super) fn new(config: Arc<RedisConfig>, connector: Arc<Connector>) -> Self {
        Self {
            config,
            connector,
            slot: Mutex::default(),
        }
    }

    /// Values and clock in one transaction. Where that is refused, be it for `MULTI` or for one of
    /// the keys, one by one.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) async fn read(&self, keys: &[Bytes]) -> Result<Reading, StoreError> {
        let mut request = pipe();
        request.atomic().ignore_errors();
        for key in keys {
            request.get(key.as_ref());
        }
        request.get(clock_key());
        match self.ask_again(&request).await {
            Ok(mut values) => {
                let clock = values.pop();
                self.reading(keys, values, clock)
            }
            Err(Failed::Server(message)) if is_passing(&message) => Err(self.refused(message)),
            Err(Failed::Server(_)) => self.read_plain(keys).await,
            Err(Failed::Lost(error)) => Err(error),
        }
    }

    /// The clock, then the values, without a transaction. The values are then of that moment or a
    /// later one, so a message with a higher clock still replaces them.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) async fn read_plain(&self, keys: &[Bytes]) -> Result<Reading, StoreError> {
        let mut request = pipe();
        request.ignore_errors();
        request.get(clock_key());
        for key in keys {
            request.get(key.as_ref());
        }
        match self.ask_again(&request).await {
            Ok(mut values) if !values.is_empty() => {
                let clock = Some(values.remove(0));
                self.reading(keys, values, clock)
            }
            Ok(_) => Err(self.protocol("no reply".to_owned())),
            Err(Failed::Server(message)) => Err(self.refused(message)),
            Err(Failed::Lost(error)) => Err(error),
        }
    }

    /// Publishes on the configured channel.
    ///
    /// # Errors
    /// Any [`StoreError`].
    pub(super) async fn publish(&self, message: &[u8]) -> Result<(), StoreError> {
        let mut request = pipe();
        request.add_command(Cmd::publish(&self.config.channel, message));
        match self.ask(&request).await {
            Ok(_) => Ok(()),
            Err(Failed::Server(message)) => Err(self.refused(message)),
            Err(Failed::Lost(error)) => Err(error),
        }
    }

    fn reading(
        &self,
        keys: &[Bytes],
        values: Vec<Value>,
        clock: Option<Value>,
    ) -> Result<Reading, StoreError> {
        if values.len() != keys.len() {
            let message = format!("{} values for {} keys", values.len(), keys.len());
            return Err(self.protocol(message));
        }
        let clock = match clock.map(integer) {
            Some(Ok(clock)) => u64::try_from(clock.unwrap_or(0)),
            Some(Err(error)) => {
                return Err(self.refused(format!("{error} (GET {})", clock_key())));
            }
            None => return Err(self.protocol("no clock".to_owned())),
        };
        let clock = clock.map_err(|_| self.protocol(format!("key {} is negative", clock_key())))?;
        let values: Vec<_> = values.into_iter().map(integer).collect();
        // A server that refuses everything for now has said so for each key.
        if let Some(Err(KeyError::Retry(message))) = values.first() {
            return Err(self.refused(message.clone()));
        }
        Ok(Reading { values, clock })
    }

    /// Asks; once more, on a new connection, if the one at hand turns out to be dead.
    async fn ask_again(&self, request: &Pipeline) -> Result<Vec<Value>, Failed> {
        match self.ask(request).await {
            Err(Failed::Lost(StoreError::Io { .. })) => self.ask(request).await,
            answer => answer,
        }
    }

    async fn ask(&self, request: &Pipeline) -> Result<Vec<Value>, Failed> {
        let (mut connection, number) = self.connection().await.map_err(Failed::Lost)?;
        match request.query_async::<Vec<Value>>(&mut connection).await {
            Ok(values) => Ok(values),
            Err(error) => {
                if let Some(code) = error.code() {
                    let detail = error.detail().unwrap_or_default();
                    return Err(Failed::Server(format!("{code} {detail}")));
                }
                self.discard(number).await;
                Err(Failed::Lost(self.lost(error)))
            }
        }
    }

    async fn connection(&self) -> Result<(MultiplexedConnection, u64), StoreError> {
        let mut slot = self.slot.lock().await;
        if let Some(live) = slot.live.as_mut()
            && !live.is_over()
        {
            return Ok((live.connection.clone(), live.number));
        }
        slot.live = None;
        let stream = self.connector.connect().await?;
        let address = self.connector.address().clone();
        let mut wire = Wire::new(stream, address, self.config.timeouts.connect);
        handshake::log_in(&mut wire, self.config.info.redis_settings()).await?;
        let quiet = RedisConnectionInfo::default()
            .set_protocol(ProtocolVersion::RESP2)
            .set_skip_set_lib_name();
        let settings =
            AsyncConnectionConfig::new().set_response_timeout(Some(self.config.timeouts.response));
        let (connection, driver) =
            MultiplexedConnection::new_with_config(&quiet, wire.into_stream(), settings)
                .await
                .map_err(|error| self.lost(error))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(driver);
        slot.opened += 1;
        let number = slot.opened;
        slot.live = Some(Live {
            connection: connection.clone(),
            driver: tasks,
            number,
        });
        Ok((connection, number))
    }

    /// Drops that connection, unless another has taken its place.
    async fn discard(&self, number: u64) {
        let mut slot = self.slot.lock().await;
        if slot.live.as_ref().is_some_and(|live| live.number == number) {
            slot.live = None;
        }
    }

    fn lost(&self, error: RedisError) -> StoreError {
        if error.is_timeout() {
            return StoreError::Timeout {
                address: self.connector.address().to_string(),
                seconds: self.config.timeouts.response.as_secs(),
            };
        }
        StoreError::Io {
            address: self.connector.address().to_string(),
            source: std::io::Error::other(error),
        }
    }

    fn refused(&self, message: String) -> StoreError {
        StoreError::Refused {
            address: self.connector.address().to_string(),
            message,
        }
    }

    fn protocol(&self, message: String) -> StoreError {
        StoreError::Protocol {
            address: self.connector.address().to_string(),
            message,
        }
    }
}

/// Whether asking one by one would be refused just the same.
fn is_passing(message: &str) -> bool {
    server_error::concerns_all(message) && server_error::code(message) != "EXECABORT"
}

/// What `GET` gave, as a counter.
fn integer(value: Value) -> Result<Option<i64>, KeyError> {
    match value {
        Value::Nil => Ok(None),
        Value::Int(value) => Ok(Some(value)),
        Value::BulkString(text) => std::str::from_utf8(&text)
            .ok()
            .and_then(|text| text.parse().ok())
            .map(Some)
            .ok_or(KeyError::NotInteger),
        Value::ServerError(error) => {
            let detail = error.details().unwrap_or_default();
            Err(server_error::of_key(&format!("{} {detail}", error.code())))
        }
        other => Err(KeyError::Other(format!("GET gave {other:?}"))),
    }
}
