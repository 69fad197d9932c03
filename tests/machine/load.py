"""Clients that count through restarts: each connects again whenever its connection ends. A refused
connection, or an error in reply, ends with 1.

    load.py SOCKET CLIENTS STOP-FILE

Prints what was acknowledged, a line for each client: key and count. A stop of the daemon answers all
that it has read, so what was not answered was not counted, and is sent again.
"""

import os
import socket
import sys
import threading

path, clients, stop = sys.argv[1], int(sys.argv[2]), sys.argv[3]
counts = {}


def count(key: str) -> None:
    request = f"INCR {key}\r\n".encode()
    acknowledged = 0
    while not os.path.exists(stop):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(path)
            replies = connection.makefile("rb")
            while not os.path.exists(stop):
                try:
                    connection.sendall(request)
                    reply = replies.readline()
                except (BrokenPipeError, ConnectionResetError):
                    break
                if not reply:
                    break
                assert reply.startswith(b":"), reply
                acknowledged += 1
    counts[key] = acknowledged


def guarded(key: str) -> None:
    try:
        count(key)
    except BaseException as error:
        print(f"{key}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


threads = [threading.Thread(target=guarded, args=(f"load:{os.getpid()}:{n}",)) for n in range(clients)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for key, acknowledged in counts.items():
    print(key, acknowledged)
