//! The command line: its flags, defaults and bounds.

use std::path::PathBuf;

use clap::{ArgGroup, Parser, value_parser};

use crate::engine::Target;
use crate::load::{KEYS_MAX, LoadSpec, PREFIX_BYTES_MAX};

/// Loads a RESP server with INCRs and reports throughput, latency and CPU per increment.
///
/// Requests are encoded before the clock starts. Each connection sends a burst of `--pipeline` requests,
/// waits for all of its replies, and sends the next one; latency is that of the burst.
#[derive(Debug, Parser)]
#[command(name = "tallyd-bench", version)]
#[command(group(ArgGroup::new("target").required(true).args(["socket", "addr"])))]
pub struct Args {
    /// Unix socket of the server
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// TCP address of the server
    #[arg(long, value_name = "HOST:PORT", value_parser = host_and_port)]
    pub addr: Option<String>,

    /// Increments to measure, over all connections
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = value_parser!(u64).range(1..=1_000_000_000_000))]
    pub ops: u64,

    /// Increments sent first and not measured
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = value_parser!(u64).range(..=1_000_000_000_000))]
    pub warmup: u64,

    /// Keys to choose from
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = value_parser!(u32).range(1..=i64::from(KEYS_MAX)))]
    pub keys: u32,

    /// Exponent of the Zipf distribution over the keys; 0 is uniform
    #[arg(long, value_name = "S", default_value_t = 0.0, value_parser = zipf_exponent)]
    pub zipf: f64,

    /// What every key begins with; its rank follows
    #[arg(long, value_name = "TEXT", default_value = "likes:", value_parser = key_prefix)]
    pub prefix: String,

    /// Connections
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = value_parser!(u32).range(1..=20_000))]
    pub connections: u32,

    /// Requests in flight on each connection
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=100_000))]
    pub pipeline: u32,

    /// Seed of the choice of keys: the same seed sends the same requests
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,

    /// Process of the server, to report its CPU time per increment
    #[arg(long, value_name = "P")]
    pub pid: Option<u32>,
}

impl Args {
    /// Where the server listens.
    pub fn target(&self) -> Target {
        match (&self.socket, &self.addr) {
            (Some(path), _) => Target::Unix(path.clone()),
            (None, Some(addr)) => Target::Tcp(addr.clone()),
            (None, None) => unreachable!("the group `target` is required"),
        }
    }

    /// Which requests to encode.
    pub fn load_spec(&self) -> LoadSpec<'_> {
        LoadSpec {
            ops: self.ops + self.warmup,
            keys: self.keys,
            zipf: self.zipf,
            prefix: &self.prefix,
            seed: self.seed,
        }
    }
}

fn host_and_port(text: &str) -> Result<String, String> {
    let valid = text
        .rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if valid {
        Ok(text.to_owned())
    } else {
        Err("must be HOST:PORT".to_owned())
    }
}

fn zipf_exponent(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        // NaN is in no range.
        Ok(exponent) if (0.0..=10.0).contains(&exponent) => Ok(exponent),
        _ => Err("must be a number from 0 to 10".to_owned()),
    }
}

fn key_prefix(text: &str) -> Result<String, String> {
    if text.len() <= PREFIX_BYTES_MAX {
        Ok(text.to_owned())
    } else {
        Err(format!("must be at most {PREFIX_BYTES_MAX} bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(std::iter::once("tallyd-bench").chain(line.split_whitespace()))
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let args = parse("--socket /run/x.sock").unwrap();
        assert_eq!((args.ops, args.warmup, args.keys), (1_000_000, 0, 100_000));
        assert_eq!((args.connections, args.pipeline, args.seed), (50, 1, 1));
        assert_eq!((args.zipf.to_bits(), args.json, args.pid), (0, false, None));
        assert!(matches!(args.target(), Target::Unix(path) if path.ends_with("x.sock")));
    }

    #[test]
    fn exactly_one_target_is_required() {
        assert!(parse("--ops 5").is_err());
        assert!(parse("--socket /s --addr localhost:1").is_err());
        assert!(parse("--addr [::1]:6379").is_ok());
    }

    #[test]
    fn values_out_of_bounds_are_refused() {
        for wrong in [
            "--ops 0",
            "--keys 0",
            "--keys 5000000000",
            "--zipf -1",
            "--zipf nan",
            "--zipf inf",
            "--connections 0",
            "--pipeline 0",
            "--addr localhost",
            "--addr :1",
            "--addr a:66000",
            "--seed x",
            "--colour red",
        ] {
            let target = if wrong.contains("--addr") {
                ""
            } else {
                "--socket /s "
            };
            assert!(
                parse(&format!("{target}{wrong}")).is_err(),
                "{wrong} was taken"
            );
        }
        assert!(parse(&format!("--socket /s --prefix {}", "x".repeat(65))).is_err());
    }
}
