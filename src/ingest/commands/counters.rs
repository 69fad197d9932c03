//! What changes or reads one counter.

use super::super::session::Action;
use super::super::taken::Verb;
use crate::counters::Kind;
use crate::wire::decode::Args;
use crate::wire::number::parse_i64;

/// A reading, whose command is not counted.
pub const GET: Action = (Kind::Get, 0, Verb::Incr);

fn amount(args: Args<'_>) -> Result<i64, &'static str> {
    parse_i64(args.get(2)).ok_or("ERR value is not an integer or out of range")
}

/// `INCR key`
pub fn incr(_: Args<'_>) -> Result<Action, &'static str> {
    Ok((Kind::Add, 1, Verb::Incr))
}

/// `DECR key`
pub fn decr(_: Args<'_>) -> Result<Action, &'static str> {
    Ok((Kind::Add, -1, Verb::Decr))
}

/// `INCRBY key increment`
pub fn incrby(args: Args<'_>) -> Result<Action, &'static str> {
    Ok((Kind::Add, amount(args)?, Verb::IncrBy))
}

/// `DECRBY key decrement`
pub fn decrby(args: Args<'_>) -> Result<Action, &'static str> {
    let opposite = amount(args)?.checked_neg();
    let amount = opposite.ok_or("ERR decrement would overflow")?;
    Ok((Kind::Add, amount, Verb::DecrBy))
}

/// `GET key`
pub fn get(_: Args<'_>) -> Result<Action, &'static str> {
    Ok(GET)
}
