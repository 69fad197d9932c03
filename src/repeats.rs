//! When to tell of something that happens again and again: at once when it begins, then a count now
//! and then, and once when it is over. The lines themselves are written where it happens.
//!
//! 1. While something goes on, it is told of once a minute at most.
//! 2. Something that begins and ends all the time is told of three times a minute at most; what is
//!    not told at once is told with its count as soon as the minute is over, if it still goes on.
//! 3. An end is told only of what was told.

use std::time::Duration;

use tokio::time::Instant;

/// Between two lines about something that goes on.
pub const REMIND: Duration = Duration::from_secs(60);
/// Beginnings that are told in so long a time, at most.
const BEGINNINGS_MAX: u32 = 3;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Repeats {
    current: Option<Current>,
    /// Since when beginnings are counted, and how many were told since.
    window: Option<(Instant, u32)>,
}

#[derive(Debug)]
struct Current {
    began: Instant,
    /// The last time that it happened.
    last: Instant,
    count: u64,
    /// Since the last line.
    untold: u64,
    /// When the last line was due.
    told: Option<Instant>,
}

/// What a line is to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Told {
    /// Whether it is the first line about it.
    pub first: bool,
    /// How often it happened: since the last line, or, at the end, in all.
    pub count: u64,
    /// Since it began.
    pub lasted: Duration,
}

impl Told {
    /// [`Told::lasted`] in seconds, as lines show it.
    pub fn seconds(&self) -> f32 {
        (self.lasted.as_secs_f32() * 10.0).round() / 10.0
    }
}

impl Repeats {
    /// It happened. `Some`: a line is due.
    pub fn again(&mut self) -> Option<Told> {
        let now = Instant::now();
        let current = self.current.get_or_insert(Current {
            began: now,
            last: now,
            count: 0,
            untold: 0,
            told: None,
        });
        current.last = now;
        current.count += 1;
        current.untold += 1;
        self.due()
    }

    /// `Some`: a line is due about what happened since the last one, though nothing new did.
    pub fn due(&mut self) -> Option<Told> {
        let now = Instant::now();
        let current = self.current.as_mut()?;
        let due = match current.told {
            Some(told) => current.untold > 0 && now - told >= REMIND,
            None => may_begin(&mut self.window, now),
        };
        due.then(|| Told {
            first: current.told.replace(now).is_none(),
            count: std::mem::take(&mut current.untold),
            lasted: now - current.began,
        })
    }

    /// Whether it goes on.
    pub fn is_on(&self) -> bool {
        self.current.is_some()
    }

    /// It is over. `Some`: it had been told of, so its end is due.
    pub fn over(&mut self) -> Option<Told> {
        let current = self.current.take()?;
        current.told?;
        Some(Told {
            first: false,
            count: current.count,
            lasted: current.began.elapsed(),
        })
    }

    /// As [`Repeats::over`], if it has not happened for so long; else as [`Repeats::due`].
    pub fn over_after(&mut self, quiet: Duration) -> Option<Result<Told, Told>> {
        let last = self.current.as_ref()?.last;
        if last.elapsed() >= quiet {
            self.over().map(Err)
        } else {
            self.due().map(Ok)
        }
    }
}

fn may_begin(window: &mut Option<(Instant, u32)>, now: Instant) -> bool {
    let (since, told) = window.get_or_insert((now, 0));
    if now - *since >= REMIND {
        (*since, *told) = (now, 0);
    }
    *told += 1;
    *told <= BEGINNINGS_MAX
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn told(first: bool, count: u64, seconds: u64) -> Told {
        let lasted = Duration::from_secs(seconds);
        Told {
            first,
            count,
            lasted,
        }
    }

    async fn seconds(seconds: u64) {
        advance(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_told_at_once_then_a_count_a_minute_then_its_end() {
        let mut repeats = Repeats::default();
        assert_eq!(repeats.over(), None);
        assert_eq!(repeats.due(), None);
        let mut lines = Vec::new();
        for _ in 0..150 {
            lines.extend(repeats.again());
            seconds(1).await;
        }
        assert_eq!(
            lines,
            [told(true, 1, 0), told(false, 60, 60), told(false, 60, 120)]
        );
        assert_eq!(repeats.over(), Some(told(false, 150, 150)));
        assert_eq!(repeats.over(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_happened_since_the_last_line_is_told_though_nothing_new_does() {
        let mut repeats = Repeats::default();
        assert_eq!(repeats.again(), Some(told(true, 1, 0)));
        for _ in 0..7 {
            assert_eq!(repeats.again(), None);
        }
        seconds(59).await;
        assert_eq!(repeats.due(), None);
        seconds(1).await;
        assert_eq!(repeats.due(), Some(told(false, 7, 60)));
        seconds(600).await;
        assert_eq!(repeats.due(), None, "nothing has happened since");
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_and_goes_all_the_time_is_no_flood() {
        let mut repeats = Repeats::default();
        let (mut begun, mut ended) = (0, 0);
        for _ in 0..590 {
            begun += u32::from(repeats.again().is_some());
            advance(Duration::from_millis(50)).await;
            ended += u32::from(repeats.over().is_some());
            advance(Duration::from_millis(50)).await;
        }
        // Almost a minute of it.
        assert_eq!((begun, ended), (3, 3));
        // It stays this time: told as soon as the minute is over.
        assert_eq!(repeats.again(), None);
        assert_eq!(repeats.due(), None);
        seconds(1).await;
        assert_eq!(repeats.again(), Some(told(true, 2, 1)));
        assert_eq!(repeats.over(), Some(told(false, 2, 1)));
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_over_when_it_has_not_happened_for_a_while() {
        let mut repeats = Repeats::default();
        let quiet = Duration::from_secs(5);
        assert_eq!(repeats.over_after(quiet), None);
        repeats.again();
        seconds(4).await;
        assert_eq!(repeats.over_after(quiet), None);
        repeats.again();
        seconds(4).await;
        assert_eq!(repeats.over_after(quiet), None);
        seconds(1).await;
        assert_eq!(repeats.over_after(quiet), Some(Err(told(false, 2, 9))));
        assert_eq!(repeats.over_after(quiet), None);
    }
}
