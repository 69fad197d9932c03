//! The protocol on the socket, byte for byte: whatever a client may send, the daemon answers as a
//! real redis-server does, which is asked the same at the same time.

use std::fmt::Write as _;
use std::io::Write as _;
use std::thread;
use std::time::Duration;

use crate::support::daemon::{Daemon, NEVER};
use crate::support::redis::RedisServer;
use crate::support::resp::{Client, Value, encode, encode_into};
use crate::support::seed;

/// Ends what a case sends; its reply shows that all the replies before it are here.
const LAST: &str = "the-last-one";

/// What is sent, and how.
struct Case {
    bytes: Vec<u8>,
    resp3: bool,
    /// Nothing is sent behind it: the server must close by itself.
    unfinished: bool,
}

fn raw(bytes: impl AsRef<[u8]>) -> Case {
    Case {
        bytes: bytes.as_ref().to_vec(),
        resp3: false,
        unfinished: false,
    }
}

/// A line that never ends. How far Redis reads before it looks is chance, so no end may follow.
fn endless(before: &str, of: &str) -> Case {
    Case {
        unfinished: true,
        ..raw(format!("{before}{}", of.repeat(70_000)))
    }
}

/// Commands, one a line, words separated by spaces.
fn commands(text: &str) -> Case {
    let mut bytes = Vec::new();
    for line in text.split(" | ") {
        encode_into(&mut bytes, &line.split(' ').collect::<Vec<_>>());
    }
    raw(bytes)
}

fn resp3(case: Case) -> Case {
    Case {
        resp3: true,
        ..case
    }
}

/// Everything the server answers, and whether it keeps the connection.
fn answer(client: &mut Client, case: &Case) -> (Vec<u8>, bool) {
    if case.resp3 {
        assert_eq!(
            client.command(&["HELLO", "3"]).fields()["proto"],
            Value::Integer(3),
            "HELLO 3 is answered with a map"
        );
    }
    // The server may close as soon as it has seen the fault: then the rest cannot be sent.
    let sent = client.send_raw(&case.bytes);
    if sent.is_ok() && !case.unfinished {
        let _ = client.send(&["PING", LAST]);
    }
    let end = format!("{LAST}\r\n");
    client.set_limit(Duration::from_secs(10));
    match client.read_raw_until(end.as_bytes()) {
        Ok(answer) => answer,
        Err(error) => (
            format!("neither answers nor closes: {error}").into_bytes(),
            true,
        ),
    }
}

/// Sends every case to both, each on a connection of its own; panics with all the differences.
#[track_caller]
fn compare(cases: Vec<Case>) {
    let (reference, store) = (RedisServer::start(&[]), RedisServer::start(&[]));
    let daemon = Daemon::builder(store.url()).flush_interval(NEVER).start();
    let mut differences = String::new();
    for case in cases {
        if daemon.client().try_command(&["PING"]).is_err() {
            differences += "\nthe daemon is dead";
            break;
        }
        let expected = answer(&mut reference.client(), &case);
        let found = answer(&mut daemon.client(), &case);
        if expected != found {
            let show = |(bytes, open): &(Vec<u8>, bool)| {
                let bytes = &bytes[..bytes.len().min(600)];
                format!(
                    "{}{}",
                    bytes.escape_ascii(),
                    if *open { "" } else { "  (closed)" }
                )
            };
            let sent = &case.bytes[..case.bytes.len().min(200)];
            let _ = write!(
                differences,
                "\nsent{}   {}\nRedis   {}\ntallyd  {}\n",
                if case.resp3 { " (RESP3)" } else { "" },
                sent.escape_ascii(),
                show(&expected),
                show(&found),
            );
        }
    }
    assert!(differences.is_empty(), "{differences}");
}

