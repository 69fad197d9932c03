//! Named points at which a test may have the process die, as by `kill -9`.
//!
//! Only with the feature `fail-points`, which no release has; otherwise a point is nothing at all.
//! `TALLYD_FAIL_POINT=name@3` kills at the third passage of `name`.

/// Dies here if a test asked for it.
#[cfg(not(feature = "fail-points"))]
#[inline(always)]
#[allow(clippy::inline_always)]
pub fn fail_point(_name: &str) {}

/// Dies here if a test asked for it.
#[cfg(feature = "fail-points")]
pub fn fail_point(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static WANTED: OnceLock<Option<(String, u64)>> = OnceLock::new();
    static PASSED: AtomicU64 = AtomicU64::new(0);

    let wanted = WANTED.get_or_init(|| {
        let setting = std::env::var("TALLYD_FAIL_POINT").ok()?;
        let (name, count) = setting.split_once('@')?;
        Some((name.to_owned(), count.parse().ok()?))
    });
    if let Some((wanted, count)) = wanted
        && wanted == name
        && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *count
    {
        // Not `abort`: nothing may run after this, no handler and no destructor.
        let _ = kill_process(getpid(), Signal::KILL);
        loop {
            std::thread::park();
        }
    }
}
