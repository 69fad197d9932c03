//! A real redis-server of the test's own, in a temporary directory, on a free port and a Unix socket.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use super::resp::{Client, Value};
use super::{LIMIT, free_port, signal, wait_exit};

/// Where the daemon keeps what is not a counter: token and clock.
pub const OWN_PREFIX: &[u8] = b"tallyd:";

/// Names another server than `redis-server`, for tests against other versions and against Valkey.
const SERVER: &str = "TALLYD_TEST_SERVER";

/// The server's program.
pub fn server_program() -> OsString {
    std::env::var_os(SERVER).unwrap_or_else(|| "redis-server".into())
}

/// Whether another server than the system's is tested against.
pub fn is_other_server() -> bool {
    std::env::var_os(SERVER).is_some()
}

/// The server. Ends with its value.
#[derive(Debug)]
pub struct RedisServer {
    dir: TempDir,
    port: u16,
    args: Vec<String>,
    child: Option<Child>,
    paused: bool,
}

impl RedisServer {
    /// Starts a server that keeps nothing on disk, with further arguments of redis-server
    /// (`--maxmemory 1mb`, as one string a word), and waits until it answers.
    pub fn start(args: &[&str]) -> Self {
        let mut server = Self {
            dir: TempDir::with_prefix("tallyd-redis-").expect("a temporary directory"),
            port: 0,
            args: args.iter().map(ToString::to_string).collect(),
            child: None,
            paused: false,
        };
        // Another process may take the free port first: then the server exits, and another is tried.
        for _ in 0..5 {
            server.port = free_port();
            if server.try_spawn() {
                return server;
            }
        }
        panic!("redis-server does not start:\n{}", server.log());
    }

    fn try_spawn(&mut self) -> bool {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .expect("a file in our directory");
        let child = Command::new(server_program())
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1"])
            .arg("--unixsocket")
            .arg(self.socket())
            .arg("--dir")
            .arg(self.dir.path())
            .args(["--save", "", "--appendonly", "no", "--daemonize", "no"])
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(Stdio::null())
            .spawn()
            .expect("the server is not installed: run tests/run, which installs it");
        self.child = Some(child);
        self.paused = false;
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            let child = self.child.as_mut().expect("just spawned");
            if child.try_wait().expect("our own child").is_some() {
                self.child = None;
                return false;
            }
            // The process answers on its own socket; a stranger may be listening on the port.
            let answer = Client::unix(&self.socket()).and_then(|mut c| c.try_command(&["PING"]));
            // An error is an answer too: NOAUTH, LOADING is waited for.
            match answer {
                Ok(Value::Error(text)) if text.starts_with("LOADING") => {}
                Ok(_) => return true,
                Err(_) => {}
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("redis-server does not answer:\n{}", self.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("redis.sock")
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The URL over TCP.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// The URL of the Unix socket.
    pub fn unix_url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// A new connection.
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::unix(&self.socket()).expect("the server is running")
    }

    /// Runs one command on a connection of its own.
    #[track_caller]
    pub fn cli<A: AsRef<[u8]>>(&self, args: &[A]) -> Value {
        self.client().command(args)
    }

    /// The value of a counter, 0 if there is none.
    #[track_caller]
    pub fn counter<K: AsRef<[u8]>>(&self, key: K) -> i64 {
        match self.cli(&[b"GET", key.as_ref()]) {
            Value::Nil => 0,
            value => value.number(),
        }
    }

    /// Every counter in the store, without what the daemon keeps for itself.
    #[track_caller]
    pub fn counters(&self) -> BTreeMap<Vec<u8>, i64> {
        let mut client = self.client();
        let mut counters = BTreeMap::new();
        let mut cursor = b"0".to_vec();
        loop {
            let page = client.command(&[b"SCAN", &cursor[..], b"COUNT", b"5000"]);
            let [Value::Bulk(next), Value::Array(keys)] = page.items() else {
                panic!("SCAN answered {page:?}");
            };
            let keys: Vec<Vec<u8>> = keys
                .iter()
                .map(|key| match key {
                    Value::Bulk(key) => key.clone(),
                    other => panic!("a key was expected, not {other:?}"),
                })
                .filter(|key| !key.starts_with(OWN_PREFIX))
                .collect();
            if !keys.is_empty() {
                let mut request = vec![b"MGET".to_vec()];
                request.extend(keys.iter().cloned());
                let values = client.command(&request);
                for (key, value) in keys.into_iter().zip(values.items()) {
                    if *value != Value::Nil {
                        counters.insert(key, value.number());
                    }
                }
            }
            if next == b"0" {
                return counters;
            }
            cursor.clone_from(next);
        }
    }

    /// How many times each command ran since the start (or `CONFIG RESETSTAT`), by its lower-case name.
    #[track_caller]
    pub fn command_calls(&self) -> BTreeMap<String, u64> {
        let info = self.cli(&["INFO", "commandstats"]).text();
        info.lines()
            .filter_map(|line| {
                let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
                let calls = rest.split(',').next()?.parse().ok()?;
                Some((name.to_string(), calls))
            })
            .collect()
    }

    /// The same of one command.
    #[track_caller]
    pub fn commandstats(&self, command: &str) -> u64 {
        self.command_calls().get(command).copied().unwrap_or(0)
    }

    /// Kills it.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(&child, Signal::KILL);
            wait_exit(&mut child, LIMIT, "redis-server");
        }
    }

    /// Starts it again: same port, same directory, same arguments.
    #[track_caller]
    pub fn restart(&mut self) {
        self.kill9();
        assert!(
            self.try_spawn(),
            "redis-server does not start again:\n{}",
            self.log()
        );
    }

    /// Stops the process in its tracks: connections stay open, nothing is answered.
    pub fn pause(&mut self) {
        signal(self.child.as_ref().expect("it is running"), Signal::STOP);
        self.paused = true;
    }

    /// Lets it go on.
    pub fn resume(&mut self) {
        if std::mem::take(&mut self.paused) {
            signal(self.child.as_ref().expect("it is running"), Signal::CONT);
        }
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
