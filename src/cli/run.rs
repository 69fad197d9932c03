//! `tallyd run`: configuration, log, signals, daemon.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tokio::sync::mpsc;
use tracing::{error, info, warn};

use super::check;
use super::exit::ExitCode;
use crate::admin::AdminError;
use crate::config::{self, Config, Environment, Flags};
use crate::daemon::{self, DaemonError, Event, Surroundings};
use crate::journal::JournalError;
use crate::log::{self, LogHandle};
use crate::socket::ListenError;
use crate::systemd::{self, Manager};

/// Runs the daemon until a signal ends it.
pub fn run(flags: Flags) -> ExitCode {
    let loaded = match Config::load(&flags, &Environment::of_process()) {
        Ok(loaded) => loaded,
        Err(error) => return check::report(&error, &mut std::io::stderr()),
    };
    let log = match log::init(&loaded.config.log) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("tallyd: {error}");
            return ExitCode::Internal;
        }
    };
    let socket = match systemd::socket::inherited() {
        Ok(socket) => socket,
        Err(error) => {
            let cause = std::error::Error::source(&error);
            error!(
                "{error}{}",
                cause.map(|c| format!(": {c}")).unwrap_or_default()
            );
            return ExitCode::Configuration;
        }
    };
    let manager = Manager::of_process();
    let (events, received) = mpsc::channel(16);
    let running = loaded.config.clone();
    if let Err(error) = watch_signals(events, flags, running, log, manager.clone()) {
        error!(%error, "cannot watch signals");
        return ExitCode::Internal;
    }
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            error!(%error, "cannot start");
            return ExitCode::Internal;
        }
    };
    let ended = runtime.block_on(daemon::run(
        loaded.config,
        Surroundings { socket, manager },
        received,
        |_| {},
    ));
    // A sync that hangs on a dead disk must not keep the process.
    runtime.shutdown_background();
    match ended {
        Ok(()) => ExitCode::Success,
        Err(error) => report(&error),
    }
}

/// Tells why the daemon did not start, or ended.
pub fn report(error: &DaemonError) -> ExitCode {
    use std::error::Error;
    let cause = error.source().map(|source| format!(": {source}"));
    let shown = error.to_string();
    // Transparent errors have told their cause already.
    let cause = cause
        .filter(|cause| !shown.contains(cause.as_str()))
        .unwrap_or_default();
    error!("{shown}{cause}");
    exit_code(error)
}

/// The exit code for it.
pub(super) fn exit_code(error: &DaemonError) -> ExitCode {
    match error {
        DaemonError::Listen(
            ListenError::Group { .. }
            | ListenError::User { .. }
            | ListenError::AllowedGroup { .. }
            | ListenError::Pattern { .. },
        )
        | DaemonError::Admin(AdminError::Unix(ListenError::Group { .. }))
        | DaemonError::Journal(JournalError::Node { .. }) => ExitCode::Configuration,
        DaemonError::Journal(_)
        | DaemonError::Listen(_)
        | DaemonError::Admin(AdminError::Tcp { .. } | AdminError::Unix(_))
        | DaemonError::Store(_)
        | DaemonError::Rejected { .. } => ExitCode::Io,
        DaemonError::Runtime(_)
        | DaemonError::Admin(AdminError::Thread(_))
        | DaemonError::Flush(_)
        | DaemonError::Ended(_) => ExitCode::Internal,
    }
}

/// A thread that turns signals into events. The second `TERM` or `INT` ends the process at once:
/// the journal has everything.
fn watch_signals(
    events: mpsc::Sender<Event>,
    flags: Flags,
    mut running: Config,
    log: LogHandle,
    manager: Manager,
) -> std::io::Result<()> {
    let stopping = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register_conditional_shutdown(signal, 0, Arc::clone(&stopping))?;
    }
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1])?;
    std::thread::Builder::new()
        .name("tallyd-signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                let event = match signal {
                    SIGHUP => {
                        manager.reloading();
                        let Some(config) = reload(&flags, &mut running, &log) else {
                            manager.reloaded();
                            continue;
                        };
                        Event::Reload(Box::new(config))
                    }
                    SIGUSR1 => Event::Flush,
                    _ => {
                        stopping.store(true, Ordering::SeqCst);
                        Event::Stop
                    }
                };
                if events.blocking_send(event).is_err() {
                    return;
                }
            }
        })?;
    Ok(())
}

/// Reads the configuration anew; says what changes and what would need a restart.
fn reload(flags: &Flags, running: &mut Config, log: &LogHandle) -> Option<Config> {
    let new = match Config::load(flags, &Environment::of_process()) {
        Ok(loaded) => loaded.config,
        Err(error) => {
            for fault in error.faults() {
                error!("not reloaded: {fault}");
            }
            return None;
        }
    };
    let changes = config::changes(running, &new);
    running.reload_from(&new);
    if let Err(error) = log.set_level(running.log.level) {
        warn!(%error, "the log level stays");
    }
    for key in &changes.needs_restart {
        warn!("{key} has changed and needs a restart");
    }
    info!(changed = ?changes.can_change, "reloaded");
    Some(running.clone())
}
