//! What the page's rates are made of: totals, taken once a second.

use std::collections::VecDeque;
use std::time::Instant;

use serde::Serialize;

use crate::stats::{Number, Stats};
use crate::time::unix_ms;

/// Samples kept.
pub const SAMPLES_MAX: usize = 301;
/// A rate is taken over so many samples: commands leave in a burst with each flush.
const RATE_SAMPLES: usize = 5;
/// Samples of a minute.
const MINUTE_SAMPLES: usize = 60;

/// The totals at a moment.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pub taken: Instant,
    pub at: u64,
    pub increments: u64,
    pub commands: u64,
    pub seals: Times,
    pub transactions: Times,
    pub publications: Times,
}

/// How often something was done, and how long all that took.
#[derive(Debug, Default, Clone, Copy)]
pub struct Times {
    pub count: u64,
    pub us: u64,
}

/// A second.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub struct Rates {
    pub increments: f64,
    pub commands: f64,
}

/// On average, if at all.
// Each carries its unit.
#[allow(clippy::struct_field_names)]
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct Took {
    pub seal_ms: Option<f64>,
    pub transaction_ms: Option<f64>,
    pub publish_ms: Option<f64>,
}

impl Sample {
    /// Takes one.
    pub fn now(stats: &Stats) -> Self {
        let times = |counts: &[&Number], us: &Number| Times {
            count: counts.iter().map(|count| count.get()).sum(),
            us: us.get(),
        };
        let transactions = [
            &stats.batches_total,
            &stats.batches_refused_total,
            &stats.batches_keys_refused_total,
            &stats.batches_aborted_total,
            &stats.uncertain_total,
        ];
        Sample {
            taken: Instant::now(),
            at: unix_ms(),
            increments: stats.increments_total.get(),
            commands: stats.flushed_keys_total.get(),
            seals: times(&[&stats.seals_total], &stats.seal_us_total),
            transactions: times(&transactions, &stats.transaction_us_total),
            publications: times(&[&stats.published_total], &stats.publish_us_total),
        }
    }
}

/// The rates up to a sample.
pub fn rates(samples: &VecDeque<Sample>, index: usize) -> Rates {
    let first = index.saturating_sub(RATE_SAMPLES);
    let (Some(from), Some(to)) = (samples.get(first), samples.get(index)) else {
        return Rates::default();
    };
    let seconds = (to.taken - from.taken).as_secs_f64();
    if seconds == 0.0 {
        return Rates::default();
    }
    let rate = |from: u64, to: u64| ((to - from) as f64 / seconds * 10.0).round() / 10.0;
    Rates {
        increments: rate(from.increments, to.increments),
        commands: rate(from.commands, to.commands),
    }
}

/// The sample from which the last minute is told.
pub fn minute_ago(samples: &VecDeque<Sample>) -> Option<&Sample> {
    samples.get(samples.len().saturating_sub(MINUTE_SAMPLES + 1))
}

/// How long things took between two samples.
pub fn took(from: &Sample, to: &Sample) -> Took {
    let mean_ms = |from: Times, to: Times| {
        let count = to.count - from.count;
        (count > 0).then(|| (to.us - from.us) as f64 / count as f64 / 1000.0)
    };
    Took {
        seal_ms: mean_ms(from.seals, to.seals),
        transaction_ms: mean_ms(from.transactions, to.transactions),
        publish_ms: mean_ms(from.publications, to.publications),
    }
}

/// Increments for each command.
pub fn ratio(increments: u64, commands: u64) -> Option<f64> {
    (commands > 0).then(|| increments as f64 / commands as f64)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A sample each second, with the totals given.
    fn samples(totals: &[(u64, u64)]) -> VecDeque<Sample> {
        let begin = Instant::now();
        let sample = |(index, &(increments, commands)): (usize, &(u64, u64))| Sample {
            taken: begin + Duration::from_secs(index as u64),
            at: 1000 * index as u64,
            increments,
            commands,
            seals: Times::default(),
            transactions: Times {
                count: commands / 10,
                us: commands * 250,
            },
            publications: Times::default(),
        };
        totals.iter().enumerate().map(sample).collect()
    }

    #[test]
    fn rates_are_of_the_last_five_seconds() {
        let totals: Vec<_> = (0..20).map(|n| (100 * n * n, n / 2)).collect();
        let samples = samples(&totals);
        let at = |index| {
            (
                rates(&samples, index).increments,
                rates(&samples, index).commands,
            )
        };
        assert_eq!(at(0), (0.0, 0.0));
        assert_eq!(at(1), (100.0, 0.0));
        assert_eq!(at(2), (200.0, 0.5));
        // 10² - 5² = 75 hundreds in 5 s.
        assert_eq!(at(10), (1500.0, 0.6));
        assert_eq!(rates(&VecDeque::new(), 0), Rates::default());
    }

    #[test]
    fn a_minute_forgets_what_was_before() {
        assert!(minute_ago(&VecDeque::new()).is_none());
        let totals: Vec<_> = (0..100).map(|n| (n, 10 * n)).collect();
        let commands = |count| minute_ago(&samples(&totals[..count])).map(|s| s.commands);
        assert_eq!((commands(1), commands(61)), (Some(0), Some(0)));
        assert_eq!((commands(62), commands(100)), (Some(10), Some(390)));
    }

    #[test]
    fn means_are_of_what_was_done_meanwhile() {
        assert_eq!((ratio(7, 0), ratio(7, 2)), (None, Some(3.5)));
        let samples = samples(&[(0, 40), (0, 60), (0, 60)]);
        assert_eq!(took(&samples[1], &samples[2]), Took::default());
        let told = took(&samples[0], &samples[1]);
        assert_eq!((told.seal_ms, told.transaction_ms), (None, Some(2.5)));
    }
}