#[test]
fn malformed_requests_are_answered_as_redis_answers_them() {
    compare(vec![
        // A wrong type byte where a bulk string is due.
        raw("*1\r\n+PING\r\n"),
        raw("*2\r\n$4\r\nINCR\r\n:1\r\n"),
        raw("*2\r\n$4\r\nINCR\r\n*1\r\n$1\r\na\r\n"),
        raw("*1\r\n\r\n"),
        // Lengths of the array.
        raw("*0\r\n"),
        raw("*-1\r\n"),
        raw("*-100\r\n"),
        raw("*2147483648\r\n"),
        raw("*99999999999999999999\r\n"),
        raw("*abc\r\n"),
        raw("*\r\n"),
        raw("*1 \r\n"),
        endless("*", "1"),
        // Lengths of a string.
        raw("*1\r\n$-1\r\n"),
        raw("*2\r\n$4\r\nINCR\r\n$-5\r\n"),
        raw("*1\r\n$abc\r\n"),
        raw("*1\r\n$\r\n"),
        raw("*1\r\n$600000000\r\n"),
        raw("*1\r\n$9223372036854775807\r\n"),
        raw("*1\r\n$99999999999999999999\r\n"),
        endless("*1\r\n$", "1"),
        // What came before the fault is answered first.
        raw("PING\r\n*1\r\n$x\r\n"),
        raw("*1\r\n$4\r\nPING\r\n*-7\r\n*1\r\n!4\r\n"),
        // Inline.
        raw("PING\r\n"),
        raw("PING\n"),
        raw("  PING   hello  \r\n"),
        raw("\r\n"),
        raw("\r\n\r\n   \r\nPING\r\n"),
        raw("ECHO \"a\\x41\\n\\\"b\"\r\n"),
        raw("ECHO 'it\\'s'\r\n"),
        raw("ECHO \"\"\r\n"),
        raw("ECHO ab\"cd\"\r\n"),
        raw("ECHO \"ab\"cd\r\n"),
        raw("INCR \"a\r\n"),
        raw("INCR 'a\r\n"),
        raw("\"\r\n"),
        raw("INCR\tinline\r\n"),
        raw("incrby inline2 5\r\n"),
        endless("", "a"),
        // Bytes that mean nothing.
        raw(b"\xff\xfe\x01\x02\r\n"),
        raw(b"\x80 \x81\r\n"),
        raw("$4\r\nPING\r\n"),
        raw("+PING\r\n"),
        raw("GET / HTTP/1.1\r\n\r\n"),
    ]);
}

#[test]
fn unknown_commands_and_wrong_numbers_of_arguments_are_answered_as_redis_answers_them() {
    let mut cases: Vec<Case> = [
        "FOO",
        "foo",
        "FOO a b",
        "FOO a b c d e f g h i j k l m n o p q r s t u v w x y z",
        "INCR",
        "INCR a b",
        "DECR",
        "DECR a b",
        "INCRBY",
        "INCRBY k",
        "INCRBY k 1 2",
        "DECRBY",
        "DECRBY k",
        "DECRBY k 1 2",
        "GET",
        "GET a b",
        "MGET",
        "EXISTS",
        "MULTI x",
        "EXEC x",
        "DISCARD x",
        "SUBSCRIBE",
        "PSUBSCRIBE",
        "PING a b",
        "ECHO",
        "ECHO a b",
        "AUTH",
        "SELECT",
        "SELECT 0 1",
        "RESET x",
        "TIME x",
        "CLIENT",
        "CLIENT FOO",
        "CLIENT REPLY",
        "CLIENT REPLY FOO",
        "CLIENT SETNAME",
        "CLIENT SETNAME a b",
        "CLIENT GETNAME a",
        "CLIENT ID x",
        "CLIENT KILL",
        "CLIENT KILL no-address",
        "CLIENT KILL ID 0",
        "CLIENT KILL ID x",
        "CLIENT KILL ID 99999999",
        "CLIENT KILL TYPE foo",
        "CLIENT KILL USER nobody",
        "CLIENT KILL FOO bar",
        "CLIENT KILL ID 99999999 SKIPME",
        "CLIENT KILL ID 99999999 SKIPME perhaps",
        "CLIENT KILL ID 99999999 SKIPME yes TYPE normal",
        "CLIENT KILL ADDR 1.1.1.1:1",
        "CLIENT KILL TYPE master",
        "CLIENT LIST FOO",
        "CLIENT LIST TYPE",
        "CLIENT LIST TYPE foo",
        "CLIENT LIST TYPE master",
        "CLIENT LIST ID",
        "CLIENT LIST ID x",
        "CLIENT LIST ID 99999999",
        "CLIENT HELP x",
        "CONFIG HELP x",
        "PUBSUB HELP x",
        "CONFIG",
        "CONFIG GET",
        "CONFIG FOO",
    ]
    .map(commands)
    .into();
    // Long words are cut, the whole list is cut, line ends do not break the reply.
    cases.push(commands(&format!(
        "{} {}",
        "F".repeat(300),
        "a".repeat(300)
    )));
    cases.push(commands(&format!(
        "FOO {}",
        ["12345678901234567890"; 12].join(" ")
    )));
    cases.push(raw(encode(&["FOO\r\nBAR", "a\r\nb"])));
    cases.push(raw(encode(&[""])));
    compare(cases);
}

