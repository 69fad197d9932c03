//! The configuration: defaults, then the file, then the environment, then flags.
//!
//! This file holds the typed result, one struct a section. How a value is written is in the file of
//! its type; where values come from in [`source`]; what they must satisfy together in `limits`.
//!
//! 1. A [`Config`] that [`Config::load`] returned is valid: no room checks it again.
//! 2. An unknown key is an error, in the file and in the environment alike.
//! 3. Secrets are masked in everything that is printed from here, errors included.
//! 4. Nothing here reads the process's environment but [`Environment::of_process`].

mod admin_listen;
mod choice;
pub mod duration;
mod fault;
mod layers;
mod limits;
mod list;
mod load;
pub mod mode;
mod password;
mod percent;
mod reload;
mod secret;
mod sentinel_url;
pub mod size;
pub mod source;
mod store_url;
mod text;
mod units;
mod written;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use admin_listen::AdminListen;
pub use choice::{Cold, Delivery, LogFormat, LogLevel, OnTimeout, SyncPolicy};
pub use fault::{ConfigError, Fault};
pub use load::Loaded;
pub use reload::{Changes, RELOADABLE, changes};
pub use secret::Secret;
pub use sentinel_url::SentinelUrl;
pub use source::{Environment, Flags, Origin, Origins};
pub use store_url::{StoreUrl, StoreUrlError};

/// Everything that can be set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Who this daemon is, and where it keeps its state.
    pub node: Node,
    /// The socket that applications connect to.
    pub listen: Listen,
    /// Where counters live for good.
    pub store: Store,
    /// When and how pending deltas go to the store.
    pub flush: Flush,
    /// What makes acknowledged increments survive.
    pub journal: Journal,
    /// What other nodes and subscribers are told.
    pub publish: Publish,
    /// What the replies to increments say.
    pub reply: Reply,
    /// This node's picture of the counters.
    pub view: View,
    /// The bounds of memory.
    pub limits: Limits,
    /// The HTTP server for health and metrics.
    pub admin: Admin,
    /// The log.
    pub log: Log,
    /// How the daemon ends.
    pub shutdown: Shutdown,
}

/// `[node]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// A label in messages and metrics; need not be unique.
    pub name: String,
    /// The directory of the journal, the node's id and the embedded store.
    pub state_dir: PathBuf,
}

/// `[listen]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// The Unix socket's path.
    pub socket: PathBuf,
    /// The socket's permission bits.
    #[serde(with = "mode")]
    pub mode: u32,
    /// The group that the socket is given to.
    #[serde(with = "text::optional")]
    pub group: Option<String>,
    /// Connections at the same time; one more is refused.
    pub max_connections: usize,
    /// Users who may connect, by number or name. With `allow_gids` empty as well: whom the
    /// socket's mode lets in.
    #[serde(with = "list")]
    pub allow_uids: Vec<String>,
    /// Groups whose members may connect, by number or name.
    #[serde(with = "list")]
    pub allow_gids: Vec<String>,
}

/// `[store]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Store {
    /// Which store. Once loaded, its login carries the password, wherever that came from.
    pub url: StoreUrl,
    /// A file that holds the store's password.
    #[serde(with = "text::optional")]
    pub password_file: Option<PathBuf>,
    /// The store's password: from `password_file`, else the URL, else the service's credentials.
    /// Not a key of its own.
    #[serde(skip)]
    pub password: Option<Secret>,
    /// A file that holds the password of the Sentinels.
    #[serde(with = "text::optional")]
    pub sentinel_password_file: Option<PathBuf>,
    /// The password of the Sentinels: from `sentinel_password_file`, else the service's
    /// credentials. Not a key of its own.
    #[serde(skip)]
    pub sentinel_password: Option<Secret>,
}

/// `[flush]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flush {
    /// Time between two seals.
    #[serde(with = "duration")]
    pub interval: Duration,
    /// Distinct keys in an epoch at which it is sealed early: a bound, not the rule. An epoch that
    /// ends by the clock adds more increments up to one command.
    pub max_keys: usize,
    /// Distinct keys in one batch.
    pub batch_keys: usize,
    /// How a batch reaches the store.
    #[serde(with = "choice")]
    pub delivery: Delivery,
    /// How long an applied segment is kept, to be replayed if the store turns out to have lost it.
    #[serde(with = "duration")]
    pub retain: Duration,
    /// Room on the disk for all of these together, in bytes; beyond it the oldest go first.
    #[serde(with = "size")]
    pub max_retained_bytes: u64,
    /// So many replicas must have an applied segment before it is let go, besides `retain`.
    pub replicas: usize,
    /// The longest that they are waited for at a time.
    #[serde(with = "duration")]
    pub replicas_timeout: Duration,
}

