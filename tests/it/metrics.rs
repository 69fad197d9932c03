//! The metrics: one source with `INFO` and `TALLY.STATS`, each of them moves, and what Prometheus
//! and Grafana are given to read them names what there is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::daemon::{Daemon, NEVER, Settings};
use crate::support::http::Address;
use crate::support::proxy::{Direction, Proxy};
use crate::support::redis::RedisServer;
use crate::support::{LIMIT, finish, wait_until};

/// A daemon with metrics.
struct Watched {
    daemon: Daemon,
    admin: Address,
    _dir: TempDir,
}

fn watched(settings: Settings) -> Watched {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let settings = settings.set("admin.listen", format!("unix:{}", path.display()));
    Watched {
        daemon: settings.start(),
        admin: Address::Unix(path),
        _dir: dir,
    }
}

impl Watched {
    fn text(&self) -> String {
        let answer = self.admin.get("/metrics");
        assert_eq!(answer.status, 200);
        let kind = answer.header("content-type").unwrap();
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
        answer.body
    }

    /// Every sample by its name and labels, as written.
    fn scrape(&self) -> BTreeMap<String, f64> {
        let text = self.text();
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples
            .map(|line| {
                let (name, value) = line.rsplit_once(' ').unwrap();
                (name.to_owned(), value.parse().unwrap())
            })
            .collect()
    }

