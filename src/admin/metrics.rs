//! The numbers as Prometheus reads them.
//!
//! 1. [`Stats`] is the one source: what is here was written there, and `INFO` shows the same. A
//!    number that no row below names is shown under its own name.
//! 2. Names as Prometheus has them: base units, `_total` on what only grows. Labels have the values
//!    that stand here, never a key.
//! 3. The format is the text format, version 0.0.4, which every scraper reads.

use std::fmt::{self, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::header::HeaderValue;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::Context;
use crate::stats::Stats;

/// What [`render`] returns.
pub const CONTENT_TYPE: HeaderValue =
    HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// How a metric differs from the number that it is made of.
enum From {
    /// Milliseconds, here seconds.
    Ms,
    /// A Unix time in milliseconds or 0, here the seconds since then or 0.
    Age,
    /// Several numbers, each a value of this label.
    Label(&'static str),
}

/// A metric that is not simply a number with its name and help.
struct Row {
    name: &'static str,
    help: &'static str,
    from: From,
    /// The label's value, if there is a label, and the number.
    numbers: &'static [(&'static str, &'static str)],
}

const ROWS: &[Row] = &[
    Row {
        name: "increments_total",
        help: "Increments and decrements taken, by command.",
        from: From::Label("command"),
        numbers: &[
            ("incr", "increments_incr_total"),
            ("incrby", "increments_incrby_total"),
            ("decr", "increments_decr_total"),
            ("decrby", "increments_decrby_total"),
        ],
    },
    Row {
        name: "connections_refused_total",
        help: "Connections refused: at listen.max_connections, for want of file descriptors, to a peer that may not connect.",
        from: From::Label("reason"),
        numbers: &[
            ("limit", "connections_refused_limit_total"),
            ("descriptors", "connections_refused_descriptors_total"),
            ("peer", "connections_refused_peer_total"),
        ],
    },
    Row {
        name: "pending_keys",
        help: "Keys with deltas that are not yet known to be in the store: in the open epoch, and sealed.",
        from: From::Label("state"),
        numbers: &[("open", "epoch_keys"), ("sealed", "sealed_keys")],
    },
    Row {
        name: "journal_bytes",
        help: "Bytes of the journal's records: of the open epoch, sealed and not yet in the store, and retained after that.",
        from: From::Label("state"),
        numbers: &[
            ("open", "epoch_bytes"),
            ("sealed", "sealed_bytes"),
            ("retained", "retained_bytes"),
        ],
    },
    Row {
        name: "journal_segments",
        help: "Segments of the journal besides the open one: not yet in the store, and retained after that.",
        from: From::Label("state"),
        numbers: &[
            ("sealed", "sealed_segments"),
            ("retained", "retained_segments"),
        ],
    },
    Row {
        name: "batches_total",
        help: "Batches sent to the store, by outcome: applied; refused whole; refused for the sake of some keys; aborted because the token had moved; uncertain, as the reply was lost.",
        from: From::Label("outcome"),
        numbers: &[
            ("applied", "batches_total"),
            ("refused", "batches_refused_total"),
            ("keys_refused", "batches_keys_refused_total"),
            ("aborted", "batches_aborted_total"),
            ("uncertain", "uncertain_total"),
        ],
    },
    Row {
        name: "retries_total",
        help: "Batches or connections that failed and were tried again, by the kind of failure.",
        from: From::Label("kind"),
        numbers: &[
            ("io", "retries_io_total"),
            ("timeout", "retries_timeout_total"),
            ("refused", "retries_refused_total"),
            ("protocol", "retries_protocol_total"),
            ("embedded", "retries_embedded_total"),
            ("local", "retries_local_total"),
        ],
    },
    Row {
        name: "last_retry_timestamp_seconds",
        help: "Unix time of the last retry; 0 if there was none.",
        from: From::Ms,
        numbers: &[("", "last_retry_ms")],
    },
    Row {
        name: "pending_age_seconds",
        help: "Age of the oldest delta that is not yet known to be in the store; 0 if there is none.",
        from: From::Age,
        numbers: &[("", "pending_since_ms")],
    },
    Row {
        name: "lag_seconds",
        help: "Between the sending of the last message of another node and its arrival, by the two clocks.",
        from: From::Ms,
        numbers: &[("", "lag_ms")],
    },
];
/// Numbers that are part of others here: a sum, or that of a histogram.
const CONTAINED: &[&str] = &[
    "seal_us_total",
    "transaction_us_total",
    "publish_us_total",
    "increments_total",
    "connections_refused_total",
    "retries_total",
    "sealed_since_ms",
];

/// The whole text.
pub fn render(context: &Context) -> String {
    let mut registry = Registry::default();
    let histograms = &context.stats.histograms;
    for (name, help, histogram) in [
        (
            "seal_duration_seconds",
            "From asking for an epoch's end until its segment is sealed",
            &histograms.seal,
        ),
        (
            "transaction_duration_seconds",
            "From sending a batch to the store until its answer",
            &histograms.transaction,
        ),
        (
            "publish_duration_seconds",
            "Publishing a message",
            &histograms.publish,
        ),
        (
            "flush_keys",
            "Distinct keys of a sealed epoch",
            &histograms.flush_keys,
        ),
        (
            "flush_increments",
            "Increments between two seals",
            &histograms.flush_increments,
        ),
    ] {
        registry.register(format!("tallyd_{name}"), help, histogram.clone());
    }
    let now = SystemTime::now();
    let facts = Facts {
        stats: Arc::clone(&context.stats),
        now_ms: unix(now).as_millis() as u64,
        started: unix(now - context.health.started().elapsed()),
        node: context.node.get().cloned().unwrap_or_default(),
        name: context.name.clone(),
    };
    registry.register_collector(Box::new(facts));
    let mut text = String::with_capacity(16 << 10);
    // A String takes all that is written to it.
    let _ = encode_registry(&mut text, &registry);
    prometheus_text(&text)
}

fn unix(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// `OpenMetrics` names a counter's family without `_total`, the text format with it.
fn prometheus_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut lines = open_metrics.lines().peekable();
    while let Some(line) = lines.next() {
        let kind = match line.strip_prefix("# HELP ") {
            Some(_) => lines.peek().copied().unwrap_or_default(),
            None => line,
        };
        if line.starts_with("# ") && kind.ends_with(" counter") {
            let mut words = line.splitn(4, ' ');
            let mut word = || words.next().unwrap_or_default();
            let _ = writeln!(text, "{} {} {}_total {}", word(), word(), word(), word());
        } else {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// What is not a histogram, at the moment of a scrape.
#[derive(Debug)]
struct Facts {
    stats: Arc<Stats>,
    now_ms: u64,
    started: Duration,
    node: String,
    name: String,
}

impl Facts {
    fn rows(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let numbers = self.stats.described();
        let value = |wanted: &str| {
            let found = numbers.iter().find(|(name, ..)| *name == wanted);
            found.map_or(0, |(.., value)| *value)
        };
        for row in ROWS {
            let name = &format!("tallyd_{}", row.name);
            match row.from {
                From::Label(label) => {
                    let samples: Vec<_> = row
                        .numbers
                        .iter()
                        .map(|(text, number)| ([(label, *text)], value(number)))
                        .collect();
                    family(encoder, name, row.help, &samples)?;
                }
                From::Ms => {
                    let seconds = value(row.numbers[0].1) as f64 / 1e3;
                    gauge(encoder, name, row.help, seconds)?;
                }
                From::Age => {
                    let age = match value(row.numbers[0].1) {
                        0 => 0,
                        since => self.now_ms.saturating_sub(since),
                    };
                    gauge(encoder, name, row.help, age as f64 / 1e3)?;
                }
            }
        }
        let shown = |name| {
            let named = |row: &Row| row.numbers.iter().any(|(_, number)| *number == name);
            ROWS.iter().any(named) || CONTAINED.contains(&name)
        };
        for (number, help, value) in &numbers {
            if number.starts_with("amount_") {
                // A sum, which may be below zero.
                gauge(
                    encoder,
                    &format!("tallyd_{number}"),
                    help,
                    *value as i64 as f64,
                )?;
            } else if !shown(number) {
                family(encoder, &format!("tallyd_{number}"), help, &[([], *value)])?;
            }
        }
        let pending = value("epoch_bytes") + value("sealed_bytes");
        gauge(
            encoder,
            "tallyd_pending_bytes",
            "Bytes of deltas that are not yet known to be in the store; the limit is tallyd_pending_bytes_max.",
            pending as f64,
        )
    }

    fn process(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        info(
            encoder,
            "tallyd_build_info",
            "The program, always 1.",
            &[("version", env!("CARGO_PKG_VERSION"))],
        )?;
        info(
            encoder,
            "tallyd_node_info",
            "This node, always 1.",
            &[("name", self.name.as_str()), ("node", self.node.as_str())],
        )?;
        gauge(
            encoder,
            "process_start_time_seconds",
            "Unix time of the process's start.",
            self.started.as_secs_f64(),
        )?;
        let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let seconds = cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9;
        let cpu = ConstCounter::new(seconds);
        let help = "Processor time of the process.";
        let kind = cpu.metric_type();
        cpu.encode(encoder.encode_descriptor("process_cpu_seconds", help, None, kind)?)?;
        let pages = std::fs::read_to_string("/proc/self/statm")
            .ok()
            .and_then(|text| text.split(' ').nth(1)?.parse().ok());
        match pages {
            None => Ok(()),
            Some::<u64>(pages) => gauge(
                encoder,
                "process_resident_memory_bytes",
                "Memory of the process, the mapped journal included.",
                (pages * rustix::param::page_size() as u64) as f64,
            ),
        }
    }
}

impl Collector for Facts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.rows(&mut encoder)?;
        self.process(&mut encoder)
    }
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    let gauge = ConstGauge::new(value);
    gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
}

/// A gauge that is 1 and says something by its labels.
fn info(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    labels: &[(&str, &str)],
) -> fmt::Result {
    let one = ConstGauge::new(1_u64);
    let mut family = encoder.encode_descriptor(name, help, None, one.metric_type())?;
    one.encode(family.encode_family(&labels)?)
}

/// A counter, if the name says so, or a gauge, for each set of labels.
fn family<const N: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: &[([(&str, &str); N], u64)],
) -> fmt::Result {
    let (family_name, is_counter) = match name.strip_suffix("_total") {
        Some(family) => (family, true),
        None => (name, false),
    };
    let kind = if is_counter {
        ConstCounter::new(0_u64).metric_type()
    } else {
        ConstGauge::new(0_u64).metric_type()
    };
    let mut family = encoder.encode_descriptor(family_name, help, None, kind)?;
    for (labels, value) in samples {
        if labels.is_empty() {
            // One sample, without braces.
            return if is_counter {
                ConstCounter::new(*value).encode(family)
            } else {
                ConstGauge::new(*value).encode(family)
            };
        }
        let sample = family.encode_family(labels)?;
        if is_counter {
            ConstCounter::new(*value).encode(sample)?;
        } else {
            ConstGauge::new(*value).encode(sample)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(name: &str) -> Context {
        Context {
            name: name.to_owned(),
            ..Context::default()
        }
    }

    #[test]
    fn rows_name_numbers_that_there_are_and_each_one_once() {
        let stats = Stats::default();
        let numbers = stats.described();
        let mut named: Vec<&str> = ROWS
            .iter()
            .flat_map(|row| row.numbers.iter().map(|(_, number)| *number))
            .chain(CONTAINED.iter().copied())
            .collect();
        for name in &named {
            assert!(numbers.iter().any(|(n, ..)| n == name), "{name}");
        }
        named.sort_unstable();
        let all = named.len();
        named.dedup();
        assert_eq!(named.len(), all);
    }

    #[test]
    fn every_sample_has_help_and_type_before_it_and_counters_end_in_total() {
        let text = render(&context("web-7"));
        let mut declared = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
                assert!(text.contains(&format!("# HELP {name} ")), "{name}");
                assert!(!declared.contains(&name), "{name} twice");
                declared.push(name);
            } else if !line.starts_with('#') {
                let name = line.split(['{', ' ']).next().unwrap();
                let family = *declared.last().unwrap();
                assert!(
                    name == family || name.starts_with(&format!("{family}_")),
                    "{line}"
                );
            }
        }
        assert!(declared.len() > 50, "{declared:?}");
        // The one unit that is not a base unit has been turned into one everywhere.
        assert!(!text.contains("_ms"), "{text}");
    }

    #[test]
    fn labels_are_escaped() {
        let text = render(&context("a\"b\\c\nd"));
        assert!(text.contains(r#"name="a\"b\\c\nd""#), "{text}");
    }

    #[test]
    fn age_and_seconds_are_derived() {
        let context = context("x");
        assert!(render(&context).contains("\ntallyd_pending_age_seconds 0"));
        let now = unix(SystemTime::now()).as_millis() as u64;
        context.stats.pending_since_ms.set(now - 90_000);
        context.stats.lag_ms.set(1500);
        let text = render(&context);
        assert!(text.contains("\ntallyd_pending_age_seconds 90."), "{text}");
        assert!(text.contains("\ntallyd_lag_seconds 1.5\n"), "{text}");
    }
}
