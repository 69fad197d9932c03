//! What values must satisfy beyond their form: the one place that lists the bounds.

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use super::{AdminListen, Config, Delivery, duration, size};

/// The bytes of a Unix socket's path: `sun_path` has 108, the last one is NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// The bytes of a name that goes into every message and metric.
const NAME_BYTES_MAX: usize = 255;
const BATCH_KEYS: RangeInclusive<usize> = 1..=100_000;
const MAX_KEYS: RangeInclusive<usize> = 1..=100_000_000;
const MAX_CONNECTIONS: RangeInclusive<usize> = 1..=1_000_000;
/// A record's key length has 16 bits.
const KEY_BYTES: RangeInclusive<usize> = 1..=65_535;
const MEMORY_BYTES: RangeInclusive<u64> = (1 << 20)..=(64 << 30);
/// Names or patterns in a list: each costs a comparison for a connection or a key.
const LIST_LEN_MAX: usize = 1000;
const REPLICAS: RangeInclusive<usize> = 0..=100;
/// Flushing stands still meanwhile, and the connection has a time-out of its own.
const REPLICAS_TIMEOUT_MAX: Duration = Duration::from_secs(5);
/// Shorter timers would spin.
const TIMER_MIN: Duration = Duration::from_millis(1);

/// A value of the right form that is out of bounds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OutOfBounds {
    pub key: &'static str,
    pub found: String,
    pub expected: String,
}

/// All that is out of bounds.
pub(super) fn check(config: &Config) -> Vec<OutOfBounds> {
    let mut checks = Checks(Vec::new());

    checks.text("node.name", &config.node.name);
    checks.text("publish.channel", &config.publish.channel);
    checks.path(
        "node.state_dir",
        &config.node.state_dir,
        "$STATE_DIRECTORY, $XDG_STATE_HOME nor $HOME",
    );
    checks.path(
        "listen.socket",
        &config.listen.socket,
        "$RUNTIME_DIRECTORY nor $XDG_RUNTIME_DIR",
    );
    checks.socket("listen.socket", &config.listen.socket);
    if let Some(AdminListen::Unix(path)) = &config.admin.listen {
        checks.socket("admin.listen", path);
    }

    checks.number(
        "listen.max_connections",
        config.listen.max_connections,
        &MAX_CONNECTIONS,
    );
    checks.list("listen.allow_uids", &config.listen.allow_uids);
    checks.list("listen.allow_gids", &config.listen.allow_gids);
    checks.list("limits.allow_keys", &config.limits.allow_keys);
    checks.number("flush.max_keys", config.flush.max_keys, &MAX_KEYS);
    checks.number("flush.batch_keys", config.flush.batch_keys, &BATCH_KEYS);
    if config.flush.batch_keys > config.flush.max_keys {
        checks.fail(
            "flush.batch_keys",
            config.flush.batch_keys.to_string(),
            format!("at most flush.max_keys, which is {}", config.flush.max_keys),
        );
    }

    checks.memory("flush.max_retained_bytes", config.flush.max_retained_bytes);
    checks.number("flush.replicas", config.flush.replicas, &REPLICAS);
    if config.flush.replicas > 0 && config.flush.delivery == Delivery::AtLeastOnce {
        checks.fail(
            "flush.replicas",
            config.flush.replicas.to_string(),
            "0 where flush.delivery is \"at-least-once\", which sends nothing again after a \
             fail-over"
                .to_owned(),
        );
    }
    checks.timer("flush.replicas_timeout", config.flush.replicas_timeout);
    if config.flush.replicas_timeout > REPLICAS_TIMEOUT_MAX {
        checks.fail(
            "flush.replicas_timeout",
            duration::format(config.flush.replicas_timeout),
            format!("at most {}", duration::format(REPLICAS_TIMEOUT_MAX)),
        );
    }

    checks.timer("flush.interval", config.flush.interval);
    checks.timer("publish.heartbeat", config.publish.heartbeat);
    checks.timer("view.max_age", config.view.max_age);

    checks.number(
        "limits.max_key_bytes",
        config.limits.max_key_bytes,
        &KEY_BYTES,
    );
    checks.memory("limits.max_pending_bytes", config.limits.max_pending_bytes);
    checks.memory("limits.max_view_bytes", config.limits.max_view_bytes);
    checks.memory("limits.max_client_bytes", config.limits.max_client_bytes);
    checks.memory(
        "limits.max_transaction_bytes",
        config.limits.max_transaction_bytes,
    );
    if config.limits.max_transaction_bytes > config.limits.max_client_bytes {
        checks.fail(
            "limits.max_transaction_bytes",
            size::format(config.limits.max_transaction_bytes),
            format!(
                "at most limits.max_client_bytes, which is {}",
                size::format(config.limits.max_client_bytes)
            ),
        );
    }

    checks.0
}