#[test]
fn numbers_are_read_and_refused_as_redis_does() {
    let (max, min) = (i64::MAX, i64::MIN);
    let mut cases: Vec<Case> = [
        format!("INCRBY top {max} | INCR top | GET top | DECR top | INCRBY top 2 | INCR top | INCR top | GET top"),
        format!("INCRBY bottom {min} | DECR bottom | GET bottom | DECRBY bottom 1 | INCRBY bottom -1 | INCR bottom"),
        format!("DECRBY nothing {min} | GET nothing | EXISTS nothing"),
        format!("DECRBY low {max} | DECRBY low 1 | DECRBY low 1 | GET low"),
        format!("INCRBY span {max} | INCRBY span {min} | GET span"),
        "INCRBY n 9223372036854775808".into(),
        "INCRBY n -9223372036854775809".into(),
        "INCRBY n +1".into(),
        "INCRBY n 01".into(),
        "INCRBY n -0".into(),
        "INCRBY n -01".into(),
        "INCRBY n 1.0".into(),
        "INCRBY n 1e3".into(),
        "INCRBY n 0x10".into(),
        "INCRBY n abc".into(),
        "INCRBY n -".into(),
        "INCRBY n --1".into(),
        "DECRBY n abc".into(),
        "DECRBY n 9223372036854775808".into(),
        "INCRBY n 0 | DECRBY n 0 | GET n".into(),
        "INCRBY n 123456789012345678901234567890".into(),
        "INCRBY n2 -5 | DECRBY n2 -7 | INCR n2 | DECR n2 | INCRBY n2 10 | DECRBY n2 3 | GET n2".into(),
        "incr case | Incr case | dEcRbY case 5 | get case".into(),
    ]
    .iter()
    .map(|text| commands(text))
    .collect();
    for odd in [" 1", "1 ", "", "1\n", "\u{0661}", "1\0"] {
        cases.push(raw(encode(&["INCRBY", "odd", odd])));
        cases.push(raw(encode(&["DECRBY", "odd", odd])));
    }
    // A key may be anything, the empty one included.
    for key in [
        &b""[..],
        b" ",
        b"\0",
        b"a\r\nb",
        b"\xff\xfe",
        "schlüssel".as_bytes(),
    ] {
        cases.push(raw(encode(&[b"INCR", key])));
        cases.push(raw(encode(&[b"GET", key])));
    }
    compare(cases);
}

