//! What every connection begins with, and what a lane must know before it may apply anything.
//!
//! All of it is one round trip. That is correct because every command in it is harmless whatever
//! became of those before it: where `AUTH`, `SELECT` or `MULTI` was refused, what follows reads,
//! watches, or sets a key that does not exist on the condition that it does.
//!
//! Invariants:
//! 1. The probe comes before `WATCH`, because `EXEC` drops every watch.
//! 2. `GET token` comes after `WATCH token`: a change after that `GET` aborts the first batch.
//! 3. What the server says about `AUTH` is not repeated but for its code: it is of no more use.

use ::redis::RedisConnectionInfo;

use super::codec::put_whole;
use super::exchange::{Encoded, Failure, Wire};
use super::replies::{Frame, Frames};
use super::server_error::{code, concerns_all};
use crate::store::{Standing, StoreError, StoreId, Token, clock_key, store_key};

/// A longer token is cut in error messages, in bytes.
const SHOWN_BYTES_MAX: usize = 64;

/// What a lane finds: `None` in the place of all that could not be asked.
const SERVER_UNKNOWN: &str = "unknown";

/// Collects commands, and remembers which reply is whose.
struct Script {
    request: Vec<u8>,
    replies: usize,
}

impl Script {
    fn new() -> Self {
        Self {
            request: Vec::new(),
            replies: 0,
        }
    }

    /// Adds a command; gives the index of its reply.
    fn add(&mut self, parts: &[&[u8]]) -> usize {
        put_whole(&mut self.request, parts);
        self.replies += 1;
        self.replies - 1
    }

    /// Adds who we are and which database we mean, as far as either is configured.
    fn add_login(&mut self, login: &RedisConnectionInfo) -> Login {
        let auth = match (login.username(), login.password()) {
            (Some(user), Some(password)) => {
                Some(self.add(&[b"AUTH", user.as_bytes(), password.as_bytes()]))
            }
            (None, Some(password)) => Some(self.add(&[b"AUTH", password.as_bytes()])),
            _ => None,
        };
        let select =
            (login.db() != 0).then(|| self.add(&[b"SELECT", login.db().to_string().as_bytes()]));
        Login { auth, select }
    }

    /// Sends it; all its replies, or why there are none.
    async fn run(self, wire: &mut Wire) -> Result<Vec<Frame>, StoreError> {
        let mut frames = Frames::new(self.replies);
        match wire.exchange(&mut Encoded(self.request), &mut frames).await {
            Ok(()) => Ok(frames.seen),
            // A server that takes no more clients, or none from here, says so and hangs up.
            Err(Failure { error, .. }) => Err(match frames.seen.into_iter().next() {
                Some(Frame::Error(message)) if code(&message) != "NOAUTH" => wire.refused(message),
                _ => error,
            }),
        }
    }
}

/// Where the replies to `AUTH` and `SELECT` are.
struct Login {
    auth: Option<usize>,
    select: Option<usize>,
}

impl Login {
    fn check(
        &self,
        wire: &Wire,
        frames: &[Frame],
        login: &RedisConnectionInfo,
    ) -> Result<(), StoreError> {
        if let Some(Frame::Error(message)) = self.auth.and_then(|at| frames.get(at)) {
            let who = login.username().unwrap_or("default");
            return Err(match code(message) {
                "ERR" => wire.refused(format!(
                    "ERR the server refused AUTH as user {who:?}: has it a password set?"
                )),
                other => wire.refused(format!("{other} the server refused AUTH as user {who:?}")),
            });
        }
        if let Some(Frame::Error(message)) = self.select.and_then(|at| frames.get(at)) {
            return Err(wire.refused(format!("{message} (SELECT {})", login.db())));
        }
        Ok(())
    }
}

/// Logs in on a connection that is used for reads or for publishing.
///
/// # Errors
/// Any [`StoreError`].
pub(super) async fn log_in(wire: &mut Wire, login: &RedisConnectionInfo) -> Result<(), StoreError> {
    let mut script = Script::new();
    let asked = script.add_login(login);
    if script.replies == 0 {
        return Ok(());
    }
    let frames = script.run(wire).await?;
    asked.check(wire, &frames, login)
}

