//! systemd: what it hands over at the start, and what it is told from then on.
//!
//! - [`socket`]: the listening socket that systemd holds through a restart
//! - [`notify`]: ready, reloading, stopping
//! - [`watch`]: the thread that feeds the watchdog and tells the status
//!
//! Started by anyone else, the process has none of systemd's variables, and all of this is nothing.
//! The variables stay in the environment: the daemon starts no programs that would inherit them.

pub mod notify;
pub mod socket;
pub mod watch;

pub use notify::Manager;
