//! Connections that break, stall, and deliver late: whatever happens, a batch counts once.

// What a test needs and does not get ends the test.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use redis::{ConnectionAddr, IntoConnectionInfo};
use tallyd::store::redis::{RedisStore, Timeouts};
use tallyd::store::{Lane, Outcome, Store, StoreError, clock_key};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::store_support::{
    NODE, Server, apply, assert_token_moved, config, deltas, identity, store_at, until,
};
use tallyd::store::token_key;

/// Stands between a store and the server.
struct Proxy {
    path: PathBuf,
    gate: watch::Sender<Gate>,
    _tasks: JoinSet<()>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Gate {
    /// How many more bytes of requests pass, from when this was set.
    requests: u64,
    /// Whether replies pass.
    replies: bool,
}

const OPEN: Gate = Gate {
    requests: u64::MAX,
    replies: true,
};

impl Proxy {
    fn start(server: &Server, name: &str) -> Self {
        let path = server.socket().with_file_name(name);
        let listener = UnixListener::bind(&path).unwrap();
        let (gate, seen) = watch::channel(OPEN);
        let target: Arc<Path> = server.socket().into();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let server = UnixStream::connect(&target).await.unwrap();
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                connections.spawn(requests(from_client, to_server, seen.clone()));
                connections.spawn(replies(from_server, to_client, seen.clone()));
            }
        });
        Self {
            path,
            gate,
            _tasks: tasks,
        }
    }

    fn store(&self, run: u64) -> RedisStore {
        let info = ConnectionAddr::Unix(self.path.clone())
            .into_connection_info()
            .unwrap();
        let mut config = config(&info);
        config.timeouts = Timeouts {
            progress: Duration::from_millis(100),
            ..Timeouts::default()
        };
        RedisStore::new(config, identity(run))
    }
}

/// Passes requests on as the gate says. What is held when the client goes is kept, as a network
/// keeps it, and goes to the server once the gate opens.
async fn requests(
    mut from: tokio::net::unix::OwnedReadHalf,
    mut to: tokio::net::unix::OwnedWriteHalf,
    mut gate: watch::Receiver<Gate>,
) {
    let mut held = Vec::new();
    let mut over = false;
    let mut left = gate.borrow_and_update().requests;
    while !(over && held.is_empty()) {
        let count = held.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if count > 0 {
            if to.write_all(&held[..count]).await.is_err() {
                return;
            }
            held.drain(..count);
            left = left.saturating_sub(count as u64);
            continue;
        }
        tokio::select! {
            changed = gate.changed() => {
                if changed.is_err() {
                    return;
                }
                left = gate.borrow_and_update().requests;
            }
            read = from.read_buf(&mut held), if !over => over = !matches!(read, Ok(1..)),
        }
    }
}

/// Passes replies on while the gate is open, and goes on reading them when nobody wants them.
async fn replies(
    mut from: tokio::net::unix::OwnedReadHalf,
    mut to: tokio::net::unix::OwnedWriteHalf,
    gate: watch::Receiver<Gate>,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if gate.borrow().replies {
            let _ = to.write_all(&buffer[..count]).await;
        }
    }
}

#[tokio::test]
async fn bytes_that_arrive_late_count_once() {
    let server = Server::start();
    let proxy = Proxy::start(&server, "p.sock");
    let slow = proxy.store(1);
    let (mut first, _) = slow.connect().await.unwrap();
    apply(&mut first, 1, &[("a", 1)]).await;

    // Batch 2 is sent, held on its way, and given up.
    proxy.gate.send_replace(Gate {
        requests: 0,
        ..OPEN
    });
    match first.apply(2, &deltas(&[("a", 10)])).await {
        Outcome::Unknown(StoreError::Timeout { .. }) => {}
        other => panic!("{other:?}"),
    }
    drop(first);

    // It is not there, so it is sent again on another connection.
    let direct = server.store();
    let (mut second, standing) = direct.connect().await.unwrap();
    assert_eq!(standing.token.unwrap().batch, 1);
    apply(&mut second, 2, &[("a", 10)]).await;

    // Now the first one's bytes are executed after all.
    let done = commands_aborted_or_run(&server);
    proxy.gate.send_replace(OPEN);
    until("the late transaction", || {
        commands_aborted_or_run(&server) > done
    })
    .await;
    // Guarded by WATCH: without it `a` is 21.
    assert_eq!((server.counter("a"), server.counter(clock_key())), (11, 2));
    apply(&mut second, 3, &[("a", 100)]).await;
    assert_eq!(server.counter("a"), 111);
}

