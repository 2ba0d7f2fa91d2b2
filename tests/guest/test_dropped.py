"""tcpaccept -x: a row for each packet that the kernel dropped since an accept queue was
full, with fexit and with kprobes, against the kernel's own count.
"""

import contextlib
import errno
import itertools
import json
import os
import pathlib
import random
import signal
import socket
import struct

import pytest
from command_lines import LINES
from conftest import (
    IPV4,
    IPV6,
    METHODS,
    Worker,
    best_method,
    only_at_both_ends,
    running,
    until,
)
from traffic import LINGER_0, MAPPED, listener, lost, plain, waiting

BACKLOG = 3
CLIENT4, CLIENT6 = "127.0.0.1", "::1"
FAMILIES = (  # where it listens, whom clients call, and from where
    (socket.AF_INET, IPV4, IPV4, CLIENT4),
    (socket.AF_INET6, IPV6, IPV6, CLIENT6),
    (socket.AF_INET6, "::", MAPPED, f"::ffff:{CLIENT4}"),
)


def overflows():
    """TcpExtListenOverflows of this network namespace."""
    names, values, *_ = pathlib.Path("/proc/net/netstat").read_text().splitlines()
    return int(dict(zip(names.split(), values.split()))["ListenOverflows"])


class Full:
    """A listening socket whose accept queue is full, and whoever waits in it."""

    def __init__(self, stack, family, address, target, client, deferred=0):
        """deferred: of so many clients more the last ACK is still to come."""
        self.server = stack.enter_context(listener(family, address, BACKLOG + deferred))
        self.family, self.client = family, client
        self.port = self.server.getsockname()[1]
        self.target = target, self.port
        self.limit = BACKLOG + deferred
        self.late = []
        if deferred:  # accepted only once they have sent something
            self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 100)
            self.late = [self.connect(stack) for _ in range(deferred)]
        for _ in range(self.limit + 1):
            self.connect(stack).send(b".")
        until("a full queue", lambda: waiting(self.server) == self.limit + 1)

    def new_client(self):
        client = socket.socket(self.family)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        client.bind((self.client, 0))
        return client

    def connect(self, stack):
        client = stack.enter_context(self.new_client())
        client.connect(self.target)
        return client

    def row(self, client, packet):
        """The row of a packet of this client's, with RPORT."""
        (address, port, *_), ip = (
            client.getsockname(),
            6 if self.client == CLIENT6 else 4,
        )
        return (
            f"{ip:<2} {plain(address):<16} {port:<6} {plain(self.target[0]):<16} "
            f"{self.port:<5} {self.limit + 1:<5} {self.limit:<5} {packet}"
        )


def knock(full, is_blocking):
    """Connect to where nobody gets in, and give up; the row of that."""
    with full.new_client() as client:
        client.setblocking(is_blocking)
        ms = struct.pack("=qq", 0, 1000)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, ms)
        assert client.connect_ex(full.target) == errno.EINPROGRESS
        return full.row(client, "syn")


def knock_often(queues, count):
    """On one CPU, so that the rows have an order."""
    os.sched_setaffinity(0, {0})
    choices = [(full, block) for full in queues for block in (True, False)]
    picked = [choices[i % len(choices)] for i in range(count)]
    random.Random(count).shuffle(picked)
    return [knock(*choice) for choice in picked]


def without_repeats(rows):
    return [row for row, _ in itertools.groupby(rows)]


def differences(found, wanted):
    """The first pairs that differ: pytest itself would take minutes for long lists."""
    pairs = itertools.zip_longest(found, wanted)
    return [pair for pair in pairs if pair[0] != pair[1]][:3]


def without_time(line):
    return {key: value for key, value in json.loads(line).items() if key != "ts"}


@pytest.fixture(scope="module")
def queues():
    with contextlib.ExitStack() as stack:
        yield [Full(stack, *family) for family in FAMILIES]


