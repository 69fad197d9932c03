//! Writes what the package holds beside the programs: manual pages and completions, made of the
//! same command lines that the programs parse.
//!
//! ```text
//! cargo run --features package --bin tallyd-package -- target/package
//! ```

// The command line of tallyd-bench refers to the rest of that program.
#[allow(dead_code)]
#[path = "tallyd-bench/args.rs"]
mod args;
#[allow(dead_code)]
#[path = "tallyd-bench/engine.rs"]
mod engine;
#[allow(dead_code)]
#[path = "tallyd-bench/load.rs"]
mod load;
#[allow(dead_code)]
#[path = "tallyd-bench/reply.rs"]
mod reply;
#[allow(dead_code)]
#[path = "tallyd-bench/zipf.rs"]
mod zipf;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

/// What the command line does not know, for the daemon's page.
const DAEMON: &str = r#".SH SIGNALS
.TP
\fBTERM\fR, \fBINT\fR
Stop accepting, answer what was read, flush for at most shutdown.timeout, exit 0; the journal keeps
what is left. A second one exits at once.
.TP
\fBHUP\fR
Read the configuration again. Says in the log what needs a restart.
.TP
\fBUSR1\fR
Flush now.
.SH "EXIT STATUS"
0, 64 (usage), 70 (internal), 74 (files, sockets and disk), 78 (configuration).
.SH FILES
.TP
\fI/etc/tallyd/tallyd.toml\fR
The configuration; every key is in it, with its default and meaning.
.TP
\fI/run/tallyd/tallyd.sock\fR
Where applications connect. Members of the group tallyd may.
.TP
\fI/var/lib/tallyd\fR
The journal, and the embedded store. One directory for each daemon, never copied, never shared.
.TP
\fI/etc/credstore/tallyd\-store\-password\fR
The store's password, for the service.
.SH "SEE ALSO"
\fBtallyd\-bench\fR(1), \fBsystemctl\fR(1), \fI/usr/share/doc/tallyd/README.md.gz\fR
"#;

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1) else {
        eprintln!("usage: tallyd-package DIRECTORY");
        return ExitCode::from(64);
    };
    match write(Path::new(&directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tallyd-package: {}: {error}", directory.display());
            ExitCode::from(74)
        }
    }
}

fn write(directory: &Path) -> io::Result<()> {
    let (pages, completions) = (directory.join("man"), directory.join("completions"));
    fs::create_dir_all(&pages)?;
    fs::create_dir_all(&completions)?;
    let programs = [
        (tallyd::cli::args::Arguments::command(), DAEMON),
        (args::Args::command(), ""),
    ];
    for (program, rest) in programs {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let name = program.get_name().to_owned();
            clap_complete::generate_to(shell, &mut program.clone(), name, &completions)?;
        }
        // A page for each subcommand besides: tallyd-journal-show.1
        let pages_of = program.disable_help_subcommand(true);
        let first = Man::new(pages_of.clone()).get_filename();
        clap_mangen::generate_to(pages_of, &pages)?;
        let mut first = File::options().append(true).open(pages.join(first))?;
        first.write_all(rest.as_bytes())?;
    }
    Ok(())
}
