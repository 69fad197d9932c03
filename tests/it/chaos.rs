//! Promises 1 to 4 at once, on real processes: two daemons, a Redis with a replica, clients that
//! never rest, and for a while everything breaks at random: connections are cut, held and delivered
//! late, a daemon is killed, Redis stands still, comes back with an older data set, or is replaced
//! by a replica that lags. Afterwards every counter is compared with what the clients counted.
//!
//! `TALLYD_CHAOS_SECONDS` sets how long it lasts, `TALLYD_TEST_SEED` repeats the same faults (not
//! the same interleaving).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::support::daemon::Daemon;
use crate::support::proxy::{Direction, Proxy};
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value, encode_into};
use crate::support::{seed, wait_until};

/// Without `TALLYD_CHAOS_SECONDS`.
const SECONDS: u64 = 40;
const CLIENTS: usize = 4;
const KEYS: usize = 6;
/// Longer than the store ever goes back in time here.
const RETAIN: &str = "20s";

/// By key: what was acknowledged, and what was sent.
type Tally = BTreeMap<String, (i64, i64)>;

/// A client that connects again and again, or, `never_cut`, must never have to.
struct Worker {
    socket: PathBuf,
    keys: Vec<String>,
    rng: fastrand::Rng,
    never_cut: bool,
    stop: Arc<AtomicBool>,
    bursts: Arc<AtomicUsize>,
}

impl Worker {
    fn run(mut self) -> Tally {
        let mut tally = Tally::new();
        while !self.stop.load(Ordering::Relaxed) {
            let end = Client::unix(&self.socket).and_then(|client| self.talk(client, &mut tally));
            if let Err(error) = end {
                assert!(!self.never_cut, "{}: {error}", self.keys[0]);
                thread::sleep(Duration::from_millis(10));
            }
        }
        tally
    }

    fn talk(&mut self, mut client: Client, tally: &mut Tally) -> std::io::Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            let mut bytes = Vec::new();
            let burst: Vec<(String, i64)> = (0..self.rng.usize(1..30))
                .map(|_| {
                    (
                        self.rng.choice(&self.keys).cloned().unwrap(),
                        self.rng.i64(1..5),
                    )
                })
                .collect();
            for (key, amount) in &burst {
                encode_into(&mut bytes, &["INCRBY", key, &amount.to_string()]);
                tally.entry(key.clone()).or_default().1 += amount;
            }
            client.send_raw(&bytes)?;
            for (key, amount) in &burst {
                match client.read()? {
                    Value::Integer(_) => tally.entry(key.clone()).or_default().0 += amount,
                    other => panic!("{key}: {other:?}"),
                }
            }
            self.bursts.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(self.rng.u64(0..5)));
        }
        Ok(())
    }
}

/// The clients of one daemon.
struct Crowd {
    stop: Arc<AtomicBool>,
    bursts: Arc<AtomicUsize>,
    workers: Vec<JoinHandle<Tally>>,
}

impl Crowd {
    fn start(socket: &Path, name: &str, never_cut: bool, rng: &mut fastrand::Rng) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let bursts = Arc::new(AtomicUsize::new(0));
        let workers = (0..CLIENTS)
            .map(|number| {
                let own = (0..KEYS).map(|key| format!("{name}:{number}:{key}"));
                let worker = Worker {
                    socket: socket.to_path_buf(),
                    keys: own.chain(["shared:0".into(), "shared:1".into()]).collect(),
                    rng: rng.fork(),
                    never_cut,
                    stop: Arc::clone(&stop),
                    bursts: Arc::clone(&bursts),
                };
                thread::spawn(move || worker.run())
            })
            .collect();
        Self {
            stop,
            bursts,
            workers,
        }
    }

    fn stop(self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let mut sum = Tally::new();
        for worker in self.workers {
            let tally = worker
                .join()
                .expect("a client was refused, or cut where none may be");
            for (key, (acknowledged, sent)) in tally {
                let entry = sum.entry(key).or_default();
                *entry = (entry.0 + acknowledged, entry.1 + sent);
            }
        }
        sum
    }
}

/// Redis with a replica, and what leads to it.
struct Stage {
    rng: fastrand::Rng,
    primary: RedisServer,
    replica: RedisServer,
    /// From the replica to the primary.
    link: Proxy,
    /// From each daemon to the primary.
    ways: [Proxy; 2],
    faults: BTreeMap<&'static str, u32>,
}

