//! A real redis-server for a test, and short ways to say what a store should do.

// What a test needs and does not get ends the test.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};
use tallyd::store::redis::{Delivery, Place, RedisConfig, RedisStore, Timeouts};
use tallyd::store::{Claim, Delta, Identity, KeyError, Lane, NodeId, Outcome, Refusal, RunId};
use tempfile::TempDir;

/// How long a test waits for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// A redis-server of its own, on a Unix socket and a free TCP port; killed when dropped.
pub struct Server {
    child: Child,
    dir: TempDir,
    pub port: u16,
}

impl Server {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// With further arguments for redis-server.
    pub fn start_with(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
            .arg("--unixsocket")
            .arg(dir.path().join("s.sock"))
            .args(["--save", "", "--dir"])
            .arg(dir.path())
            .args(args)
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        let server = Self { child, dir, port };
        let start = Instant::now();
        while UnixStream::connect(server.socket()).is_err() {
            assert!(start.elapsed() < PATIENCE, "redis-server does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s.sock")
    }

    pub fn info(&self) -> ConnectionInfo {
        ConnectionAddr::Unix(self.socket())
            .into_connection_info()
            .unwrap()
    }

    /// A store on it, with exactly-once delivery.
    pub fn store(&self) -> RedisStore {
        store_at(&self.info())
    }

    /// Runs one command as the default user and gives the reply as text.
    pub fn run(&self, command: &[&str]) -> String {
        let mut connection = redis::Client::open(self.info())
            .unwrap()
            .get_connection()
            .unwrap();
        let mut request = redis::cmd(command[0]);
        request.arg(&command[1..]);
        match request.query::<redis::Value>(&mut connection) {
            Ok(redis::Value::Nil) => "nil".to_owned(),
            Ok(value) => redis::from_redis_value::<String>(value.clone())
                .unwrap_or_else(|_| format!("{value:?}")),
            Err(error) => format!("{error}"),
        }
    }

    /// The value of a counter, 0 if there is none.
    pub fn counter(&self, key: &str) -> i64 {
        match self.run(&["GET", key]).as_str() {
            "nil" => 0,
            text => text.parse().unwrap(),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

pub const NODE: NodeId = NodeId(0xabc);

/// One run of one node.
pub fn identity(run: u64) -> Identity {
    Identity {
        node: NODE,
        run: RunId(run),
    }
}

pub fn config(info: &ConnectionInfo) -> RedisConfig {
    RedisConfig {
        place: Place::Server(info.addr().clone()),
        login: info.redis_settings().clone(),
        delivery: Delivery::ExactlyOnce,
        channel: "tallyd:deltas".to_owned(),
        timeouts: Timeouts::default(),
    }
}

pub fn store_at(info: &ConnectionInfo) -> RedisStore {
    RedisStore::new(config(info), identity(1))
}

/// Deltas of these keys and amounts.
pub fn deltas<'a>(of: &[(&'a str, i64)]) -> Vec<Delta<'a>> {
    of.iter()
        .map(|(key, amount)| Delta {
            key: key.as_bytes(),
            amount: *amount,
        })
        .collect()
}

/// Applies a batch that must be applied; its values and clock.
pub async fn apply(
    lane: &mut impl Lane,
    batch: u64,
    of: &[(&str, i64)],
) -> (Vec<Result<i64, KeyError>>, u64) {
    match lane.apply(batch, &deltas(of)).await {
        Outcome::Applied { values, clock } => (values, clock),
        other => panic!("batch {batch} was not applied: {other:?}"),
    }
}

pub async fn claim(lane: &mut impl Lane, batch: u64) {
    let claim = lane.claim(batch).await;
    assert!(matches!(claim, Claim::Claimed), "{claim:?}");
}

pub fn assert_token_moved(outcome: &Outcome) {
    assert!(
        matches!(outcome, Outcome::NotApplied(Refusal::TokenMoved)),
        "{outcome:?}"
    );
}

/// The error that refuses the batch as a whole.
pub fn refused_whole(outcome: Outcome) -> String {
    match outcome {
        Outcome::NotApplied(Refusal::Whole(error)) => error.to_string(),
        other => panic!("not refused as a whole: {other:?}"),
    }
}

/// All that an error says, its causes included.
pub fn everything(error: &impl std::error::Error) -> String {
    let mut said = format!("{error} {error:?}");
    let mut cause = error.source();
    while let Some(error) = cause {
        write!(said, " {error} {error:?}").unwrap();
        cause = error.source();
    }
    said
}

/// Waits until `done`, or fails the test.
pub async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what} does not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
