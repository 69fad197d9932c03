//! How fast a backlog drains to a real Redis, as ratios of one run on one machine.
//!
//! `cargo bench --bench drain`. Each way sends the same `INCRBY`s in batches of 1,000 keys, in turn,
//! several times over; the median of the rounds' ratios counts. Every way's totals are compared at the end.
//!
//! - plain: the commands encoded beforehand, written and their replies counted: what the server
//!   can do when the client costs nothing. Once batch by batch, once all in one pipeline.
//! - lane: `Lane::apply`, exactly once, and at least once.
//! - crate: the `redis` crate's pipeline with `MULTI`/`EXEC`, and without.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};
use tallyd::store::redis::{Delivery, Place, RedisConfig, RedisLane, RedisStore, Timeouts};
use tallyd::store::{Delta, Identity, Lane, NodeId, Outcome, RunId, Store};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

const BATCH_KEYS: usize = 1_000;
const BATCHES: usize = 200;
const ROUNDS: usize = 15;
const AMOUNT: i64 = 12;

type Error = Box<dyn std::error::Error>;

struct Server {
    child: Child,
    dir: tempfile::TempDir,
}

impl Server {
    fn start() -> Result<Self, Error> {
        let dir = tempfile::tempdir()?;
        let child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(dir.path().join("s.sock"))
            .arg("--dir")
            .arg(dir.path())
            .stdout(Stdio::null())
            .spawn()?;
        let server = Self { child, dir };
        let start = Instant::now();
        while std::os::unix::net::UnixStream::connect(server.socket()).is_err() {
            if start.elapsed() > Duration::from_secs(10) {
                return Err("redis-server does not start".into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s.sock")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn lane(info: &ConnectionInfo, node: u128, delivery: Delivery) -> Result<RedisLane, Error> {
    let config = RedisConfig {
        place: Place::Server(info.addr().clone()),
        login: info.redis_settings().clone(),
        delivery,
        channel: String::new(),
        timeouts: Timeouts::default(),
    };
    let identity = Identity {
        node: NodeId(node),
        run: RunId(1),
    };
    Ok(RedisStore::new(config, identity).connect().await?.0)
}

/// One way of sending all batches once.
enum Way {
    /// Pipelines of so many keys.
    Plain(UnixStream, usize),
    Lane(RedisLane, u64),
    Crate(MultiplexedConnection, bool),
}

fn encode(keys: &[String]) -> Vec<u8> {
    let amount = AMOUNT.to_string();
    let mut out = Vec::new();
    for key in keys {
        let (k, a) = (key.len(), amount.len());
        out.extend_from_slice(
            format!("*3\r\n$6\r\nINCRBY\r\n${k}\r\n{key}\r\n${a}\r\n{amount}\r\n").as_bytes(),
        );
    }
    out
}

/// Writes and reads at once; counts replies.
async fn pipeline(stream: &mut UnixStream, request: &[u8], replies: usize) -> Result<(), Error> {
    let (mut from, mut to) = stream.split();
    let reading = async {
        let mut buffer = vec![0; 64 << 10];
        let mut seen = 0;
        while seen < replies {
            let count = from.read(&mut buffer).await?;
            if count == 0 {
                return Err("the server hung up".into());
            }
            seen += buffer.iter().take(count).filter(|b| **b == b'\n').count();
        }
        Ok::<_, Error>(())
    };
    let writing = async { Ok::<_, Error>(to.write_all(request).await?) };
    tokio::try_join!(writing, reading)?;
    Ok(())
}

/// Sends everything once; how long it took.
async fn drain(way: &mut Way, keys: &[String]) -> Result<Duration, Error> {
    match way {
        Way::Plain(stream, size) => {
            let requests: Vec<_> = keys
                .chunks(*size)
                .map(|keys| (encode(keys), keys.len()))
                .collect();
            let start = Instant::now();
            for (request, replies) in &requests {
                pipeline(stream, request, *replies).await?;
            }
            Ok(start.elapsed())
        }
        Way::Lane(lane, number) => {
            let deltas: Vec<_> = keys
                .iter()
                .map(|key| Delta {
                    key: key.as_bytes(),
                    amount: AMOUNT,
                })
                .collect();
            let start = Instant::now();
            for batch in deltas.chunks(BATCH_KEYS) {
                *number += 1;
                match lane.apply(*number, batch).await {
                    Outcome::Applied { values, .. } if values.iter().all(Result::is_ok) => {}
                    other => return Err(format!("{other:?}").into()),
                }
            }
            Ok(start.elapsed())
        }
        Way::Crate(connection, atomic) => {
            let start = Instant::now();
            for batch in keys.chunks(BATCH_KEYS) {
                let mut request = redis::pipe();
                if *atomic {
                    request.atomic();
                }
                for key in batch {
                    request.incr(key, AMOUNT);
                }
                let values: Vec<i64> = request.query_async(connection).await?;
                if values.len() != batch.len() {
                    return Err("a value is missing".into());
                }
            }
            Ok(start.elapsed())
        }
    }
}

async fn ways(info: &ConnectionInfo, socket: &Path) -> Result<Vec<(&'static str, Way)>, Error> {
    let client = redis::Client::open(info.clone())?;
    let all = BATCH_KEYS * BATCHES;
    let exactly = lane(info, 1, Delivery::ExactlyOnce).await?;
    let at_least = lane(info, 2, Delivery::AtLeastOnce).await?;
    let connection = client.get_multiplexed_async_connection().await?;
    Ok(vec![
        (
            "plain",
            Way::Plain(UnixStream::connect(socket).await?, BATCH_KEYS),
        ),
        (
            "plain, one pipeline",
            Way::Plain(UnixStream::connect(socket).await?, all),
        ),
        ("lane, exactly once", Way::Lane(exactly, 0)),
        ("lane, at least once", Way::Lane(at_least, 0)),
        ("crate, MULTI/EXEC", Way::Crate(connection.clone(), true)),
        ("crate, plain", Way::Crate(connection, false)),
    ])
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let server = Server::start()?;
    let info = ConnectionAddr::Unix(server.socket()).into_connection_info()?;
    let keys: Vec<String> = (0..BATCH_KEYS * BATCHES)
        .map(|number| format!("likes:post:{number}"))
        .collect();
    let mut ways = ways(&info, &server.socket()).await?;
    let mut times = vec![Vec::new(); ways.len()];
    // The first round makes the keys, and does not count.
    for round in 0..=ROUNDS {
        for ((_, way), times) in ways.iter_mut().zip(&mut times) {
            let time = drain(way, &keys).await?;
            if round > 0 {
                times.push(time.as_secs_f64());
            }
        }
    }

    let due = AMOUNT * i64::try_from((ROUNDS + 1) * ways.len())?;
    let mut connection = redis::Client::open(info)?.get_connection()?;
    for key in &keys {
        let value: i64 = redis::cmd("GET").arg(key).query(&mut connection)?;
        if value != due {
            return Err(format!("{key} is {value}, not {due}").into());
        }
    }

    println!(
        "{} keys in batches of {BATCH_KEYS}, median of {ROUNDS} rounds; totals agree",
        keys.len()
    );
    let plain = times.first().cloned().unwrap_or_default();
    for ((name, _), times) in ways.iter().zip(&times) {
        // Each round against the plain one beside it: other work on the machine hits both.
        let mut ratios: Vec<_> = plain.iter().zip(times).map(|(p, t)| p / t).collect();
        ratios.sort_by(f64::total_cmp);
        let mut sorted = times.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |of: &[f64], index: usize| of.get(index).copied().unwrap_or(f64::NAN);
        let speed = keys.len() as f64 / at(&sorted, ROUNDS / 2);
        println!(
            "{name:20} {speed:10.0} keys/s {:6.0} ns/key  ratio {:.2} ({:.2} to {:.2})",
            1e9 / speed,
            at(&ratios, ROUNDS / 2),
            at(&ratios, 0),
            at(&ratios, ROUNDS - 1),
        );
    }
    Ok(())
}
