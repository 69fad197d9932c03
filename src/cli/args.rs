//! The command line. Doc comments on its parts are the help that users read.

// So they are shown as they are, and backticks would be too.
#![allow(clippy::doc_markdown)]

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::config::{Flags, duration};

/// Takes high-write counters off Redis: adds increments up in memory, durably, and flushes one
/// INCRBY per key.
#[derive(Debug, Parser)]
#[command(name = "tallyd", version, arg_required_else_help = true)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the daemon
    Run(ConfigArgs),
    /// Print the effective configuration, secrets masked; exit with 78 if it is wrong
    Check(CheckArgs),
    /// Count in a temporary directory and compare the totals; no Redis needed
    Demo(DemoArgs),
    /// Show what the running daemon does, live; q quits
    ///
    /// In a terminal: rates in and out, what is pending, the store, the other nodes. Anywhere else:
    /// a line for each interval.
    Top(TopArgs),
    /// Look into a journal
    #[command(subcommand)]
    Journal(JournalCommand),
}

/// Flags that set what the configuration file sets too.
#[derive(Debug, Default, Args)]
pub struct ConfigArgs {
    /// The configuration file [default: /etc/tallyd/tallyd.toml, if it is there]
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// Where the journal and the embedded store are kept (node.state_dir)
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<String>,
    /// The Unix socket that applications connect to (listen.socket)
    #[arg(long, value_name = "PATH")]
    pub socket: Option<String>,
    /// The store: embedded, redis://, rediss://, redis+unix:// or redis+sentinel:// (store.url). Every
    /// user of the host can read a command line: a password belongs in store.password_file
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Time between two flushes, such as 1s or 250ms (flush.interval)
    #[arg(long, value_name = "DURATION")]
    pub flush_interval: Option<String>,
    /// Where health and metrics are served: HOST:PORT or unix:PATH (admin.listen)
    #[arg(long, value_name = "ADDRESS")]
    pub admin: Option<String>,
    /// error, warn, info, debug or trace (log.level)
    #[arg(long, value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// Flags of `tallyd check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// What is to be checked.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print only what is wrong
    #[arg(short, long)]
    pub quiet: bool,
}

impl From<ConfigArgs> for Flags {
    fn from(args: ConfigArgs) -> Self {
        Self {
            config: args.config,
            state_dir: args.state_dir,
            socket: args.socket,
            store: args.store,
            flush_interval: args.flush_interval,
            admin: args.admin,
            log_level: args.log_level,
        }
    }
}

/// Flags of `tallyd demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Stop after so many seconds
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub seconds: u64,
    /// Stop after so many increments, if that is earlier
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub ops: Option<u64>,
}

/// Flags of `tallyd top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// The running daemon's socket [default: listen.socket of the configuration]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The configuration file that names the socket [default: /etc/tallyd/tallyd.toml, if it is there]
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
    /// Time between two looks, 100ms to 1h
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
    pub interval: Duration,
    /// Print one block of numbers, with rates over one interval, and exit; 74 if the daemon is away
    #[arg(long)]
    pub once: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let bounds = Duration::from_millis(100)..=Duration::from_secs(3600);
    duration::parse(text)
        .filter(|interval| bounds.contains(interval))
        .ok_or_else(|| "expected 100ms to 1h, such as 500ms or 2s".to_owned())
}

/// `tallyd journal …`
#[derive(Debug, Subcommand)]
pub enum JournalCommand {
    /// List the segments and what a recovery would do with each; changes nothing
    Show(JournalArgs),
    /// Check every record's check sum; exit with 74 if something is damaged; changes nothing
    Verify(JournalArgs),
    /// List the deltas that the store refused and that were not replayed
    ///
    /// A line each, parts separated by tabs: time (RFC 3339, UTC), batch, delta, key, the store's
    /// reason. Keys are escaped.
    Rejected(JournalArgs),
    /// Send the rejected deltas to the running daemon again, once their cause is mended
    ///
    /// Each one is an INCRBY to the daemon's socket, and is noted in rejected.replayed.jsonl
    /// before the next one is sent. If this program ends between the daemon's answer and the note, or
    /// the connection breaks before the answer, the next replay sends that one delta again, and it
    /// may count twice. What the store refuses once more is rejected anew.
    Replay(ReplayArgs),
}

/// The directory that a journal command looks into.
#[derive(Debug, Args)]
pub struct JournalArgs {
    /// The state directory
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
}

/// Flags of `tallyd journal replay`.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// The state directory
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// The running daemon's socket [default: listen.socket of the configuration]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The configuration file that names the socket [default: /etc/tallyd/tallyd.toml, if it is there]
    #[arg(long, value_name = "PATH")]
    pub config: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_configuration_flag_arrives() {
        let line = "tallyd run --config c --state-dir d --socket s --store embedded \
                    --flush-interval 1s --admin a --log-level info";
        let arguments = Arguments::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Run(args) = arguments.command else {
            panic!("not run");
        };
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(
            Flags::from(args),
            Flags {
                config: Some(PathBuf::from("c")),
                state_dir: text("d"),
                socket: text("s"),
                store: text("embedded"),
                flush_interval: text("1s"),
                admin: text("a"),
                log_level: text("info"),
            }
        );
    }
}