/// `[journal]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    /// When it is forced to the disk.
    #[serde(with = "choice")]
    pub sync: SyncPolicy,
}

/// `[publish]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// Whether batches are published, and those of other nodes listened to.
    pub enabled: bool,
    /// The channel, in the store and on this daemon's socket.
    pub channel: String,
    /// Silence after which an idle node sends an empty message.
    #[serde(with = "duration")]
    pub heartbeat: Duration,
}

/// `[reply]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// What the first reply for a key counts from.
    #[serde(with = "choice")]
    pub cold: Cold,
    /// What a read of a key never seen is answered when its value does not come in time.
    #[serde(with = "choice")]
    pub on_timeout: OnTimeout,
    /// The longest that a reply waits for the store's value.
    #[serde(with = "duration")]
    pub load_timeout: Duration,
}

/// `[view]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// Age of a value at which it is read from the store anew.
    #[serde(with = "duration")]
    pub max_age: Duration,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// The longest key, in bytes.
    #[serde(with = "size")]
    pub max_key_bytes: usize,
    /// Memory and journal for pending deltas, in bytes; beyond it increments are refused.
    #[serde(with = "size")]
    pub max_pending_bytes: u64,
    /// Memory for the view, in bytes; beyond it the coldest keys are forgotten.
    #[serde(with = "size")]
    pub max_view_bytes: u64,
    /// Memory for all clients together, in bytes; beyond it those that hold most are cut off.
    #[serde(with = "size")]
    pub max_client_bytes: u64,
    /// Memory for what one client has between `MULTI` and `EXEC`, in bytes.
    #[serde(with = "size")]
    pub max_transaction_bytes: u64,
    /// Patterns of the keys that clients may use; empty: every key.
    #[serde(with = "list")]
    pub allow_keys: Vec<String>,
}

/// `[admin]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// Where the HTTP server listens; `None`: there is none.
    #[serde(with = "admin_listen")]
    pub listen: Option<AdminListen>,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// The least severe lines that are logged.
    #[serde(with = "choice")]
    pub level: LogLevel,
    /// How lines look.
    #[serde(with = "choice")]
    pub format: LogFormat,
}

/// `[shutdown]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shutdown {
    /// The longest that the last flush may take; the journal keeps what is left.
    #[serde(with = "duration")]
    pub timeout: Duration,
}

impl Config {
    /// What holds where nothing is set. `node.state_dir` and `listen.socket` are empty where the
    /// environment offers no place for them.
    pub fn defaults(environment: &Environment) -> Self {
        Self {
            node: Node {
                name: environment.host_name.clone(),
                state_dir: environment.state_dir().0,
            },
            listen: Listen {
                socket: environment.socket().0,
                mode: 0o660,
                group: None,
                max_connections: 10_000,
                allow_uids: Vec::new(),
                allow_gids: Vec::new(),
            },
            store: Store {
                url: StoreUrl::Embedded,
                password_file: None,
                password: None,
                sentinel_password_file: None,
                sentinel_password: None,
            },
            flush: Flush {
                interval: Duration::from_secs(1),
                max_keys: 1_000_000,
                batch_keys: 1_000,
                delivery: Delivery::ExactlyOnce,
                retain: Duration::from_secs(30),
                max_retained_bytes: 256 << 20,
                replicas: 0,
                replicas_timeout: Duration::from_millis(100),
            },
            journal: Journal {
                sync: SyncPolicy::Interval,
            },
            publish: Publish {
                enabled: true,
                channel: "tallyd:deltas".to_owned(),
                heartbeat: Duration::from_secs(5),
            },
            reply: Reply {
                cold: Cold::Load,
                on_timeout: OnTimeout::Error,
                load_timeout: Duration::from_millis(50),
            },
            view: View {
                max_age: Duration::from_secs(60),
            },
            limits: Limits {
                max_key_bytes: 1 << 10,
                max_pending_bytes: 256 << 20,
                max_view_bytes: 256 << 20,
                max_client_bytes: 256 << 20,
                max_transaction_bytes: 64 << 20,
                allow_keys: Vec::new(),
            },
            admin: Admin { listen: None },
            log: Log {
                level: LogLevel::Info,
                format: LogFormat::Auto,
            },
            shutdown: Shutdown {
                timeout: Duration::from_secs(10),
            },
        }
    }

    /// Reads every source and checks the whole.
    ///
    /// # Errors
    ///
    /// All that is wrong, each with its key and where it came from.
    pub fn load(flags: &Flags, environment: &Environment) -> Result<Loaded, ConfigError> {
        load::load(flags, environment)
    }

    /// Every key with its value as TOML, secrets masked, by section.
    pub fn written(&self) -> Vec<(String, String)> {
        written::keys(self)
            .into_iter()
            .map(|(key, value)| (key, written::toml(&value)))
            .collect()
    }
}
