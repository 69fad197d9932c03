//! Promises 6 and 8: whoever answers at the store's address can neither get the password shown nor
//! fill memory, log or replies, nor hold the flush without a word.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use redis::IntoConnectionInfo;
use tallyd::store::redis::{RedisStore, Timeouts};
use tallyd::store::{Store, StoreError};
use tempfile::TempDir;

use crate::store_support::{config, identity};
use crate::support::daemon::{Daemon, NEVER};
use crate::support::http::Address;
use crate::support::redis::RedisServer;
use crate::support::resp::Client;
use crate::support::{LIMIT, wait_until};

const PASSWORD: &str = "hunter2 and/more";
const ENCODED: &str = "hunter2%20and%2Fmore";

/// A server that answers every connection as it likes, and how many connections it had.
struct Hostile {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Hostile {
    fn start(answer: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let (counted, answer) = (Arc::clone(&connections), Arc::new(answer));
        // Ends with the process; it does nothing by itself.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                counted.fetch_add(1, Ordering::SeqCst);
                let answer = Arc::clone(&answer);
                std::thread::spawn(move || answer(stream));
            }
        });
        Self {
            address,
            connections,
        }
    }

    fn url(&self) -> String {
        format!("redis://joe:{ENCODED}@{}", self.address)
    }

    fn daemon(&self) -> Daemon {
        Daemon::builder(self.url()).flush_interval(NEVER).start()
    }
}

/// What came in one read, as commands of words.
fn commands(stream: &mut TcpStream) -> Vec<String> {
    let mut bytes = vec![0; 1 << 16];
    let count = stream.read(&mut bytes).unwrap_or(0);
    let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
    let words = |command: &str| -> String {
        let words: Vec<_> = command.split("\r\n").skip(2).step_by(2).collect();
        words.join(" ")
    };
    text.split('*').skip(1).map(words).collect()
}

/// Everything that the daemon shows to anybody.
fn all_shown(daemon: &Daemon, admin: &Address) -> String {
    let mut client = daemon.client();
    client.command(&["INCR", "k"]);
    let flush = client.command(&["TALLY.FLUSH", "1"]);
    let cold = client.command(&["GET", "cold"]);
    let info = client.command(&["INFO", "tallyd"]).text();
    let metrics = admin.get("/metrics").body;
    let mut events = admin.connect();
    let request = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n";
    events.write_all(request).unwrap();
    let mut state = String::new();
    let whole = |text: &str| {
        text.split_once("event: state")
            .is_some_and(|(_, data)| data.contains("\n\n"))
    };
    while !whole(&state) {
        let mut bytes = [0; 4096];
        let count = events.read(&mut bytes).unwrap();
        assert!(count > 0, "{state}");
        state.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    let log = daemon.log();
    format!("{flush:?}\n{cold:?}\n{info}\n{metrics}\n{state}\n{log}")
}

fn with_admin(url: String) -> (TempDir, Daemon, Address) {
    let dir = TempDir::with_prefix("tallyd-hostile-").unwrap();
    let path = dir.path().join("admin.sock");
    let daemon = Daemon::builder(url)
        .flush_interval("20ms")
        .set("admin.listen", format!("unix:{}", path.display()))
        .start();
    (dir, daemon, Address::Unix(path))
}

#[test]
fn a_server_that_repeats_the_password_does_not_get_it_shown() {
    /// Answers one read; `false`: hangs up.
    type Answer = fn(&[String], &mut TcpStream) -> bool;
    let echo: Answer = |commands, stream| {
        let _ = write!(stream, "-ERR unknown: {}\r\n", commands.join(" "));
        false
    };
    let echo_each: Answer = |commands, stream| {
        for command in commands {
            let _ = write!(stream, "-ERR you said {command} and AUTH {ENCODED}\r\n");
        }
        true
    };
    let after_login: Answer = |commands, stream| {
        for command in commands {
            let _ = if command.starts_with("AUTH") {
                write!(stream, "+OK\r\n")
            } else {
                write!(stream, "-READONLY since AUTH joe {PASSWORD}\r\n")
            };
        }
        true
    };
    let cut_off: Answer = |_, stream| {
        let _ = write!(stream, "-ERR unknown: 'joe' '{}\r\n", &PASSWORD[..9]);
        false
    };
    let token: Answer = |commands, stream| {
        for command in commands {
            let _ = match command.as_str() {
                text if text.starts_with("GET tallyd:token") => {
                    write!(stream, "${}\r\n{PASSWORD}\r\n", PASSWORD.len())
                }
                "EXEC" => write!(stream, "*1\r\n$-1\r\n"),
                text if text.starts_with("SET") => write!(stream, "+QUEUED\r\n"),
                _ => write!(stream, "+OK\r\n"),
            };
        }
        true
    };
    let status: Answer = |commands, stream| {
        for _ in commands {
            let _ = write!(stream, "+{PASSWORD}\r\n");
        }
        true
    };
    for (name, answer) in [
        ("echo and hang up", echo),
        ("echo each", echo_each),
        ("after the login", after_login),
        ("cut off", cut_off),
        ("as a token", token),
        ("as a status", status),
    ] {
        let server = Hostile::start(move |mut stream| {
            loop {
                let commands = commands(&mut stream);
                if commands.is_empty() || !answer(&commands, &mut stream) {
                    return;
                }
            }
        });
        let (_dir, daemon, admin) = with_admin(server.url());
        wait_until("a flush was tried", || {
            let info = daemon.client().command(&["INFO", "tallyd"]).text();
            daemon.client().command(&["INCR", "k"]);
            !info.contains("tallyd_store_error:\r\n")
        });
        let shown = all_shown(&daemon, &admin);
        for secret in [PASSWORD, ENCODED, &PASSWORD[..7], "hunter2%20"] {
            assert!(!shown.contains(secret), "{name}: {secret}\n{shown}");
        }
        assert!(
            shown.contains(&server.address.to_string()),
            "{name}: {shown}"
        );
    }
}

#[test]
fn a_servers_words_are_cut() {
    let server = Hostile::start(|mut stream| {
        let text = "x".repeat(60_000);
        while !commands(&mut stream).is_empty() {
            if write!(stream, "-ERR {text}\r\n").is_err() {
                return;
            }
        }
    });
    let (_dir, daemon, admin) = with_admin(server.url());
    wait_until("a flush was tried", || {
        daemon.client().command(&["INCR", "k"]);
        daemon.log().contains("xxx")
    });
    let shown = all_shown(&daemon, &admin);
    assert!(
        shown.contains("(cut)") && !shown.contains(&"x".repeat(300)),
        "{shown}"
    );
}

#[test]
fn a_reply_without_end_is_refused_and_not_kept() {
    let server = Hostile::start(|mut stream| {
        commands(&mut stream);
        if stream.write_all(b"*1000000000\r\n").is_ok() {
            let elements = b":1\r\n".repeat(10_000);
            while stream.write_all(&elements).is_ok() {}
        }
    });
    let mut daemon = server.daemon();
    let mut client = daemon.client();
    client.command(&["GET", "cold"]);
    client.command(&["INCR", "k"]);
    client.command(&["TALLY.FLUSH", "1"]);
    // A connection is opened again only after the last one was given up: nothing is still read.
    wait_until("it was given up", || {
        server.connections.load(Ordering::SeqCst) >= 6
    });
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 64 << 10, "{kib} KiB");
    let error = client.command(&["INFO", "tallyd"]).text();
    assert!(error.contains("1000000000"), "{error}");
    daemon.kill9();
}

