//! `tallyd-bench`: loads any RESP server with `INCR`s, and says what each one cost.
//!
//! ```text
//! args    the command line
//! zipf    which key comes next
//! load    all requests, encoded before the clock starts
//! engine  one thread, one epoll: writes bursts, checks replies, records latency
//! reply   the replies: `:<integer>\r\n` and nothing else
//! cpu     CPU time of the server and of this process
//! report  the figures, for people or as JSON
//! ```
//!
//! The generator must never be what it measures. So nothing is drawn, formatted or allocated while
//! the clock runs, a burst costs one write and (as a rule) one read, and the report says how busy this
//! process itself was.
//!
//! Exit codes: 0, 64 usage, 70 internal, 74 I/O (no connection, a broken one, or a wrong reply).

mod args;
mod cpu;
mod engine;
mod load;
mod reply;
mod report;
mod zipf;

use std::io::{IsTerminal as _, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser as _;
use indicatif::{ProgressBar, ProgressStyle};
use thiserror::Error;

use crate::args::Args;
use crate::cpu::CpuTime;
use crate::engine::{Engine, EngineError};
use crate::load::Load;
use crate::report::Report;

const EXIT_USAGE: u8 = 64;
const EXIT_INTERNAL: u8 = 70;
const EXIT_IO: u8 = 74;

/// Why there is no report.
#[derive(Debug, Error)]
enum BenchError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("cannot read the CPU time of process {pid}: {source}")]
    Cpu { pid: u32, source: std::io::Error },
    #[error("cannot write the report: {0}")]
    Output(std::io::Error),
    #[error("cannot encode the report: {0}")]
    Json(#[from] serde_json::Error),
}

impl BenchError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Engine(EngineError::Epoll(_)) | Self::Json(_) => EXIT_INTERNAL,
            Self::Engine(_) | Self::Cpu { .. } | Self::Output(_) => EXIT_IO,
        }
    }
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(refused) => {
            // Help and version arrive here too. Nobody is left to tell when printing fails.
            let _ = refused.print();
            return ExitCode::from(if refused.use_stderr() { EXIT_USAGE } else { 0 });
        }
    };
    match catch_unwind(AssertUnwindSafe(|| run(&args))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("tallyd-bench: {error}");
            ExitCode::from(error.exit_code())
        }
        // The panic hook has printed what happened.
        Err(_) => ExitCode::from(EXIT_INTERNAL),
    }
}

fn run(args: &Args) -> Result<(), BenchError> {
    // Before the load is encoded, so that a wrong address or process is known at once.
    let sockets = engine::connect(&args.target(), args.connections)?;
    server_cpu(args)?;

    let load = Load::encode(&args.load_spec());
    let mut engine = Engine::new(sockets, &load, args.pipeline)?;
    engine.run(args.warmup, |_| {})?;

    let progress = progress_bar(args.ops);
    let server_before = server_cpu(args)?;
    let client_before = cpu::own_cpu();
    let measured = engine.run(args.ops, |done| progress.set_position(done))?;
    let client_cpu = cpu::own_cpu().saturating_sub(client_before);
    let server_after = server_cpu(args)?;
    progress.finish_and_clear();

    let server_cpu = server_before
        .zip(server_after)
        .map(|(before, after)| after.since(&before));
    let report = Report::new(args, &load, &measured, server_cpu, client_cpu);
    let text = if args.json {
        serde_json::to_string(&report)? + "\n"
    } else {
        report.to_string()
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(BenchError::Output)
}

fn server_cpu(args: &Args) -> Result<Option<CpuTime>, BenchError> {
    args.pid
        .map(|pid| CpuTime::of(pid).map_err(|source| BenchError::Cpu { pid, source }))
        .transpose()
}

/// A bar on a terminal; nothing where it would only fill a log.
fn progress_bar(ops: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {human_pos}/{human_len} {eta}")
        .expect("the template is constant and valid");
    ProgressBar::new(ops).with_style(style)
}
