"""Two hosts, one counter: usage `two_nodes.py SOCKET_A SOCKET_B`."""

import sys
import time

import redis

here = redis.Redis(unix_socket_path=sys.argv[1])  # the daemon of one host
there = redis.Redis(unix_socket_path=sys.argv[2])  # the daemon of another

assert there.get("likes:42") is None
assert here.incr("likes:42", 3) == 3

# After the next flush, at most flush.interval, the other daemon knows.
limit = time.monotonic() + 30
while there.get("likes:42") != b"3":
    assert time.monotonic() < limit, "the increment was not heard"
    time.sleep(0.01)

# And the other way round, told as it happens.
with here.pubsub(ignore_subscribe_messages=True) as live:
    live.subscribe("tallyd:key:likes:42")
    live.get_message(timeout=5)
    assert there.incr("likes:42", 4) == 7
    message = None
    while message is None:
        assert time.monotonic() < limit, "nothing was told"
        message = live.get_message(timeout=1)
    assert message["data"] == b"7", message
assert here.get("likes:42") == b"7"
print("ok")