#[test]
fn reads_connection_commands_and_errors_are_answered_as_redis_answers_them() {
    let cases = [
        "PING",
        "PING hello",
        "ping",
        "ECHO hello",
        "SELECT 0",
        "SELECT 99",
        "SELECT -1",
        "SELECT abc",
        "HELLO 4",
        "HELLO 1",
        "HELLO abc",
        "HELLO 3 FOO",
        "RESET",
        "QUIT",
        "QUIT | INCR after-quit",
        "INCR before-reset | MULTI | INCR before-reset | RESET | EXEC | GET before-reset",
        "GET missing",
        "EXISTS missing",
        "MGET missing missing",
        "INCR r | GET r | EXISTS r | EXISTS r r missing | MGET r missing r",
        "CLIENT GETNAME",
        "CLIENT SETNAME me | CLIENT GETNAME | CLIENT SETNAME me2 | CLIENT GETNAME | RESET | CLIENT GETNAME",
        "CLIENT NO-EVICT on",
        "CLIENT NO-EVICT maybe",
        "CLIENT TRACKING off",
        "CONFIG GET no-such-setting",
        "CLIENT REPLY ON",
        "CLIENT REPLY OFF | INCR off | INCR off | FOO | CLIENT REPLY ON | GET off",
        "CLIENT REPLY SKIP | INCR skip | INCR skip",
        "CLIENT REPLY SKIP | FOO | INCR skip2",
        "CLIENT REPLY SKIP | CLIENT REPLY ON | INCR skip3",
        "CLIENT REPLY OFF | CLIENT REPLY SKIP | CLIENT REPLY ON | INCR skip4",
    ];
    let mut all: Vec<Case> = cases.map(commands).into();
    all.push(raw(encode(&["CLIENT", "SETNAME", "a b"])));
    all.push(raw(encode(&["CLIENT", "SETNAME", "a\nb"])));
    all.push(raw(encode(&["CLIENT", "SETNAME", ""])));
    for text in [
        "GET missing",
        "MGET missing",
        "EXISTS missing",
        "INCR three | MGET three missing",
        "PING",
        "FOO",
        "CLIENT GETNAME",
    ] {
        all.push(resp3(commands(text)));
    }
    compare(all);
}

#[test]
fn transactions_are_answered_as_redis_answers_them() {
    let cases = [
        "EXEC",
        "DISCARD",
        "MULTI | EXEC",
        "MULTI | DISCARD",
        "MULTI | MULTI | EXEC",
        "MULTI | MULTI | INCR nested | EXEC | GET nested",
        "MULTI | INCR t | INCRBY t 4 | DECR t | GET t | EXEC | GET t",
        "MULTI | INCR d | DISCARD | GET d | EXEC",
        "MULTI | FOO | INCR u | EXEC | GET u | INCR u",
        "MULTI | INCR | INCR v | EXEC | GET v",
        "MULTI | INCR w | INCRBY w x | INCR w | EXEC | GET w",
        "MULTI | FOO | DISCARD | INCR y",
        "MULTI | PING | ECHO hi | EXISTS z | MGET z z | SELECT 0 | EXEC",
        "MULTI | EXEC x | INCR a1 | EXEC",
        "MULTI | INCR a2 | QUIT",
        "MULTI | INCR a3 | RESET | GET a3",
        "CLIENT REPLY OFF | MULTI | INCR a4 | EXEC | CLIENT REPLY ON | GET a4",
        "MULTI | INCRBY a5 9223372036854775807 | INCR a5 | DECR a5 | EXEC | GET a5",
    ];
    let mut all: Vec<Case> = cases.map(commands).into();
    all.extend(
        [
            "MULTI | INCR t3 | GET t3 | MGET t3 no | EXEC",
            "MULTI | FOO | EXEC",
        ]
        .map(commands)
        .map(resp3),
    );
    // A fault of the protocol ends the transaction with the connection.
    all.push(raw([
        encode(&["MULTI"]),
        encode(&["INCR", "a6"]),
        b"*1\r\n$x\r\n".to_vec(),
    ]
    .concat()));
    all.push(commands("GET a6"));
    compare(all);
}

