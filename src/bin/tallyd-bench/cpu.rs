//! CPU time of a process, as the kernel accounts it.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::time::Duration;

use rustix::param::clock_ticks_per_second;
use rustix::time::{ClockId, clock_gettime};

/// CPU time that a process has used, read at one moment.
///
/// Two accounts, since each has a flaw: `schedstat` counts nanoseconds but forgets a thread that ends, `stat` counts whole
/// ticks (mostly 10 ms) but forgets nothing.
#[derive(Debug, Clone)]
pub struct CpuTime {
    /// Nanoseconds per thread; empty on kernels without `schedstat`.
    threads_ns: HashMap<String, u64>,
    ticks: u64,
}

impl CpuTime {
    /// Reads the CPU time of the process `pid`, all threads together.
    ///
    /// # Errors
    ///
    /// When there is no such process, or `/proc` does not read as expected.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let ticks = ticks_of(&stat)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected stat"))?;
        let mut threads_ns = HashMap::new();
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?;
            // A thread may end meanwhile; its file is then gone.
            let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else {
                continue;
            };
            let on_cpu = text
                .split_whitespace()
                .next()
                .and_then(|ns| ns.parse().ok());
            if let Some(ns) = on_cpu {
                threads_ns.insert(task.file_name().to_string_lossy().into_owned(), ns);
            }
        }
        Ok(Self { threads_ns, ticks })
    }

    /// CPU time used since `earlier`.
    pub fn since(&self, earlier: &Self) -> Duration {
        self.since_with_ticks(earlier, 1_000_000_000 / clock_ticks_per_second())
    }

    fn since_with_ticks(&self, earlier: &Self, tick_ns: u64) -> Duration {
        let by_threads: u64 = self
            .threads_ns
            .iter()
            .map(|(id, ns)| ns.saturating_sub(earlier.threads_ns.get(id).copied().unwrap_or(0)))
            .sum();
        let by_ticks = self.ticks.saturating_sub(earlier.ticks) * tick_ns;
        // User and system time are each rounded, at both ends: within that the finer account holds. Beyond it, a thread
        // has ended and taken its nanoseconds along.
        let nanos = if by_threads + 2 * tick_ns >= by_ticks {
            by_threads
        } else {
            by_ticks
        };
        Duration::from_nanos(nanos)
    }
}

/// User and system time in `/proc/P/stat`, fields 14 and 15. The second field, the name, may hold blanks and brackets.
fn ticks_of(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// CPU time of this process.
pub fn own_cpu() -> Duration {
    // Not by `/proc`, which lags by up to a tick for a thread that is running.
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(threads: &[(&str, u64)], ticks: u64) -> CpuTime {
        let threads_ns = threads.iter().map(|&(id, ns)| (id.to_owned(), ns));
        CpuTime {
            threads_ns: threads_ns.collect(),
            ticks,
        }
    }

    fn nanos_between(before: &CpuTime, after: &CpuTime) -> u128 {
        after.since_with_ticks(before, 10_000_000).as_nanos()
    }

    #[test]
    fn ticks_are_found_behind_a_name_with_brackets() {
        let stat = "7 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 40 2 13 14";
        assert_eq!(ticks_of(stat), Some(42));
        assert_eq!(ticks_of("7 (a) S 1 2"), None);
    }

    #[test]
    fn threads_are_added_up_and_new_ones_count_from_zero() {
        let before = cpu(&[("1", 1_000)], 0);
        let after = cpu(&[("1", 4_000), ("2", 500)], 1);
        assert_eq!(nanos_between(&before, &after), 3_500);
    }

    #[test]
    fn ticks_stand_in_when_a_thread_has_ended() {
        let before = cpu(&[("1", 0), ("2", 0)], 0);
        let after = cpu(&[("1", 5_000_000)], 90);
        assert_eq!(nanos_between(&before, &after), 900_000_000);
    }

    #[test]
    fn this_process_has_used_cpu_time_and_a_missing_one_is_an_error() {
        assert!(CpuTime::of(std::process::id()).is_ok());
        assert!(own_cpu() > Duration::ZERO);
        assert!(CpuTime::of(u32::MAX).is_err());
    }
}