impl Stage {
    fn start(rng: fastrand::Rng) -> Self {
        let primary = server();
        let (replica, link) = follow(&primary);
        let ways = [(); 2].map(|()| Proxy::start(primary.address()));
        Self {
            rng,
            primary,
            replica,
            link,
            ways,
            faults: BTreeMap::new(),
        }
    }

    fn pause(&mut self, ms: std::ops::Range<u64>) {
        thread::sleep(Duration::from_millis(self.rng.u64(ms)));
    }

    fn note(&mut self, fault: &'static str) {
        *self.faults.entry(fault).or_default() += 1;
    }

    /// The replica lacks the last batches when it takes over.
    fn fail_over(&mut self) {
        self.note("fail-over");
        let replica = &self.replica;
        wait_until("the replica follows", || {
            let info = replica.cli(&["INFO", "replication"]).text();
            info.contains("master_link_status:up") || info.contains("role:master")
        });
        self.link.hold(Direction::Replies);
        self.pause(50..500);
        self.primary.kill9();
        assert_eq!(self.replica.cli(&["REPLICAOF", "NO", "ONE"]), Value::ok());
        self.link.cut_all();
        for way in &self.ways {
            way.reroute(self.replica.address());
            way.cut_all();
        }
        let (replica, link) = follow(&self.replica);
        self.primary = std::mem::replace(&mut self.replica, replica);
        self.link = link;
    }

    /// Redis comes back as it was a moment before.
    fn go_back(&mut self) {
        self.note("older data set");
        assert_eq!(self.primary.cli(&["SAVE"]), Value::ok());
        self.pause(50..400);
        self.primary.kill9();
        self.pause(0..200);
        self.primary.restart();
        // A replica of another past must not take over before it has seen this one.
        let replica = &self.replica;
        wait_until("the replica follows again", || {
            let info = replica.cli(&["INFO", "replication"]).text();
            info.contains("master_link_status:up")
        });
    }

    fn stand_still(&mut self) {
        self.note("standstill");
        self.primary.pause();
        self.pause(50..400);
        self.primary.resume();
    }

    /// Trouble on the way of one daemon.
    fn trouble(&mut self, daemon: usize) {
        let (seed, range) = (self.rng.u64(..), self.rng.u64(200..4000));
        let choice = self.rng.u8(..6);
        let way = &self.ways[daemon];
        let fault = match choice {
            0 | 1 => {
                way.cut_at_random(seed, range);
                "random cuts"
            }
            2 => {
                way.hold(Direction::Requests);
                "held requests"
            }
            3 => {
                way.hold(Direction::Replies);
                "held replies"
            }
            4 => {
                way.swallow(Direction::Replies);
                "lost replies"
            }
            _ => {
                way.refuse();
                way.cut_all();
                "no connection"
            }
        };
        self.note(fault);
    }

    /// The trouble ends; what is held arrives now, sometimes long after its sender was cut off.
    fn relief(&mut self, daemon: usize) {
        let cut = self.rng.u8(..3);
        let way = &self.ways[daemon];
        if cut > 0 {
            way.cut_daemon_side();
        }
        if cut > 0 {
            // Time enough to connect again and to deliver the same batch before the held bytes.
            self.pause(50..300);
        }
        let way = &self.ways[daemon];
        way.heal();
        // Replies that were lost never come: without this, the daemon would wait for its time-out.
        way.cut_daemon_side();
    }
}

fn server() -> RedisServer {
    RedisServer::start(&["--repl-diskless-sync-delay", "0"])
}

/// A new replica of `primary`, and what it is connected through.
fn follow(primary: &RedisServer) -> (RedisServer, Proxy) {
    let (replica, link) = (server(), Proxy::start(primary.address()));
    let port = link.address().port().to_string();
    assert_eq!(replica.cli(&["REPLICAOF", "127.0.0.1", &port]), Value::ok());
    (replica, link)
}

fn seconds() -> Duration {
    let text = std::env::var("TALLYD_CHAOS_SECONDS");
    Duration::from_secs(text.map_or(SECONDS, |text| {
        text.parse().expect("TALLYD_CHAOS_SECONDS is a number")
    }))
}

