"""-d: whose DNS responses are believed, what is seen of them, and which name a connect
that fails has.
"""

import errno
import json
import pathlib
import select
import socket
import time

import dnslib
import pytest
from conftest import NOBODY4, Worker, best_method, only_at_both_ends, until
from traffic import listener

SERVER = "127.0.0.66"  # a DNS server that resolv.conf does not name
TCP_SYNCNT = 7  # linux/tcp.h
TARGETS = [f"127.0.1.{n}" for n in range(1, 8)]
# Records without which a response would have less than 4,096 bytes
FILLER = [f"198.18.{n // 256}.{n % 256}" for n in range(331)]


def response(name, *addresses):
    reply = dnslib.DNSRecord.question(name).reply()
    for address in addresses:
        reply.add_answer(*dnslib.RR.fromZone(f"{name}. 60 A {address}"))
    return reply.pack()


def receive(is_connected, *pieces):
    """Read a datagram of the server, which the kernel keeps in pieces: the first in the
    linear part of the skb, others in fragments.
    """
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind((SERVER, 53))
        client.bind(("127.0.0.1", 0))
        if is_connected:
            client.connect((SERVER, 53))
        server.connect(client.getsockname())
        for piece in pieces[:-1]:
            server.send(piece, socket.MSG_MORE)
        server.send(pieces[-1])
        assert client.recv(65535) == b"".join(pieces)


def connect(addresses, port):
    for address in addresses:
        socket.create_connection((address, port)).close()


def receive_and_connect(is_connected, pieces, addresses, port):
    receive(is_connected, *pieces)
    connect(addresses, port)


def fail_to_connect():
    """A connect that fails after another name for its address was looked up; how long
    after the first it was made at most, in ms.
    """
    begin = time.monotonic()
    receive(True, response("before.example", NOBODY4))
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, 1)
        assert client.connect_ex((NOBODY4, 1)) == errno.EINPROGRESS
        age_ms = (time.monotonic() - begin) * 1000
        receive(True, response("after.example", NOBODY4))
        select.select([], [client], [])
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ETIMEDOUT
    return age_ms


@pytest.fixture
def resolv_conf():
    """The file, which has no resolver but this guest's 127.0.0.1."""
    path = pathlib.Path("/etc/resolv.conf")
    before = path.read_text() if path.exists() else ""
    path.write_text("nameserver 127.0.0.1\n")
    yield path
    path.write_text(before)


@only_at_both_ends
def test_what_is_believed_and_seen(start, resolv_conf):
    tool, failed = start(
        "tcpconnect -d --json", "tcpconnect -d -x --json", TCPTOOLS_METHOD=best_method()
    )
    two, many = (
        response("two.example", *TARGETS[3:5]),
        [TARGETS[5], *FILLER, TARGETS[6]],
    )
    expected = []
    with listener(socket.AF_INET, "0.0.0.0") as server:
        port = server.getsockname()[1]

        def looked_up(is_connected, pieces, addresses, own, others):
            """Have a process read a response and connect, and another one connect:
            the names of each.
            """
            reader = Worker(
                b"reader", receive_and_connect, is_connected, pieces, addresses, port
            )
            reader.report()
            other = Worker(b"other", connect, addresses, port)
            other.report()
            for pid, names in ((reader.pid, own), (other.pid, others)):
                expected.extend((pid, *row) for row in zip(addresses, names))
            last = f'"pid": {other.pid},'
            until("the other's row", lambda: last in tool.out.read_text())

        evil, fine = (
            response("evil.example", TARGETS[0]),
            response("oK.eXample", TARGETS[1]),
        )
        looked_up(False, [evil], TARGETS[:1], ["evil.example"], [None])
        looked_up(True, [fine], TARGETS[1:2], ["ok.example"], ["ok.example"])
        resolv_conf.write_text(f"nameserver {SERVER}\n")
        known = [response("resolver.example", TARGETS[2])]
        looked_up(False, known, TARGETS[2:3], *[["resolver.example"]] * 2)
        # What is in fragments can be read with fexit only
        second = "two.example" if best_method() == "fexit" else None
        pieces, names = [two[:-16], two[-16:]], ["two.example", second]
        looked_up(True, pieces, TARGETS[3:5], names, names)
        pieces, names = [response("many.example", *many)], ["many.example", None]
        looked_up(True, pieces, TARGETS[5:], names, names)
        worker = Worker(b"fails", fail_to_connect)
        age_ms = worker.report()
    expected.append((worker.pid, NOBODY4, "before.example"))
    rows = [json.loads(line) for line in tool.stop()]
    assert [(row["pid"], row["daddr"], row.get("query")) for row in rows] == expected
    (row,) = map(json.loads, failed.stop())
    assert (row["pid"], row["error"]) == (worker.pid, "ETIMEDOUT")
    assert row["query"] == "before.example"
    assert 0 <= row["query_age_ms"] <= age_ms
    for one in (tool, failed):
        assert one.complaints() == []
