//! The log: lines on stderr, as text, for the journal of systemd, or as JSON.
//!
//! 1. One event is one line, whatever its values hold: control characters are escaped.
//!    `tracing-subscriber` alone escapes terminal sequences in messages, but neither line breaks nor
//!    anything in a value recorded by `Display`, so a key with a line break could forge a line.
//! 2. The level can be changed while running; the format cannot.

use std::fmt::{self, Write};
use std::io::{self, IsTerminal};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::config;

/// Why the log could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The process has a log already.
    #[error("the log is set up already")]
    AlreadySet(#[source] tracing_subscriber::util::TryInitError),
    /// The log that the handle belonged to is gone.
    #[error("the log's level cannot be changed")]
    Gone(#[source] reload::Error),
}

/// Changes the log while the daemon runs.
#[derive(Debug, Clone)]
pub struct LogHandle {
    level: reload::Handle<LevelFilter, Registry>,
}

impl LogHandle {
    /// Logs from this level on.
    ///
    /// # Errors
    ///
    /// When the log is gone.
    pub fn set_level(&self, level: config::LogLevel) -> Result<(), LogError> {
        self.level.reload(filter(level)).map_err(LogError::Gone)
    }
}

/// Sets the process's log up; once.
///
/// # Errors
///
/// When it was set up before.
pub fn init(log: &config::Log) -> Result<LogHandle, LogError> {
    let style = Style::of(
        log.format,
        io::stderr().is_terminal(),
        stderr_is_journal(),
        std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty()),
    );
    let (subscriber, handle) = subscriber(style, log.level, io::stderr);
    subscriber.try_init().map_err(LogError::AlreadySet)?;
    Ok(handle)
}

/// How lines look, once it is known where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Text { colour: bool },
    Journal,
    Json,
}

impl Style {
    fn of(format: config::LogFormat, terminal: bool, journal: bool, no_colour: bool) -> Self {
        match format {
            config::LogFormat::Json => Self::Json,
            config::LogFormat::Auto if journal => Self::Journal,
            config::LogFormat::Auto | config::LogFormat::Text => Self::Text {
                colour: terminal && !no_colour,
            },
        }
    }
}

/// Whether stderr is the stream that systemd connected to its journal. `$JOURNAL_STREAM` alone does
/// not say it: a shell in a service inherits the variable, and may send stderr elsewhere.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    rustix::fs::fstat(io::stderr())
        .is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

fn filter(level: config::LogLevel) -> LevelFilter {
    match level {
        config::LogLevel::Error => LevelFilter::ERROR,
        config::LogLevel::Warn => LevelFilter::WARN,
        config::LogLevel::Info => LevelFilter::INFO,
        config::LogLevel::Debug => LevelFilter::DEBUG,
        config::LogLevel::Trace => LevelFilter::TRACE,
    }
}

fn subscriber<W>(
    style: Style,
    level: config::LogLevel,
    writer: W,
) -> (impl Subscriber + Send + Sync, LogHandle)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, level) = reload::Layer::new(filter(level));
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let layer = match style {
        Style::Text { colour } => layer.with_ansi(colour).fmt_fields(Fields).boxed(),
        Style::Journal => layer
            .with_ansi(false)
            .fmt_fields(Fields)
            .event_format(JournalLine)
            .boxed(),
        Style::Json => layer.json().flatten_event(true).boxed(),
    };
    let subscriber = tracing_subscriber::registry().with(filter).with(layer);
    (subscriber, LogHandle { level })
}

/// A line for systemd's journal: it takes the priority from the prefix, and has its own clock.
struct JournalLine;

impl<S, N> FormatEvent<S, N> for JournalLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        // The priorities of syslog(3).
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        tracing_subscriber::fmt::format()
            .without_time()
            .with_level(false)
            .format_event(context, writer, event)
    }
}

/// Writes fields with control characters escaped, and errors with their causes.
struct Fields;

impl<'writer> FormatFields<'writer> for Fields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = Visitor {
            writer,
            first: true,
            result: Ok(()),
        };
        fields.record(&mut visitor);
        visitor.result
    }
}

struct Visitor<'writer> {
    writer: Writer<'writer>,
    first: bool,
    /// Of the writes so far; after one failed nothing more is written.
    result: fmt::Result,
}

impl Visitor<'_> {
    fn write(&mut self, field: &Field, value: fmt::Arguments<'_>) -> fmt::Result {
        if !self.first {
            self.writer.write_char(' ')?;
        }
        self.first = false;
        let name = field.name();
        if name != "message" {
            let name = name.strip_prefix("r#").unwrap_or(name);
            if self.writer.has_ansi_escapes() {
                write!(self.writer, "\x1b[3m{name}\x1b[0m\x1b[2m=\x1b[0m")?;
            } else {
                write!(self.writer, "{name}=")?;
            }
        }
        Escaped(&mut self.writer).write_fmt(value)
    }
}

impl Visit for Visitor<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.result.is_ok() {
            self.result = self.write(field, format_args!("{value:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        // A message is a sentence; any other string is quoted, so that it is seen where it ends.
        if field.name() == "message" {
            self.record_debug(field, &format_args!("{value}"));
        } else {
            self.record_debug(field, &value);
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let mut text = value.to_string();
        let mut cause = value.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        self.record_str(field, &text);
    }
}

/// Escapes control characters on their way to a writer.
struct Escaped<'a, W>(&'a mut W);

impl<W: fmt::Write> fmt::Write for Escaped<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(is_unsafe) {
            let (plain, from) = rest.split_at(at);
            self.0.write_str(plain)?;
            let mut chars = from.chars();
            if let Some(char) = chars.next() {
                write!(self.0, "{}", char.escape_default())?;
            }
            rest = chars.as_str();
        }
        self.0.write_str(rest)
    }
}

