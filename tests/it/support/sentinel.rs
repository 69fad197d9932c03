//! Real Sentinels of the test's own, and the servers that they watch.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use super::redis::{RedisServer, server_program};
use super::resp::{Client, Value};
use super::{LIMIT, free_port, signal, wait_exit, wait_until};

/// The name that the Sentinels know the master by.
pub const MASTER: &str = "mymaster";

/// One Sentinel. Ends with its value.
#[derive(Debug)]
pub struct Sentinel {
    dir: TempDir,
    port: u16,
    password: Option<String>,
    child: Option<Child>,
}

impl Sentinel {
    /// Starts one that watches `master`, with further lines of its configuration, in which `{port}` is
    /// its port.
    pub fn start(
        master: SocketAddr,
        quorum: u32,
        password: Option<&str>,
        lines: &[String],
    ) -> Self {
        let mut sentinel = Self {
            dir: TempDir::with_prefix("tallyd-sentinel-").expect("a temporary directory"),
            port: 0,
            password: password.map(str::to_owned),
            child: None,
        };
        for _ in 0..5 {
            sentinel.port = free_port();
            sentinel.write(master, quorum, lines);
            if sentinel.try_spawn() {
                return sentinel;
            }
        }
        panic!("redis-sentinel does not start:\n{}", sentinel.log());
    }

    fn write(&self, master: SocketAddr, quorum: u32, lines: &[String]) {
        let (host, port) = (master.ip(), master.port());
        let mut text = format!(
            "port {}\nbind 127.0.0.1\ndir {}\n\
             sentinel monitor {MASTER} {host} {port} {quorum}\n\
             sentinel down-after-milliseconds {MASTER} 500\n\
             sentinel failover-timeout {MASTER} 3000\n\
             sentinel parallel-syncs {MASTER} 1\n",
            self.port,
            self.dir.path().display(),
        );
        if let Some(password) = &self.password {
            // They speak to each other as well.
            for name in ["requirepass", "sentinel sentinel-pass"] {
                text += &[name, password, "\n"].join(" ");
            }
        }
        for line in lines {
            text += &line.replace("{port}", &self.port.to_string());
            text += "\n";
        }
        std::fs::write(self.config(), text).expect("a file in our directory");
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("sentinel.conf")
    }

    fn try_spawn(&mut self) -> bool {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .expect("a file in our directory");
        let child = Command::new(server_program())
            .arg(self.config())
            .arg("--sentinel")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(Stdio::null())
            .spawn()
            .expect("the server is not installed: run tests/run, which installs it");
        self.child = Some(child);
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            let child = self.child.as_mut().expect("just spawned");
            if child.try_wait().expect("our own child").is_some() {
                self.child = None;
                return false;
            }
            if Client::tcp(self.address()).is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("redis-sentinel does not answer:\n{}", self.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Runs one command on a connection of its own.
    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> Value {
        let mut client = Client::tcp(self.address()).expect("the Sentinel is running");
        if let Some(password) = &self.password {
            assert_eq!(client.command(&["AUTH", password]), Value::ok());
        }
        client.command(args)
    }

    /// The port of the master that it names.
    #[track_caller]
    pub fn master_port(&self) -> u16 {
        let answer = self.cli(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER]);
        answer.items()[1].text().parse().expect("a port")
    }

    /// How many others it knows: replicas and Sentinels.
    #[track_caller]
    fn knows(&self) -> (String, String) {
        let fields = self.cli(&["SENTINEL", "MASTER", MASTER]).fields();
        let text = |name: &str| fields[name].text();
        (text("num-slaves"), text("num-other-sentinels"))
    }

    /// Kills it.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            signal(&child, Signal::KILL);
            wait_exit(&mut child, LIMIT, "redis-sentinel");
        }
    }

    /// Starts it again: same port, and what it knew.
    #[track_caller]
    pub fn restart(&mut self) {
        self.kill9();
        assert!(self.try_spawn(), "it does not start:\n{}", self.log());
    }

    /// Stops the process in its tracks, or lets it go on.
    pub fn pause(&self, paused: bool) {
        let which = if paused { Signal::STOP } else { Signal::CONT };
        signal(self.child.as_ref().expect("it is running"), which);
    }
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail = log.char_indices().rev().nth(3_000).map_or(0, |(at, _)| at);
            eprintln!("---- what the Sentinel said:\n{}\n----", &log[tail..]);
        }
    }
}

