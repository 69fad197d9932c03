//! Clients that increment as fast as they can, each its own key, and count what was acknowledged,
//! until they are stopped or their connection ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::{self, JoinHandle};

use super::resp::{Client, Value, encode, encode_into};
use super::wait_until;

/// What one client did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted {
    pub key: String,
    /// Increments that were sent, at least in part.
    pub sent: i64,
    /// Increments whose reply arrived.
    pub acknowledged: i64,
}

/// A number of running clients.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicI64>,
    workers: Vec<JoinHandle<Counted>>,
}

impl Load {
    /// Starts `clients` clients with keys `{name}:0`, `{name}:1` …, each of which sends `pipeline` increments
    /// at a time and then reads their replies.
    pub fn start(socket: &Path, name: &str, clients: usize, pipeline: usize) -> Self {
        Self::on_keys(
            socket,
            (0..clients).map(|number| format!("{name}:{number}")),
            pipeline,
        )
    }

    /// The same where the store loses writes: until they are sent again, replies may be lower than before.
    pub fn start_amid_losses(socket: &Path, name: &str, clients: usize, pipeline: usize) -> Self {
        let keys = (0..clients).map(|number| format!("{name}:{number}"));
        Self::spawn(socket, keys, pipeline, false)
    }

    /// The same with keys of their own making.
    pub fn on_keys(socket: &Path, keys: impl IntoIterator<Item = String>, pipeline: usize) -> Self {
        Self::spawn(socket, keys, pipeline, true)
    }

    fn spawn(
        socket: &Path,
        keys: impl IntoIterator<Item = String>,
        pipeline: usize,
        rises: bool,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicI64::new(0));
        let workers = keys
            .into_iter()
            .map(|key| {
                let worker = Worker {
                    socket: socket.to_path_buf(),
                    key,
                    pipeline,
                    rises,
                    stop: Arc::clone(&stop),
                    acknowledged: Arc::clone(&acknowledged),
                };
                thread::spawn(move || worker.run())
            })
            .collect();
        Self {
            stop,
            acknowledged,
            workers,
        }
    }

    /// Waits until so many increments were acknowledged, over all clients.
    #[track_caller]
    pub fn wait_acknowledged(&self, count: i64) {
        wait_until("the load gets through", || {
            self.acknowledged.load(Ordering::Relaxed) >= count
        });
    }

    /// Ends the load in order: what was sent is answered.
    #[track_caller]
    pub fn stop(self) -> Vec<Counted> {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Waits until every client's connection has ended.
    #[track_caller]
    pub fn join(self) -> Vec<Counted> {
        self.workers
            .into_iter()
            .map(|worker| {
                worker
                    .join()
                    .expect("a client was answered with an error, or out of order")
            })
            .collect()
    }
}

struct Worker {
    socket: PathBuf,
    key: String,
    pipeline: usize,
    /// Whether each reply is higher than the one before.
    rises: bool,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicI64>,
}

impl Worker {
    fn run(self) -> Counted {
        let mut counted = Counted {
            key: self.key.clone(),
            sent: 0,
            acknowledged: 0,
        };
        // The daemon may be gone before this client had its turn.
        let Ok(mut client) = Client::unix(&self.socket) else {
            return counted;
        };
        let burst = encode(&["INCR", &self.key]).repeat(self.pipeline);
        let mut last = i64::MIN;
        while !self.stop.load(Ordering::Relaxed) {
            counted.sent += self.pipeline as i64;
            // A connection that broke may still hold replies: they count.
            let alive = client.send_raw(&burst).is_ok();
            for _ in 0..self.pipeline {
                match client.read() {
                    Ok(Value::Integer(value)) => {
                        assert!(
                            value > last || !self.rises,
                            "{}: {value} after {last}",
                            self.key
                        );
                        last = value;
                        counted.acknowledged += 1;
                        self.acknowledged.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(other) => panic!("{}: {other:?}", self.key),
                    Err(_) => return counted,
                }
            }
            if !alive {
                break;
            }
        }
        counted
    }
}

/// Increments `{name}:{n}` once each, many at a time: how many were taken before the first refusal,
/// and how that was worded. After it all must be refused.
#[track_caller]
pub fn fill(client: &mut Client, name: &str, keys: usize) -> (usize, Option<String>) {
    let mut taken = 0;
    let mut refusal = None;
    for from in (0..keys).step_by(500) {
        let mut bytes = Vec::new();
        let to = (from + 500).min(keys);
        for n in from..to {
            encode_into(&mut bytes, &["INCR", &format!("{name}:{n}")]);
        }
        client.send_raw(&bytes).unwrap();
        for n in from..to {
            match client.read().unwrap() {
                Value::Integer(_) => {
                    assert_eq!(refusal, None, "{name}:{n} was taken after a refusal");
                    taken += 1;
                }
                Value::Error(text) => refusal = Some(text),
                other => panic!("{other:?}"),
            }
        }
        if refusal.is_some() {
            break;
        }
    }
    (taken, refusal)
}
