//! A store that Sentinels watch: found by them, followed when it moves, and never written to where it is
//! not a master.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::store_support::free_port;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::load::Load;
use crate::support::redis::{RedisServer, is_other_server};
use crate::support::resp::{Client, Value};
use crate::support::sentinel::{Group, MASTER, Sentinel, ask, role, url};
use crate::support::{finish, wait_until};

/// Waits until the daemon's log has this.
#[track_caller]
fn wait_log(daemon: &Daemon, text: &str) {
    wait_until(&format!("the log says {text:?}"), || {
        daemon.log().contains(text)
    });
}

/// Clients count while the master is killed: what was acknowledged is on the new one, once. What the
/// replica had not got yet is sent again out of `flush.retain`.
#[test]
fn a_master_that_is_killed_under_load_is_followed_and_every_total_is_exact() {
    let mut group = Group::start(None, None);
    let daemon = Daemon::builder(group.url())
        .flush_interval("10ms")
        .set("flush.batch_keys", 3)
        .start();
    let load = Load::start_amid_losses(daemon.socket(), "killed", 8, 10);
    load.wait_acknowledged(5000);
    wait_until("flushes arrive", || {
        group.servers[0].counter("killed:0") > 0
    });
    group.servers[0].kill9();
    group.wait_named(1);
    let before = group.servers[1].counter("killed:0");
    wait_until("flushes arrive at the new master", || {
        group.servers[1].counter("killed:0") > before
    });
    let counted = load.stop();
    daemon.flush();
    for c in &counted {
        assert_eq!(
            group.servers[1].counter(&c.key),
            c.acknowledged,
            "{}",
            c.key
        );
    }

    // The old master comes back, empty and for a while as a master: it is not written to.
    group.servers[0].restart();
    let load = Load::start_amid_losses(daemon.socket(), "later", 4, 10);
    wait_until("the old master is made a replica", || {
        let stats = ask(&group.servers[0], &["INFO", "commandstats"]).text();
        if role(&group.servers[0]) == "slave" {
            return true;
        }
        assert!(
            !stats.contains("cmdstat_exec:"),
            "the old master was written to: {stats}"
        );
        false
    });
    let later = load.stop();
    daemon.flush();
    for c in counted.iter().chain(&later) {
        assert_eq!(
            group.servers[1].counter(&c.key),
            c.acknowledged,
            "{}",
            c.key
        );
    }
    wait_until("the replica has it all", || {
        group.servers[0].counters() == group.servers[1].counters()
    });
}

/// Back and forth, as for maintenance, while clients count.
#[test]
fn a_failover_by_hand_is_followed_at_once() {
    let group = Group::start(None, None);
    let daemon = Daemon::builder(group.url()).flush_interval("10ms").start();
    let load = Load::start_amid_losses(daemon.socket(), "moved", 4, 10);
    load.wait_acknowledged(1000);
    for next in [1, 0] {
        wait_until("a fail-over is possible", || {
            group.sentinels[0].cli(&["SENTINEL", "FAILOVER", MASTER]) == Value::ok()
        });
        wait_until("the Sentinel names the other server", || {
            usize::from(group.sentinels[0].master_port() == group.servers[1].address().port())
                == next
        });
        let begin = Instant::now();
        let address = group.servers[next].address();
        wait_log(
            &daemon,
            &format!("the master \"{MASTER}\" is {address} now"),
        );
        let before = group.servers[next].counter("moved:0");
        wait_until("flushes arrive there", || {
            group.servers[next].counter("moved:0") > before
        });
        assert!(begin.elapsed() < Duration::from_secs(10), "{begin:?}");
        // What hears the other nodes moves along.
        wait_until("the subscription moves", || {
            let subscribed = ["PUBSUB", "NUMSUB", "tallyd:deltas"];
            ask(&group.servers[next], &subscribed).items()[1].number() == 1
        });
        group.wait_named(next);
        wait_until("the old master is a replica in sync", || {
            let info = ask(&group.servers[next], &["INFO", "replication"]).text();
            role(&group.servers[1 - next]) == "slave" && info.contains("state=online")
        });
    }
    let counted = load.stop();
    daemon.flush();
    for c in &counted {
        assert_eq!(
            group.servers[0].counter(&c.key),
            c.acknowledged,
            "{}",
            c.key
        );
    }
}