/// Control characters, and Unicode's own line breaks, which some viewers honour.
fn is_unsafe(char: char) -> bool {
    char.is_control() || matches!(char, '\u{2028}' | '\u{2029}')
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::config::{LogFormat, LogLevel};

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Buffer {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    /// What is written while `log` runs.
    fn written(style: Style, level: LogLevel, log: impl FnOnce(&LogHandle, &Buffer)) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let (subscriber, handle) = subscriber(style, level, move || writer.clone());
        tracing::subscriber::with_default(subscriber, || log(&handle, &buffer));
        buffer.take()
    }

    const HOSTILE: &str = "a\n<3>forged\r\u{1b}[31m\u{9b}\u{2028}\0";

    fn log_hostile() {
        let span = tracing::info_span!("connection", peer = %HOSTILE);
        let _entered = span.enter();
        tracing::info!(display = %HOSTILE, debug = ?HOSTILE, text = HOSTILE, "message {HOSTILE}");
    }

    #[test]
    fn no_value_can_forge_a_line() {
        for style in [Style::Text { colour: false }, Style::Journal, Style::Json] {
            let line = written(style, LogLevel::Info, |_, _| log_hostile());
            assert_eq!(line.matches('\n').count(), 1, "{style:?}: {line:?}");
            assert!(line.ends_with('\n'), "{style:?}: {line:?}");
            assert!(
                !line.contains(['\u{1b}', '\r', '\0']),
                "{style:?}: {line:?}"
            );
            assert!(line.contains("\\n<3>forged"), "{style:?}: {line:?}");
        }
        let coloured = written(Style::Text { colour: true }, LogLevel::Info, |_, _| {
            log_hostile();
        });
        assert_eq!(coloured.matches('\n').count(), 1, "{coloured:?}");
        assert!(!coloured.contains("\u{1b}[31m"), "{coloured:?}");
        assert!(coloured.contains("\u{1b}["), "{coloured:?}");
    }

    #[test]
    fn a_journal_line_has_a_priority_and_neither_time_nor_colour() {
        let lines = written(Style::Journal, LogLevel::Trace, |_, _| {
            tracing::error!(target: "t", key = 1, "e");
            tracing::warn!(target: "t", "w");
            tracing::info!(target: "t", name = "n", "i");
            tracing::debug!(target: "t", "d");
            tracing::trace!(target: "t", "t");
        });
        assert_eq!(
            lines,
            "<3>t: e key=1\n<4>t: w\n<6>t: i name=\"n\"\n<7>t: d\n<7>t: t\n"
        );
    }

    #[test]
    fn an_error_is_logged_with_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] fmt::Error);

        let error = Outer(fmt::Error);
        let line = written(Style::Journal, LogLevel::Info, |_, _| {
            let error: &(dyn std::error::Error + 'static) = &error;
            tracing::warn!(target: "t", error, "failed");
        });
        assert_eq!(
            line,
            format!("<4>t: failed error=\"outer: {}\"\n", fmt::Error)
        );
    }

    #[test]
    fn json_is_one_object_a_line() {
        let lines = written(Style::Json, LogLevel::Info, |_, _| {
            tracing::info!(keys = 7, "sealed \"x\"\n");
            tracing::warn!("next");
        });
        let objects: Vec<serde_json::Value> = lines
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(objects.len(), 2);
        assert_eq!(objects[0]["message"], "sealed \"x\"\n");
        assert_eq!(objects[0]["keys"], 7);
        assert_eq!(objects[0]["level"], "INFO");
        assert!(objects[0]["timestamp"].is_string());
    }

    #[test]
    fn the_level_can_be_changed_while_running() {
        written(Style::Journal, LogLevel::Warn, |handle, buffer| {
            let log = || {
                tracing::info!(target: "t", "i");
                tracing::debug!(target: "t", "d");
                buffer.take()
            };
            assert_eq!(log(), "");
            handle.set_level(LogLevel::Debug).unwrap();
            assert_eq!(log(), "<6>t: i\n<7>t: d\n");
            handle.set_level(LogLevel::Info).unwrap();
            assert_eq!(log(), "<6>t: i\n");
        });
    }

    #[test]
    fn auto_looks_at_where_stderr_goes() {
        let style =
            |format, terminal, journal, no_colour| Style::of(format, terminal, journal, no_colour);
        let text = |colour| Style::Text { colour };
        assert_eq!(style(LogFormat::Auto, true, false, false), text(true));
        assert_eq!(style(LogFormat::Auto, true, false, true), text(false));
        assert_eq!(style(LogFormat::Auto, false, false, false), text(false));
        assert_eq!(style(LogFormat::Auto, false, true, false), Style::Journal);
        assert_eq!(style(LogFormat::Text, false, true, false), text(false));
        assert_eq!(style(LogFormat::Text, true, false, false), text(true));
        assert_eq!(style(LogFormat::Json, true, true, false), Style::Json);
    }
}
