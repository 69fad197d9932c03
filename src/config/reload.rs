//! What may change while the daemon runs.

use super::{Config, written};

/// The keys that take effect without a restart.
pub const RELOADABLE: [&str; 6] = [
    "listen.allow_uids",
    "listen.allow_gids",
    "flush.interval",
    "limits.allow_keys",
    "log.level",
    "shutdown.timeout",
];

/// How two configurations differ, by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Keys that take effect now.
    pub can_change: Vec<String>,
    /// Keys that wait for a restart.
    pub needs_restart: Vec<String>,
}

impl Changes {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.can_change.is_empty() && self.needs_restart.is_empty()
    }
}

/// Compares the configuration that is running with one that was read anew.
pub fn changes(old: &Config, new: &Config) -> Changes {
    let mut changes = Changes::default();
    for ((key, before), (_, after)) in written::keys(old).into_iter().zip(written::keys(new)) {
        // The written form masks passwords, so a new one shows only here.
        let secret_differs = match key.as_str() {
            "store.url" => old.store.url != new.store.url,
            "store.sentinel_password_file" => {
                old.store.sentinel_password != new.store.sentinel_password
            }
            _ => false,
        };
        if before == after && !secret_differs {
            continue;
        }
        if RELOADABLE.contains(&key.as_str()) {
            changes.can_change.push(key);
        } else {
            changes.needs_restart.push(key);
        }
    }
    changes
}

impl Config {
    /// Takes over what may change while running, and nothing else.
    pub fn reload_from(&mut self, new: &Self) {
        self.listen.allow_uids.clone_from(&new.listen.allow_uids);
        self.listen.allow_gids.clone_from(&new.listen.allow_gids);
        self.flush.interval = new.flush.interval;
        self.limits.allow_keys.clone_from(&new.limits.allow_keys);
        self.log.level = new.log.level;
        self.shutdown.timeout = new.shutdown.timeout;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Environment, LogLevel, Secret, StoreUrl};
    use super::*;

    fn defaults() -> Config {
        Config::defaults(&Environment::default())
    }

    #[test]
    fn the_same_configuration_has_no_changes() {
        assert!(changes(&defaults(), &defaults()).is_empty());
    }

    #[test]
    fn changes_are_told_apart_by_whether_they_need_a_restart() {
        let mut new = defaults();
        new.log.level = LogLevel::Debug;
        new.flush.interval = Duration::from_millis(5);
        new.flush.max_keys += 1;
        new.node.name.push('x');
        let changes = changes(&defaults(), &new);
        assert_eq!(changes.can_change, ["flush.interval", "log.level"]);
        assert_eq!(changes.needs_restart, ["node.name", "flush.max_keys"]);
    }

    #[test]
    fn a_new_password_is_a_change_of_the_store() {
        let mut old = defaults();
        old.store.url = StoreUrl::parse("redis://:one@h").unwrap();
        let mut new = old.clone();
        new.store.url.set_password(&Secret::new("two".to_owned()));
        assert_eq!(changes(&old, &new).needs_restart, ["store.url"]);
    }

    #[test]
    fn every_reloadable_key_exists_and_is_taken_over() {
        let old = defaults();
        let mut new = defaults();
        let other = Duration::from_millis(1234);
        new.listen.allow_uids.push("1".to_owned());
        new.listen.allow_gids.push("1".to_owned());
        new.flush.interval = other;
        new.limits.allow_keys.push("a".to_owned());
        new.log.level = LogLevel::Trace;
        new.shutdown.timeout = other;
        let mut reloadable = changes(&old, &new).can_change;
        let mut named = RELOADABLE.map(str::to_owned).to_vec();
        reloadable.sort();
        named.sort();
        assert_eq!(reloadable, named);

        new.listen.max_connections = 7;
        let mut running = old.clone();
        running.reload_from(&new);
        let left = changes(&running, &new);
        assert_eq!(left.can_change, [""; 0]);
        assert_eq!(left.needs_restart, ["listen.max_connections"]);
    }

    #[test]
    fn the_example_file_marks_exactly_the_keys_that_can_change() {
        let mut section = String::new();
        let mut marked = Vec::new();
        let mut mark = false;
        for line in include_str!("../../config/tallyd.toml").lines().skip(10) {
            if let Some(name) = line.strip_prefix('[') {
                section = name.trim_end_matches(']').to_owned();
            } else if let Some(key) = line.strip_prefix('#')
                && !key.starts_with(' ')
            {
                let key = key.split(" = ").next().unwrap_or_default();
                if std::mem::take(&mut mark) {
                    marked.push(format!("{section}.{key}"));
                }
            } else {
                mark |= line.ends_with("[reload]");
            }
        }
        marked.sort();
        let mut named = RELOADABLE.map(str::to_owned).to_vec();
        named.sort();
        assert_eq!(marked, named);
    }
}
