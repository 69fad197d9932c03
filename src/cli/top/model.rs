//! From the daemon's numbers to what is shown: rates between two samples, and facts with how
//! serious they are. Knows nothing of terminals.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::source::{Answer, HotKey, Sample};
use super::words::{age, bytes, count};

/// Rates kept: more than any terminal has columns.
const HISTORY_MAX: usize = 1000;
/// The ratio is taken over so many of the last rates, because a flush comes in bursts.
const RATIO_OVER: usize = 60;
/// Pending for so long means that flushing does not keep up, whatever `flush.interval` is by
/// default.
const PENDING_LONG: Duration = Duration::from_secs(30);

/// What happened a second between two samples.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// Increments taken.
    pub increments: f64,
    /// `INCRBY`s sent to the store.
    pub commands: f64,
    /// The time between the samples.
    pub seconds: f64,
}

/// How serious a fact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// As it should be.
    Well,
    /// Someone should look at it.
    Look,
    /// Something is broken.
    Bad,
}

/// One line: what it is, what it is now, and whether that is well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// What it is.
    pub name: &'static str,
    /// What it is now.
    pub value: String,
    /// Whether that is well.
    pub mood: Mood,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Model {
    /// Where the daemon is.
    pub socket: PathBuf,
    last: Option<Sample>,
    /// Why there is no newer sample, and since when.
    away: Option<(String, Instant)>,
    history: VecDeque<Rates>,
    /// The newest sample while the picture is held.
    kept: Option<Sample>,
}

impl Model {
    /// Nothing is known yet.
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            last: None,
            away: None,
            history: VecDeque::new(),
            kept: None,
        }
    }

    /// What came of asking.
    pub fn take(&mut self, answer: Answer) {
        if let Some(kept) = self.kept.take() {
            self.sample(kept);
        }
        match answer {
            Answer::Numbers(sample) => {
                self.away = None;
                self.sample(*sample);
            }
            Answer::Away(reason) => {
                let since = self
                    .away
                    .take()
                    .map_or_else(Instant::now, |(_, since)| since);
                self.away = Some((reason, since));
            }
        }
    }

    /// As [`Model::take`], but the picture stays as it is until then.
    pub fn keep(&mut self, answer: Answer) {
        if let Answer::Numbers(sample) = answer {
            self.kept = Some(*sample);
        }
    }

    fn sample(&mut self, new: Sample) {
        if let Some(old) = self.last.take() {
            if old.text("process_id") == new.text("process_id") {
                if let Some(rates) = rates(&old, &new) {
                    self.history.truncate(HISTORY_MAX - 1);
                    self.history.push_front(rates);
                } else {
                    // Too close to the one before to tell a rate.
                    self.last = Some(old);
                    return;
                }
            } else {
                // Another process counts from zero.
                self.history.clear();
            }
        }
        self.last = Some(new);
    }

    /// Why the daemon is away, and since when.
    pub fn away(&self) -> Option<(&str, Duration)> {
        self.away
            .as_ref()
            .map(|(reason, since)| (reason.as_str(), since.elapsed()))
    }

    /// Whether any numbers are known, be they old.
    pub fn is_known(&self) -> bool {
        self.last.is_some()
    }

    /// Rates, the newest first.
    pub fn history(&self) -> impl Iterator<Item = &Rates> {
        self.history.iter()
    }

    /// The newest rates.
    pub fn rates(&self) -> Option<Rates> {
        self.history.front().copied()
    }

    /// Increments for each command to the store: over the last minute, or, when nothing was sent
    /// in it, since the daemon began. `None`: nothing was sent at all.
    pub fn ratio(&self) -> Option<f64> {
        let over =
            |(increments, commands): (f64, f64)| (commands > 0.0).then(|| increments / commands);
        let lately = self.history.iter().take(RATIO_OVER);
        let lately = lately.fold((0.0, 0.0), |(increments, commands), rates| {
            (
                increments + rates.increments * rates.seconds,
                commands + rates.commands * rates.seconds,
            )
        });
        over(lately).or_else(|| {
            let last = self.last.as_ref()?;
            over((
                last.number("increments_total") as f64,
                last.number("flushed_keys_total") as f64,
            ))
        })
    }

    /// Version and age of the daemon.
    pub fn title(&self) -> String {
        let Some(last) = &self.last else {
            return "tallyd".to_owned();
        };
        let uptime = last.text("uptime_in_seconds").parse().unwrap_or(0);
        format!(
            "tallyd {}, up {}",
            last.text("tallyd_version"),
            age(Duration::from_secs(uptime))
        )
    }

    /// The keys that changed most of late, the hottest first.
    pub fn hot(&self) -> &[HotKey] {
        self.last.as_ref().map_or(&[], |last| &last.hot)
    }

    /// Everything but the rates and the keys, the most important first.
    pub fn facts(&self) -> Vec<Fact> {
        let Some(last) = &self.last else {
            return Vec::new();
        };
        let number = |name| last.number(name);
        let fact = |name, value, mood| Fact { name, value, mood };
        let look = |look: bool| if look { Mood::Look } else { Mood::Well };
        let bad = |bad: bool| if bad { Mood::Bad } else { Mood::Well };
        vec![
            store(last),
            pending(last),
            fact(
                "refused by the store",
                format!("{} deltas", count(number("rejected_total"))),
                look(number("rejected_total") > 0),
            ),
            fact(
                "flushes",
                format!(
                    "{} batches, {} retries, {} in doubt, {} sent again",
                    count(number("batches_total")),
                    count(number("retries_total")),
                    count(number("uncertain_total")),
                    count(number("replayed_total"))
                ),
                Mood::Well,
            ),
            fact(
                "other nodes",
                if number("subscribed") == 0 {
                    "not subscribed".to_owned()
                } else {
                    format!(
                        "{}, lag {} ms, {} gaps",
                        count(number("peers")),
                        count(number("lag_ms")),
                        count(number("gaps_total"))
                    )
                },
                look(number("subscribed") == 0),
            ),
            fact(
                "connections",
                format!(
                    "{}, {} refused",
                    count(number("connections")),
                    count(number("connections_refused_total"))
                ),
                look(number("connections_refused_total") > 0),
            ),
            fact(
                "view",
                format!(
                    "{} keys, {}, {} evicted",
                    count(number("view_keys")),
                    bytes(number("view_bytes")),
                    count(number("view_evictions_total"))
                ),
                Mood::Well,
            ),
            fact(
                "errors answered",
                format!(
                    "{} of {} commands",
                    count(number("errors_total")),
                    count(number("commands_total"))
                ),
                Mood::Well,
            ),
            fact(
                "damaged files",
                count(number("damaged_files")),
                bad(number("damaged_files") > 0),
            ),
        ]
    }
}