#[test]
fn a_subscribed_connection_is_restricted_as_in_redis() {
    let cases = [
        "SUBSCRIBE a",
        "SUBSCRIBE a b a",
        "PSUBSCRIBE a* b?",
        "SUBSCRIBE a | INCR s",
        "SUBSCRIBE a | GET s",
        "SUBSCRIBE a | MULTI",
        "SUBSCRIBE a | FOO",
        "SUBSCRIBE a | INCR",
        "SUBSCRIBE a | PING",
        "SUBSCRIBE a | PING hello",
        "SUBSCRIBE a | UNSUBSCRIBE a | INCR s1",
        "SUBSCRIBE a b | UNSUBSCRIBE b | INCR s2",
        "SUBSCRIBE a | PSUBSCRIBE p* | UNSUBSCRIBE | INCR s3 | PUNSUBSCRIBE | INCR s3",
        "UNSUBSCRIBE",
        "PUNSUBSCRIBE",
        "UNSUBSCRIBE never",
        "PUNSUBSCRIBE never*",
        "SUBSCRIBE a | RESET | INCR s4",
        "SUBSCRIBE a | QUIT",
    ];
    let mut all: Vec<Case> = cases.map(commands).into();
    let three = [
        "SUBSCRIBE a | INCR s5 | GET s5",
        "SUBSCRIBE a | PING",
        "SUBSCRIBE a | UNSUBSCRIBE",
        "UNSUBSCRIBE",
    ];
    all.extend(three.map(commands).map(resp3));
    compare(all);
}

#[test]
fn hello_answers_with_what_clients_look_for() {
    let store = RedisServer::start(&[]);
    let daemon = Daemon::builder(store.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    let two = client.command(&["HELLO"]);
    assert!(matches!(two, Value::Array(_)), "RESP2 has no maps: {two:?}");
    let three = client.command(&["HELLO", "3", "SETNAME", "tester"]);
    assert!(
        matches!(three, Value::Map(_)),
        "RESP3 answers with a map: {three:?}"
    );
    for (hello, version) in [(two.fields(), 2), (three.fields(), 3)] {
        assert_eq!(hello["proto"], Value::Integer(version));
        assert_eq!(
            hello["server"],
            Value::bulk("redis"),
            "clients look for this name"
        );
        assert_eq!(hello["mode"], Value::bulk("standalone"));
        assert_eq!(hello["role"], Value::bulk("master"));
        for key in ["version", "id", "modules"] {
            assert!(hello.contains_key(key), "{key} is missing: {hello:?}");
        }
    }
    assert_eq!(
        client.command(&["CLIENT", "GETNAME"]),
        Value::bulk("tester")
    );
    assert_eq!(
        client.command(&["HELLO", "2"]).fields()["proto"],
        Value::Integer(2),
        "and back again"
    );
    let info = client.command(&["INFO"]).text();
    assert!(
        info.lines().any(|line| line == "loading:0"),
        "ioredis waits for it: {info}"
    );
    assert_eq!(
        client.command(&["CLIENT", "SETINFO", "LIB-NAME", "x"]),
        Value::ok()
    );
    assert!(client.number(&["CLIENT", "ID"]) > 0);
    assert_eq!(client.command(&["TIME"]).items().len(), 2);
}

/// The socket's mode decides who gets in: a client that is configured with Redis' password is let
/// in with it, and one without is too.
#[test]
fn a_password_that_a_client_has_for_redis_does_no_harm() {
    let store = RedisServer::start(&[]);
    let daemon = Daemon::builder(store.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    assert_eq!(client.command(&["AUTH", "secret"]), Value::ok());
    assert_eq!(client.command(&["AUTH", "user", "secret"]), Value::ok());
    let hello = client.command(&["HELLO", "3", "AUTH", "user", "secret"]);
    assert_eq!(hello.fields()["proto"], Value::Integer(3));
    assert!(!daemon.log().contains("secret"), "a secret in the log");
}

#[test]
fn a_request_may_be_split_at_every_byte() {
    let store = RedisServer::start(&[]);
    let daemon = Daemon::builder(store.url())
        .flush_interval(NEVER)
        .set("reply.cold", "delta")
        .start();
    let (mut client, mut other) = (daemon.client(), daemon.client());
    let conversation = |key: &str| {
        let mut bytes = encode(&["INCRBY", key, "1234567"]);
        bytes.extend(format!("DECR {key}\r\n\"INCRBY\" '{key}' -10\n").as_bytes());
        bytes.extend(encode(&["MGET", key, key]));
        bytes.extend(encode(&["MULTI"]));
        bytes.extend(encode(&["incr", key]));
        bytes.extend(encode(&["EXEC"]));
        bytes.extend(encode(&["ECHO", "\r\n*1\r\n$4\r\nPING\r\n"]));
        bytes.extend(encode(&["PING", LAST]));
        bytes
    };
    let expected = "\
        :1234567\r\n:1234566\r\n:1234556\r\n\
        *2\r\n$7\r\n1234556\r\n$7\r\n1234556\r\n\
        +OK\r\n+QUEUED\r\n*1\r\n:1234557\r\n\
        $16\r\n\r\n*1\r\n$4\r\nPING\r\n\r\n\
        $12\r\nthe-last-one\r\n";
    let end = format!("{LAST}\r\n");
    let len = conversation("split:000").len();
    for at in 1..len {
        let bytes = conversation(&format!("split:{at:03}"));
        client.send_raw(&bytes[..at]).unwrap();
        // A round trip on another connection: the daemon has had its turn to read the first half.
        other.command(&["PING"]);
        client.send_raw(&bytes[at..]).unwrap();
        let (found, _) = client.read_raw_until(end.as_bytes()).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&found),
            expected,
            "split after {at} of {len} bytes"
        );
    }
    for byte in conversation("split:one") {
        client.send_raw(&[byte]).unwrap();
        other.command(&["PING"]);
    }
    let (found, _) = client.read_raw_until(end.as_bytes()).unwrap();
    assert_eq!(
        String::from_utf8_lossy(&found),
        expected,
        "one byte at a time"
    );
}

