//! The admin server: health over HTTP, who may ask, and clients that mean ill.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::daemon::{Daemon, NEVER, Settings};
use crate::support::http::{Address, Response};
use crate::support::redis::RedisServer;
use crate::support::wait_until;

/// A daemon whose admin server listens on a Unix socket in the directory.
fn on_socket(settings: Settings, dir: &TempDir) -> (Daemon, Address) {
    let path = dir.path().join("admin.sock");
    let settings = settings.set("admin.listen", format!("unix:{}", path.display()));
    (settings.start(), Address::Unix(path))
}

/// A daemon whose admin server listens on a port of its own choice.
pub fn on_port(settings: Settings) -> (Daemon, Address) {
    let daemon = settings.set("admin.listen", "127.0.0.1:0").start();
    let log = daemon.log();
    let address = log
        .split_once("the admin server listens address=")
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    let address = Address::Tcp(address.unwrap_or_else(|| panic!("no address in: {log}")));
    (daemon, address)
}

#[test]
fn it_answers_over_tcp_and_over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    for (daemon, admin) in [
        on_port(Daemon::builder("embedded")),
        on_socket(Daemon::builder("embedded"), &dir),
    ] {
        let health = admin.get("/healthz");
        assert_eq!((health.status, health.body.as_str()), (200, "ok\n"));
        let ready = admin.get("/readyz");
        assert_eq!((ready.status, ready.body.as_str()), (200, "ready\n"));
        let head = admin.ask("HEAD /metrics HTTP/1.1\r\nHost: localhost");
        assert_eq!((head.status, head.body.as_str()), (200, ""));
        for (path, status) in [("/metrics", 200), ("/nowhere", 404)] {
            let answer = admin.get(path);
            assert_eq!(answer.status, status, "{path}");
            assert_eq!(answer.header("cache-control"), Some("no-store"));
            assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
            let policy = answer.header("content-security-policy").unwrap();
            assert!(policy.starts_with("default-src 'none'"), "{policy}");
            assert_eq!(answer.header("access-control-allow-origin"), None);
        }
        assert!(
            admin
                .get("/nowhere")
                .body
                .contains("/healthz /readyz /metrics")
        );
        let posted = admin.ask("POST /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0");
        assert_eq!(posted.status, 405);
        assert_eq!(posted.header("allow"), Some("GET, HEAD"));
        drop(daemon);
    }
}

#[test]
fn what_a_request_brings_along_is_not_read() {
    let (_daemon, admin) = on_port(Daemon::builder("embedded"));
    let mut stream = admin.connect();
    let request = "GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nxx";
    stream.write_all(request.as_bytes()).unwrap();
    let mut bytes = Vec::new();
    // It neither waits for the rest nor takes what comes for another request.
    let _ = stream.read_to_end(&mut bytes);
    let answer = Response::of(&bytes);
    assert_eq!((answer.status, answer.body.as_str()), (200, "ok\n"));
    assert_eq!(answer.header("connection"), Some("close"));
}

#[test]
fn pages_of_strangers_are_kept_out() {
    let settings = Daemon::builder("embedded").set("node.name", "web-7");
    let (_daemon, admin) = on_port(settings);
    let ask = |more: &str| {
        admin
            .ask(&format!("GET /metrics HTTP/1.1\r\n{more}"))
            .status
    };
    // A name that the attacker's server resolves to this host.
    assert_eq!(ask("Host: evil.example"), 421);
    assert_eq!(ask(""), 400);
    assert_eq!(ask("Host: localhost\r\nHost: evil.example"), 400);
    for host in ["127.0.0.1:9464", "localhost", "web-7:9464", "[::1]"] {
        assert_eq!(ask(&format!("Host: {host}")), 200, "{host}");
    }
    let local = "Host: localhost:9464\r\n";
    for refused in [
        "Origin: https://evil.example",
        "Origin: null",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-site",
    ] {
        assert_eq!(ask(&format!("{local}{refused}")), 403, "{refused}");
    }
    assert_eq!(ask(&format!("{local}Origin: http://localhost:9464")), 200);
    assert_eq!(ask(&format!("{local}Sec-Fetch-Site: same-origin")), 200);
}

#[test]
fn an_address_that_cannot_be_had_is_an_error_at_the_start() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    let living = dir.path().join("living");
    let _living = UnixListener::bind(&living).unwrap();
    for (address, why) in [
        (taken.local_addr().unwrap().to_string(), "in use"),
        (format!("unix:{}", file.display()), "no socket"),
        (format!("unix:{}/below", file.display()), "directory"),
        (format!("unix:{}", living.display()), "listening on it"),
    ] {
        let settings = Daemon::builder("embedded").set("admin.listen", &address);
        let (code, log) = settings.run_to_exit();
        assert_eq!(code, Some(74), "{address}: {log}");
        assert!(log.contains("admin.listen"), "{address}: {log}");
        assert!(log.contains(why), "{address}: {log}");
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
}