/// How many EXECs the server has seen.
fn commands_aborted_or_run(server: &Server) -> u64 {
    let stats = server.run(&["INFO", "commandstats"]);
    let line = stats
        .lines()
        .find_map(|line| line.strip_prefix("cmdstat_exec:calls="))
        .unwrap_or("0,");
    line.split(',').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn late_bytes_and_their_successor_in_any_order_count_once() {
    let server = Server::start();
    let proxy = Proxy::start(&server, "p.sock");
    let slow = proxy.store(1);
    let direct = server.store();
    // Bytes of one such batch, about: EXEC ends near 232.
    let request = 304;
    let mut total = 0;
    for (round, cut) in (0..=request).step_by(8).enumerate() {
        let (mut lane, standing) = slow.connect().await.unwrap();
        let next = standing.token.map_or(1, |token| token.batch + 1);
        // Cut at this byte; the rest arrives while the successor is at work.
        proxy.gate.send_replace(Gate {
            requests: cut,
            replies: false,
        });
        let outcome = lane.apply(next, &deltas(&[("a", 1), ("b", 2)])).await;
        assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
        drop(lane);
        total += 1;
        let (mut lane, standing) = direct.connect().await.unwrap();
        if round % 2 == 0 {
            proxy.gate.send_replace(OPEN);
        }
        if standing.token.map_or(0, |token| token.batch) < next {
            let again = lane.apply(next, &deltas(&[("a", 1), ("b", 2)])).await;
            if !matches!(again, Outcome::Applied { .. }) {
                // The late one was first.
                assert_token_moved(&again);
                let (_, standing) = direct.connect().await.unwrap();
                assert_eq!(standing.token.unwrap().batch, next);
            }
        }
        proxy.gate.send_replace(OPEN);
        // Guarded by WATCH, and by asking the token: without either, some round counts twice.
        assert_eq!(
            (server.counter("a"), server.counter("b")),
            (total, 2 * total),
            "cut at {cut}"
        );
    }
}

#[tokio::test]
async fn a_lost_reply_is_unknown_and_the_token_tells() {
    let server = Server::start();
    let proxy = Proxy::start(&server, "p.sock");
    let store = proxy.store(1);
    let (mut lane, _) = store.connect().await.unwrap();
    proxy.gate.send_replace(Gate {
        replies: false,
        ..OPEN
    });
    let outcome = lane.apply(1, &deltas(&[("a", 1)])).await;
    assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
    proxy.gate.send_replace(OPEN);
    let (_, standing) = store.connect().await.unwrap();
    assert_eq!(standing.token.unwrap().batch, 1);
    assert_eq!(server.counter("a"), 1);
}

#[tokio::test]
async fn a_batch_that_is_given_up_leaves_a_lane_that_refuses() {
    let server = Server::start();
    let proxy = Proxy::start(&server, "p.sock");
    let (mut lane, _) = proxy.store(1).connect().await.unwrap();
    proxy.gate.send_replace(Gate {
        replies: false,
        ..OPEN
    });
    let batch = deltas(&[("a", 1)]);
    let given_up = tokio::time::timeout(Duration::from_millis(50), lane.apply(1, &batch)).await;
    assert!(given_up.is_err());
    proxy.gate.send_replace(OPEN);
    // Guarded by `spent`, set before the first byte: without it this reads the first one's replies.
    let outcome = lane.apply(2, &batch).await;
    assert!(matches!(outcome, Outcome::NotApplied(_)), "{outcome:?}");
    assert_eq!(server.counter("a"), 1);
}

#[tokio::test]
async fn a_server_that_stands_still_is_a_timeout() {
    let server = Server::start();
    let mut config = config(&server.info());
    config.timeouts.progress = Duration::from_millis(100);
    config.timeouts.response = Duration::from_millis(100);
    let store = RedisStore::new(config, identity(1));
    let (mut lane, _) = store.connect().await.unwrap();
    server.run(&["CLIENT", "PAUSE", "400", "ALL"]);
    let (batch, reading) = (deltas(&[("a", 1)]), [bytes::Bytes::from("a")]);
    let (outcome, read) = tokio::join!(lane.apply(1, &batch), store.read(&reading));
    assert!(
        matches!(outcome, Outcome::Unknown(StoreError::Timeout { .. })),
        "{outcome:?}"
    );
    assert!(matches!(read, Err(StoreError::Timeout { .. })), "{read:?}");
    drop(lane);
    // Executed late, or dropped with its connection: the token says which, and it agrees.
    let (_, standing) = store_at(&server.info()).connect().await.unwrap();
    let applied = standing.token.map_or(0, |token| token.batch);
    assert_eq!(server.counter("a"), i64::try_from(applied).unwrap());
    assert_eq!(
        server.run(&["EXISTS", &token_key(NODE)]),
        applied.to_string()
    );
}
