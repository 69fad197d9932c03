//! `INFO`, `TALLY.STATS` and `CLIENT LIST`: the numbers of [`crate::stats`], in Redis' forms.

use std::fmt::Write;

use super::account::Part;
use super::commands::server::REDIS_VERSION;
use super::core::Core;
use super::listener::Client;
use crate::wire::decode::Args;
use crate::wire::encode::{self, Out, Version};

/// The text of `INFO`; `args` may name sections.
pub fn info(core: &Core, args: Args<'_>) -> String {
    let stats = &core.stats;
    let uptime = core.started.elapsed().as_secs();
    let sections = [
        (
            "Server",
            format!(
                "redis_version:{REDIS_VERSION}\r\nredis_mode:standalone\r\ntallyd_version:{}\r\nprocess_id:{}\r\nuptime_in_seconds:{uptime}\r\nuptime_in_days:{}\r\n",
                env!("CARGO_PKG_VERSION"),
                std::process::id(),
                uptime / 86400,
            ),
        ),
        (
            "Clients",
            format!(
                "connected_clients:{}\r\nmaxclients:{}\r\nblocked_clients:0\r\n",
                stats.connections.get(),
                core.config.connections_max
            ),
        ),
        (
            "Memory",
            format!(
                "used_memory:{}\r\nused_memory_human:{:.2}M\r\nmaxmemory:0\r\n",
                stats.view_bytes.get(),
                stats.view_bytes.get() as f64 / f64::from(1 << 20)
            ),
        ),
        ("Persistence", "loading:0\r\nasync_loading:0\r\n".to_owned()),
        (
            "Stats",
            format!(
                "total_connections_received:{}\r\ntotal_commands_processed:{}\r\nrejected_connections:{}\r\nevicted_keys:{}\r\ntotal_error_replies:{}\r\n",
                stats.connections_total.get(),
                stats.commands_total.get(),
                stats.connections_refused_total.get(),
                stats.view_evictions_total.get(),
                stats.errors_total.get()
            ),
        ),
        (
            "Replication",
            "role:master\r\nconnected_slaves:0\r\n".to_owned(),
        ),
        ("Cluster", "cluster_enabled:0\r\n".to_owned()),
        ("Tallyd", {
            let mut text = String::new();
            for (name, value) in stats.snapshot() {
                // Sums may be below zero.
                let _ = write!(text, "tallyd_{name}:{}\r\n", value as i64);
            }
            let error = stats.store_error().replace(['\r', '\n'], " ");
            let _ = write!(text, "tallyd_store_error:{error}\r\n");
            text
        }),
        (
            "Keyspace",
            format!("db0:keys={},expires=0,avg_ttl=0\r\n", stats.view_keys.get()),
        ),
    ];
    let wanted = |name: &str| {
        args.len() < 2
            || args.from(1).any(|asked| {
                asked.eq_ignore_ascii_case(name.as_bytes())
                    || [&b"all"[..], b"default", b"everything"]
                        .iter()
                        .any(|word| asked.eq_ignore_ascii_case(word))
            })
    };
    let mut text = String::new();
    for (name, body) in sections.iter().filter(|(name, _)| wanted(name)) {
        if !text.is_empty() {
            text.push_str("\r\n");
        }
        let _ = write!(text, "# {name}\r\n{body}");
    }
    text
}

/// The map of `TALLY.STATS`.
pub fn stats(core: &Core, version: Version, out: &mut Out) {
    let numbers = core.stats.snapshot();
    encode::map(out, numbers.len(), version);
    for (name, value) in numbers {
        encode::bulk(out, name.as_bytes());
        encode::integer(out, value as i64);
    }
}

/// One line of `CLIENT LIST`, as Redis has it, with the peer's process and user at its end.
pub fn client_line(core: &Core, client: &Client, text: &mut String) {
    let (channels, patterns) = core.hub.borrow().counts(client.id);
    let account = &client.account;
    let queued = client.queued.get();
    let seconds = client.since.elapsed().as_secs();
    let mut flags = String::new();
    if channels + patterns > 0 {
        flags.push('P');
    }
    if queued.is_some() {
        flags.push('x');
    }
    flags.push('U'); // A Unix socket.
    let library = client.library.borrow();
    let (pid, uid) = client.peer.unzip();
    let _ = writeln!(
        text,
        "id={} addr={} name={} age={seconds} idle={} flags={flags} db=0 sub={channels} psub={patterns} \
         multi={} qbuf={} multi-mem={} omem={} tot-mem={} user=default resp={} lib-name={} lib-ver={} \
         pid={} uid={}",
        client.id,
        client.address(),
        client.name.borrow(),
        core.seconds().saturating_sub(client.active.get()),
        queued.map_or(-1, i64::from),
        account.part(Part::Input),
        account.part(Part::Commands),
        account.part(Part::Answers) + account.part(Part::Inbox),
        account.held(),
        if client.resp3.get() { 3 } else { 2 },
        library.0,
        library.1,
        pid.map_or(-1, i64::from),
        uid.map_or(-1, i64::from),
    );
}