/// `count` increments of one key, every hundredth replaced by an echo of its number.
fn deep_pipeline(count: usize) -> (Vec<u8>, Vec<Value>) {
    let (mut bytes, mut replies, mut sum) = (Vec::new(), Vec::new(), 0);
    for n in 0..count {
        if n % 100 == 99 {
            encode_into(&mut bytes, &["ECHO", &n.to_string()]);
            replies.push(Value::bulk(&n.to_string()));
        } else {
            encode_into(&mut bytes, &["INCR", "deep"]);
            sum += 1;
            replies.push(Value::Integer(sum));
        }
    }
    (bytes, replies)
}

#[track_caller]
fn expect_replies(client: &mut Client, expected: &[Value]) {
    for (n, expected) in expected.iter().enumerate() {
        assert_eq!(&client.read().unwrap(), expected, "reply number {n}");
    }
}

#[test]
fn a_pipeline_of_a_hundred_thousand_commands_is_answered_in_order() {
    let store = RedisServer::start(&[]);
    let daemon = Daemon::builder(store.url()).start();
    let (bytes, replies) = deep_pipeline(100_000);
    let mut client = daemon.client();
    let mut writer = client.stream().duplicate();
    let writing = thread::spawn(move || writer.write_all(&bytes));
    expect_replies(&mut client, &replies);
    writing.join().unwrap().unwrap();
    daemon.flush();
    assert_eq!(store.counter("deep"), 99_000);
}

/// redis-py and others write their whole pipeline before they read the first reply. A server that
/// stops reading until its replies are taken would then wait for the client as the client for it.
#[test]
fn a_client_that_writes_its_whole_pipeline_before_it_reads_is_served() {
    let store = RedisServer::start(&[]);
    let daemon = Daemon::builder(store.url()).start();
    let (bytes, replies) = deep_pipeline(100_000);
    let mut client = daemon.client();
    client.send_raw(&bytes).unwrap();
    expect_replies(&mut client, &replies);
}

