//! `TALLY.*`: what Redis has no command for.

use std::time::Duration;

use super::super::core::Core;
use super::super::report;
use super::super::session::{Next, Session};
use super::wrong_arity;
use crate::hot::KEYS_MAX;
use crate::wire::decode::Args;
use crate::wire::encode::{self, Out};
use crate::wire::number::parse_i64;

/// Keys that `TALLY.HOT` tells if it is not said how many, and at most.
const HOT_KEYS: usize = 10;
const HOT_KEYS_MAX: usize = 100;

/// `TALLY.FLUSH [ms]`
pub fn flush(_: &Core, _: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    if args.len() > 2 {
        wrong_arity("tally.flush", out);
        return None;
    }
    if args.len() == 1 {
        return Some(Next::Flush(None));
    }
    if let Some(ms) = parse_i64(args.get(1)).and_then(|ms| u64::try_from(ms).ok()) {
        Some(Next::Flush(Some(Duration::from_millis(ms))))
    } else {
        encode::error(out, "ERR timeout is not an integer or out of range");
        None
    }
}

/// `TALLY.HOT [count]`: the keys that change most, each with its change and by how much that may be too high.
pub fn hot(core: &Core, _: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    let asked = match args.len() {
        1 => Some(HOT_KEYS),
        2 => parse_i64(args.get(1)).and_then(|count| usize::try_from(count).ok()),
        _ => {
            wrong_arity("tally.hot", out);
            return None;
        }
    };
    let Some(count) = asked.filter(|count| (1..=HOT_KEYS_MAX).contains(count)) else {
        let text = format!("ERR count must be an integer from 1 to {HOT_KEYS_MAX}");
        encode::error(out, text);
        return None;
    };
    let access = core.access.borrow();
    let mut keys = core.hot.hottest(KEYS_MAX).keys;
    // Of a key that was cut off nobody can tell whether it matches.
    keys.retain(|key| {
        access.keys.is_all() || (key.shown.len() == key.key_bytes && access.keys.allow(&key.shown))
    });
    keys.truncate(count);
    encode::array(out, keys.len());
    for key in keys {
        encode::array(out, 3);
        encode::bulk(out, &key.shown);
        encode::integer(out, i64::try_from(key.count).unwrap_or(i64::MAX));
        encode::integer(out, i64::try_from(key.error).unwrap_or(i64::MAX));
    }
    None
}

/// `TALLY.PENDING key`
pub fn pending(core: &Core, _: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    let state = core.state.borrow();
    let pending = state.table.view(args.get(1)).map_or(0, |view| view.pending);
    encode::integer(out, pending);
    None
}

/// `TALLY.STATS`
pub fn stats(core: &Core, session: &mut Session, _: Args<'_>, out: &mut Out) -> Option<Next> {
    core.refresh_gauges();
    report::stats(core, session.version, out);
    None
}
