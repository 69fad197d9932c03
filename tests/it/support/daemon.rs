//! The daemon as a process, with a state directory and a socket of its own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use super::resp::{Client, Value};
use super::{LIMIT, signal, wait_exit};

/// Long enough that no timer flushes during a test: only what the test asks for does.
pub const NEVER: &str = "1h";

/// How a daemon is to be started.
#[derive(Debug, Clone)]
pub struct Settings {
    store: String,
    flush_interval: String,
    socket: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    env: Vec<(String, String)>,
    files_max: Option<u32>,
    config: Option<PathBuf>,
    held: Option<Arc<OwnedFd>>,
    journal_stream: bool,
}

impl Settings {
    /// A variable of its environment, as it is.
    pub fn env(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.env.push((name.into(), value.to_string()));
        self
    }

    /// A configuration file, below what else is set here.
    pub fn config(mut self, path: &Path) -> Self {
        self.config = Some(path.into());
        self
    }

    /// A descriptor that it is passed as systemd passes sockets, by this name.
    pub fn held(mut self, descriptor: OwnedFd, name: &str) -> Self {
        self.held = Some(Arc::new(descriptor));
        self.env("LISTEN_FDS", 1).env("LISTEN_FDNAMES", name)
    }

    /// Has it take its log for systemd's journal.
    pub fn journal_stream(mut self) -> Self {
        self.journal_stream = true;
        self
    }

    /// How many files the system lets it open, at most.
    pub fn files_max(mut self, files: u32) -> Self {
        self.files_max = Some(files);
        self
    }

    /// Time between flushes, as the flag takes it.
    pub fn flush_interval(mut self, interval: &str) -> Self {
        self.flush_interval = interval.into();
        self
    }

    /// One key of the configuration by its name in the documentation: `.set("flush.max_keys", 10)`.
    pub fn set(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        let name = format!("TALLYD_{}", key.replace('.', "__").to_uppercase());
        self.env.push((name, value.to_string()));
        self
    }

    /// A socket elsewhere than in the temporary directory.
    pub fn socket(mut self, path: &Path) -> Self {
        self.socket = Some(path.into());
        self
    }

    /// A state directory elsewhere than in the temporary directory.
    pub fn state_dir(mut self, path: &Path) -> Self {
        self.state_dir = Some(path.into());
        self
    }

    /// Starts it and waits until its socket answers.
    #[track_caller]
    pub fn start(self) -> Daemon {
        let mut daemon = self.prepare();
        daemon.spawn();
        daemon.wait_ready();
        daemon
    }

    /// Starts one that is expected to give up by itself: its exit code, and what it said.
    #[track_caller]
    pub fn run_to_exit(self) -> (Option<i32>, String) {
        let mut daemon = self.prepare();
        daemon.spawn();
        let mut child = daemon.child.take().expect("just spawned");
        let status = wait_exit(&mut child, LIMIT, "a daemon that cannot run");
        (status.code(), daemon.log())
    }

    fn prepare(self) -> Daemon {
        let dir = TempDir::with_prefix("tallyd-").expect("a temporary directory");
        Daemon {
            socket: self
                .socket
                .clone()
                .unwrap_or_else(|| dir.path().join("tallyd.sock")),
            state_dir: self
                .state_dir
                .clone()
                .unwrap_or_else(|| dir.path().join("state")),
            settings: self,
            dir,
            child: None,
        }
    }
}

/// A running daemon. Ends with its value; what it logged is printed when the test fails.
#[derive(Debug)]
pub struct Daemon {
    settings: Settings,
    dir: TempDir,
    socket: PathBuf,
    state_dir: PathBuf,
    child: Option<Child>,
}

impl Daemon {
    /// A daemon on this store, flushing every 100 ms unless told otherwise. An answer waits for a value
    /// longer than by default: this machine may be slow.
    pub fn builder(store_url: impl Into<String>) -> Settings {
        let settings = Settings {
            store: store_url.into(),
            flush_interval: "100ms".into(),
            socket: None,
            state_dir: None,
            env: Vec::new(),
            files_max: None,
            config: None,
            held: None,
            journal_stream: false,
        };
        settings.set("reply.load_timeout", "1s")
    }

    /// Has the next runs die at a point (`name@3`: at its third passage), or no longer.
    #[cfg(feature = "fail-points")]
    pub fn arm(&mut self, point: Option<&str>) {
        self.settings
            .env
            .retain(|(name, _)| name != "TALLYD_FAIL_POINT");
        if let Some(point) = point {
            self.settings
                .env
                .push(("TALLYD_FAIL_POINT".into(), point.into()));
        }
    }

