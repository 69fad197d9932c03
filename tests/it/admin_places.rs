//! The admin server's places: who must go when all are taken, and that health can be asked even
//! then.

use std::io::{Read, Write};

use crate::admin::on_port;
use crate::support::daemon::Daemon;
use crate::support::http::{Address, Response, Stream};
use crate::support::wait_until;

/// Connections that may ask anything, `CONNECTIONS_MAX` in the server.
const PLACES: usize = 64;
/// Connections more that may ask health, `HEALTH_CONNECTIONS_MAX` there.
const HEALTH_PLACES: usize = 16;
/// Pages that may be open, `STREAMS_MAX` there.
const STREAMS: usize = 32;

/// Asks on a connection that stays open, and takes the answer. `None`: it was closed.
fn ask(stream: &mut dyn Stream, head: &str) -> Option<u16> {
    let request = format!("{head} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let head = head_of(stream)?;
    let answer = Response::of(&head);
    let length = answer
        .header("content-length")
        .map_or(0, |length| length.parse().expect("a length is a number"));
    if !request.starts_with("HEAD") {
        stream.read_exact(&mut vec![0; length]).ok()?;
    }
    Some(answer.status)
}

/// The head of an answer, to its empty line. `None`: it ends before.
fn head_of(stream: &mut dyn Stream) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.extend(byte);
    }
    Some(head)
}

/// Asks on a connection of its own, and says what came, if there was an answer: one connection too
/// many may be reset before it is read.
fn try_get(admin: &Address, path: &str) -> Option<Response> {
    let mut stream = admin.connect();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut answer = Vec::new();
    let _ = stream.write_all(request.as_bytes());
    // Both kinds that answer here are closed by the server.
    let _ = stream.read_to_end(&mut answer);
    (!answer.is_empty()).then(|| Response::of(&answer))
}

/// Whether the server closes it, within a minute.
fn is_closed(stream: &mut dyn Stream) -> bool {
    stream.read(&mut [0]).is_ok_and(|read| read == 0)
}

/// Sixty-four scrapers that keep their connections were enough for a supervisor to be told 503, and
/// to restart a daemon that was well.
#[test]
fn the_longest_idle_connection_gives_its_place_to_a_new_one() {
    let (_daemon, admin) = on_port(Daemon::builder("embedded"));
    let mut kept: Vec<_> = (0..PLACES).map(|_| admin.connect()).collect();
    for (number, stream) in kept.iter_mut().enumerate() {
        let request = ["GET /metrics", "HEAD /metrics", "GET /nowhere"][number % 3];
        assert!(ask(&mut **stream, request).is_some(), "{number}");
    }
    // Now the second is the one that has been idle the longest.
    assert_eq!(ask(&mut *kept[0], "GET /healthz"), Some(200));
    let mut new = admin.connect();
    assert_eq!(ask(&mut *new, "GET /metrics"), Some(200));
    assert!(is_closed(&mut *kept[1]), "it had been idle the longest");
    kept.remove(1);
    kept.push(new);
    for (number, stream) in kept.iter_mut().enumerate() {
        assert_eq!(ask(&mut **stream, "GET /metrics"), Some(200), "{number}");
    }
    // As many again: each finds a place.
    let mut others: Vec<_> = (0..PLACES).map(|_| admin.connect()).collect();
    for (number, stream) in others.iter_mut().enumerate() {
        assert_eq!(ask(&mut **stream, "GET /metrics"), Some(200), "{number}");
    }
    for stream in &mut kept {
        assert!(is_closed(&mut **stream));
    }
}

#[test]
fn health_is_answered_while_every_place_is_busy() {
    let (_daemon, admin) = on_port(Daemon::builder("embedded"));
    let mut pages: Vec<_> = (0..STREAMS).map(|_| admin.connect()).collect();
    for page in &mut pages {
        let request = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n";
        page.write_all(request).unwrap();
        assert_eq!(Response::of(&head_of(&mut **page).unwrap()).status, 200);
    }
    let half = || {
        let mut stream = admin.connect();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: loc")
            .unwrap();
        stream
    };
    let mut halves: Vec<_> = (STREAMS..PLACES).map(|_| half()).collect();
    for _ in 0..2 * HEALTH_PLACES {
        for (path, body) in [("/healthz", "ok\n"), ("/readyz", "ready\n")] {
            let health = try_get(&admin, path).unwrap();
            assert_eq!((health.status, health.body.as_str()), (200, body));
            assert_eq!(health.header("connection"), Some("close"));
        }
    }
    for path in ["/metrics", "/", "/events", "/nowhere"] {
        let refused = try_get(&admin, path).unwrap();
        assert_eq!(refused.status, 503, "{path}");
        assert_eq!(refused.header("connection"), Some("close"));
        let kind = refused.header("content-type").unwrap();
        assert!(kind.starts_with("text/plain"), "{kind}");
        assert!(refused.body.contains("64 connections"), "{}", refused.body);
        assert!(refused.body.contains("/healthz"), "{}", refused.body);
    }
    // Whoever takes the reserved places without asking has them for a moment only.
    halves.extend((0..HEALTH_PLACES).map(|_| half()));
    wait_until("health is answered again", || {
        try_get(&admin, "/healthz").is_some_and(|health| health.status == 200)
    });
    assert_eq!(
        try_get(&admin, "/metrics").map(|refused| refused.status),
        Some(503),
        "the other places are taken all the while"
    );
    for stream in &mut halves {
        assert!(is_closed(&mut **stream), "half a request is not waited for");
    }
    assert_eq!(admin.get("/metrics").status, 200);
    for page in &mut pages {
        // One a second: these are beyond what had come before the half requests ended.
        let mut events = String::new();
        while events.matches("event: state").count() < 12 {
            let mut bytes = [0; 4096];
            let read = page.read(&mut bytes).unwrap();
            assert_ne!(read, 0, "a page was closed: {events}");
            events += &String::from_utf8_lossy(&bytes[..read]);
        }
    }
}
