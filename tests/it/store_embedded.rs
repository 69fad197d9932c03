//! The embedded store keeps the promises that the Redis store keeps.

use bytes::Bytes;
use tallyd::store::embedded::EmbeddedStore;
use tallyd::store::{Claim, KeyError, Lane, Store, StoreError, Token};

use crate::store_support::{apply, assert_token_moved, claim, deltas, identity, refused_whole};

#[tokio::test]
async fn batches_are_applied_and_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let id;
    {
        let store = EmbeddedStore::open(&path, identity(1)).unwrap();
        let (mut lane, standing) = store.connect().await.unwrap();
        id = standing.server.clone();
        assert_eq!((standing.token, standing.clock), (None, 0));
        let first = apply(&mut lane, 7, &[("a", 5), ("a", 1), ("c", i64::MAX)]).await;
        assert_eq!(first, (vec![Ok(5), Ok(6), Ok(i64::MAX)], 1));
        let second = apply(&mut lane, 8, &[("c", 1), ("a", -6)]).await;
        assert_eq!(second, (vec![Err(KeyError::Overflow), Ok(0)], 2));
        store.publish(b"nobody listens").await.unwrap();
        // In use: refused, not shared.
        let error = EmbeddedStore::open(&path, identity(2)).err().unwrap();
        assert!(matches!(error, StoreError::Embedded { .. }), "{error:?}");
    }
    let store = EmbeddedStore::open(&path, identity(2)).unwrap();
    let (_, standing) = store.connect().await.unwrap();
    let run = identity(1).run;
    assert_eq!(standing.token, Some(Token { batch: 8, run }));
    assert_eq!((standing.clock, standing.server), (2, id));
    let keys = ["a", "none", "c"].map(Bytes::from);
    let reading = store.read(&keys).await.unwrap();
    assert_eq!(reading.values, [Ok(Some(0)), Ok(None), Ok(Some(i64::MAX))]);
    assert_eq!(reading.clock, 2);
    assert!(store.read(&vec![Bytes::from("a"); 1001]).await.is_err());
}

#[tokio::test]
async fn a_claim_fences_off_an_older_lane() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&dir.path().join("store.redb"), identity(1)).unwrap();
    let (mut old, _) = store.connect().await.unwrap();
    apply(&mut old, 1, &[("a", 1)]).await;
    let (mut lane, _) = store.connect().await.unwrap();
    let (mut rival, _) = store.connect().await.unwrap();
    claim(&mut lane, 5).await;
    // Guarded by the comparison in `move_token`: without it both are applied.
    assert_token_moved(&old.apply(2, &deltas(&[("a", 10)])).await);
    assert!(refused_whole(old.apply(2, &deltas(&[("a", 10)])).await).contains("spent"));
    assert!(matches!(rival.claim(1).await, Claim::TokenMoved));
    assert_eq!(apply(&mut lane, 6, &[("a", 100)]).await, (vec![Ok(101)], 2));
    refused_whole(lane.apply(9, &deltas(&[("a", 100)])).await);
}