struct Checks(Vec<OutOfBounds>);

impl Checks {
    fn fail(&mut self, key: &'static str, found: String, expected: String) {
        self.0.push(OutOfBounds {
            key,
            found,
            expected,
        });
    }

    /// Names end up in messages, metrics and log lines.
    fn text(&mut self, key: &'static str, text: &str) {
        if text.is_empty() {
            self.fail(key, "empty".to_owned(), "at least one character".to_owned());
        } else if text.len() > NAME_BYTES_MAX || text.chars().any(char::is_control) {
            self.fail(
                key,
                format!("{text:?}"),
                format!("at most {NAME_BYTES_MAX} bytes without control characters"),
            );
        }
    }

    /// `neither`: the variables that would have given a default.
    fn path(&mut self, key: &'static str, path: &Path, neither: &str) {
        if path.as_os_str().is_empty() {
            self.fail(
                key,
                "empty".to_owned(),
                format!("a path: neither {neither} offers a default"),
            );
        } else if path.as_os_str().as_encoded_bytes().contains(&0) {
            self.fail(
                key,
                "one that holds a NUL byte".to_owned(),
                "a path without".to_owned(),
            );
        }
    }

    fn socket(&mut self, key: &'static str, path: &Path) {
        let bytes = path.as_os_str().len();
        if bytes > SOCKET_PATH_BYTES_MAX {
            self.fail(
                key,
                format!("a path of {bytes} bytes"),
                format!("at most {SOCKET_PATH_BYTES_MAX}, the system's limit for a Unix socket"),
            );
        }
    }

    fn list(&mut self, key: &'static str, list: &[String]) {
        if list.len() > LIST_LEN_MAX {
            let found = format!("a list of {}", list.len());
            self.fail(key, found, format!("at most {LIST_LEN_MAX}"));
        }
        if list.iter().any(String::is_empty) {
            self.fail(
                key,
                "a list with an empty name".to_owned(),
                "names of at least one character".to_owned(),
            );
        }
    }

    fn number(&mut self, key: &'static str, number: usize, range: &RangeInclusive<usize>) {
        if !range.contains(&number) {
            self.fail(
                key,
                number.to_string(),
                format!("{} to {}", range.start(), range.end()),
            );
        }
    }

    fn memory(&mut self, key: &'static str, bytes: u64) {
        if !MEMORY_BYTES.contains(&bytes) {
            self.fail(
                key,
                size::format(bytes),
                format!(
                    "{} to {}",
                    size::format(*MEMORY_BYTES.start()),
                    size::format(*MEMORY_BYTES.end())
                ),
            );
        }
    }