#[test]
fn a_value_that_is_too_long_for_a_counter_is_not_held() {
    let redis = RedisServer::start(&[]);
    let huge = vec![b'7'; 20 << 20];
    redis.client().command(&[b"SET", &b"huge"[..], &huge]);
    redis.cli(&["SET", "near", "41"]);
    let daemon = Daemon::builder(redis.url())
        .set("reply.load_timeout", "10s")
        .start();
    let mut client = daemon.client();
    let values = client.command(&["MGET", "huge", "near", "absent"]);
    assert_eq!(
        format!("{values:?}"),
        "Array([Nil, Bulk(\"41\"), Nil])".replace("\"41\"", &format!("{:?}", b"41".to_vec()))
    );
    let refused = client.command(&["INCR", "huge"]);
    assert_eq!(
        refused.error(),
        "ERR value is not an integer or out of range"
    );
    // It is looked at again, and not for everyone who tries.
    let before = redis.commandstats("mget");
    for _ in 0..200 {
        assert_eq!(client.command(&["INCR", "huge"]).error(), refused.error());
    }
    let reads = redis.commandstats("mget") - before;
    assert!(reads < 20, "{reads} reads");
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 40 << 10, "{kib} KiB: the value was held");
}

/// Sends a byte now and then, which is enough for a limit on silence alone.
#[tokio::test]
async fn a_server_that_drips_is_given_up() {
    let server = Hostile::start(|mut stream| {
        while stream.write_all(b"+").is_ok() {
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let silent = Hostile::start(|mut stream| {
        commands(&mut stream);
        // Answers the handshake, a byte at a time.
        while stream.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    for server in [server, silent] {
        let info = server.address.to_string();
        let info = format!("redis://{info}").into_connection_info().unwrap();
        let mut config = config(&info);
        let limit = Duration::from_millis(200);
        config.timeouts = Timeouts {
            connect: limit,
            progress: limit,
            response: limit,
        };
        let store = RedisStore::new(config, identity(1));
        let tried = tokio::time::timeout(LIMIT, store.connect()).await;
        let error = tried.expect("it is given up").err().expect("no connection");
        assert!(
            matches!(
                error,
                StoreError::Timeout { .. } | StoreError::Protocol { .. }
            ),
            "{error}"
        );
    }
}

#[test]
fn what_is_no_single_redis_is_called_what_it_is() {
    let http = Hostile::start(|mut stream| {
        commands(&mut stream);
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
    });
    let cluster = RedisServer::start(&["--cluster-enabled", "yes"]);
    let full = RedisServer::start(&["--maxclients", "1"]);
    let _only: Client = full.client();
    for (url, words) in [
        (format!("redis://{}", http.address), "HTTP"),
        (cluster.url(), "a node of a Redis Cluster"),
        (full.url(), "max number of clients"),
    ] {
        let daemon = Daemon::builder(&url).flush_interval(NEVER).start();
        let mut client = daemon.client();
        client.command(&["INCR", "k"]);
        let mut answer = String::new();
        wait_until("it is said what is there", || {
            answer = client.command(&["TALLY.FLUSH", "10"]).error().to_owned();
            answer.contains(words)
        });
        wait_until("the log says so", || daemon.log().contains(words));
        assert!(!daemon.log().contains("roken pipe"), "{}", daemon.log());
    }
}

#[test]
fn a_flush_that_is_still_connecting_says_so() {
    // Takes connections, and never answers.
    let server = Hostile::start(|stream| {
        std::thread::sleep(LIMIT);
        drop(stream);
    });
    let daemon = server.daemon();
    let mut client = daemon.client();
    client.command(&["INCR", "k"]);
    let answer = client.command(&["TALLY.FLUSH", "20"]);
    let said = answer.error();
    assert!(
        said.starts_with("TIMEOUT ")
            && said.ends_with("last error: none; the store has not answered yet"),
        "{said}"
    );
}
