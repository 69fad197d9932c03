"""A name server for one name: usage `names.py ADDRESS NAME ANSWER`. Everything else does not exist.

Prints a line when it can be asked.
"""

import socket
import struct
import sys

address, name, answer = sys.argv[1:]
known = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind((address, 53))
print(name, flush=True)
while True:
    query, client = server.recvfrom(4096)
    question = query[12 : query.index(b"\0", 12) + 5]
    is_known = question[:-4].lower() == known
    # Type A alone has an answer; for the others of a known name there is none, which is no error.
    answers = 1 if is_known and question[-4:] == b"\0\1\0\1" else 0
    flags = 0x8580 if is_known else 0x8583
    reply = query[:2] + struct.pack(">HHHHH", flags, 1, answers, 0, 0) + question
    if answers:
        reply += b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 5, 4) + socket.inet_aton(answer)
    server.sendto(reply, client)
