//! The live page's feed: what it says is what the daemon counted, whatever keys are called, and a
//! client that takes nothing, or wants too much, is refused. The page itself is looked at in
//! `browser`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Signal;
use serde_json::Value as Json;
use tempfile::TempDir;

use crate::support::daemon::{Daemon, NEVER, Settings};
use crate::support::http::{Address, Response, Stream};
use crate::support::load::Load;
use crate::support::redis::RedisServer;
use crate::support::{LIMIT, wait_until};

/// A daemon whose admin server listens on a Unix socket.
struct Watched {
    daemon: Daemon,
    admin: Address,
    _dir: TempDir,
}

fn watched(settings: Settings) -> Watched {
    let dir = TempDir::with_prefix("tallyd-admin-").unwrap();
    let path = dir.path().join("admin.sock");
    let listen = format!("unix:{}", path.display());
    Watched {
        daemon: settings.set("admin.listen", listen).start(),
        admin: Address::Unix(path),
        _dir: dir,
    }
}

const REQUEST: &[u8] = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A stream of events.
struct Events {
    body: BufReader<Box<dyn Stream>>,
    text: String,
}

impl Events {
    fn of(admin: &Address) -> Self {
        let mut stream = admin.connect();
        stream.write_all(REQUEST).unwrap();
        let mut body = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(body.read_line(&mut head).unwrap(), 0, "{head}");
        }
        let head = Response::of(head.as_bytes());
        assert_eq!(head.status, 200);
        assert_eq!(head.header("content-type"), Some("text/event-stream"));
        Self {
            body,
            text: String::new(),
        }
    }

    /// The next event, its name and data; `None` at the end of the stream.
    fn next(&mut self) -> Option<(String, Json)> {
        while !self.text.contains("\n\n") {
            let body = &mut self.body;
            let mut size = String::new();
            body.read_line(&mut size).unwrap();
            let size = usize::from_str_radix(size.trim_end(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            body.read_exact(&mut chunk).unwrap();
            if size == 0 {
                assert_eq!(self.text, "", "the stream ends within an event");
                return None;
            }
            self.text += std::str::from_utf8(&chunk[..size]).unwrap();
        }
        let (event, rest) = self.text.split_once("\n\n").unwrap();
        let mut lines = event.lines().filter(|line| !line.starts_with("retry: "));
        let name = lines.next().unwrap().strip_prefix("event: ").unwrap();
        let data = lines.next().unwrap().strip_prefix("data: ").unwrap();
        assert_eq!(lines.next(), None, "{event}");
        let event = (name.to_owned(), serde_json::from_str(data).unwrap());
        self.text = rest.to_owned();
        Some(event)
    }

    /// The next state.
    fn state(&mut self) -> Json {
        match self.next() {
            Some((name, state)) if name == "state" => state,
            other => panic!("{other:?}"),
        }
    }

    /// The first state for which `condition` holds.
    #[track_caller]
    fn state_when(&mut self, what: &str, condition: impl Fn(&Json) -> bool) -> Json {
        let begin = std::time::Instant::now();
        loop {
            let state = self.state();
            if condition(&state) {
                return state;
            }
            assert!(begin.elapsed() < LIMIT, "not in time: {what}: {state}");
        }
    }
}

#[test]
fn the_page_may_do_only_what_its_policy_names() {
    let redis = RedisServer::start(&[]);
    let watched = watched(Daemon::builder(redis.url()));
    let get = || {
        let answer = watched.admin.get("/");
        assert_eq!(answer.status, 200);
        let header = |name| answer.header(name).unwrap().to_owned();
        assert_eq!(header("content-type"), "text/html; charset=utf-8");
        (header("content-security-policy"), answer.body)
    };
    let (policy, page) = get();
    let (_, nonce) = policy.split_once("script-src 'nonce-").unwrap();
    let (nonce, _) = nonce.split_once('\'').unwrap();
    assert!(nonce.len() >= 22, "{nonce}");
    for part in [
        "default-src 'none'",
        &format!("style-src 'nonce-{nonce}'"),
        "connect-src 'self'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ] {
        assert!(policy.contains(part), "{part} is not in {policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    assert_eq!(page.matches(&format!("nonce=\"{nonce}\"")).count(), 2);
    assert!(!page.contains("{nonce}"));
    // A nonce that comes twice is none.
    assert_ne!(get().0, policy);
    // Names of namespaces are no addresses.
    let elsewhere = page.replace("http://www.w3.org/", "");
    assert!(!elsewhere.contains("http:") && !elsewhere.contains("https:"));
}

