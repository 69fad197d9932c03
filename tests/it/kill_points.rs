//! A kill at every named step of sealing, sending, answering, removing and recovering. After a
//! restart every total is exact: what was acknowledged is there, once.
//!
//! Built with the feature `fail-points`: `cargo test --features fail-points --test it kill_points`.

use std::collections::HashSet;

use serde_json::Value as Json;

use crate::crash::Bounds;
use crate::support::daemon::Daemon;
use crate::support::load::Load;
use crate::support::redis::RedisServer;
use crate::support::wait_until;

/// Met while a daemon starts on what a killed one left.
const AT_START: &[&str] = &[
    "recover.adopted",
    "node.written",
    "recover.named",
    "segment.created",
    "recover.created",
    "recover.begun",
    "seal.table",
    "seal.marked",
];

/// Met under load.
const UNDER_LOAD: &[&str] = &[
    "append.written",
    "epoch.closed",
    "seal.closed",
    "seal.table",
    "seal.marked",
    "seal.done",
    "claim.done",
    "batch.ready",
    "batch.answered",
    "reject.written",
    "batch.noted",
    "segment.created",
    "segment.removed",
];

struct Case {
    redis: RedisServer,
    daemon: Daemon,
    name: String,
    bounds: Bounds,
    /// Sum of what was sent to a key that holds no counter.
    refused: i64,
}

impl Case {
    /// A daemon killed with batches applied, retained, rejected and pending.
    fn new(name: &str) -> Self {
        let redis = RedisServer::start(&[]);
        redis.cli(&["RPUSH", "list", "x"]);
        let daemon = Daemon::builder(redis.url())
            .flush_interval("3ms")
            .set("flush.batch_keys", 2)
            .set("flush.retain", "10ms")
            .set("reply.cold", "delta")
            .start();
        let mut case = Case {
            redis,
            daemon,
            name: name.to_owned(),
            bounds: Bounds::default(),
            refused: 0,
        };
        case.load(|load, _| load.wait_acknowledged(200));
        case
    }

    /// Loads the daemon until `until` is satisfied, then kills it if it lives.
    fn load(&mut self, until: impl FnOnce(&Load, &mut Daemon)) {
        // Taken before the daemon knows what the key holds; refused at the flush.
        if let Ok(mut client) = tallyd_client(&self.daemon)
            && client
                .try_command(&["INCRBY", "list", "7"])
                .is_ok_and(|value| is_integer(&value))
        {
            self.refused += 7;
        }
        let load = Load::start(self.daemon.socket(), &self.name, 5, 3);
        until(&load, &mut self.daemon);
        if self.daemon.is_running() {
            self.daemon.kill9();
        }
        self.bounds.add(&load.join());
    }

    fn assert_exact(mut self) {
        self.daemon.arm(None);
        self.daemon.restart();
        self.daemon.flush();
        self.bounds.assert_hold(&self.redis);
        let file = self.daemon.state_dir().join("rejected.jsonl");
        let lines = std::fs::read_to_string(file).unwrap();
        let mut batches = HashSet::new();
        let rejected: i64 = lines
            .lines()
            .map(|line| serde_json::from_str::<Json>(line).unwrap())
            .filter(|line| batches.insert(line["batch"].as_u64().unwrap()))
            .map(|line| line["delta"].as_i64().unwrap())
            .sum();
        assert_eq!(rejected % 7, 0);
        // The answer to the last one may have been lost with the daemon.
        let bounds = self.refused..=self.refused + 7;
        assert!(
            bounds.contains(&rejected),
            "{rejected} rejected, must be in {bounds:?}"
        );
    }
}

fn tallyd_client(daemon: &Daemon) -> std::io::Result<crate::support::resp::Client> {
    crate::support::resp::Client::unix(daemon.socket())
}

fn is_integer(value: &crate::support::resp::Value) -> bool {
    matches!(value, crate::support::resp::Value::Integer(_))
}

#[test]
fn a_kill_at_any_step_of_a_start_loses_nothing_and_counts_nothing_twice() {
    for point in AT_START {
        let mut case = Case::new(point);
        case.daemon.arm(Some(&format!("{point}@1")));
        if case.daemon.restart_armed() {
            // Met by the daemon's stages, just behind its first answer.
            case.load(|_, daemon| wait_until(point, || daemon.has_died()));
        }
        case.assert_exact();
    }
}

#[test]
fn a_kill_at_any_step_under_load_loses_nothing_and_counts_nothing_twice() {
    for point in UNDER_LOAD {
        // The last two are met once in a life.
        let passages: &[u32] = match *point {
            "claim.done" | "reject.written" => &[1],
            _ => &[2, 3, 7],
        };
        for passage in passages {
            let mut case = Case::new(point);
            case.daemon.arm(Some(&format!("{point}@{passage}")));
            if case.daemon.restart_armed() {
                case.load(|_, daemon| wait_until(point, || daemon.has_died()));
            }
            case.assert_exact();
        }
    }
}

/// Guards that the books have sources of their own: a defect on the way to the store shows in them.
#[test]
fn what_is_lost_on_the_way_shows_in_the_books() {
    let redis = RedisServer::start(&[]);
    let daemon = Daemon::builder(redis.url())
        .flush_interval("1h")
        .env("TALLYD_LOSE_POINT", "batch.amounts@2")
        .start();
    let mut client = daemon.client();
    let flush = |client: &mut crate::support::resp::Client| {
        client.command(&["TALLY.FLUSH", "50000"]);
        let info = client.command(&["INFO", "tallyd"]).text();
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix("tallyd_conservation_difference:"));
        line.unwrap().parse::<i64>().unwrap()
    };
    client.command(&["INCRBY", "k", "3"]);
    assert_eq!(flush(&mut client), 0);
    client.command(&["INCRBY", "k", "5"]);
    assert_eq!(flush(&mut client), 5);
    assert_eq!(redis.counter("k"), 3);
}
