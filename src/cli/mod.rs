//! The edge towards people: parses the command line, and maps every result to an exit code.

pub mod args;
pub mod check;
pub mod demo;
pub mod exit;
pub mod journal;
pub mod rejected;
pub mod run;
pub mod top;

use std::ffi::OsString;
use std::io::{self, Write};

use clap::Parser;

use crate::config::{Environment, Flags};

use args::{Arguments, Command, JournalCommand};
use exit::ExitCode;

/// Does what the command line says; `args` begins with the program's name.
pub fn main<I>(args: I) -> ExitCode
where
    I: IntoIterator<Item = OsString>,
{
    let args: Vec<OsString> = args.into_iter().collect();
    let arguments = match Arguments::try_parse_from(&args) {
        Ok(arguments) => arguments,
        Err(error) => {
            print(&error, &args);
            // Help and version were asked for; all else is a mistake. clap's own code for it is 2.
            return if error.use_stderr() {
                ExitCode::Usage
            } else {
                ExitCode::Success
            };
        }
    };
    match arguments.command {
        Command::Check(args) => {
            let out: &mut dyn Write = if args.quiet {
                &mut io::sink()
            } else {
                &mut io::stdout().lock()
            };
            let flags = Flags::from(args.config);
            check::check(&flags, &Environment::of_process(), out, &mut io::stderr())
        }
        Command::Run(args) => run::run(Flags::from(args)),
        Command::Demo(args) => demo::demo(&args),
        Command::Top(args) => top::top(&args, &mut io::stdout(), &mut io::stderr()),
        Command::Journal(command) => {
            let (out, err) = (&mut io::stdout().lock(), &mut io::stderr());
            match command {
                JournalCommand::Show(args) => journal::show(&args.directory, out, err),
                JournalCommand::Verify(args) => journal::verify(&args.directory, out, err),
                JournalCommand::Rejected(args) => rejected::list(&args.directory, out, err),
                JournalCommand::Replay(args) => rejected::replay(&args, out, err),
            }
        }
    }
}

/// What clap says, to stdout or stderr, whichever fits.
fn print(error: &clap::Error, args: &[OsString]) {
    // There is nothing to do when it is closed.
    let _ = match masked(error, args) {
        Some(text) => writeln!(io::stderr(), "{text}"),
        None => error.print(),
    };
}

/// What clap says where it repeats a URL, which may hold a password: with its scheme alone.
fn masked(error: &clap::Error, args: &[OsString]) -> Option<String> {
    let mut text = error.render().to_string();
    let mut has_url = false;
    for arg in args.iter().map(|arg| arg.to_string_lossy()) {
        if let Some((_, rest)) = arg.split_once("://").filter(|(_, rest)| !rest.is_empty()) {
            has_url |= text.contains(rest);
            text = text.replace(rest, "***");
        }
    }
    has_url.then(|| format!("{text}\nThe store's URL is given by --store, or by store.url."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(line: &str) -> u8 {
        main(line.split_whitespace().map(OsString::from)).code()
    }

    #[test]
    fn help_and_version_are_no_errors() {
        assert_eq!(code("tallyd --help"), 0);
        assert_eq!(code("tallyd --version"), 0);
        assert_eq!(code("tallyd help run"), 0);
        assert_eq!(code("tallyd check --help"), 0);
    }

    #[test]
    fn a_command_line_that_makes_no_sense_exits_with_64() {
        for line in [
            "tallyd",
            "tallyd fly",
            "tallyd --verbose",
            "tallyd run --sockt s",
            "tallyd run extra",
            "tallyd journal",
            "tallyd journal show",
            "tallyd journal replay",
            "tallyd journal verify --socket s d",
            "tallyd demo --seconds 0",
            "tallyd top --interval 1",
            "tallyd top --interval 10ms",
        ] {
            assert_eq!(code(line), 64, "{line}");
        }
    }

    #[test]
    fn what_a_command_line_is_refused_for_does_not_repeat_a_password() {
        for line in [
            "tallyd run redis://joe:hunter2@h",
            "tallyd redis+unix:///r.sock?pass=hunter2",
            "tallyd demo --ops redis://joe:hunter2@h",
        ] {
            let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            let error = Arguments::try_parse_from(&args).unwrap_err();
            assert!(error.render().to_string().contains("hunter2"), "{line}");
            let text = masked(&error, &args).unwrap();
            assert!(
                !text.contains("hunter2") && text.contains("://***"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_bad_value_of_a_flag_is_a_fault_of_the_configuration() {
        assert_eq!(code("tallyd check --flush-interval 5"), 78);
    }
}