/// Guards what sections 4 and 5 of the design are made of: the journal, the token, its `WATCH`, the
/// replay of what the store has lost. Seen to fail when a token that is lower than it should be was
/// taken for the right one, when nothing was watched, and when `TALLY.FLUSH` was answered before
/// what was then found to be lost had been sent again.
#[test]
fn whatever_breaks_every_acknowledged_increment_counts_once() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let mut stage = Stage::start(rng.fork());
    let mut daemons = [0, 1].map(|n: usize| {
        Daemon::builder(stage.ways[n].url())
            .flush_interval("20ms")
            .set("flush.batch_keys", 5)
            .set("flush.retain", RETAIN)
            .start()
    });
    let cut = Crowd::start(daemons[0].socket(), "killed", false, &mut rng);
    let whole = Crowd::start(daemons[1].socket(), "living", true, &mut rng);
    wait_until("the load has begun", || {
        whole.bursts.load(Ordering::Relaxed) > 50 && cut.bursts.load(Ordering::Relaxed) > 50
    });

    let end = Instant::now() + seconds();
    let mut round = 0;
    while Instant::now() < end {
        let troubled = rng.usize(..2);
        stage.trouble(troubled);
        if rng.bool() {
            stage.trouble(1 - troubled);
        }
        stage.pause(0..300);
        // The two that matter most come in any case.
        match if round < 2 { round } else { rng.u32(..6) } {
            0 => stage.fail_over(),
            1 => {
                stage.note("kill");
                daemons[0].kill9();
                stage.pause(0..200);
                daemons[0].restart();
            }
            2 => stage.go_back(),
            3 => stage.stand_still(),
            4 => {
                stage.note("kill");
                daemons[0].kill9();
                stage.fail_over();
                daemons[0].restart();
            }
            _ => {}
        }
        stage.pause(0..300);
        stage.relief(0);
        stage.relief(1);
        let before = whole.bursts.load(Ordering::Relaxed);
        stage.pause(100..900);
        assert!(
            whole.bursts.load(Ordering::Relaxed) > before,
            "increments are not taken"
        );
        round += 1;
    }

    let (cut, whole) = (cut.stop(), whole.stop());
    for daemon in &daemons {
        daemon.flush();
    }
    eprintln!("{round} rounds: {:?}", stage.faults);
    for daemon in &daemons {
        let stats = daemon.client().command(&["TALLY.STATS"]).fields();
        assert_eq!(stats["store_conflict"].number(), 0);
        assert_eq!(stats["rejected_total"].number(), 0);
        assert_eq!(stats["sealed_keys"].number(), 0);
        assert!(
            !daemon.state_dir().join("damaged").exists(),
            "a kill damages nothing"
        );
    }
    let counters = stage.primary.counters();
    let value = |key: &String| counters.get(key.as_bytes()).copied().unwrap_or(0);
    let mut wrong = Vec::new();
    let mut sent_in_all = 0;
    for (key, (acknowledged, sent)) in &whole {
        sent_in_all += sent;
        let is_shared = key.starts_with("shared");
        let (low, high) = match cut.get(key).filter(|_| is_shared) {
            Some((a, s)) => (acknowledged + a, sent + s),
            None => (*acknowledged, *sent),
        };
        assert_eq!(acknowledged, sent, "{key}: its client was never cut");
        if !(low..=high).contains(&value(key)) {
            wrong.push(format!(
                "{key} is {}, must be in {low}..={high}",
                value(key)
            ));
        }
    }
    for (key, (low, high)) in cut.iter().filter(|(key, _)| !key.starts_with("shared")) {
        sent_in_all += high;
        if !(*low..=*high).contains(&value(key)) {
            wrong.push(format!(
                "{key} is {}, must be in {low}..={high}",
                value(key)
            ));
        }
    }
    assert!(wrong.is_empty(), "{} wrong: {wrong:#?}", wrong.len());
    assert_eq!(counters.len(), whole.len() + cut.len() - 2, "{counters:?}");
    // Otherwise all of this has shown little.
    let logs = daemons.each_ref().map(Daemon::log).concat();
    assert!(
        logs.contains("the store went back from batch"),
        "no roll-back"
    );
    eprintln!("{sent_in_all} increments, exact");
}