    /// Starts it again, though it may die before its socket answers. Whether it lives.
    #[cfg(feature = "fail-points")]
    pub fn restart_armed(&mut self) -> bool {
        if self.child.is_some() {
            self.kill9();
        }
        self.spawn();
        let begin = Instant::now();
        while Client::unix(&self.socket)
            .and_then(|mut c| c.try_command(&["PING"]))
            .is_err()
        {
            if self.has_died() {
                return false;
            }
            assert!(begin.elapsed() < LIMIT, "it neither answers nor dies");
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Whether it was started and has not been seen to end.
    #[cfg(feature = "fail-points")]
    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    /// Whether it has ended by itself.
    #[cfg(feature = "fail-points")]
    pub fn has_died(&mut self) -> bool {
        let child = self.child.as_mut().expect("it was spawned");
        let died = child.try_wait().expect("our own child").is_some();
        if died {
            self.child = None;
        }
        died
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("stderr")
    }

    /// All that it wrote to standard output and standard error so far, over all its runs.
    pub fn log(&self) -> String {
        std::fs::read(self.log_path())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    fn spawn(&mut self) {
        assert!(self.child.is_none(), "it is running already");
        // The parent only: the daemon makes the directory itself, or says why it cannot.
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("a file in our directory");
        let binary = env!("CARGO_BIN_EXE_tallyd");
        let shell = |script: &str| {
            let mut shell = Command::new("sh");
            shell.args(["-c", script, binary]);
            shell
        };
        let mut stdin = Stdio::null();
        let mut command = match (self.settings.files_max, &self.settings.held) {
            (None, None) => Command::new(binary),
            (Some(files), _) => shell(&format!("ulimit -n {files}; exec \"$0\" \"$@\"")),
            (None, Some(held)) => {
                stdin = held.try_clone().expect("a descriptor").into();
                shell("export LISTEN_PID=$$; exec \"$0\" \"$@\" 3<&0 </dev/null")
            }
        };
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TALLYD_") {
                command.env_remove(name);
            }
        }
        command.arg("run");
        if let Some(path) = &self.settings.config {
            command.arg("--config").arg(path);
        }
        if self.settings.journal_stream {
            let stat = log.metadata().expect("an open file");
            command.env("JOURNAL_STREAM", format!("{}:{}", stat.dev(), stat.ino()));
        }
        let child = command
            .args(["--store", &self.settings.store])
            .arg("--socket")
            .arg(&self.socket)
            .arg("--state-dir")
            .arg(&self.state_dir)
            .args(["--flush-interval", &self.settings.flush_interval])
            .envs(self.settings.env.iter().map(|(name, value)| (name, value)))
            .stdin(stdin)
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn()
            .expect("the daemon's binary was built with the tests");
        self.child = Some(child);
    }

    #[track_caller]
    fn wait_ready(&mut self) {
        let begin = Instant::now();
        loop {
            let answer = Client::unix(&self.socket).and_then(|mut c| c.try_command(&["PING"]));
            if answer.is_ok_and(|value| value == Value::Status("PONG".into())) {
                return;
            }
            let child = self.child.as_mut().expect("it was spawned");
            if let Some(status) = child.try_wait().expect("our own child") {
                self.child = None;
                panic!("the daemon gave up ({status})");
            }
            assert!(
                begin.elapsed() < LIMIT,
                "the daemon's socket does not answer"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Where clients connect.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where its journal is.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Its process number.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it is running").id()
    }

    /// A new connection.
    #[track_caller]
    pub fn client(&self) -> Client {
        Client::unix(&self.socket).expect("the daemon accepts")
    }

    /// Seals now and waits until the store has all that was pending. Its books balance then, as always.
    #[track_caller]
    pub fn flush(&self) {
        let mut client = self.client();
        assert_eq!(client.command(&["TALLY.FLUSH", "50000"]), Value::ok());
        let info = client.command(&["INFO", "tallyd"]).text();
        let books: Vec<&str> = info
            .lines()
            .filter(|line| line.contains("amount_"))
            .collect();
        assert!(
            info.contains("tallyd_conservation_difference:0\r\n"),
            "{books:?}"
        );
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, which: Signal) {
        signal(self.child.as_ref().expect("it is running"), which);
    }

    /// Asks it to stop, and waits until it has.
    #[track_caller]
    pub fn term(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait_exit()
    }

    /// Waits until it has stopped.
    #[track_caller]
    pub fn wait_exit(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("it is running");
        wait_exit(&mut child, LIMIT, "the daemon")
    }

    /// Kills it, at whatever it is doing.
    #[track_caller]
    pub fn kill9(&mut self) {
        self.signal(Signal::KILL);
        self.wait_exit();
    }

    /// Starts it again on the same state directory and socket; kills it first if it runs.
    #[track_caller]
    pub fn restart(&mut self) {
        if self.child.is_some() {
            self.kill9();
        }
        self.spawn();
        self.wait_ready();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let tail = log.char_indices().rev().nth(20_000).map_or(0, |(at, _)| at);
            eprintln!("---- what the daemon said:\n{}\n----", &log[tail..]);
        }
    }
}