/// A node that has nothing to flush leaves the old master as well, and counts on where the new one is.
#[test]
fn an_idle_connection_to_a_former_master_is_not_used_again() {
    let group = Group::start(None, None);
    let daemon = Daemon::builder(group.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    assert_eq!(client.number(&["INCR", "idle"]), 1);
    daemon.flush();
    assert_eq!(
        group.sentinels[0].cli(&["SENTINEL", "FAILOVER", MASTER]),
        Value::ok()
    );
    group.wait_named(1);
    wait_log(&daemon, "now, before");
    assert_eq!(client.number(&["INCR", "idle"]), 2);
    daemon.flush();
    assert_eq!(group.servers[1].counter("idle"), 2);
}

/// A replica that lacks more than `flush.retain` keeps becomes the master: what `flush.replicas` has kept
/// beyond that is sent again, though nobody counts any more.
#[test]
fn a_failover_to_a_replica_that_lags_for_long_loses_nothing_of_what_replicas_never_had() {
    let mut group = Group::start(None, None);
    let daemon = Daemon::builder(group.url())
        .flush_interval("20ms")
        .set("flush.retain", "50ms")
        .set("flush.replicas", 1)
        .start();
    let mut client = daemon.client();
    let stat =
        |client: &mut Client, name: &str| client.command(&["TALLY.STATS"]).fields()[name].number();
    assert_eq!(client.number(&["INCRBY", "kept", "5"]), 5);
    daemon.flush();
    wait_until("the replica has it and it is let go", || {
        stat(&mut client, "retained_segments") == 0
    });
    group.servers[1].pause();
    // What is in the sockets already would still arrive.
    group.servers[0].cli(&["CLIENT", "KILL", "TYPE", "replica"]);
    for n in 6..=10 {
        assert_eq!(client.number(&["INCR", "kept"]), n);
        daemon.flush();
    }
    assert_eq!(group.servers[0].counter("kept"), 10);
    wait_until("all five wait for the replica", || {
        stat(&mut client, "replicas_waiting_segments") == 5
    });
    group.servers[0].kill9();
    group.servers[1].resume();
    group.wait_named(1);
    wait_until("it is sent again", || {
        group.servers[1].counter("kept") == 10
    });
    assert_eq!(stat(&mut client, "replayed_total"), 5);
    assert!(daemon.log().contains("went back"), "{}", daemon.log());
}

/// The replica would take writes: only its role keeps the daemon from them.
#[test]
fn a_sentinel_that_names_a_replica_is_told_apart_and_nothing_is_written() {
    let master = RedisServer::start(&["--repl-diskless-sync-delay", "0"]);
    let of = master.address().port().to_string();
    let replica =
        RedisServer::start(&["--replicaof", "127.0.0.1", &of, "--replica-read-only", "no"]);
    let liar = Sentinel::start(replica.address(), 2, None, &[]);
    let daemon = Daemon::builder(url([&liar])).flush_interval("10ms").start();
    let mut client = daemon.client();
    for n in 1..=100 {
        assert_eq!(client.number(&["INCR", "lied"]), n);
    }
    let (by, named) = (liar.address(), replica.address());
    wait_log(
        &daemon,
        &format!("no master \"{MASTER}\": {by} names {named}: this is a replica, not the master"),
    );
    let info = client.command(&["INFO", "tallyd"]).text();
    assert!(info.contains("tallyd_store_error:no master"), "{info}");
    for command in ["multi", "set", "incrby", "exec", "publish"] {
        assert_eq!(replica.commandstats(command), 0, "{command}");
    }
    assert_eq!(role(&replica), "slave");

    // Another Sentinel that knows better is enough, also where the first one is asked first.
    let honest = Sentinel::start(master.address(), 2, None, &[]);
    let second = Daemon::builder(url([&liar, &honest])).start();
    assert_eq!(second.client().number(&["INCR", "honest"]), 1);
    second.flush();
    assert_eq!(master.counter("honest"), 1);
    assert_eq!(daemon.client().number(&["GET", "lied"]), 100);
}

#[test]
fn while_all_sentinels_are_away_increments_are_taken_and_the_error_says_who_was_asked() {
    let master = RedisServer::start(&[]);
    let mut sentinels = [(); 2].map(|()| Sentinel::start(master.address(), 2, None, &[]));
    let addresses = [sentinels[0].address(), sentinels[1].address()];
    sentinels.iter_mut().for_each(Sentinel::kill9);
    let daemon = Daemon::builder(url(&sentinels))
        .flush_interval("10ms")
        .start();
    let mut client = daemon.client();
    for n in 1..=50 {
        assert_eq!(client.number(&["INCR", "away"]), n);
    }
    wait_log(
        &daemon,
        &format!("cannot flush: no master \"{MASTER}\": {}: ", addresses[0]),
    );
    let log = daemon.log();
    assert!(log.contains(&format!("; {}: ", addresses[1])), "{log}");
    wait_log(&daemon, "no Sentinel answers");
    sentinels[1].restart();
    daemon.flush();
    assert_eq!(master.counter("away"), 50);

    // One that is stuck is passed over; with none left, the connections that are there still serve.
    sentinels[1].pause(true);
    sentinels[0].restart();
    let other = Daemon::builder(url([&sentinels[1], &sentinels[0]])).start();
    other.client().number(&["INCR", "stuck"]);
    other.flush();
    assert_eq!(master.counter("stuck"), 1);
    sentinels[1].kill9();
    sentinels[0].kill9();
    assert_eq!(client.number(&["INCR", "away"]), 51);
    daemon.flush();
    assert_eq!(master.counter("away"), 51);
}

#[test]
fn a_name_that_the_sentinels_do_not_know_and_a_server_that_is_none_are_called_what_they_are() {
    let master = RedisServer::start(&[]);
    let sentinel = Sentinel::start(master.address(), 2, None, &[]);
    let store = url([&sentinel]).replace(MASTER, "other");
    let daemon = Daemon::builder(store).flush_interval("10ms").start();
    daemon.client().number(&["INCR", "a"]);
    let of = sentinel.address();
    wait_log(
        &daemon,
        &format!("\"other\": {of}: it knows no master of this name"),
    );

    let store = format!("redis+sentinel://{}/{MASTER}", master.address());
    let daemon = Daemon::builder(store).flush_interval("10ms").start();
    daemon.client().number(&["INCR", "a"]);
    wait_log(&daemon, "ERR unknown command");

    // And the other way round.
    let daemon = Daemon::builder(format!("redis://{of}")).start();
    daemon.client().number(&["INCR", "a"]);
    wait_log(&daemon, "this is a Sentinel: ");
}

#[test]
fn sentinel_and_master_are_spoken_to_by_tls() {
    if is_other_server() {
        eprintln!("skipped: the other servers come without TLS");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let openssl = |args: &str| {
        let mut command = Command::new("openssl");
        command
            .args([
                "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            ])
            .args(args.split(' '));
        let (status, output) = finish(&mut command, b"");
        assert!(status.success(), "{output}");
    };
    let (authority, authority_key) = (path("ca.pem"), path("ca.key"));
    let (cert, key) = (path("c.pem"), path("c.key"));
    openssl(&format!(
        "-subj /CN=authority -keyout {authority_key} -out {authority}"
    ));
    openssl(&format!(
        "-subj /CN=tallyd -keyout {key} -out {cert} -CA {authority} -CAkey {authority_key} \
         -addext basicConstraints=critical,CA:FALSE -addext subjectAltName=IP:127.0.0.1"
    ));
    let port = free_port();
    let tls = [
        ("tls-cert-file", cert.as_str()),
        ("tls-key-file", &key),
        ("tls-ca-cert-file", &authority),
        ("tls-auth-clients", "no"),
        ("tls-replication", "yes"),
    ];
    let mut args = vec!["--tls-port".to_owned(), port.to_string()];
    let mut lines = vec!["port 0".to_owned(), "tls-port {port}".to_owned()];
    for (name, value) in tls {
        args.extend([format!("--{name}"), value.to_owned()]);
        lines.push(format!("{name} {value}"));
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let master = RedisServer::start(&args);
    let sentinel = Sentinel::start((Ipv4Addr::LOCALHOST, port).into(), 1, None, &lines);
    let store = url([&sentinel]).replace("redis+", "rediss+");
    let daemon = Daemon::builder(&store)
        .flush_interval("20ms")
        .env("SSL_CERT_FILE", &authority)
        .start();
    daemon.client().number(&["INCR", "tls"]);
    daemon.flush();
    assert_eq!(master.counter("tls"), 1);
    // A certificate that nobody here has signed is not taken.
    let daemon = Daemon::builder(&store).flush_interval("20ms").start();
    daemon.client().number(&["INCR", "tls"]);
    wait_log(&daemon, "invalid peer certificate");
    assert_eq!(master.counter("tls"), 1);
}

#[test]
fn master_and_sentinels_each_have_a_password() {
    let (of_master, of_sentinels) = ("hunter2-of-the-master", "hunter3-of-the-sentinels");
    let group = Group::start(Some(of_master), Some(of_sentinels));
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| -> PathBuf {
        let path = dir.path().join(name);
        std::fs::write(&path, format!("{text}\n")).unwrap();
        path
    };
    let master = file("master", of_master);
    let sentinels = file("sentinels", of_sentinels);
    let wrong = file("wrong", "hunter4-wrong");
    let daemon = Daemon::builder(group.url())
        .set("store.password_file", master.display())
        .set("store.sentinel_password_file", sentinels.display())
        .start();
    daemon.client().number(&["INCR", "secret"]);
    daemon.flush();
    let value = |server: &RedisServer| {
        let mut client = Client::unix(&server.socket()).unwrap();
        assert_eq!(client.command(&["AUTH", of_master]), Value::ok());
        client.number(&["GET", "secret"])
    };
    assert_eq!(value(&group.servers[0]), 1);
    assert_eq!(
        group.sentinels[0].cli(&["SENTINEL", "FAILOVER", MASTER]),
        Value::ok()
    );
    wait_until("the Sentinels name the other server", || {
        group.named() == Some(1)
    });
    daemon.client().number(&["INCR", "secret"]);
    daemon.flush();
    assert_eq!(value(&group.servers[1]), 2);

    for (masters, sentinels, said) in [
        (&master, &wrong, "WRONGPASS the server refused AUTH"),
        (&wrong, &sentinels, "WRONGPASS the server refused AUTH"),
    ] {
        let refused = Daemon::builder(group.url())
            .flush_interval("10ms")
            .set("store.password_file", masters.display())
            .set("store.sentinel_password_file", sentinels.display())
            .start();
        refused.client().number(&["INCR", "secret"]);
        wait_log(&refused, said);
        assert!(!refused.log().contains("hunter"), "{}", refused.log());
    }
    let without = Daemon::builder(group.url())
        .flush_interval("10ms")
        .set("store.password_file", master.display())
        .start();
    without.client().number(&["INCR", "secret"]);
    wait_log(&without, "NOAUTH");
}