/// Logs in, makes sure that exactly-once is possible here, watches the token and reads it.
///
/// # Errors
/// Any [`StoreError`]; [`StoreError::Refused`] where the server or the user's permissions do not
/// allow such transactions.
pub(super) async fn open_exactly_once(
    wire: &mut Wire,
    login: &RedisConnectionInfo,
    token_key: &str,
    store_id: &str,
) -> Result<Standing, StoreError> {
    let probe_key = format!("{token_key}:probe");
    let key = token_key.as_bytes();
    let mut script = Script::new();
    let asked = script.add_login(login);
    // A name for operators' CLIENT LIST; servers that do not know it may refuse.
    script.add(&[b"CLIENT", b"SETNAME", b"tallyd"]);
    let multi = script.add(&[b"MULTI"]);
    // XX on a key that nobody makes: changes nothing, and tells whether SET knows GET. Where it
    // does not (before Redis 6.2), a batch would run without moving its token.
    let set = script.add(&[b"SET", probe_key.as_bytes(), b"0", b"XX", b"GET"]);
    let exec = script.add(&[b"EXEC"]);
    let store = script.add(&[b"GET", store_key().as_bytes()]);
    let watch = script.add(&[b"WATCH", key]);
    let token = script.add(&[b"GET", key]);
    let clock = script.add(&[b"GET", clock_key().as_bytes()]);
    let server = script.add(&[b"INFO", b"server"]);
    let replication = script.add(&[b"INFO", b"replication"]);
    let policy = script.add(&[b"CONFIG", b"GET", b"maxmemory-policy"]);
    let frames = script.run(wire).await?;
    asked.check(wire, &frames, login)?;

    let reply = |at: usize| frames.get(at).unwrap_or(&Frame::Nil);
    single_server(wire, reply(server))?;
    for at in [multi, set, exec, watch] {
        if let Frame::Error(message) = reply(at) {
            return Err(impossible(wire, message));
        }
    }
    match reply(exec) {
        Frame::Array(results) => match results.as_slice() {
            [Frame::Nil] => {}
            [Frame::Error(message)] => return Err(impossible(wire, message)),
            other => return Err(wire.protocol(format!("the probe gave {other:?}"))),
        },
        other => return Err(wire.protocol(format!("the probe's EXEC gave {other:?}"))),
    }
    let store = match reply(store) {
        Frame::Nil => name_store(wire, store_id).await?,
        found => parse_store(wire, found)?,
    };
    Ok(Standing {
        token: parse_token(wire, token_key, reply(token))?,
        store: Some(store),
        clock: parse_clock(wire, reply(clock))?,
        server: server_id(reply(server), reply(replication)),
        warnings: eviction_warning(reply(policy)).into_iter().collect(),
    })
}

/// Logs in and reads the clock. Nothing else is asked, as the proxies that this is for may close
/// a connection for a command that they do not know.
///
/// # Errors
/// Any [`StoreError`].
pub(super) async fn open_at_least_once(
    wire: &mut Wire,
    login: &RedisConnectionInfo,
) -> Result<Standing, StoreError> {
    let mut script = Script::new();
    let asked = script.add_login(login);
    let clock = script.add(&[b"GET", clock_key().as_bytes()]);
    let frames = script.run(wire).await?;
    asked.check(wire, &frames, login)?;
    Ok(Standing {
        token: None,
        clock: parse_clock(wire, frames.get(clock).unwrap_or(&Frame::Nil))?,
        server: SERVER_UNKNOWN.to_owned(),
        store: None,
        warnings: Vec::new(),
    })
}

/// What is no single server is called what it is, before its refusals are.
fn single_server(wire: &Wire, server: &Frame) -> Result<(), StoreError> {
    // Valkey has a name of its own for it.
    let mode = info_field(server, "redis_mode").or_else(|| info_field(server, "server_mode"));
    let what = match mode {
        Some("cluster") => "a node of a Redis Cluster, and this tallyd flushes to a single server",
        Some("sentinel") => "a Sentinel: redis+sentinel://HOST:PORT/NAME asks it for its master",
        _ => return Ok(()),
    };
    Err(wire.refused(format!("this is {what}")))
}

/// The server refuses what exactly-once stands on.
fn impossible(wire: &Wire, message: &str) -> StoreError {
    if concerns_all(message) && code(message) != "EXECABORT" {
        return wire.refused(message);
    }
    wire.refused(format!(
        "{message} (exactly-once flushes need MULTI, EXEC, WATCH and SET … GET of Redis 6.2; where \
         they cannot be had, flush.delivery = \"at-least-once\" is the alternative)"
    ))
}

