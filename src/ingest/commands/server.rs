//! Questions about this daemon.

use std::time::{SystemTime, UNIX_EPOCH};

use super::super::core::Core;
use super::super::glob::Glob;
use super::super::report;
use super::super::session::{Next, Session};
use super::{COMMANDS, Spec, help, is_resp2, lookup, null, unknown_subcommand, wrong_arity};
use crate::wire::decode::{Args, FRAME_BYTES_MAX};
use crate::wire::encode::{self, Out};

/// The version of Redis whose behaviour clients may expect.
pub const REDIS_VERSION: &str = "7.0.15";

/// `TIME`
pub fn time(_: &Core, _: &mut Session, _: Args<'_>, out: &mut Out) -> Option<Next> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    encode::array(out, 2);
    encode::bulk_integer(out, now.as_secs() as i64);
    encode::bulk_integer(out, i64::from(now.subsec_micros()));
    None
}

/// `INFO [section ...]`
pub fn info(core: &Core, session: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    core.refresh_gauges();
    encode::verbatim(out, &report::info(core, args), session.version);
    None
}

/// `COMMAND [COUNT|LIST|INFO|DOCS]`
pub fn command(_: &Core, session: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    let sub = args.get(1).to_ascii_lowercase();
    match (&sub[..], args.len()) {
        (_, 1) => {
            encode::array(out, COMMANDS.len());
            COMMANDS.iter().for_each(|spec| describe(spec, out));
        }
        (b"count", 2) => encode::integer(out, COMMANDS.len() as i64),
        (b"list", 2) => {
            encode::array(out, COMMANDS.len());
            COMMANDS
                .iter()
                .for_each(|spec| encode::bulk(out, spec.name.as_bytes()));
        }
        (b"info", 2) => {
            encode::array(out, COMMANDS.len());
            COMMANDS.iter().for_each(|spec| describe(spec, out));
        }
        (b"info", _) => {
            encode::array(out, args.len() - 2);
            for name in args.from(2) {
                match lookup(name) {
                    Some(spec) => describe(spec, out),
                    None if is_resp2(session) => out.extend_from_slice(b"*-1\r\n"),
                    None => null(session, out),
                }
            }
        }
        // Nothing to add to the names; redis-cli is content with an empty map.
        (b"docs", _) => encode::map(out, 0, session.version),
        (b"help", 2) => help(
            "COMMAND",
            &[
                "(no subcommand)",
                "    Return details about all commands.",
                "COUNT",
                "    Return the number of commands.",
                "DOCS [<command-name> ...]",
                "    Return an empty map: there is nothing to add to the names.",
                "INFO [<command-name> ...]",
                "    Return details about these commands, or all.",
                "LIST",
                "    Return the names of all commands.",
            ],
            out,
        ),
        _ => unknown_subcommand("COMMAND", args, out),
    }
    None
}

/// As `COMMAND` of Redis 7 does: name, arity, flags, keys, and three empty lists.
fn describe(spec: &Spec, out: &mut Out) {
    encode::array(out, 10);
    encode::bulk(out, spec.name.as_bytes());
    encode::integer(out, i64::from(spec.arity));
    encode::array(out, 2);
    encode::simple(out, if spec.write { "write" } else { "readonly" });
    encode::simple(out, "fast");
    for place in [spec.keys.0, spec.keys.1, spec.keys.2] {
        encode::integer(out, i64::from(place));
    }
    for _ in 0..4 {
        encode::array(out, 0);
    }
}

/// `CONFIG GET pattern ...`
pub fn config(core: &Core, session: &mut Session, args: Args<'_>, out: &mut Out) -> Option<Next> {
    let sub = args.get(1).to_ascii_lowercase();
    match (&sub[..], args.len()) {
        (b"get", 3..) => {
            let values = [
                ("appendonly", "yes".to_owned()),
                ("databases", "1".to_owned()),
                ("maxclients", core.config.connections_max.to_string()),
                ("maxmemory", "0".to_owned()),
                ("proto-max-bulk-len", FRAME_BYTES_MAX.to_string()),
                ("save", String::new()),
                ("timeout", "0".to_owned()),
            ];
            let asked = |name: &str| {
                args.from(2)
                    .filter_map(|pattern| Glob::new(&pattern.to_ascii_lowercase()).ok())
                    .any(|pattern| pattern.matches(name.as_bytes()))
            };
            let found: Vec<_> = values.iter().filter(|(name, _)| asked(name)).collect();
            encode::map(out, found.len(), session.version);
            for (name, value) in found {
                encode::bulk(out, name.as_bytes());
                encode::bulk(out, value.as_bytes());
            }
        }
        (b"get", _) => wrong_arity("config|get", out),
        (b"set" | b"rewrite" | b"resetstat", _) => encode::error(
            out,
            "ERR tallyd is configured by its file, environment and flags; see 'tallyd check'",
        ),
        (b"help", 2) => help(
            "CONFIG",
            &[
                "GET <pattern>",
                "    Return parameters that clients look for; tallyd's own are told by 'tallyd check'.",
            ],
            out,
        ),
        _ => unknown_subcommand("CONFIG", args, out),
    }
    None
}