#[test]
fn a_dead_socket_is_replaced_and_an_own_one_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, admin) = on_socket(Daemon::builder("embedded"), &dir);
    let path = dir.path().join("admin.sock");
    daemon.kill9();
    assert!(path.exists(), "a kill leaves it behind");
    daemon.restart();
    assert_eq!(admin.get("/readyz").status, 200);
    assert_eq!(daemon.term().code(), Some(0));
    assert!(!path.exists());
}

/// A load balancer must be told before the last flush, not after it.
#[test]
fn ready_says_stopping_while_the_last_flush_waits() {
    let mut redis = RedisServer::start(&[]);
    let dir = tempfile::tempdir().unwrap();
    let settings = Daemon::builder(redis.url())
        .flush_interval(NEVER)
        .set("shutdown.timeout", "50s");
    let (mut daemon, admin) = on_socket(settings, &dir);
    assert_eq!(daemon.client().number(&["INCRBY", "last", "5"]), 5);
    redis.pause();
    daemon.signal(Signal::TERM);
    wait_until("it is told", || admin.get("/readyz").status == 503);
    let ready = admin.get("/readyz");
    assert!(ready.body.starts_with("stopping"), "{ready:?}");
    // Alive all the same: a supervisor must not kill it amid the last flush.
    assert_eq!(admin.get("/healthz").status, 200);
    redis.resume();
    assert_eq!(daemon.wait_exit().code(), Some(0));
    assert_eq!(redis.counter("last"), 5);
}

/// Half a request each on more connections than it takes, headers without end, and pipelines whose
/// answers nobody reads: clients of the counters notice nothing, and the server is free again when
/// their time is over.
#[test]
fn hostile_http_clients_hold_up_nobody_for_long() {
    let (daemon, admin) = on_port(Daemon::builder("embedded"));
    let over = AtomicBool::new(false);
    let counted = thread::scope(|scope| {
        let counting = scope.spawn(|| {
            let mut client = daemon.client();
            let mut counted = 0;
            while !over.load(Ordering::Relaxed) {
                counted += 1;
                assert_eq!(client.number(&["INCR", "hit"]), counted);
            }
            counted
        });
        let ended = scope.spawn(|| {
            // Without end: refused or cut off.
            let mut flood = admin.connect();
            flood.write_all(b"GET / HTTP/1.1\r\n").unwrap();
            let cut =
                (0..10_000).any(|n| flood.write_all(format!("X{n}: y\r\n").as_bytes()).is_err());
            let mut answer = Vec::new();
            let _ = flood.read_to_end(&mut answer);
            assert!(cut || !answer.is_empty(), "headers without end are taken");

            // Never reads: its own writes fail when it is given up. Before the crowd comes in.
            let mut deaf = admin.connect();
            let request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(100);
            let error = (0..100_000).find_map(|_| deaf.write_all(&request).err());
            let kind = error.map(|error| error.kind());
            assert!(
                matches!(
                    kind,
                    Some(ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
                ),
                "not given up: {kind:?}"
            );

            // Half a request each.
            let mut crowd: Vec<_> = (0..200).map(|_| admin.connect()).collect();
            for stream in &mut crowd {
                // Those beyond the limit are closed already.
                let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: loc");
            }
            let refused = crowd.iter_mut().rev().take(100).all(|stream| {
                let mut answer = Vec::new();
                let _ = stream.read_to_end(&mut answer);
                answer.is_empty() || Response::of(&answer).status == 503
            });
            assert!(refused, "the last of 200 connections were taken");
            // The crowd stays connected, and yet others are served again.
            wait_until("the server is free again", || {
                let mut stream = admin.connect();
                let request =
                    b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
                let mut answer = Vec::new();
                let _ = stream.write_all(request);
                let _ = stream.read_to_end(&mut answer);
                answer.starts_with(b"HTTP/1.1 200")
            });
            drop(crowd);
        });
        let result = ended.join();
        over.store(true, Ordering::Relaxed);
        let counted = counting.join().unwrap();
        result.unwrap();
        counted
    });
    assert!(counted > 0);
    assert_eq!(daemon.client().number(&["INCR", "hit"]), counted + 1);
}

#[test]
fn beyond_this_host_it_listens_with_a_warning() {
    let daemon = Daemon::builder("embedded")
        .set("admin.listen", "0.0.0.0:0")
        .start();
    let log = daemon.log();
    let warned = |line: &str| line.contains("WARN") && line.contains("no authentication");
    assert!(log.lines().any(warned), "{log}");
}
