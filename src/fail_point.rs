//! Named points at which a test may have the process die, as by `kill -9`, or a thread stick.
//!
//! Only with the feature `fail-points`, which no release has; otherwise a point is nothing at all.
//! `TALLYD_FAIL_POINT=name@3` kills at the third passage of `name`; `TALLYD_STICK_POINT=name@3` has
//! the thread that passes there never come back; `TALLYD_LOSE_POINT=name@3` has what passes there lost, as by
//! a defect.

/// Dies here if a test asked for it.
#[cfg(not(feature = "fail-points"))]
#[inline(always)]
#[allow(clippy::inline_always)]
pub fn fail_point(_name: &str) {}

/// Dies here if a test asked for it.
#[cfg(feature = "fail-points")]
pub fn fail_point(name: &str) {
    use rustix::process::{Signal, getpid, kill_process};

    static DIE: Point = Point::new("TALLYD_FAIL_POINT");
    static STICK: Point = Point::new("TALLYD_STICK_POINT");

    let die = DIE.is_here(name);
    if die {
        // Not `abort`: nothing may run after this, no handler and no destructor.
        let _ = kill_process(getpid(), Signal::KILL);
    }
    if die || STICK.is_here(name) {
        loop {
            std::thread::park();
        }
    }
}

/// Whether a test asked that what passes here is lost.
#[cfg(not(feature = "fail-points"))]
#[inline(always)]
#[allow(clippy::inline_always)]
pub fn loses(_name: &str) -> bool {
    false
}

/// Whether a test asked that what passes here is lost.
#[cfg(feature = "fail-points")]
pub fn loses(name: &str) -> bool {
    static LOSE: Point = Point::new("TALLYD_LOSE_POINT");
    LOSE.is_here(name)
}

/// A passage that a variable names.
#[cfg(feature = "fail-points")]
struct Point {
    variable: &'static str,
    wanted: std::sync::OnceLock<Option<(String, u64)>>,
    passed: std::sync::atomic::AtomicU64,
}

#[cfg(feature = "fail-points")]
impl Point {
    const fn new(variable: &'static str) -> Self {
        Self {
            variable,
            wanted: std::sync::OnceLock::new(),
            passed: std::sync::atomic::AtomicU64::new(0),
        }
    }

    fn is_here(&self, name: &str) -> bool {
        let wanted = self.wanted.get_or_init(|| {
            let setting = std::env::var(self.variable).ok()?;
            let (name, count) = setting.split_once('@')?;
            Some((name.to_owned(), count.parse().ok()?))
        });
        wanted.as_ref().is_some_and(|(wanted, count)| {
            wanted == name
                && self
                    .passed
                    .fetch_add(1, std::sync::atomic::Ordering::SeqCst)
                    + 1
                    == *count
        })
    }
}
