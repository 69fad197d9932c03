//! The daemon's program: the library does everything.

use std::process::ExitCode;

fn main() -> ExitCode {
    tallyd::cli::main(std::env::args_os()).into()
}
