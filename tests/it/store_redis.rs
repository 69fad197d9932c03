//! The Redis store on a real redis-server: what it applies, reads, publishes, and refuses.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bytes::Bytes;
use redis::{ConnectionAddr, IntoConnectionInfo};
use tallyd::store::redis::{Delivery, RedisConfig, RedisStore};
use tallyd::store::{
    Claim, KeyError, Lane, Outcome, Refusal, Store, StoreError, Token, clock_key, token_key,
};
use tokio::task::JoinSet;

use crate::store_support::{
    NODE, Server, apply, assert_token_moved, claim, config, deltas, everything, identity,
    refused_whole, store_at, until,
};

#[tokio::test]
async fn batches_are_applied_to_the_unit_and_the_token_follows() {
    let server = Server::start();
    let store = server.store();
    let (mut lane, standing) = store.connect().await.unwrap();
    assert_eq!((standing.token, standing.clock), (None, 0));
    assert!(standing.server.contains('/'), "{}", standing.server);
    assert_eq!(standing.warnings, Vec::<String>::new());

    let first = apply(&mut lane, 7, &[("a", 5), ("b", -3), ("c", i64::MAX)]).await;
    assert_eq!(first, (vec![Ok(5), Ok(-3), Ok(i64::MAX)], 1));
    let second = apply(&mut lane, 8, &[("a", 1), ("a", 1), ("c", i64::MIN)]).await;
    assert_eq!(second, (vec![Ok(6), Ok(7), Ok(-1)], 2));
    assert_eq!(apply(&mut lane, 9, &[]).await, (vec![], 3));
    assert_eq!(server.run(&["GET", &token_key(NODE)]), "9 0000000000000001");

    let (mut lane, again) = store.connect().await.unwrap();
    let run = identity(1).run;
    assert_eq!(again.token, Some(Token { batch: 9, run }));
    assert_eq!((again.clock, &again.server), (3, &standing.server));
    assert_eq!(apply(&mut lane, 10, &[("a", 1)]).await, (vec![Ok(8)], 4));
}

#[tokio::test]
async fn a_number_that_does_not_follow_is_refused_and_spends_the_lane() {
    let server = Server::start();
    let (mut lane, _) = server.store().connect().await.unwrap();
    claim(&mut lane, 4).await;
    let outcome = lane.apply(6, &deltas(&[("a", 1)])).await;
    assert!(refused_whole(outcome).contains("batch 6 does not follow"));
    // Guarded by `spent`: without it this applies.
    assert!(refused_whole(lane.apply(5, &deltas(&[("a", 1)])).await).contains("spent"));
    assert!(matches!(lane.claim(5).await, Claim::Failed(_)));
    assert_eq!(server.counter("a"), 0);
}

#[tokio::test]
async fn an_error_of_one_key_is_singled_out_and_the_others_are_applied() {
    let server = Server::start();
    server.run(&["LPUSH", "list", "x"]);
    server.run(&["SET", "text", "abc"]);
    server.run(&["SET", "high", &i64::MAX.to_string()]);
    let (mut lane, _) = server.store().connect().await.unwrap();
    let batch = [("a", 1), ("list", 1), ("text", 1), ("high", 1), ("b", 2)];
    let (values, clock) = apply(&mut lane, 1, &batch).await;
    let due = vec![
        Ok(1),
        Err(KeyError::WrongType),
        Err(KeyError::NotInteger),
        Err(KeyError::Overflow),
        Ok(2),
    ];
    assert_eq!((values, clock), (due, 1));
    // The lane is still good.
    assert_eq!(apply(&mut lane, 2, &[("a", 1)]).await.0, [Ok(2)]);
}

