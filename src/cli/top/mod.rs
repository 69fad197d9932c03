//! `tallyd top`: what the daemon does, live in a terminal, over the daemon's own socket.
//!
//! - [`source`]: asks the daemon, in a thread of its own, so that no key waits for an answer
//! - [`model`]: numbers to rates and facts
//! - [`view`]: draws them
//! - [`plain`]: the same as lines, where there is no terminal
//! - [`words`]: numbers as people read them
//!
//! The terminal is given back on every way out: keys, signals, errors and panics.

mod model;
mod plain;
mod source;
mod view;
mod words;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::args::TopArgs;
use super::check;
use super::exit::ExitCode;
use crate::config::{Config, Environment, Flags};
use model::Model;
use source::{Answer, Source};

/// A key or a signal is noticed after so long at most.
const WAIT_MAX: Duration = Duration::from_millis(100);

/// Shows the daemon until told to stop.
pub fn top(args: &TopArgs, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let socket = match socket(args) {
        Ok(socket) => socket,
        Err(error) => return check::report(&error, err),
    };
    let ended = if args.once {
        once(socket, args.interval, out)
    } else if is_interactive() {
        interactive(socket, args.interval)
    } else {
        lines(socket, args.interval, out)
    };
    check::written(ended, "the daemon's numbers", err)
}

fn socket(args: &TopArgs) -> Result<PathBuf, crate::config::ConfigError> {
    if let Some(socket) = &args.socket {
        return Ok(socket.clone());
    }
    let flags = Flags {
        config: args.config.clone(),
        ..Flags::default()
    };
    let loaded = Config::load(&flags, &Environment::of_process())?;
    Ok(loaded.config.listen.socket)
}

fn is_interactive() -> bool {
    let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    io::stdout().is_terminal() && io::stdin().is_terminal() && !dumb
}

/// A block of facts, with rates over one interval.
fn once(socket: PathBuf, interval: Duration, out: &mut dyn Write) -> io::Result<()> {
    let mut model = Model::new(socket.clone());
    let mut source = Source::new(socket);
    for round in 0..2 {
        if round > 0 {
            std::thread::sleep(interval);
        }
        match source.ask() {
            Answer::Numbers(sample) => model.take(Answer::Numbers(sample)),
            Answer::Away(reason) => return Err(io::Error::other(reason)),
        }
    }
    out.write_all(plain::block(&model).as_bytes())?;
    out.flush()
}

/// A line for each interval, until the reader has had enough.
fn lines(socket: PathBuf, interval: Duration, out: &mut dyn Write) -> io::Result<()> {
    let stop = stop_on_signals()?;
    let mut model = Model::new(socket.clone());
    let answers = source::start(socket, interval)?;
    while !stop.load(Ordering::Relaxed) {
        match answers.recv_timeout(WAIT_MAX) {
            Ok(answer) => {
                model.take(answer);
                if let Some(line) = plain::line(&model) {
                    writeln!(out, "{line}")?;
                    out.flush()?;
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(nobody_asks()),
        }
    }
    Ok(())
}

fn interactive(socket: PathBuf, interval: Duration) -> io::Result<()> {
    let stop = stop_on_signals()?;
    let model = Model::new(socket.clone());
    let answers = source::start(socket, interval)?;
    // Sets the hook that gives the terminal back on a panic, too.
    let mut terminal = ratatui::try_init()?;
    let ended = show(&mut terminal, model, &answers, &stop);
    let restored = ratatui::try_restore();
    ended.and(restored)
}

fn show(
    terminal: &mut DefaultTerminal,
    mut model: Model,
    answers: &Receiver<Answer>,
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut paused = false;
    let mut drawn: Option<Instant> = None;
    while !stop.load(Ordering::Relaxed) {
        let mut changed = drawn.is_none_or(|at| at.elapsed() >= Duration::from_secs(1));
        loop {
            match answers.try_recv() {
                // What comes while it is paused still counts, so that rates are right afterwards.
                Ok(answer) if paused => model.keep(answer),
                Ok(answer) => {
                    model.take(answer);
                    changed = true;
                }
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(nobody_asks()),
            }
        }
        if changed {
            terminal.draw(|frame| view::draw(frame, &model, paused))?;
            drawn = Some(Instant::now());
        }
        if event::poll(WAIT_MAX)? {
            match event::read()? {
                Event::Key(key) if key.kind != KeyEventKind::Release => match action(key) {
                    Some(Action::Quit) => return Ok(()),
                    Some(Action::Pause) => {
                        paused = !paused;
                        drawn = None;
                    }
                    None => {}
                },
                Event::Resize(..) => drawn = None,
                _ => {}
            }
        }
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Quit,
    Pause,
}

fn action(key: KeyEvent) -> Option<Action> {
    match key.code {
        KeyCode::Char('c' | 'C') if key.modifiers.contains(KeyModifiers::CONTROL) => {
            Some(Action::Quit)
        }
        KeyCode::Char('q' | 'Q') | KeyCode::Esc => Some(Action::Quit),
        KeyCode::Char('p' | 'P' | ' ') => Some(Action::Pause),
        _ => None,
    }
}

/// The thread of the source ends only after its receiver, unless it panicked.
fn nobody_asks() -> io::Error {
    io::Error::other("the thread that asks the daemon has ended")
}

/// Set by the signals that would else end the process with the terminal as it is.
fn stop_on_signals() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_do_what_the_footer_says() {
        let key = |code, modifiers| action(KeyEvent::new(code, modifiers));
        let none = KeyModifiers::NONE;
        assert_eq!(key(KeyCode::Char('q'), none), Some(Action::Quit));
        assert_eq!(key(KeyCode::Esc, none), Some(Action::Quit));
        let control = KeyModifiers::CONTROL;
        assert_eq!(key(KeyCode::Char('c'), control), Some(Action::Quit));
        assert_eq!(key(KeyCode::Char('c'), none), None);
        assert_eq!(key(KeyCode::Char('p'), none), Some(Action::Pause));
        assert_eq!(key(KeyCode::Char('x'), none), None);
    }

    #[test]
    fn once_without_a_daemon_is_an_io_error_that_names_the_socket() {
        let args = TopArgs {
            socket: Some("/nonexistent/tallyd.sock".into()),
            config: None,
            interval: Duration::from_secs(1),
            once: true,
        };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        assert_eq!(top(&args, &mut out, &mut err), ExitCode::Io);
        let err = String::from_utf8(err).unwrap();
        assert!(err.contains("/nonexistent/tallyd.sock"), "{err}");
        assert_eq!(out, b"");
    }
}