    fn value(&self, name: &str) -> f64 {
        let samples = self.scrape();
        *samples.get(name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Does something, then waits until each of the samples is higher than before.
    #[track_caller]
    fn moves(&self, names: &[&str], action: impl FnOnce()) {
        let before = self.scrape();
        action();
        let mut still: Vec<&str> = names.to_vec();
        let what = format!("{names:?} move");
        wait_until(&what, || {
            let now = self.scrape();
            still.retain(|name| {
                let then = before.get(*name).unwrap_or_else(|| panic!("no {name}"));
                now[*name] <= *then
            });
            still.is_empty()
        });
    }
}

/// Prometheus' own tool, which `tests/run` fetches.
fn promtool(args: &[&str], input: &str) {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let tool: PathBuf = target.join("tools/promtool");
    assert!(
        tool.exists(),
        "{} is missing: run tests/run once, which fetches it",
        tool.display()
    );
    let mut command = Command::new(tool);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(args);
    let (status, output) = finish(&mut command, input.as_bytes());
    assert!(status.success(), "promtool {args:?}:\n{output}");
}

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// Everything in a text that looks like a metric of ours.
fn named(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| word.starts_with("tallyd_") || word.starts_with("process_"))
        .collect()
}

fn use_it(watched: &Watched) {
    let mut client = watched.daemon.client();
    client.command(&["INCR", "secret-key"]);
    client.command(&["DECRBY", "secret-key", "3"]);
    watched.daemon.flush();
}

#[test]
fn promtool_finds_nothing_to_complain_about() {
    let redis = RedisServer::start(&["--requirepass", "hunter2"]);
    let url = redis.url().replace("redis://", "redis://:hunter2@");
    let watched = watched(Daemon::builder(url).set("node.name", "web \\\"7\""));
    use_it(&watched);
    let text = watched.text();
    promtool(&["check", "metrics"], &text);
    for secret in ["hunter2", "secret-key"] {
        assert!(!text.contains(secret), "{secret} in {text}");
    }
}

#[test]
fn rules_and_dashboard_name_metrics_that_there_are() {
    let watched = watched(Daemon::builder("embedded"));
    use_it(&watched);
    let text = watched.text();
    let there = named(&text);
    for file in [
        "config/prometheus-alerts.yml",
        "config/grafana-dashboard.json",
    ] {
        let text = read(file);
        let used: BTreeSet<&str> = named(&text)
            .into_iter()
            // What INFO calls the reason; the runbook sends the reader there.
            .filter(|name| *name != "tallyd_store_error")
            .collect();
        assert!(used.len() > 10, "{file}: {used:?}");
        let missing: Vec<_> = used.difference(&there).collect();
        assert!(missing.is_empty(), "{file} names {missing:?}");
    }
}

#[test]
fn the_rules_are_well_formed_and_fire_when_they_should() {
    promtool(&["check", "rules", "config/prometheus-alerts.yml"], "");
    promtool(&["test", "rules", "tests/prometheus/alerts_test.yml"], "");
}

#[test]
fn the_dashboard_can_be_imported_and_its_queries_parse() {
    let json: serde_json::Value =
        serde_json::from_str(&read("config/grafana-dashboard.json")).unwrap();
    let variables = json["templating"]["list"].as_array().unwrap();
    let types: Vec<_> = variables
        .iter()
        .map(|v| v["type"].as_str().unwrap())
        .collect();
    assert!(types.contains(&"datasource"), "{types:?}");
    let mut rules = String::from("groups:\n- name: dashboard\n  rules:\n");
    let mut ids = BTreeSet::new();
    for panel in json["panels"].as_array().unwrap() {
        assert!(
            ids.insert(panel["id"].as_u64().unwrap()),
            "{}",
            panel["title"]
        );
        if panel["type"] == "row" {
            continue;
        }
        assert_eq!(
            panel["datasource"]["uid"], "${datasource}",
            "{}",
            panel["title"]
        );
        for target in panel["targets"].as_array().unwrap() {
            let query = target["expr"].as_str().unwrap();
            let query = query
                .replace("$__rate_interval", "1m")
                .replace("$instance", "x");
            let record = rules.len();
            let _ = write!(rules, "  - record: x{record}\n    expr: {query:?}\n");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rules.yml");
    std::fs::write(&path, rules).unwrap();
    promtool(&["check", "rules", path.to_str().unwrap()], "");
}

#[test]
fn info_stats_and_metrics_agree() {
    let redis = RedisServer::start(&[]);
    let watched = watched(Daemon::builder(redis.url()).flush_interval(NEVER));
    let mut client = watched.daemon.client();
    for (command, amount) in [("INCRBY", "2"), ("DECRBY", "1")] {
        for key in ["a", "b", "c"] {
            client.command(&[command, key, amount]);
        }
    }
    client.command(&["INCR", "a"]);
    client.command(&["DECR", "a"]);
    client.command(&["INCRBY", "a", "x"]);
    watched.daemon.flush();
    client.command(&["INCR", "later"]);

    // Numbers of time and of what goes on by itself apart.
    let settled = [
        "increments_incr_total",
        "increments_incrby_total",
        "increments_decr_total",
        "increments_decrby_total",
        "errors_total",
        "connections_total",
        "connections_refused_limit_total",
        "view_keys",
        "view_bytes",
        "view_bytes_max",
        "epoch_keys",
        "epoch_bytes",
        "sealed_keys",
        "sealed_bytes",
        "pending_bytes_max",
        "seals_total",
        "batches_total",
        "flushed_keys_total",
        "retries_io_total",
        "uncertain_total",
        "rejected_total",
        "store_up",
        "retained_segments",
        "retained_bytes",
    ];
    // Gauges are set once a second, and by INFO.
    wait_until("the gauges are those of now", || {
        client.command(&["INFO"]);
        watched.value("tallyd_pending_keys{state=\"open\"}") >= 1.0
    });
    let stats = client.command(&["TALLY.STATS"]).fields();
    let info = client.command(&["INFO", "tallyd"]).text();
    let scraped = watched.scrape();
    for name in settled {
        let stat = stats[name].number();
        let line = format!("tallyd_{name}:{stat}\r\n");
        assert!(info.contains(&line), "{line} in {info}");
        let label = |family: &str, label: &str, value: &str| {
            format!("tallyd_{family}{{{label}=\"{value}\"}}")
        };
        let metric = match name {
            "increments_incr_total" => label("increments_total", "command", "incr"),
            "increments_incrby_total" => label("increments_total", "command", "incrby"),
            "increments_decr_total" => label("increments_total", "command", "decr"),
            "increments_decrby_total" => label("increments_total", "command", "decrby"),
            "connections_refused_limit_total" => {
                label("connections_refused_total", "reason", "limit")
            }
            "epoch_keys" => label("pending_keys", "state", "open"),
            "sealed_keys" => label("pending_keys", "state", "sealed"),
            "epoch_bytes" => label("journal_bytes", "state", "open"),
            "sealed_bytes" => label("journal_bytes", "state", "sealed"),
            "retained_bytes" => label("journal_bytes", "state", "retained"),
            "retained_segments" => label("journal_segments", "state", "retained"),
            "batches_total" => label("batches_total", "outcome", "applied"),
            "uncertain_total" => label("batches_total", "outcome", "uncertain"),
            "retries_io_total" => label("retries_total", "kind", "io"),
            name => format!("tallyd_{name}"),
        };
        let value = scraped
            .get(&metric)
            .unwrap_or_else(|| panic!("no {metric}"));
        assert!(
            (value - stat as f64).abs() < 0.5,
            "{metric}: {value}, {name}: {stat}"
        );
    }
    let number = |name: &str| stats[name].number();
    assert_eq!(number("increments_total"), 9);
    assert_eq!(number("increments_incrby_total"), 3);
    assert_eq!(number("increments_decrby_total"), 3);
    assert_eq!(number("increments_incr_total"), 2);
    assert_eq!(number("increments_decr_total"), 1);
    assert_eq!(number("flushed_keys_total"), 3);
}

/// What the README tells an operator to watch: each moves when its cause is there.
#[test]
fn each_metric_moves_with_its_cause() {
    let mut redis = RedisServer::start(&["--appendonly", "yes", "--appendfsync", "always"]);
    let proxy = Proxy::start(redis.address());
    let watched = watched(
        Daemon::builder(proxy.url())
            .flush_interval(NEVER)
            .set("publish.heartbeat", "50ms"),
    );
    let daemon = &watched.daemon;
    let mut client = daemon.client();
    let taken = |command: &str| format!("tallyd_increments_total{{command=\"{command}\"}}");
    let others = |command: &str| -> BTreeMap<String, f64> {
        let mut samples = watched.scrape();
        samples.retain(|name, _| name.starts_with("tallyd_increments_total"));
        samples.remove(&taken(command)).expect("it is there");
        samples
    };
    for (command, args) in [
        ("incr", &["INCR", "k"][..]),
        ("incrby", &["INCRBY", "k", "7"]),
        ("decr", &["DECR", "k"]),
        ("decrby", &["DECRBY", "k", "2"]),
    ] {
        let before = others(command);
        watched.moves(&[&taken(command), "tallyd_commands_total"], || {
            client.command(args);
        });
        let after = others(command);
        assert_eq!(before, after, "{command} is counted as itself alone");
    }
    watched.moves(&["tallyd_errors_total"], || {
        client.command(&["INCRBY", "k", "many"]);
    });
    watched.moves(
        &[
            "tallyd_pending_keys{state=\"open\"}",
            "tallyd_journal_bytes{state=\"open\"}",
            "tallyd_pending_bytes",
            "tallyd_view_keys",
            "tallyd_view_bytes",
        ],
        || {
            client.command(&["INCR", "another"]);
        },
    );
    watched.moves(&["tallyd_pending_age_seconds"], || {});
    watched.moves(
        &[
            "tallyd_seals_total",
            "tallyd_seal_duration_seconds_count",
            "tallyd_seal_duration_seconds_sum",
            "tallyd_transaction_duration_seconds_count",
            "tallyd_transaction_duration_seconds_bucket{le=\"+Inf\"}",
            "tallyd_publish_duration_seconds_count",
            "tallyd_published_total",
            "tallyd_batches_total{outcome=\"applied\"}",
            "tallyd_flushed_keys_total",
            "tallyd_flush_keys_count",
            "tallyd_flush_keys_sum",
            "tallyd_flush_increments_sum",
            "tallyd_journal_segments{state=\"retained\"}",
            "tallyd_journal_bytes{state=\"retained\"}",
        ],
        || daemon.flush(),
    );
    wait_until("nothing is old any more", || {
        watched.value("tallyd_pending_age_seconds") == 0.0
    });
    watched.moves(&["tallyd_loads_total"], || {
        client.command(&["GET", "cold"]);
    });
    watched.moves(&["tallyd_connections", "tallyd_connections_total"], || {
        client = daemon.client();
        std::mem::forget(daemon.client());
    });

    // One key of the wrong type.
    client.command(&["INCR", "wrong"]);
    redis.cli(&["RPUSH", "wrong", "x"]);
    watched.moves(&["tallyd_rejected_total"], || daemon.flush());

    // The reply to a transaction is lost; then the token tells.
    let outcome = |outcome: &str| format!("tallyd_batches_total{{outcome=\"{outcome}\"}}");
    client.command(&["INCR", "lost"]);
    proxy.only(b"INCRBY");
    proxy.swallow(Direction::Replies);
    watched.moves(
        &[
            &outcome("uncertain"),
            "tallyd_retries_total{kind=\"io\"}",
            "tallyd_last_retry_timestamp_seconds",
        ],
        || {
            daemon.signal(rustix::process::Signal::USR1);
            wait_until("Redis has it", || redis.counter("lost") == 1);
            proxy.cut_daemon_side();
        },
    );
    watched.moves(&["tallyd_uncertain_resolved_total"], || proxy.heal());
    daemon.flush();

    // The store refuses the whole.
    client.command(&["INCR", "refused"]);
    redis.cli(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
    watched.moves(
        &[
            &outcome("refused"),
            "tallyd_retries_total{kind=\"refused\"}",
            "tallyd_pending_keys{state=\"sealed\"}",
            "tallyd_journal_segments{state=\"sealed\"}",
        ],
        || daemon.signal(rustix::process::Signal::USR1),
    );
    redis.cli(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
    daemon.flush();

    // It goes away and comes back.
    client.command(&["INCR", "away"]);
    redis.kill9();
    daemon.signal(rustix::process::Signal::USR1);
    wait_until("it is missed", || watched.value("tallyd_store_up") == 0.0);
    watched.moves(&["tallyd_pending_age_seconds"], || {});
    redis.restart();
    proxy.reroute(redis.address());
    wait_until("it is back", || watched.value("tallyd_store_up") > 0.0);
    daemon.flush();
    wait_until("it hears", || watched.value("tallyd_subscribed") > 0.0);

    // Another node, whose messages get lost.
    let mut store = redis.client();
    let mut message = |seq: u64| {
        let text = format!(
            r#"{{"v":1,"node":"00000000000000000000000000000077","name":"other","run":"0000000000000001","seq":{seq},"clock":1,"at":1,"deltas":[["k",1,1]]}}"#
        );
        store.command(&["PUBLISH", "tallyd:deltas", &text]);
    };
    watched.moves(
        &[
            "tallyd_peers",
            "tallyd_messages_total",
            "tallyd_lag_seconds",
        ],
        || message(1),
    );
    watched.moves(&["tallyd_gaps_total", "tallyd_rereads_total"], || {
        message(9);
    });
    watched.moves(&["process_cpu_seconds_total"], || {});
    assert!(watched.value("process_resident_memory_bytes") > 1e6);
    assert!(watched.value("process_start_time_seconds") > 1.7e9);
    assert!(watched.text().contains("tallyd_build_info{version=\""));
}

/// `limits.max_view_bytes` and `listen.max_connections`.
/// Speaks another protocol, whatever it is asked.
fn web_server() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    address
}

#[test]
fn each_way_in_which_a_flush_can_fail_is_counted_as_itself() {
    let redis = RedisServer::start(&[]);
    let proxy = Proxy::start(redis.address());
    let watched = watched(
        Daemon::builder(proxy.url())
            .flush_interval(NEVER)
            .set("publish.enabled", false),
    );
    let daemon = &watched.daemon;
    let mut client = daemon.client();
    client.command(&["INCR", "k"]);
    daemon.flush();
    let token = redis.cli(&["KEYS", "tallyd:token:*"]).items()[0].text();
    let outcome = |outcome: &str| format!("tallyd_batches_total{{outcome=\"{outcome}\"}}");
    let retries = |kind: &str| format!("tallyd_retries_total{{kind=\"{kind}\"}}");
    let flush_later = || daemon.signal(rustix::process::Signal::USR1);

    // Somebody touches the watched token between two batches.
    let value = redis.cli(&["GET", &token]).text();
    redis.cli(&["SET", &token, &value]);
    client.command(&["INCR", "k"]);
    watched.moves(&[&outcome("aborted")], || daemon.flush());

    redis.cli(&["ACL", "SETUSER", "default", "resetkeys", "~k", "~tallyd:*"]);
    client.command(&["INCR", "other"]);
    watched.moves(&[&outcome("keys_refused")], || daemon.flush());

    client.command(&["INCR", "k"]);
    proxy.hold(Direction::Replies);
    watched.moves(&[&retries("timeout")], flush_later);
    proxy.heal();
    daemon.flush();

    proxy.reroute(web_server());
    proxy.cut_all();
    client.command(&["INCR", "k"]);
    watched.moves(&[&retries("protocol")], flush_later);
    proxy.reroute(redis.address());
    proxy.cut_all();
    daemon.flush();
    assert_eq!(redis.counter("k"), 4);

    // Another daemon's signature.
    redis.cli(&["SET", &token, "1 0123456789abcdef"]);
    client.command(&["INCR", "k"]);
    watched.moves(&[&retries("local"), "tallyd_store_conflict"], flush_later);
}

#[test]
fn limits_that_are_met_are_counted() {
    let watched = watched(
        Daemon::builder("embedded")
            .set("listen.max_connections", 2)
            .set("limits.max_view_bytes", "1MiB"),
    );
    watched.moves(
        &["tallyd_connections_refused_total{reason=\"limit\"}"],
        || {
            let held = [watched.daemon.client(), watched.daemon.client()];
            wait_until("both are there", || {
                watched.value("tallyd_connections") >= 2.0
            });
            let mut third = watched.daemon.client();
            assert!(
                third
                    .read()
                    .is_ok_and(|answer| answer.error().contains("max number"))
            );
            drop(held);
        },
    );
    wait_until("they are gone", || {
        watched.value("tallyd_connections") == 0.0
    });
    watched.moves(&["tallyd_view_evictions_total"], || {
        let mut client = watched.daemon.client();
        for round in 0..40 {
            for key in 0..1000 {
                client
                    .send(&["INCR", &format!("key:{round}:{key}")])
                    .unwrap();
            }
            for _ in 0..1000 {
                client.read().unwrap();
            }
            assert_eq!(client.command(&["TALLY.FLUSH"]).text(), "OK");
        }
    });
}

/// Under steady traffic something is always pending, in the open epoch; that is not old.
#[test]
fn the_age_of_what_is_pending_does_not_grow_while_flushes_succeed() {
    let watched = watched(Daemon::builder("embedded").flush_interval("20ms"));
    let mut client = watched.daemon.client();
    let seals = || watched.value("tallyd_seals_total");
    let (begin, from) = (Instant::now(), seals());
    // Many flushes, and several ticks of the gauges: an age that is never set back shows by then.
    while begin.elapsed() < Duration::from_secs(5) || seals() < from + 20.0 {
        assert!(begin.elapsed() < LIMIT, "it does not flush");
        for _ in 0..100 {
            client.command(&["INCR", "steady"]);
        }
    }
    let age = watched.value("tallyd_pending_age_seconds");
    let traffic = begin.elapsed().as_secs_f64();
    assert!(age < traffic / 2.0, "{age} s after {traffic} s");
}