#[test]
fn a_half_command_does_nothing_and_harms_nobody() {
    let store = RedisServer::start(&[]);
    let daemon = Daemon::builder(store.url()).flush_interval(NEVER).start();
    let whole = encode(&["INCRBY", "half", "7"]);
    for at in 1..whole.len() {
        let mut client = daemon.client();
        client.send_raw(&whole[..at]).unwrap();
        client.stream().finish_writing();
        assert_eq!(client.read_to_end().unwrap(), b"", "cut after {at} bytes");
    }
    // All that came before the half one is answered.
    let mut client = daemon.client();
    client
        .send_raw(b"INCR first\r\n*2\r\n$4\r\nINCR\r\n$4\r\nhal")
        .unwrap();
    client.stream().finish_writing();
    assert_eq!(client.read_to_end().unwrap(), b":1\r\n");
    assert_eq!(daemon.client().command(&["GET", "half"]), Value::Nil);
}

#[test]
fn random_bytes_change_nothing_and_stop_nobody() {
    let store = RedisServer::start(&[]);
    let daemon = Daemon::builder(store.url()).flush_interval(NEVER).start();
    let mut rng = fastrand::Rng::with_seed(seed());
    // Pieces of the protocol in wrong order go deeper into the parser than noise does.
    let pieces: [&[u8]; 12] = [
        b"*2\r\n",
        b"$4\r\n",
        b"INCRR\r\n",
        b"\r\n",
        b"*",
        b"$",
        b"-1\r\n",
        b"GET",
        b"\0\xff",
        b"\"",
        b"999999999",
        b" ",
    ];
    for _ in 0..300 {
        let mut client = daemon.client();
        let mut bytes = Vec::new();
        for _ in 0..rng.usize(1..40) {
            if rng.bool() {
                bytes.extend_from_slice(pieces[rng.usize(..pieces.len())]);
            } else {
                bytes.extend((0..rng.usize(1..20)).map(|_| rng.u8(..)));
            }
        }
        // It may close in the middle.
        let _ = client.send_raw(&bytes);
        client.stream().finish_writing();
        client.read_to_end().unwrap();
    }
    daemon.flush();
    assert_eq!(store.counters().len(), 0);
}

#[test]
fn an_array_of_a_million_elements_is_answered_and_the_connection_stays_usable_or_is_closed() {
    let store = RedisServer::start(&[]);
    let daemon = Daemon::builder(store.url()).flush_interval(NEVER).start();
    let mut bytes = b"*1000001\r\n$4\r\nMGET\r\n".to_vec();
    for _ in 0..1_000_000 {
        bytes.extend_from_slice(b"$1\r\nk\r\n");
    }
    let mut client = daemon.client();
    let mut writer = client.stream().duplicate();
    let writing = thread::spawn(move || writer.write_all(&bytes));
    match client.read().expect("an answer, be it an error") {
        Value::Array(values) => assert_eq!(values.len(), 1_000_000),
        refused => assert!(refused.error().starts_with("ERR"), "{refused:?}"),
    }
    // A server that refused and closed has not taken all of it.
    let _ = writing.join().unwrap();
    assert_eq!(daemon.client().number(&["INCR", "alive"]), 1);
}

#[test]
fn keys_that_are_too_long_or_reserved_are_refused_and_the_connection_stays() {
    let store = RedisServer::start(&[]);
    let daemon = Daemon::builder(store.url()).flush_interval(NEVER).start();
    let mut client = daemon.client();
    let (longest, too_long) = ("k".repeat(1024), "k".repeat(1025));
    assert_eq!(client.number(&["INCR", &longest]), 1);
    for refused in [
        vec!["INCR", &too_long],
        vec!["INCRBY", &too_long, "5"],
        vec!["INCR", "tallyd:clock"],
        vec!["DECRBY", "tallyd:", "1"],
    ] {
        let reply = client.command(&refused);
        assert!(reply.error().starts_with("ERR "), "{reply:?}");
    }
    assert!(
        client
            .command(&["INCR", &too_long])
            .error()
            .contains("1024"),
        "the error names the limit"
    );
    assert!(
        client
            .command(&["INCR", "tallyd:x"])
            .error()
            .contains("tallyd:"),
        "the error names what is reserved"
    );
    assert_eq!(
        client.number(&["INCR", "tallydx"]),
        1,
        "only the prefix with its colon is reserved"
    );
    daemon.flush();
    assert_eq!(store.counters().len(), 2);
}