fn store(last: &Sample) -> Fact {
    let error = last.text("tallyd_store_error");
    let (value, mood) = if last.number("store_conflict") > 0 {
        (format!("conflict: {error}"), Mood::Bad)
    } else if !error.is_empty() {
        (format!("trouble: {error}"), Mood::Bad)
    } else if last.number("store_up") > 0 {
        ("up".to_owned(), Mood::Well)
    } else {
        ("not asked yet".to_owned(), Mood::Well)
    };
    Fact {
        name: "store",
        value,
        mood,
    }
}

fn pending(last: &Sample) -> Fact {
    let keys = last.number("epoch_keys") + last.number("sealed_keys");
    let since = last.number("pending_since_ms");
    let old = match since {
        0 => Duration::ZERO,
        since => Duration::from_millis(last.unix_ms.saturating_sub(since)),
    };
    let waits = last.number("sealed_bytes");
    let mut value = format!("{} keys", count(keys));
    if since > 0 {
        value = format!("{value} for {}", age(old));
    }
    if waits > 0 {
        value = format!("{value}, {} sealed", bytes(waits));
    }
    // Under load something is pending all the time; sealed and not taken is what tells.
    let stuck = old >= PENDING_LONG && waits > 0;
    Fact {
        name: "pending",
        value,
        mood: if stuck { Mood::Look } else { Mood::Well },
    }
}