@pytest.fixture(scope="module")
def tools(queues, tmp_path_factory):
    """With each method, and two of which each sees one of the three."""
    commands = {method: ("tcpaccept -x -R", method) for method in METHODS}
    ports = f"{queues[1].port},{queues[2].port}"
    for key, line in zip(("table", "json"), LINES["tcpaccept -x"]):
        options = line.format(four=CLIENT4, six=CLIENT6, ports=ports)
        commands[key] = (f"tcpaccept {options}", best_method())
    with running(tmp_path_factory, commands) as found:
        yield found


@pytest.fixture
def new_rows(tools):
    """new_rows(): what was printed of this test with each method, as many rows as
    packets were dropped.
    """
    before, dropped = [len(tools[method].rows()) for method in METHODS], overflows()

    def rows():
        return [tools[method].rows()[n:] for method, n in zip(METHODS, before)]

    def all_rows():
        count = overflows() - dropped
        until(f"{count} rows", lambda: min(map(len, rows())) >= count)
        found = rows()
        assert [len(rows) for rows in found] == [count] * 2
        return found

    return all_rows


def test_header(tools):
    titles = "IP RADDR            RPORT  LADDR            LPORT QLEN  QMAX  DROP\n"
    for method in METHODS:
        assert tools[method].out.read_text().startswith(titles)
    assert tools["table"].out.read_text().startswith(f"TIME     TIME(s)   {titles}")


def test_syns(tools, queues, new_rows):
    """Of 997 connects, each is a row, and a SYN that was repeated is one more."""
    knocked = Worker(b"client", knock_often, queues, 997).report()
    fexit, kprobe = new_rows()
    assert differences(fexit, kprobe) == []
    assert differences(without_repeats(fexit), without_repeats(knocked)) == []
    _, ipv6, mapped = (
        [row for row in fexit if row.split()[4] == str(full.port)] for full in queues
    )
    table, lines = tools["table"], tools["json"]
    until("the last rows", lambda: len(table.rows()) >= len(mapped))
    shown = [row.split(maxsplit=2)[2] for row in table.rows()]
    assert differences(shown, mapped) == []
    until("the last lines", lambda: len(lines.rows()) >= len(ipv6))
    wanted = [
        {
            "host": os.uname().nodename,
            "event": "accept_failed",
            "ip": 6,
            "saddr": CLIENT6,
            "sport": int(row.split()[2]),
            "daddr": IPV6,
            "dport": queues[1].port,
            "netns": os.stat("/proc/self/ns/net").st_ino,
            "qlen": BACKLOG + 1,
            "qmax": BACKLOG,
            "dropped": "syn",
        }
        for row in ipv6
    ]
    assert differences(map(without_time, lines.rows()), wanted) == []


@pytest.mark.parametrize("family", FAMILIES, ids=["IPv4", "IPv6", "mapped"])
def test_last_acks(new_rows, family):
    """13 were answered before the queue was full: what they send is dropped with the
    ACK that comes with it, and repeated.
    """
    with contextlib.ExitStack() as stack:
        full = Full(stack, *family, deferred=13)
        for client in full.late:
            client.send(b"data")
        rows = {full.row(client, "ack") for client in full.late}
        for client in full.late:  # a reset: nothing is repeated any more
            client.close()
    assert [set(found) for found in new_rows()] == [rows] * 2


@only_at_both_ends
def test_lost(start):
    """A stopped reader: what did not fit into its buffers is counted."""
    with contextlib.ExitStack() as stack:
        full = Full(stack, *FAMILIES[0])
        (tool,) = start("tcpaccept -x -b 1", TCPTOOLS_METHOD=best_method())
        before = overflows()
        tool.process.send_signal(signal.SIGSTOP)
        Worker(b"client", knock_often, [full], 997).report()
        tool.process.send_signal(signal.SIGCONT)
        rows = tool.stop()
        assert 0 < len(rows) < 997
        assert len(rows) + lost(tool) == overflows() - before
