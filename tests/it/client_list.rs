//! Who is connected, what each holds, and cutting one off.

use std::collections::HashMap;
use std::time::Duration;

use crate::convergence::quiet;
use crate::support::daemon::Daemon;
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value};
use crate::support::wait_until;

/// The lines of `CLIENT LIST`, by id.
fn list(daemon: &Daemon, options: &[&str]) -> HashMap<i64, HashMap<String, String>> {
    let command = [&["CLIENT", "LIST"], options].concat();
    let text = daemon.client().command(&command).text();
    let lines = text.lines().map(|line| {
        let fields = line.split(' ').map(|field| field.split_once('=').unwrap());
        let fields: HashMap<String, String> = fields
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        (fields["id"].parse().unwrap(), fields)
    });
    lines.collect()
}

fn id(client: &mut Client) -> i64 {
    client.number(&["CLIENT", "ID"])
}

fn is_cut_off(client: &mut Client) -> bool {
    client.set_limit(Duration::from_secs(10));
    client
        .read()
        .is_err_and(|error| error.kind() != std::io::ErrorKind::WouldBlock)
}

#[test]
fn the_list_tells_process_user_and_what_is_held() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    let mut half = daemon.client();
    let half_id = id(&mut half);
    half.send_raw(&[&b"*2\r\n$3\r\nGET\r\n$5000\r\n"[..], &[b'k'; 4000]].concat())
        .unwrap();
    let mut queueing = daemon.client();
    let queueing_id = id(&mut queueing);
    queueing.command(&["MULTI"]);
    queueing.command(&["INCR", "a"]);
    queueing.command(&["INCR", "b"]);
    let mut listening = daemon.client();
    let listening_id = id(&mut listening);
    listening.command(&["HELLO", "3", "SETNAME", "ears"]);
    listening.command(&["SUBSCRIBE", "one"]);
    listening.command(&["SUBSCRIBE", "two"]);
    listening.command(&["PSUBSCRIBE", "th*"]);
    let mut deaf = daemon.client();
    let deaf_id = id(&mut deaf);
    deaf.send_raw("INFO\n".repeat(500).as_bytes()).unwrap();

    let bytes = |lines: &HashMap<i64, HashMap<String, String>>, id: i64, field: &str| {
        lines[&id][field].parse::<i64>().unwrap()
    };
    wait_until("all of it is done", || {
        let lines = list(&daemon, &[]);
        bytes(&lines, half_id, "qbuf") >= 4000 && bytes(&lines, deaf_id, "omem") > 100_000
    });
    let lines = list(&daemon, &[]);
    assert_eq!(lines.len(), 5, "four, and the one who asks");
    let process = std::process::id().to_string();
    let user = rustix::process::getuid().as_raw().to_string();
    for line in lines.values() {
        assert_eq!((&line["pid"], &line["uid"]), (&process, &user));
        assert_eq!(line["addr"], format!("unix:{}", line["id"]));
        let parts = ["qbuf", "multi-mem", "omem"].map(|field| line[field].parse::<i64>().unwrap());
        assert!(line["tot-mem"].parse::<i64>().unwrap() >= parts.iter().sum());
    }
    let listening_line = &lines[&listening_id];
    assert_eq!(
        (&*listening_line["sub"], &*listening_line["psub"]),
        ("2", "1")
    );
    assert_eq!(
        (&*listening_line["flags"], &*listening_line["resp"]),
        ("PU", "3")
    );
    assert_eq!(listening_line["name"], "ears");
    let queueing_line = &lines[&queueing_id];
    assert_eq!(
        (&*queueing_line["multi"], &*queueing_line["flags"]),
        ("2", "xU")
    );
    assert_eq!(
        (&*lines[&half_id]["multi"], &*lines[&half_id]["flags"]),
        ("-1", "U")
    );

    // Of some alone, and of oneself.
    let some = list(&daemon, &["ID", &half_id.to_string(), "99999"]);
    assert_eq!(some.keys().collect::<Vec<_>>(), [&half_id]);
    let some = list(&daemon, &["TYPE", "pubsub"]);
    assert_eq!(some.keys().collect::<Vec<_>>(), [&listening_id]);
    assert_eq!(list(&daemon, &["TYPE", "normal"]).len(), 4);
    queueing.command(&["CLIENT", "INFO"]);
    queueing.command(&["CLIENT", "LIST"]);
    let exec = queueing.command(&["EXEC"]);
    let info = exec.items()[2].text();
    assert!(info.starts_with(&format!("id={queueing_id} ")), "{info}");
    assert_eq!(exec.items()[3].text().lines().count(), 4);
}

#[test]
fn who_is_killed_is_cut_off_whatever_it_waits_for() {
    let mut redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    let mut admin = daemon.client();
    let me = id(&mut admin).to_string();
    let kill =
        |admin: &mut Client, filter: &[&str]| admin.number(&[&["CLIENT", "KILL"], filter].concat());

    let mut by_id = daemon.client();
    let victim = id(&mut by_id).to_string();
    assert_eq!(kill(&mut admin, &["ID", &victim]), 1);
    assert!(is_cut_off(&mut by_id));
    assert_eq!(kill(&mut admin, &["ID", &victim]), 0);

    let mut by_address = daemon.client();
    let address = format!("unix:{}", id(&mut by_address));
    assert_eq!(admin.command(&["CLIENT", "KILL", &address]), Value::ok());
    assert!(is_cut_off(&mut by_address));
    assert_eq!(
        admin.command(&["CLIENT", "KILL", &address]).error(),
        "ERR No such client"
    );

    let mut subscriber = daemon.client();
    subscriber.command(&["SUBSCRIBE", "c"]);
    assert_eq!(kill(&mut admin, &["TYPE", "pubsub"]), 1);
    assert!(is_cut_off(&mut subscriber));
    assert_eq!(admin.number(&["PUBSUB", "NUMPAT"]), 0);

    // It waits for a flush that does not end.
    redis.pause();
    admin.command(&["INCR", "k"]);
    let mut waiting = daemon.client();
    waiting.send(&["TALLY.FLUSH"]).unwrap();
    let process = std::process::id().to_string();
    wait_until("it waits", || list(&daemon, &[]).len() == 3);
    assert_eq!(kill(&mut admin, &["PID", "1"]), 0);
    assert!(kill(&mut admin, &["PID", &process]) >= 1);
    assert!(is_cut_off(&mut waiting));
    redis.resume();

    // Oneself last: with an answer.
    assert_eq!(kill(&mut admin, &["ID", &me]), 0);
    assert_eq!(kill(&mut admin, &["ID", &me, "SKIPME", "no"]), 1);
    assert!(is_cut_off(&mut admin));
    daemon.flush();
    assert_eq!(redis.counter("k"), 1);
}

#[test]
fn help_is_there_where_an_error_suggests_it() {
    let redis = RedisServer::start(&[]);
    let daemon = quiet(&redis).start();
    let (mut ours, mut theirs) = (daemon.client(), redis.client());
    for command in ["CLIENT", "COMMAND", "CONFIG", "PUBSUB"] {
        let error = ours.command(&[command, "no-such"]);
        assert!(
            error.error().ends_with(&format!("Try {command} HELP.")),
            "{error:?}"
        );
        let (ours, theirs) = (
            ours.command(&[command, "HELP"]),
            theirs.command(&[command, "HELP"]),
        );
        let (ours, theirs) = (ours.items(), theirs.items());
        assert_eq!(ours[0], theirs[0]);
        assert_eq!(ours[ours.len() - 2..], theirs[theirs.len() - 2..]);
        assert!(ours.len() > 4);
    }
}