fn rates(old: &Sample, new: &Sample) -> Option<Rates> {
    let seconds = new.at.checked_duration_since(old.at)?.as_secs_f64();
    if seconds <= 0.0 {
        return None;
    }
    let rate = |name| new.number(name).saturating_sub(old.number(name)) as f64 / seconds;
    Some(Rates {
        increments: rate("increments_total"),
        commands: rate("flushed_keys_total"),
        seconds,
    })
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // The rates of these tests are whole numbers.
pub(super) mod tests {
    use super::*;

    /// A daemon's numbers, `seconds` after `begin`.
    pub fn sample(begin: Instant, seconds: u64, numbers: &[(&str, u64)], error: &str) -> Sample {
        let mut text =
            "tallyd_version:0.1.0\r\nprocess_id:7\r\nuptime_in_seconds:3725\r\n".to_owned();
        for (name, number) in numbers {
            text = format!("{text}tallyd_{name}:{number}\r\n");
        }
        let mut sample = Sample::parse(&format!("{text}tallyd_store_error:{error}\r\n"));
        sample.at = begin + Duration::from_secs(seconds);
        sample.unix_ms = 1_000_000 + seconds * 1000;
        sample
    }

    pub fn model(samples: impl IntoIterator<Item = Sample>) -> Model {
        let mut model = Model::new("/run/tallyd/tallyd.sock".into());
        for sample in samples {
            model.take(Answer::Numbers(Box::new(sample)));
        }
        model
    }

    fn counted(begin: Instant, seconds: u64, increments: u64, commands: u64) -> Sample {
        let numbers = [
            ("increments_total", increments),
            ("flushed_keys_total", commands),
        ];
        sample(begin, seconds, &numbers, "")
    }

    fn fact(model: &Model, name: &str) -> Fact {
        let facts = model.facts();
        facts.into_iter().find(|fact| fact.name == name).unwrap()
    }

    #[test]
    fn rates_are_between_two_samples_by_their_own_time() {
        let begin = Instant::now();
        let model = model([
            counted(begin, 0, 1000, 10),
            counted(begin, 2, 3000, 14),
            counted(begin, 3, 3000, 16),
        ]);
        let rates: Vec<(f64, f64)> = model
            .history()
            .map(|r| (r.increments, r.commands))
            .collect();
        assert_eq!(rates, [(0.0, 2.0), (1000.0, 2.0)]);
        // 2,000 increments and 6 commands within the minute.
        assert_eq!(model.ratio().unwrap().round(), 333.0);
    }

    #[test]
    fn the_ratio_is_the_daemons_own_until_something_was_sent() {
        let begin = Instant::now();
        assert_eq!(model([]).ratio(), None);
        assert_eq!(model([counted(begin, 0, 5, 0)]).ratio(), None);
        let idle = model([counted(begin, 0, 1000, 10), counted(begin, 1, 1000, 10)]);
        assert_eq!(idle.ratio(), Some(100.0));
    }

    #[test]
    fn a_daemon_that_was_restarted_begins_anew() {
        let begin = Instant::now();
        let mut model = model([counted(begin, 0, 1000, 10), counted(begin, 1, 2000, 20)]);
        let mut restarted = Sample::parse("process_id:8\r\ntallyd_increments_total:3\r\n");
        restarted.at = begin + Duration::from_secs(2);
        model.take(Answer::Numbers(Box::new(restarted)));
        assert_eq!(model.rates(), None);
    }

    #[test]
    fn a_daemon_that_is_away_keeps_its_last_numbers_until_it_is_back() {
        let begin = Instant::now();
        let mut model = model([counted(begin, 0, 1000, 10)]);
        assert_eq!(model.away(), None);
        model.take(Answer::Away("s: refused".to_owned()));
        assert_eq!(model.away().unwrap().0, "s: refused");
        assert!(model.is_known());
        model.take(Answer::Numbers(Box::new(counted(begin, 9, 1900, 10))));
        assert_eq!(model.away(), None);
        assert_eq!(model.rates().unwrap().increments, 100.0);
    }

    #[test]
    fn a_picture_that_is_held_takes_over_what_came_meanwhile() {
        let begin = Instant::now();
        let numbers = |sample| Answer::Numbers(Box::new(sample));
        let mut model = model([counted(begin, 0, 0, 0), counted(begin, 1, 50, 0)]);
        model.keep(numbers(counted(begin, 2, 60, 0)));
        model.keep(numbers(counted(begin, 3, 70, 0)));
        assert_eq!(model.rates().unwrap().increments, 50.0, "held");
        model.take(numbers(counted(begin, 4, 100, 0)));
        let rates: Vec<f64> = model.history().map(|rates| rates.increments).collect();
        assert_eq!(rates, [30.0, 10.0, 50.0]);
    }

    #[test]
    fn facts_say_what_is_wrong() {
        let begin = Instant::now();
        let well = model([sample(begin, 0, &[("store_up", 1), ("subscribed", 1)], "")]);
        assert!(well.facts().iter().all(|fact| fact.mood == Mood::Well));
        assert_eq!(fact(&well, "store").value, "up");
        assert_eq!(fact(&well, "pending").value, "0 keys");

        let numbers = [
            ("epoch_keys", 1200),
            ("sealed_keys", 34),
            ("sealed_bytes", 2048),
            ("pending_since_ms", 940_000),
            ("rejected_total", 2),
            ("damaged_files", 1),
        ];
        let ill = model([sample(begin, 0, &numbers, "connection refused")]);
        let store = fact(&ill, "store");
        assert_eq!(store.value, "trouble: connection refused");
        assert_eq!(store.mood, Mood::Bad);
        let pending = fact(&ill, "pending");
        assert_eq!(pending.value, "1,234 keys for 1 min 0 s, 2.0 KiB sealed");
        assert_eq!(pending.mood, Mood::Look);
        assert_eq!(fact(&ill, "refused by the store").mood, Mood::Look);
        assert_eq!(fact(&ill, "damaged files").mood, Mood::Bad);
        assert_eq!(fact(&ill, "other nodes").value, "not subscribed");
    }
}
