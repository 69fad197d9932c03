//! The embedded store on a disk that is full: it fails, and goes on by itself when there is room.

use std::collections::HashMap;

use bytes::Bytes;
use tallyd::store::embedded::EmbeddedStore;
use tallyd::store::{Delta, Lane, Outcome, Store};

use crate::store_support::{apply, identity};
use crate::support::daemon::{Daemon, NEVER};
use crate::support::disk::Disk;
use crate::support::resp::{Client, Value, encode_into};
use crate::support::wait_until;

/// What the log says when the store fails, and when it works again.
const FAILED: &str = "the embedded store failed";
const WORKS: &str = "the embedded store was opened again and works";

fn lines(daemon: &Daemon, what: &str) -> usize {
    daemon.log().lines().filter(|l| l.contains(what)).count()
}

/// What was acknowledged, by key.
#[derive(Default)]
struct Counted {
    by_key: HashMap<String, i64>,
    keys: usize,
}

impl Counted {
    /// Increments a key that there has always been, and new ones; a full journal refuses these.
    fn burst(&mut self, client: &mut Client, new: usize) {
        let mut keys = vec!["always".to_owned()];
        keys.extend(
            (0..new).map(|n| format!("likes:of:a:post:with:a:long:name:{}", self.keys + n)),
        );
        self.keys += new;
        let mut bytes = Vec::new();
        for key in &keys {
            encode_into(&mut bytes, &["INCRBY", key, "3"]);
        }
        client.send_raw(&bytes).unwrap();
        for key in keys {
            match client.read().unwrap() {
                Value::Integer(_) => *self.by_key.entry(key).or_default() += 3,
                Value::Error(text) => assert!(text.contains("disk"), "{text}"),
                other => panic!("{other:?}"),
            }
        }
    }

    /// Compares them with the store's file, which the daemon must have left.
    #[track_caller]
    fn assert_stored(&self, disk: &Disk) {
        let path = disk.state_dir().join("store.redb");
        let store = EmbeddedStore::open(&path, identity(1)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let keys: Vec<_> = self.by_key.keys().collect();
        for keys in keys.chunks(1000) {
            let asked: Vec<_> = keys.iter().map(|key| Bytes::from((*key).clone())).collect();
            let reading = runtime.block_on(store.read(&asked)).unwrap();
            for (key, value) in keys.iter().zip(reading.values) {
                assert_eq!(value, Ok(Some(self.by_key[*key])), "{key}");
            }
        }
    }
}

/// redb answers every call with "Previous I/O error occurred" until its file is opened again: a disk
/// that was full for a moment stopped all flushing for good.
#[test]
fn a_full_disk_stops_the_embedded_store_only_until_there_is_room() {
    let Some(disk) = Disk::mount("12m") else {
        return;
    };
    let mut daemon = Daemon::builder("embedded")
        .flush_interval(NEVER)
        .set("reply.cold", "delta")
        .state_dir(&disk.state_dir())
        .start();
    let mut client = daemon.client();
    let mut counted = Counted::default();
    for round in 1..=3 {
        counted.burst(&mut client, 100);
        daemon.flush();
        // Nothing is pending: the next segment is made and stays at hand.
        daemon.flush();
        disk.fill();
        counted.burst(&mut client, 10_000);
        let asked = client.command(&["TALLY.FLUSH", "1"]);
        assert!(matches!(asked, Value::Error(_)), "{asked:?}");
        wait_until("the store is refused room, again and again", || {
            let stats = daemon.client().command(&["TALLY.STATS"]);
            stats.fields()["retries_embedded_total"].number() >= 5 * round
        });
        assert_eq!(lines(&daemon, FAILED), round as usize, "said once");
        assert_eq!(lines(&daemon, WORKS), round as usize - 1, "not yet true");
        counted.burst(&mut client, 100);
        disk.free();
        // Nobody asks for it.
        wait_until("it is opened again", || {
            lines(&daemon, WORKS) == round as usize
        });
        counted.burst(&mut client, 100);
        daemon.flush();
    }
    assert_eq!(lines(&daemon, FAILED), 3);
    assert_eq!(lines(&daemon, "Previous I/O error"), 0);
    assert_eq!(daemon.term().code(), Some(0));
    assert_eq!(lines(&daemon, "ready"), 1, "it was never restarted");
    counted.assert_stored(&disk);
}

/// The same from within: what became of the batch, and what can be read meanwhile.
#[tokio::test]
async fn a_store_that_was_refused_room_is_read_and_written_again() {
    let Some(disk) = Disk::mount("8m") else {
        return;
    };
    std::fs::create_dir(disk.state_dir()).unwrap();
    let path = disk.state_dir().join("store.redb");
    let store = EmbeddedStore::open(&path, identity(1)).unwrap();
    let (mut lane, standing) = store.connect().await.unwrap();
    let id = standing.server;
    apply(&mut lane, 1, &[("known", 5)]).await;
    disk.fill();
    let keys: Vec<_> = (0..10_000).map(|n| format!("{n:0100}")).collect();
    let deltas: Vec<_> = std::iter::once("known")
        .chain(keys.iter().map(String::as_str))
        .map(|key| Delta {
            key: key.as_bytes(),
            amount: 2,
        })
        .collect();
    let known = [Bytes::from("known")];
    for _ in 0..5 {
        let outcome = lane.apply(2, &deltas).await;
        assert!(matches!(outcome, Outcome::Unknown(_)), "{outcome:?}");
        let (next, standing) = store.connect().await.unwrap();
        assert_eq!(standing.token.map(|token| token.batch), Some(1));
        assert_eq!((standing.clock, &standing.server), (1, &id));
        let reading = store.read(&known).await.unwrap();
        assert_eq!((reading.values, reading.clock), (vec![Ok(Some(5))], 1));
        lane = next;
    }
    disk.free();
    let outcome = lane.apply(2, &deltas).await;
    assert!(matches!(outcome, Outcome::Applied { .. }), "{outcome:?}");
    drop((lane, store));
    let store = EmbeddedStore::open(&path, identity(1)).unwrap();
    let reading = store.read(&known).await.unwrap();
    assert_eq!((reading.values, reading.clock), (vec![Ok(Some(7))], 2));
}
