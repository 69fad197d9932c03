//! The figures of a run: text for people, one JSON object for programs.

use std::fmt;
use std::time::Duration;

use indicatif::HumanCount;
use serde::Serialize;

use crate::args::Args;
use crate::engine::Measured;
use crate::load::Load;

/// Share of the run above which this process may have been what limited it.
const BUSY: f64 = 0.9;

/// What was sent, and what it took.
#[derive(Debug, Serialize)]
pub struct Report {
    ops: u64,
    seconds: f64,
    ops_per_second: f64,
    latency_us: Latency,
    connections: u32,
    pipeline: u32,
    keys: u32,
    zipf: f64,
    seed: u64,
    distinct_keys: u64,
    server_cpu_ns_per_op: Option<f64>,
    client_cpu_ns_per_op: f64,
}

/// Microseconds from a burst's write to its last reply.
#[derive(Debug, Serialize)]
struct Latency {
    p50: f64,
    p90: f64,
    p99: f64,
    p999: f64,
    max: f64,
}

impl Report {
    /// Gathers the figures of one run.
    pub fn new(
        args: &Args,
        load: &Load,
        measured: &Measured,
        server_cpu: Option<Duration>,
        client_cpu: Duration,
    ) -> Self {
        let seconds = measured.elapsed.as_secs_f64();
        let per_op = |cpu: Duration| cpu.as_nanos() as f64 / args.ops as f64;
        let latency = &measured.latency_ns;
        let quantile = |q| latency.value_at_quantile(q) as f64 / 1e3;
        Self {
            ops: args.ops,
            seconds,
            ops_per_second: args.ops as f64 / seconds,
            latency_us: Latency {
                p50: quantile(0.5),
                p90: quantile(0.9),
                p99: quantile(0.99),
                p999: quantile(0.999),
                max: latency.max() as f64 / 1e3,
            },
            connections: args.connections,
            pipeline: args.pipeline,
            keys: args.keys,
            zipf: args.zipf,
            seed: args.seed,
            distinct_keys: load.distinct(),
            server_cpu_ns_per_op: server_cpu.map(per_op),
            client_cpu_ns_per_op: per_op(client_cpu),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            connections,
            pipeline,
            latency_us: latency,
            ..
        } = self;
        let busy = self.client_cpu_ns_per_op * self.ops as f64 / 1e9 / self.seconds;
        writeln!(
            f,
            "{} increments of {} distinct keys in {:.3} s, {connections} connections, pipeline {pipeline}",
            HumanCount(self.ops),
            HumanCount(self.distinct_keys),
            self.seconds,
        )?;
        writeln!(
            f,
            "throughput  {} ops/s",
            HumanCount(self.ops_per_second as u64)
        )?;
        writeln!(
            f,
            "latency     p50 {:.1}  p90 {:.1}  p99 {:.1}  p99.9 {:.1}  max {:.1} µs a burst",
            latency.p50, latency.p90, latency.p99, latency.p999, latency.max
        )?;
        if let Some(server) = self.server_cpu_ns_per_op {
            writeln!(f, "server CPU  {server:.0} ns an increment")?;
        }
        writeln!(
            f,
            "client CPU  {:.0} ns an increment, busy {:.0} % of the time",
            self.client_cpu_ns_per_op,
            busy * 100.0
        )?;
        if busy > BUSY {
            writeln!(
                f,
                "The client was as good as never idle: the server may be faster than this."
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;
    use hdrhistogram::Histogram;

    #[test]
    fn the_json_has_the_keys_of_the_contract() {
        let args = Args::parse_from(["tallyd-bench", "--socket", "/s", "--ops", "1000"]);
        let load = Load::encode(&args.load_spec());
        let mut latency_ns = Histogram::new(3).unwrap();
        latency_ns.record(2_000).unwrap();
        let measured = Measured {
            elapsed: Duration::from_millis(10),
            latency_ns,
        };
        let report = Report::new(&args, &load, &measured, None, Duration::from_millis(1));

        let json = serde_json::to_value(&report).unwrap();
        let keys: Vec<_> = json
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let mut expected = vec![
            "ops",
            "seconds",
            "ops_per_second",
            "latency_us",
            "connections",
            "pipeline",
            "keys",
            "zipf",
            "seed",
            "distinct_keys",
            "server_cpu_ns_per_op",
            "client_cpu_ns_per_op",
        ];
        expected.sort_unstable();
        assert_eq!(keys, expected);
        assert_eq!(json["ops_per_second"], 100_000.0);
        assert_eq!(json["latency_us"]["p50"], 2.0);
        assert_eq!(json["client_cpu_ns_per_op"], 1_000.0);
        assert!(json["server_cpu_ns_per_op"].is_null());
        assert!(report.to_string().contains("100,000 ops/s"));
    }
}