fn parse_token(wire: &Wire, key: &str, frame: &Frame) -> Result<Option<Token>, StoreError> {
    let mend = "somebody wrote to it; once it is deleted (DEL), flushing goes on";
    match frame {
        Frame::Nil => Ok(None),
        Frame::Bulk(value) => std::str::from_utf8(value)
            .ok()
            .and_then(|text| text.parse().ok())
            .map(Some)
            .ok_or_else(|| {
                let shown = value.get(..SHOWN_BYTES_MAX).unwrap_or(value);
                wire.protocol(format!(
                    "key {key} holds \"{}\", which is no token (\"<batch> <run>\"): {mend}",
                    shown.escape_ascii()
                ))
            }),
        Frame::Error(message) if code(message) == "WRONGTYPE" => {
            Err(wire.protocol(format!("key {key} holds no token ({message}): {mend}")))
        }
        Frame::Error(message) => Err(wire.refused(format!("{message} (GET {key})"))),
        other => Err(wire.protocol(format!("GET {key} gave {other:?}"))),
    }
}

fn parse_clock(wire: &Wire, frame: &Frame) -> Result<u64, StoreError> {
    let key = clock_key();
    let mend = "somebody wrote to it; set it to a number above every clock seen so far (such as \
                1000000000000000), and values are read anew";
    match frame {
        Frame::Nil => Ok(0),
        Frame::Bulk(value) => std::str::from_utf8(value)
            .ok()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| {
                let shown = value.get(..SHOWN_BYTES_MAX).unwrap_or(value);
                wire.protocol(format!(
                    "key {key} holds \"{}\", which is no clock: {mend}",
                    shown.escape_ascii()
                ))
            }),
        Frame::Error(message) if code(message) == "WRONGTYPE" => {
            Err(wire.protocol(format!("key {key} holds no clock ({message}): {mend}")))
        }
        Frame::Error(message) => Err(wire.refused(format!("{message} (GET {key})"))),
        other => Err(wire.protocol(format!("GET {key} gave {other:?}"))),
    }
}

/// Gives the store an id, unless somebody else was sooner. Only once all else is well: it writes.
async fn name_store(wire: &mut Wire, id: &str) -> Result<StoreId, StoreError> {
    let key = store_key();
    let mut script = Script::new();
    let named = script.add(&[b"SET", key.as_bytes(), id.as_bytes(), b"NX"]);
    let store = script.add(&[b"GET", key.as_bytes()]);
    let frames = script.run(wire).await?;
    if let Some(Frame::Error(message)) = frames.get(named) {
        return Err(wire.refused(format!("{message} (SET {key})")));
    }
    parse_store(wire, frames.get(store).unwrap_or(&Frame::Nil))
}

fn parse_store(wire: &Wire, frame: &Frame) -> Result<StoreId, StoreError> {
    let key = store_key();
    let is_id = |value: &[u8]| value.len() == 32 && value.iter().all(u8::is_ascii_hexdigit);
    match frame {
        Frame::Bulk(value) if is_id(value) => Ok(StoreId {
            id: format!("redis:{}", String::from_utf8_lossy(value)),
            // Who finds none gives it the one that it knows, if any.
            is_new: false,
        }),
        Frame::Error(message) => Err(wire.refused(format!("{message} (GET {key})"))),
        _ => Err(wire.protocol(format!(
            "key {key} holds no store id: somebody wrote to it; once it is deleted (DEL), flushing goes on"
        ))),
    }
}

/// `run_id/master_replid`, or "unknown" where either is not told.
fn server_id(server: &Frame, replication: &Frame) -> String {
    match (
        info_field(server, "run_id"),
        info_field(replication, "master_replid"),
    ) {
        (Some(run_id), Some(replid)) => format!("{run_id}/{replid}"),
        _ => SERVER_UNKNOWN.to_owned(),
    }
}

fn info_field<'f>(info: &'f Frame, name: &str) -> Option<&'f str> {
    let Frame::Bulk(text) = info else {
        return None;
    };
    std::str::from_utf8(text)
        .ok()?
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
}

/// The token has no time to live, so only the `allkeys` policies can evict it.
fn eviction_warning(policy: &Frame) -> Option<String> {
    let Frame::Array(pair) = policy else {
        return None;
    };
    let [_, Frame::Bulk(value)] = pair.as_slice() else {
        return None;
    };
    value.starts_with(b"allkeys-").then(|| {
        format!(
            "the server's maxmemory-policy is {}: it may evict counters, and the token that keeps \
             batches from counting twice; use noeviction or a volatile-* policy",
            value.escape_ascii()
        )
    })
}