#[tokio::test]
async fn a_key_that_the_user_may_not_touch_is_singled_out() {
    let server = Server::start();
    let grants = ["~likes:*", "~tallyd:*", "&*", "+@all"];
    server.run(&[&["ACL", "SETUSER", "bob", "on", ">secret"][..], &grants].concat());
    let info = server.info();
    let login = info
        .redis_settings()
        .clone()
        .set_username("bob")
        .set_password("secret");
    let store = store_at(&info.set_redis_settings(login));
    let (mut lane, _) = store.connect().await.unwrap();
    let batch = deltas(&[("likes:1", 1), ("other", 1), ("likes:2", 1), ("more", 1)]);
    // Guarded by asking for INCRBY on the clock: without it this is refused as a whole,
    // and holds up all other keys for ever.
    match lane.apply(1, &batch).await {
        Outcome::NotApplied(Refusal::Keys(errors)) => {
            let at: Vec<_> = errors.iter().map(|(at, _)| *at).collect();
            assert_eq!(at, [1, 3]);
            assert!(matches!(errors[0].1, KeyError::NoPermission(_)));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(server.counter("likes:1"), 0);
    let (mut lane, _) = store.connect().await.unwrap();
    let allowed = apply(&mut lane, 1, &[("likes:1", 1), ("likes:2", 1)]).await;
    assert_eq!(allowed.0, [Ok(1), Ok(1)]);

    // The command itself taken away is not the keys' fault.
    server.run(&["ACL", "SETUSER", "bob", "-incrby"]);
    let outcome = lane
        .apply(2, &deltas(&[("likes:1", 1), ("other", 1)]))
        .await;
    assert!(refused_whole(outcome).contains("NOPERM"));

    // A reading survives such a key as well.
    let keys = [Bytes::from("likes:1"), Bytes::from("other")];
    let reading = store.read(&keys).await.unwrap();
    assert_eq!((&reading.values[0], reading.clock), (&Ok(Some(1)), 1));
    assert!(matches!(reading.values[1], Err(KeyError::NoPermission(_))));
}

#[tokio::test]
async fn a_server_that_takes_no_writes_refuses_the_whole_and_applies_nothing() {
    let server = Server::start();
    let store = server.store();
    let (mut lane, _) = store.connect().await.unwrap();
    server.run(&["CONFIG", "SET", "maxmemory", "1"]);
    let outcome = lane.apply(1, &deltas(&[("a", 1), ("b", 1)])).await;
    assert!(refused_whole(outcome).contains("OOM "));
    let error = store.connect().await.err().unwrap().to_string();
    assert!(
        error.contains("OOM ") && !error.contains("at-least-once"),
        "{error}"
    );
    server.run(&["CONFIG", "SET", "maxmemory", "0"]);

    let (mut lane, _) = store.connect().await.unwrap();
    let (mut claimant, _) = store.connect().await.unwrap();
    server.run(&["REPLICAOF", "127.0.0.1", "1"]);
    let outcome = lane.apply(1, &deltas(&[("a", 1)])).await;
    assert!(refused_whole(outcome).contains("READONLY "));
    match claimant.claim(0).await {
        Claim::Failed(error) => assert!(error.to_string().contains("READONLY "), "{error}"),
        other => panic!("{other:?}"),
    }
    server.run(&["REPLICAOF", "NO", "ONE"]);
    assert_eq!((server.counter("a"), server.counter(clock_key())), (0, 0));
    let (mut lane, _) = store.connect().await.unwrap();
    assert_eq!(apply(&mut lane, 1, &[("a", 1)]).await, (vec![Ok(1)], 1));
}

#[tokio::test]
async fn a_token_that_another_moved_aborts_the_batch() {
    let server = Server::start();
    let (mut lane, _) = server.store().connect().await.unwrap();
    apply(&mut lane, 1, &[("a", 1)]).await;
    server.run(&["SET", &token_key(NODE), "9 00000000000000ff"]);
    // Guarded by the WATCH behind the first batch: without it both run, and `a` is 2.
    assert_token_moved(&lane.apply(2, &deltas(&[("a", 1)])).await);
    assert_eq!((server.counter("a"), server.counter(clock_key())), (1, 1));
}

#[tokio::test]
async fn a_claim_fences_off_an_older_lane() {
    let server = Server::start();
    let (mut old, _) = server.store().connect().await.unwrap();
    apply(&mut old, 1, &[("a", 1)]).await;
    let next = RedisStore::new(config(&server.info()), identity(2));
    let (mut lane, standing) = next.connect().await.unwrap();
    let (mut rival, _) = next.connect().await.unwrap();
    assert_eq!(standing.token.unwrap().run, identity(1).run);
    claim(&mut lane, 1).await;
    // Guarded by the WATCH of each lane: without it the old lane applies batch 2 as well.
    assert_token_moved(&old.apply(2, &deltas(&[("a", 10)])).await);
    assert!(matches!(rival.claim(1).await, Claim::TokenMoved));
    assert_eq!(apply(&mut lane, 2, &[("a", 100)]).await.0, [Ok(101)]);
    assert_eq!(server.run(&["GET", &token_key(NODE)]), "2 0000000000000002");
}

#[tokio::test]
async fn a_malformed_token_or_clock_is_named() {
    let server = Server::start();
    for value in [
        "",
        "12",
        "12 xyz",
        "012 0000000000000001",
        "1 00000000000000001",
    ] {
        server.run(&["SET", &token_key(NODE), value]);
        let error = server.store().connect().await.err().unwrap();
        assert!(matches!(error, StoreError::Protocol { .. }), "{error:?}");
        assert!(error.to_string().contains(&token_key(NODE)), "{error}");
    }
    server.run(&["DEL", &token_key(NODE)]);
    server.run(&["LPUSH", &token_key(NODE), "1"]);
    let error = server.store().connect().await.err().unwrap();
    assert!(error.to_string().contains("WRONGTYPE"), "{error}");
    server.run(&["DEL", &token_key(NODE)]);
    server.run(&["SET", clock_key(), "noon"]);
    let error = server.store().connect().await.err().unwrap();
    assert!(error.to_string().contains(clock_key()), "{error}");
}

#[tokio::test]
async fn a_user_without_multi_gets_the_alternative_named() {
    let server = Server::start();
    for denied in ["-multi", "-watch", "-exec"] {
        server.run(&["ACL", "SETUSER", "default", "+@all", denied]);
        // Guarded by the probe: without it the INCRBYs of the first batch run one by one.
        let error = server.store().connect().await.err().unwrap();
        assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
        let said = error.to_string();
        assert!(
            said.contains("NOPERM") && said.contains("at-least-once"),
            "{said}"
        );
    }

    // Taken away under a lane that had been let in: what became of the batch is not known.
    server.run(&["ACL", "SETUSER", "default", "+@all"]);
    let (mut lane, _) = server.store().connect().await.unwrap();
    server.run(&["ACL", "SETUSER", "default", "-multi"]);
    match lane.apply(1, &deltas(&[("a", 1)])).await {
        Outcome::Unknown(error) => assert!(error.to_string().contains("MULTI was refused")),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn at_least_once_needs_no_transaction() {
    let server = Server::start();
    server.run(&[
        "ACL", "SETUSER", "default", "-multi", "-exec", "-watch", "-info",
    ]);
    server.run(&["LPUSH", "list", "x"]);
    let store = RedisStore::new(
        RedisConfig {
            delivery: Delivery::AtLeastOnce,
            ..config(&server.info())
        },
        identity(1),
    );
    let (mut lane, standing) = store.connect().await.unwrap();
    assert_eq!((standing.token, standing.clock), (None, 0));
    claim(&mut lane, 6).await;
    let (values, clock) = apply(&mut lane, 7, &[("a", 2), ("list", 1), ("b", 3)]).await;
    assert_eq!(values, [Ok(2), Err(KeyError::WrongType), Ok(3)]);
    assert_eq!(clock, 1);
    assert_eq!(server.run(&["EXISTS", &token_key(NODE)]), "0");
    let reading = store
        .read(&[Bytes::from("a"), Bytes::from("list")])
        .await
        .unwrap();
    assert_eq!(reading.values, [Ok(Some(2)), Err(KeyError::WrongType)]);
    assert_eq!(reading.clock, 1);

    server.run(&["CONFIG", "SET", "maxmemory", "1"]);
    let outcome = lane.apply(8, &deltas(&[("a", 1), ("b", 1)])).await;
    assert!(refused_whole(outcome).contains("OOM "));
}

#[tokio::test]
async fn values_are_read_with_their_clock() {
    let server = Server::start();
    let store = server.store();
    let (mut lane, _) = store.connect().await.unwrap();
    apply(&mut lane, 1, &[("a", 5), ("b", -7)]).await;
    server.run(&["SET", "text", "abc"]);
    server.run(&["LPUSH", "list", "x"]);
    let keys = ["a", "none", "b", "text", "list"].map(Bytes::from);
    let due = [
        Ok(Some(5)),
        Ok(None),
        Ok(Some(-7)),
        Err(KeyError::NotInteger),
        Err(KeyError::WrongType),
    ];
    let reading = store.read(&keys).await.unwrap();
    assert_eq!((reading.values.as_slice(), reading.clock), (&due[..], 1));
    assert!(store.read(&vec![Bytes::from("a"); 1001]).await.is_err());

    // The server drops the connection: the next read opens another by itself.
    server.run(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    assert_eq!(store.read(&keys).await.unwrap().clock, 1);

    // Many at once share the connection.
    let (store, mut reads) = (Arc::new(store), JoinSet::new());
    for _ in 0..50 {
        let (store, keys) = (Arc::clone(&store), keys.clone());
        reads.spawn(async move { store.read(&keys).await });
    }
    let many = reads.join_all().await;
    assert!(
        many.iter()
            .all(|reading| reading.as_ref().unwrap().clock == 1)
    );
}

#[tokio::test]
async fn a_message_reaches_who_subscribed() {
    let server = Server::start();
    let store = server.store();
    let client = redis::Client::open(server.info()).unwrap();
    let mut connection = client.get_connection().unwrap();
    let mut subscriber = connection.as_pubsub();
    subscriber.subscribe("tallyd:deltas").unwrap();
    store.publish(b"{\"v\":1}").await.unwrap();
    let message = subscriber.get_message().unwrap();
    assert_eq!(message.get_payload_bytes(), b"{\"v\":1}");
}

#[tokio::test]
async fn a_password_is_used_and_never_shown() {
    const PASSWORD: &str = "correct-horse";
    let server = Server::start();
    server.run(&[
        "ACL",
        "SETUSER",
        "bob",
        "on",
        &format!(">{PASSWORD}"),
        "~*",
        "&*",
        "+@all",
    ]);
    server.run(&[
        "ACL", "SETUSER", "default", "-@all", "+auth", "+acl", "+config", "+client", "+get",
    ]);
    let login = |user: &str, password: &str| {
        let info = server.info();
        let login = info
            .redis_settings()
            .clone()
            .set_username(user)
            .set_password(password);
        config(&info.set_redis_settings(login.set_db(3)))
    };
    let store = RedisStore::new(login("bob", PASSWORD), identity(1));
    let (mut lane, _) = store.connect().await.unwrap();
    apply(&mut lane, 1, &[("a", 5)]).await;
    let reading = store.read(&[Bytes::from("a")]).await.unwrap();
    assert_eq!(reading.values, [Ok(Some(5))]);
    // Database 3, not 0.
    assert_eq!(server.counter("a"), 0);

    let wrong = format!("{PASSWORD}-wrong");
    let bad = login("bob", &wrong);
    assert!(!format!("{bad:?}").contains(PASSWORD));
    let store = RedisStore::new(bad, identity(1));
    assert!(!format!("{store:?}").contains(PASSWORD));
    let errors = [
        store.connect().await.err().unwrap(),
        store.read(&[]).await.err().unwrap(),
        store.publish(b"x").await.err().unwrap(),
    ];
    for error in errors {
        let said = everything(&error);
        assert!(said.contains("WRONGPASS") && said.contains("bob"), "{said}");
        assert!(!said.contains(PASSWORD), "{said}");
    }

    let info = server.info();
    let far = info
        .redis_settings()
        .clone()
        .set_username("bob")
        .set_password(PASSWORD)
        .set_db(99);
    let error = store_at(&info.set_redis_settings(far))
        .connect()
        .await
        .err()
        .unwrap();
    assert!(error.to_string().contains("SELECT 99"), "{error}");
}

#[tokio::test]
async fn a_server_that_takes_no_more_clients_says_so() {
    let server = Server::start();
    let store = server.store();
    server.run(&["CONFIG", "SET", "maxclients", "1"]);
    // Until the connection of the command above is gone, this one may be refused as well.
    let _only = loop {
        let mut only = UnixStream::connect(server.socket()).unwrap();
        let mut answer = [0; 5];
        if only.write_all(b"PING\r\n").is_ok()
            && only.read_exact(&mut answer).is_ok()
            && &answer == b"+PONG"
        {
            break only;
        }
    };
    let error = store.connect().await.err().unwrap().to_string();
    assert!(error.contains("max number of clients"), "{error}");
}

#[tokio::test]
async fn an_eviction_policy_that_may_drop_the_token_is_a_warning() {
    let server = Server::start();
    for (policy, warnings) in [("allkeys-lru", 1), ("volatile-lru", 0), ("noeviction", 0)] {
        server.run(&["CONFIG", "SET", "maxmemory-policy", policy]);
        let (_, standing) = server.store().connect().await.unwrap();
        assert_eq!(standing.warnings.len(), warnings, "{policy}");
    }
}

#[tokio::test]
async fn a_batch_larger_than_every_buffer_goes_through() {
    let server = Server::start();
    let (mut lane, _) = server.store().connect().await.unwrap();
    let keys: Vec<String> = (0..10_000).map(|n| format!("{n:01024}")).collect();
    let batch: Vec<_> = keys.iter().map(|key| (key.as_str(), 3)).collect();
    for number in 1..=2 {
        let (values, clock) = apply(&mut lane, number, &batch).await;
        assert!(values.iter().all(|value| *value == Ok(3 * number as i64)));
        assert_eq!((values.len(), clock), (10_000, number));
    }
}

#[tokio::test]
async fn tcp_and_tls_work_like_the_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let (cert, key) = (dir.path().join("c.pem"), dir.path().join("k.pem"));
    let made = std::process::Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ])
        .args(["-subj", "/CN=localhost", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&cert)
        .stderr(std::process::Stdio::null())
        .status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("skipped: there is no openssl here");
        return;
    }
    let tls_port = crate::store_support::free_port();
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let port = tls_port.to_string();
    let server = Server::start_with(&[
        "--tls-port",
        &port,
        "--tls-cert-file",
        cert,
        "--tls-key-file",
        key,
        "--tls-ca-cert-file",
        cert,
        "--tls-auth-clients",
        "no",
    ]);
    let plain = ConnectionAddr::Tcp("127.0.0.1".to_owned(), server.port);
    let tls = |insecure| ConnectionAddr::TcpTls {
        host: "localhost".to_owned(),
        port: tls_port,
        insecure,
        tls_params: None,
    };
    for (batch, address) in [(1, plain), (2, tls(true))] {
        let store = store_at(&address.into_connection_info().unwrap());
        let (mut lane, _) = store.connect().await.unwrap();
        let keys: Vec<String> = (0..5_000).map(|n| format!("{n:0256}")).collect();
        let all: Vec<_> = keys.iter().map(|key| (key.as_str(), 1)).collect();
        let (values, _) = apply(&mut lane, batch, &all).await;
        assert!(values.iter().all(|value| *value == Ok(batch as i64)));
        let reading = store.read(&[Bytes::from(keys[0].clone())]).await.unwrap();
        assert_eq!(reading.values, [Ok(Some(batch as i64))]);
    }
    // Guarded by the check of certificates: nobody on this system has signed that one.
    let store = store_at(&tls(false).into_connection_info().unwrap());
    let error = store.connect().await.err().unwrap();
    assert!(matches!(error, StoreError::Io { .. }), "{error:?}");
}

#[tokio::test]
async fn a_server_that_is_gone_before_a_batch_leaves_no_doubt() {
    let server = Server::start();
    let store = server.store();
    let (mut lane, _) = store.connect().await.unwrap();
    server.run(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    until("the connection's end", || {
        !server.run(&["CLIENT", "LIST"]).contains("name=tallyd")
    })
    .await;
    // The runtime hears of it when it next asks the system, as it has in any idle moment.
    tokio::task::yield_now().await;
    // Guarded by the look at the connection before the first write: without it this is unknown.
    refused_whole(lane.apply(1, &deltas(&[("a", 1)])).await);
    drop(server);
    assert!(matches!(
        store.connect().await.err().unwrap(),
        StoreError::Io { .. }
    ));
}