    fn timer(&mut self, key: &'static str, value: Duration) {
        if value < TIMER_MIN {
            self.fail(
                key,
                duration::format(value),
                format!("at least {}", duration::format(TIMER_MIN)),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::Environment;
    use super::*;

    fn keys_after(change: fn(&mut Config)) -> Vec<&'static str> {
        let mut config = Config::defaults(&Environment {
            root: true,
            ..Environment::default()
        });
        change(&mut config);
        check(&config).into_iter().map(|fault| fault.key).collect()
    }

    #[test]
    fn the_defaults_are_within_all_bounds() {
        assert_eq!(keys_after(|_| ()), [""; 0]);
    }

    #[test]
    fn each_bound_names_its_key() {
        assert_eq!(keys_after(|c| c.node.name.clear()), ["node.name"]);
        assert_eq!(keys_after(|c| c.node.name = "a\nb".into()), ["node.name"]);
        assert_eq!(
            keys_after(|c| c.node.state_dir = PathBuf::new()),
            ["node.state_dir"]
        );
        assert_eq!(
            keys_after(|c| c.listen.socket = PathBuf::new()),
            ["listen.socket"]
        );
        assert_eq!(
            keys_after(|c| c.publish.channel.clear()),
            ["publish.channel"]
        );
        assert_eq!(
            keys_after(|c| c.listen.max_connections = 0),
            ["listen.max_connections"]
        );
        assert_eq!(
            keys_after(|c| c.listen.max_connections = 1_000_001),
            ["listen.max_connections"]
        );
        assert_eq!(
            keys_after(|c| c.listen.allow_uids = vec!["1".to_owned(); 1001]),
            ["listen.allow_uids"]
        );
        assert_eq!(
            keys_after(|c| c.listen.allow_gids = vec![String::new()]),
            ["listen.allow_gids"]
        );
        assert_eq!(
            keys_after(|c| c.limits.allow_keys = vec![String::new()]),
            ["limits.allow_keys"]
        );
        assert_eq!(keys_after(|c| c.flush.batch_keys = 0), ["flush.batch_keys"]);
        assert_eq!(
            keys_after(|c| (c.flush.batch_keys, c.flush.max_keys) = (100_001, 200_000)),
            ["flush.batch_keys"]
        );
        assert_eq!(keys_after(|c| c.flush.max_keys = 999), ["flush.batch_keys"]);
        assert_eq!(keys_after(|c| c.flush.replicas = 101), ["flush.replicas"]);
        assert_eq!(
            keys_after(|c| {
                c.flush.replicas = 1;
                c.flush.delivery = Delivery::AtLeastOnce;
            }),
            ["flush.replicas"]
        );
        for timeout in [Duration::ZERO, Duration::from_millis(5001)] {
            let mut config = Config::defaults(&Environment {
                root: true,
                ..Environment::default()
            });
            config.flush.replicas_timeout = timeout;
            assert_eq!(check(&config)[0].key, "flush.replicas_timeout");
        }
        assert_eq!(
            keys_after(|c| c.flush.interval = Duration::from_micros(999)),
            ["flush.interval"]
        );
        assert_eq!(
            keys_after(|c| c.flush.max_retained_bytes = (1 << 20) - 1),
            ["flush.max_retained_bytes"]
        );
        assert_eq!(
            keys_after(|c| c.flush.max_retained_bytes = (64 << 30) + 1),
            ["flush.max_retained_bytes"]
        );
        assert_eq!(
            keys_after(|c| c.publish.heartbeat = Duration::ZERO),
            ["publish.heartbeat"]
        );
        assert_eq!(
            keys_after(|c| c.view.max_age = Duration::ZERO),
            ["view.max_age"]
        );
        assert_eq!(
            keys_after(|c| c.limits.max_key_bytes = 0),
            ["limits.max_key_bytes"]
        );
        assert_eq!(
            keys_after(|c| c.limits.max_key_bytes = 65_536),
            ["limits.max_key_bytes"]
        );
        assert_eq!(
            keys_after(|c| c.limits.max_pending_bytes = (1 << 20) - 1),
            ["limits.max_pending_bytes"]
        );
        assert_eq!(
            keys_after(|c| c.limits.max_view_bytes = (64 << 30) + 1),
            ["limits.max_view_bytes"]
        );
        assert_eq!(
            keys_after(|c| c.limits.max_client_bytes = (64 << 30) + 1),
            ["limits.max_client_bytes"]
        );
        assert_eq!(
            keys_after(|c| c.limits.max_transaction_bytes = (1 << 20) - 1),
            ["limits.max_transaction_bytes"]
        );
        assert_eq!(
            keys_after(|c| c.limits.max_client_bytes = 32 << 20),
            ["limits.max_transaction_bytes"]
        );
    }

    #[test]
    fn values_at_a_bound_are_taken() {
        assert_eq!(
            keys_after(|c| {
                c.flush.interval = Duration::from_millis(1);
                c.flush.retain = Duration::ZERO;
                c.flush.max_retained_bytes = 1 << 20;
                c.reply.load_timeout = Duration::ZERO;
                c.flush.max_keys = 100_000;
                c.flush.batch_keys = c.flush.max_keys;
                c.limits.max_pending_bytes = 1 << 20;
                c.limits.max_view_bytes = 64 << 30;
                c.limits.max_key_bytes = 65_535;
                c.listen.max_connections = 1;
            }),
            [""; 0]
        );
    }

    #[test]
    fn a_socket_path_may_have_107_bytes_and_no_more() {
        assert_eq!(
            keys_after(|c| c.listen.socket = "s".repeat(107).into()),
            [""; 0]
        );
        assert_eq!(
            keys_after(|c| c.listen.socket = "s".repeat(108).into()),
            ["listen.socket"]
        );
        assert_eq!(
            keys_after(|c| c.admin.listen = Some(AdminListen::Unix("s".repeat(108).into()))),
            ["admin.listen"]
        );
    }
}