/// A master, its replica, and three Sentinels of which two decide.
#[derive(Debug)]
pub struct Group {
    /// The first one is the master to begin with.
    pub servers: [RedisServer; 2],
    /// All know of each other.
    pub sentinels: Vec<Sentinel>,
}

impl Group {
    /// Starts them, and waits until they know each other and the replica is in sync. `password`: of the
    /// servers; `sentinel_password`: of the Sentinels.
    pub fn start(password: Option<&str>, sentinel_password: Option<&str>) -> Self {
        let mut args = vec!["--repl-diskless-sync-delay", "0"];
        let mut lines = Vec::new();
        if let Some(password) = password {
            args.extend(["--requirepass", password, "--masterauth", password]);
            lines.push(format!("sentinel auth-pass {MASTER} {password}"));
        }
        let master = RedisServer::start(&args);
        let of = master.address().port().to_string();
        args.extend(["--replicaof", "127.0.0.1", &of]);
        let replica = RedisServer::start(&args);
        wait_until("the replica is in sync", || {
            let mut client = master.client();
            if let Some(password) = password {
                client.command(&["AUTH", password]);
            }
            let info = client.command(&["INFO", "replication"]).text();
            info.contains("state=online")
        });
        // Only now: a Sentinel asks for replicas when it starts, and then every ten seconds.
        let sentinels: Vec<Sentinel> = (0..3)
            .map(|_| Sentinel::start(master.address(), 2, sentinel_password, &lines))
            .collect();
        wait_until("the Sentinels know each other", || {
            sentinels
                .iter()
                .all(|sentinel| sentinel.knows() == ("1".into(), "2".into()))
        });
        Self {
            servers: [master, replica],
            sentinels,
        }
    }

    /// The store's URL.
    pub fn url(&self) -> String {
        url(&self.sentinels)
    }

    /// Which of the servers all Sentinels name; `None` while they do not agree.
    #[track_caller]
    pub fn named(&self) -> Option<usize> {
        let mut ports = self.sentinels.iter().map(Sentinel::master_port);
        let port = ports.next()?;
        let server = |server: &RedisServer| server.address().port() == port;
        ports
            .all(|other| other == port)
            .then(|| self.servers.iter().position(server))?
    }

    /// Waits until all Sentinels name this server, and it is a master.
    #[track_caller]
    pub fn wait_named(&self, index: usize) {
        wait_until("the Sentinels name the other server", || {
            self.named() == Some(index)
        });
        wait_until("it is a master", || role(&self.servers[index]) == "master");
    }
}

/// A store's URL with these Sentinels.
pub fn url<'s>(sentinels: impl IntoIterator<Item = &'s Sentinel>) -> String {
    let hosts: Vec<String> = sentinels
        .into_iter()
        .map(|sentinel| sentinel.address().to_string())
        .collect();
    format!("redis+sentinel://{}/{MASTER}", hosts.join(","))
}

/// What a server without a password answers, asked again where a Sentinel cuts its clients off, as it
/// does with each change of its role.
#[track_caller]
pub fn ask(server: &RedisServer, command: &[&str]) -> Value {
    let mut answer = None;
    wait_until("a server answers", || {
        answer = server.client().try_command(command).ok();
        answer.is_some()
    });
    answer.expect("it was waited for")
}

/// What it says that it is.
#[track_caller]
pub fn role(server: &RedisServer) -> String {
    ask(server, &["ROLE"]).items()[0].text()
}