#[test]
fn the_feed_tells_what_was_counted() {
    let redis = RedisServer::start(&[]);
    let watched = watched(Daemon::builder(redis.url()).set("node.name", "web-7"));
    let daemon = &watched.daemon;
    let mut events = Events::of(&watched.admin);
    let (name, history) = events.next().unwrap();
    assert_eq!(name, "history");
    assert!(!history["samples"].as_array().unwrap().is_empty());
    let first = events.state();
    assert_eq!(first["node"]["name"], "web-7");
    assert_eq!(first["node"]["phase"], "ready");
    assert_eq!(first["node"]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(first["store"]["url"], redis.url());
    assert_eq!(first["numbers"]["increments_total"], 0);

    let load = Load::start(daemon.socket(), "page", 3, 50);
    let moving = events.state_when("rates of a load", |state| {
        state["rates"]["increments"].as_f64() > Some(0.0)
            && state["rates"]["commands"].as_f64() > Some(0.0)
            && !state["hot"]["keys"].as_array().unwrap().is_empty()
    });
    assert_eq!(moving["store"]["up"], true);
    assert!(moving["ratio"]["minute"].as_f64() > Some(1.0), "{moving}");
    let acknowledged: i64 = load.stop().iter().map(|done| done.acknowledged).sum();
    daemon.flush();
    let after = events.state_when("nothing left to do", |state| {
        state["numbers"]["increments_total"] == acknowledged
            && state["pending"]["keys"] == 0
            && state["rates"]["increments"] == 0.0
    });
    assert_eq!(after["pending"]["bytes"], 0);
    assert_eq!(after["pending"]["age_ms"], 0);
    assert_eq!(after["pending"]["full"], false);
    // Everything that the process counts, but what asking changes.
    let stats = daemon.client().command(&["TALLY.STATS"]).fields();
    let mut numbers = after["numbers"].as_object().unwrap().clone();
    assert_eq!(numbers.len(), stats.len());
    for moves in [
        "commands_total",
        "connections_total",
        "connections",
        "published_total",
    ] {
        assert!(numbers.remove(moves).unwrap().as_i64() <= Some(stats[moves].number()));
    }
    for (name, value) in numbers {
        assert_eq!(value, stats[&name].number(), "{name}");
    }

    // A page that is opened later begins with what has been.
    let mut later = Events::of(&watched.admin);
    let (_, history) = later.next().unwrap();
    let samples = history["samples"].as_array().unwrap();
    assert!(samples.iter().any(|sample| sample[1].as_f64() > Some(0.0)));
    assert!(samples.is_sorted_by_key(|sample| sample[0].as_u64()));
}

#[test]
fn the_hottest_keys_are_told_as_text_with_their_counts() {
    let redis = RedisServer::start(&[]);
    let watched = watched(Daemon::builder(redis.url()).flush_interval(NEVER));
    let daemon = &watched.daemon;
    let mut client = daemon.client();
    let long = "x".repeat(1000);
    let keys: [(&[u8], &str, i64); 5] = [
        (
            b"<img src=x onerror=alert(1)>",
            "<img src=x onerror=alert(1)>",
            900,
        ),
        (b"a\n\ndata: {}\r\0", "a\\n\\ndata: {}\\r\\0", -800),
        (b"\xff\xfe", "\\xff\\xfe", 700),
        (
            "\u{202e}likes\u{2028}".as_bytes(),
            "\\u{202e}likes\\u{2028}",
            600,
        ),
        (long.as_bytes(), "", 500),
    ];
    for (key, _, delta) in keys {
        client.command(&[&b"INCRBY"[..], key, delta.to_string().as_bytes()]);
    }
    // More keys than are kept: the cool ones give way.
    for cool in 0..2000 {
        client.command(&["INCR", &format!("cool:{cool}")]);
    }
    daemon.flush();
    let mut events = Events::of(&watched.admin);
    events.next();
    let hot = events.state()["hot"].clone();
    let told = hot["keys"].as_array().unwrap();
    assert_eq!(told.len(), 20);
    assert_eq!(hot["total"], 900 + 800 + 700 + 600 + 500 + 2000);
    for ((_, text, delta), told) in keys.iter().zip(told) {
        let key = told["key"].as_str().unwrap();
        if text.is_empty() {
            assert_eq!(key, format!("{}… (1000 bytes)", "x".repeat(256)));
        } else {
            assert_eq!(key, *text);
        }
        assert_eq!(told["count"], delta.abs());
        assert_eq!(told["error"], 0);
    }
    // The same once more: what is not among the hottest of both is known with an error.
    client.command(&["INCRBY", "late", "50"]);
    for cool in 1000..3000 {
        client.command(&["INCR", &format!("cool:{cool}")]);
    }
    daemon.flush();
    let state = events.state_when("a second epoch", |state| state["hot"]["total"] == 7550);
    let late = &state["hot"]["keys"][5];
    assert_eq!(
        (late["key"].as_str(), late["count"].as_i64()),
        (Some("late"), Some(51))
    );
    assert_eq!(late["error"], 1, "it may have been a cool one before");
}

#[test]
fn pages_are_bounded_in_number() {
    let redis = RedisServer::start(&[]);
    let watched = watched(Daemon::builder(redis.url()));
    let mut open: Vec<Events> = (0..32).map(|_| Events::of(&watched.admin)).collect();
    let status = || {
        let mut stream = watched.admin.connect();
        stream.write_all(REQUEST).unwrap();
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        String::from_utf8_lossy(&status).into_owned()
    };
    assert_eq!(status(), "HTTP/1.1 503");
    // Now that it is known to end.
    let refused = watched.admin.get("/events");
    assert!(refused.body.contains("32 pages are open"));
    // Health is answered all the same, and each page is served.
    assert_eq!(watched.admin.get("/healthz").status, 200);
    for events in &mut open {
        events.next();
        events.state();
        events.state();
    }
    open.pop();
    wait_until("there is room for one again", || status() == "HTTP/1.1 200");
}

#[test]
fn a_page_that_takes_nothing_is_given_up() {
    let redis = RedisServer::start(&[]);
    let watched = watched(Daemon::builder(redis.url()).flush_interval(NEVER));
    // States of some size, so that the buffers between are soon full.
    let mut client = watched.daemon.client();
    for n in 0..20 {
        client.command(&["INCR", &format!("{n}:{}", "\u{1}".repeat(900))]);
    }
    watched.daemon.flush();
    let Address::Unix(path) = &watched.admin else {
        unreachable!("that is where it listens");
    };
    let deaf: Vec<UnixStream> = (0..8)
        .map(|_| {
            let mut stream = UnixStream::connect(path).unwrap();
            stream.write_all(REQUEST).unwrap();
            stream
        })
        .collect();
    let is_closed = |stream: &UnixStream| {
        let mut poll = [PollFd::new(stream, PollFlags::empty())];
        rustix::event::poll(&mut poll, Some(&Timespec::default())).unwrap();
        poll[0].revents().contains(PollFlags::HUP)
    };
    // What they were sent before is still there: nobody has read it.
    wait_until("they are given up", || deaf.iter().all(is_closed));
}

#[test]
fn the_last_event_says_that_the_daemon_stops() {
    let mut redis = RedisServer::start(&[]);
    let mut watched = watched(Daemon::builder(redis.url()).set("shutdown.timeout", "3s"));
    let mut events = Events::of(&watched.admin);
    events.next();
    // Something that the last flush waits for, so that stopping takes a while.
    redis.kill9();
    watched.daemon.client().command(&["INCR", "last"]);
    watched.daemon.signal(Signal::TERM);
    let state = events.state_when("stopping", |state| state["node"]["phase"] == "stopping");
    assert_eq!(state["pending"]["keys"], 1);
    let last = loop {
        match events.next() {
            Some((name, _)) if name == "state" => {}
            other => break other,
        }
    };
    assert_eq!(last.unwrap().0, "stopping");
    assert_eq!(events.next(), None);
    assert_eq!(watched.daemon.wait_exit().code(), Some(0));
}

#[test]
fn no_password_is_told() {
    let redis = RedisServer::start(&["--requirepass", "hush-4711"]);
    let url = format!("redis://:hush-4711@{}", redis.address());
    let watched = watched(Daemon::builder(url));
    watched.daemon.client().command(&["INCR", "key"]);
    watched.daemon.flush();
    let mut events = Events::of(&watched.admin);
    events.next();
    let state = events.state().to_string();
    assert!(state.contains(&redis.address().to_string()), "{state}");
    assert!(!state.contains("hush-4711"), "{state}");
    assert!(!watched.admin.get("/").body.contains("hush-4711"));
}
