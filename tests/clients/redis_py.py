"""redis-py does its normal things over the daemon's socket.

usage: redis_py.py SOCKET REDIS_PORT PROTOCOL VERSION
Exits 0 when all went as with Redis itself; an assertion says what did not.
"""

import asyncio
import json
import sys
import threading
import time

import redis
import redis.asyncio

SOCKET, PORT, PROTOCOL, VERSION = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
NAME = f"py{VERSION}-{PROTOCOL}"
DEEP = 20_000

assert redis.__version__.startswith(VERSION), redis.__version__


def connect(**more):
    options = {"protocol": PROTOCOL, "socket_timeout": 30, **more}
    if PROTOCOL == 3 and VERSION.startswith("7"):
        # redis-py 7 cannot speak RESP3 over any Unix socket unless this is off: it looks for a host.
        from redis.maint_notifications import MaintNotificationsConfig

        off = MaintNotificationsConfig(enabled=False)
        kind = redis.UnixDomainSocketConnection
        pool = redis.ConnectionPool(connection_class=kind, path=SOCKET, maint_notifications_config=off, **options)
        return redis.Redis.from_pool(pool)
    return redis.Redis(unix_socket_path=SOCKET, **options)


def key(name):
    return f"{NAME}:{name}"


def raises(kind, text, call):
    try:
        call()
    except kind as error:
        assert text in str(error), f"{error!r} does not contain {text!r}"
    else:
        raise AssertionError(f"no {kind.__name__}")


def plain(r):
    assert r.ping() is True
    assert r.echo("hello") == b"hello"
    assert r.incr(key("a")) == 1
    assert r.incr(key("a"), 10) == 11
    assert r.decr(key("a")) == 10
    assert r.incrby(key("a"), 5) == 15
    assert r.decrby(key("a"), 7) == 8
    assert r.get(key("a")) == b"8"
    assert r.get(key("missing")) is None
    assert r.mget(key("a"), key("missing")) == [b"8", None]
    assert r.exists(key("a"), key("missing")) == 1
    assert r.info()["loading"] == 0
    assert r.client_id() > 0
    assert r.client_setname("tester") is True
    assert r.client_getname() in (b"tester", "tester")
    assert isinstance(r.time()[0], int)
    assert "save" in r.config_get("save")
    raises(redis.ResponseError, "not an integer", lambda: r.execute_command("INCRBY", key("a"), "x"))
    raises(redis.ResponseError, "unknown command", lambda: r.lpush(key("list"), "x"))
    assert r.incr(key("a")) == 9, "an error does not break the connection"
    text = connect(decode_responses=True, db=0, client_name="named")
    assert text.get(key("a")) == "9"
    text.close()


def pipelines(r):
    pipe = r.pipeline()
    pipe.incr(key("t")).incr(key("t")).get(key("t")).decrby(key("t"), 5).mget(key("t"), key("no"))
    assert pipe.execute() == [1, 2, b"2", -3, [b"-3", None]]
    pipe = r.pipeline(transaction=False)
    pipe.incr(key("p")).exists(key("p")).get(key("no"))
    assert pipe.execute() == [1, 1, None]

    pipe = r.pipeline()
    pipe.incr(key("t")).execute_command("INCRBY", key("t"), "x").incr(key("t"))
    results = pipe.execute(raise_on_error=False)
    assert results[0] == -2 and results[2] == -1, results
    assert isinstance(results[1], redis.ResponseError), results

    pipe = r.pipeline()
    pipe.incr(key("aborted")).execute_command("NOSUCH", "x")
    raises(redis.ResponseError, "unknown command", pipe.execute)
    assert r.get(key("aborted")) is None, "an aborted transaction does nothing"

    for transaction in (True, False):
        pipe = r.pipeline(transaction=transaction)
        for _ in range(DEEP):
            pipe.incr(key(f"deep-{transaction}"))
        assert pipe.execute() == list(range(1, DEEP + 1))


def threads(r):
    def work():
        for _ in range(300):
            r.incr(key("threads"))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert r.get(key("threads")) == b"2400"


def pubsub(r):
    subscription = r.pubsub(ignore_subscribe_messages=True)
    subscription.subscribe("tallyd:deltas")
    # The subscription is in force once its confirmation was read.
    deadline = time.monotonic() + 30
    while subscription.get_message(timeout=1) is not None:
        pass
    r.incr(key("published"), 3)
    r.execute_command("TALLY.FLUSH")
    while time.monotonic() < deadline:
        message = subscription.get_message(timeout=1)
        if message and message["type"] == "message":
            deltas = json.loads(message["data"])["deltas"]
            if [key("published"), 3, 3] in deltas:
                break
    else:
        raise AssertionError("the delta was not published")
    assert subscription.ping() is not False
    subscription.unsubscribe()
    subscription.close()


async def asynchronous():
    r = redis.asyncio.Redis(unix_socket_path=SOCKET, protocol=PROTOCOL)
    assert await r.incr(key("async")) == 1
    assert sorted(await asyncio.gather(*(r.incr(key("async")) for _ in range(50)))) == list(range(2, 52))
    async with r.pipeline(transaction=True) as pipe:
        assert await pipe.incr(key("async")).get(key("async")).execute() == [52, b"52"]
    async with r.pipeline(transaction=False) as pipe:
        assert await pipe.incr(key("async")).get(key("async")).execute() == [53, b"53"]
    await r.aclose()


def arrived(r):
    assert r.execute_command("TALLY.FLUSH") in (b"OK", "OK", True)
    store = redis.Redis(port=PORT)
    expected = {
        "a": b"9",
        "t": b"-1",
        "p": b"1",
        "aborted": None,
        "deep-True": str(DEEP).encode(),
        "deep-False": str(DEEP).encode(),
        "threads": b"2400",
        "published": b"3",
        "async": b"53",
    }
    found = {name: store.get(key(name)) for name in expected}
    assert found == expected, found


client = connect()
plain(client)
pipelines(client)
threads(client)
pubsub(client)
asyncio.run(asynchronous())
arrived(client)
client.close()
print("ok")
