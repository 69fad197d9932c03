//! Whether the machine lost power, or crashed, since a former process wrote to this directory.
//!
//! After a mere kill every write is there. After a power cut the youngest may be gone: also the
//! segments of batches that the store has taken already. Then the numbers that the segments tell are
//! too low, and recovery must begin far above them (see [`plan`](super::plan::plan)).
//!
//! A directory that was copied to another machine looks much the same, and must not: there the
//! original is still at work with this node's id. So both are asked: another boot, of the same host.

use std::fs;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

/// One boot of one host; empty where the system does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Boot {
    /// The kernel's id of this boot.
    boot: String,
    /// Of machine id and host name, hashed: systemd asks that the machine id is not handed on.
    host: String,
}

impl Boot {
    /// Of this moment.
    pub fn now() -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let machine = read("/etc/machine-id");
        let name = rustix::system::uname();
        let host = [machine.trim().as_bytes(), name.nodename().to_bytes()].join(&b'/');
        Self {
            boot: read("/proc/sys/kernel/random/boot_id").trim().to_owned(),
            host: format!("{:032x}", xxh3_128(&host)),
        }
    }

    /// Whether `self`, now, is a later boot of the same host. A shut-down in order looks the same as a
    /// power cut, which does no harm.
    pub fn follows(&self, earlier: &Self) -> bool {
        let known = |boot: &Self| !boot.boot.is_empty() && !boot.host.is_empty();
        known(self) && known(earlier) && self.host == earlier.host && self.boot != earlier.boot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_boot_of_the_same_host_follows() {
        let boot = |boot: &str, host: &str| Boot {
            boot: boot.to_owned(),
            host: host.to_owned(),
        };
        let now = boot("2", "a");
        assert!(now.follows(&boot("1", "a")));
        assert!(!now.follows(&boot("2", "a")), "the same boot: a mere kill");
        assert!(!now.follows(&boot("1", "b")), "a copy from another host");
        assert!(!now.follows(&Boot::default()), "an older node.json");
        assert!(!Boot::default().follows(&boot("1", "a")));
    }

    #[test]
    fn this_system_tells_which_boot_it_is() {
        assert_eq!(Boot::now().boot.len(), 36);
        assert_eq!(Boot::now(), Boot::now());
        assert!(!Boot::now().follows(&Boot::now()));
    }
}
