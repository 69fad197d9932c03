//! `tallyd check`: the effective configuration as TOML, each key with its origin.

use std::io::{self, Write};

use crate::config::{Config, ConfigError, Environment, Flags, Loaded};

use super::exit::ExitCode;

/// Prints the effective configuration to `out`, or what is wrong with it to `err`.
pub fn check(
    flags: &Flags,
    environment: &Environment,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> ExitCode {
    let loaded = match Config::load(flags, environment) {
        Ok(loaded) => loaded,
        Err(error) => return report(&error, err),
    };
    let printed = print(&loaded, out).and_then(|()| out.flush());
    written(printed, "the configuration", err)
}

/// The exit code of what was printed to standard output.
pub(super) fn written(printed: io::Result<()>, what: &str, err: &mut dyn Write) -> ExitCode {
    match printed {
        Ok(()) => ExitCode::Success,
        // The reader had enough (`tallyd check | head`), and knows it.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::Io,
        Err(error) => {
            // Nowhere left to report to when this fails too; the exit code says it.
            let _ = writeln!(err, "tallyd: cannot write {what}: {error}");
            ExitCode::Io
        }
    }
}

/// A line for each thing that is wrong.
pub(super) fn report(error: &ConfigError, err: &mut dyn Write) -> ExitCode {
    for fault in error.faults() {
        let mut line = fault.to_string();
        let mut cause = std::error::Error::source(fault);
        while let Some(error) = cause {
            line.push_str(": ");
            line.push_str(&error.to_string());
            cause = error.source();
        }
        // Nowhere left to report to when this fails; the exit code says it.
        let _ = writeln!(err, "tallyd: {}", one_line(&line));
    }
    ExitCode::Configuration
}

fn print(loaded: &Loaded, out: &mut dyn Write) -> io::Result<()> {
    let keys = loaded.config.written();
    let mut section = "";
    for (name, value) in &keys {
        let (of, key) = name.split_once('.').unwrap_or(("", name));
        if of != section {
            if !section.is_empty() {
                writeln!(out)?;
            }
            writeln!(out, "[{of}]")?;
            section = of;
        }
        let setting = format!("{key} = {value}");
        let origin = one_line(&loaded.origins.of(name).to_string());
        writeln!(out, "{setting:<39} # {origin}")?;
    }
    Ok(())
}

/// Control characters escaped: a key or a path may hold a line break.
pub(super) fn one_line(text: &str) -> String {
    text.chars()
        .flat_map(|char| {
            let escaped = char.is_control().then(|| char.escape_default());
            let plain = (!char.is_control()).then_some(char);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment() -> Environment {
        Environment {
            root: true,
            ..Environment::default()
        }
    }

    fn run(flags: &Flags, environment: &Environment) -> (ExitCode, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = check(flags, environment, &mut out, &mut err);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (code, text(out), text(err))
    }

    #[test]
    fn each_key_is_printed_with_where_it_came_from() {
        let flags = Flags {
            store: Some("redis://joe:hunter2@h".to_owned()),
            ..Flags::default()
        };
        let mut environment = environment();
        environment
            .variables
            .insert("TALLYD_FLUSH__INTERVAL".to_owned(), "1500ms".to_owned());
        environment
            .variables
            .insert("STATE_DIRECTORY".to_owned(), "/s".to_owned());
        let (code, out, err) = run(&flags, &environment);
        assert_eq!((code, err.as_str()), (ExitCode::Success, ""));
        let lines: Vec<_> = out
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        for line in [
            "[flush]",
            "interval = \"1500ms\" # env TALLYD_FLUSH__INTERVAL",
            "url = \"redis://joe:***@h:6379\" # flag --store",
            "state_dir = \"/s\" # default, from $STATE_DIRECTORY",
            "mode = \"0660\" # default",
            "max_pending_bytes = \"256MiB\" # default",
            "enabled = true # default",
        ] {
            assert!(lines.iter().any(|l| l == line), "{line} is not in\n{out}");
        }
    }

    #[test]
    fn what_is_printed_means_the_same_when_it_is_read() {
        let mut environment = environment();
        environment.host_name = "a \"host\"\\".to_owned();
        let (_, out, _) = run(&Flags::default(), &environment);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), out).unwrap();
        let flags = Flags {
            config: Some(file.path().to_owned()),
            ..Flags::default()
        };
        let loaded = Config::load(&flags, &environment).unwrap();
        assert_eq!(loaded.config, Config::defaults(&environment));
    }

    #[test]
    fn a_wrong_configuration_is_a_line_for_each_fault_and_78() {
        let flags = Flags {
            config: Some("/nonexistent/x.toml".into()),
            log_level: Some("loud\nlouder".to_owned()),
            ..Flags::default()
        };
        let (code, out, err) = run(&flags, &environment());
        assert_eq!((code.code(), out.as_str()), (78, ""));
        let lines: Vec<_> = err.lines().collect();
        assert_eq!(lines.len(), 2, "{err}");
        assert_eq!(
            lines[0],
            "tallyd: /nonexistent/x.toml: cannot read the configuration file: \
             No such file or directory (os error 2)"
        );
        assert_eq!(
            lines[1],
            "tallyd: log.level: is \"loud\\nlouder\"; expected \"error\", \"warn\", \"info\", \
             \"debug\" or \"trace\" (flag --log-level)"
        );
    }

    #[test]
    fn a_reader_that_goes_away_is_an_io_error() {
        struct Gone;
        impl Write for Gone {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut err = Vec::new();
        let code = check(&Flags::default(), &environment(), &mut Gone, &mut err);
        assert_eq!((code.code(), err.len()), (74, 0));
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(one_line("a\nb\u{1b}[0m ü"), "a\\nb\\u{1b}[0m ü");
    }
}
