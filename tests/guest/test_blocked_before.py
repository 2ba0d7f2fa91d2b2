"""Servers that were blocked in accept() when tracing began: neither fexit on
inet_csk_accept() nor a kretprobe sees that call return.
"""

import json
import os
import socket
from types import SimpleNamespace

import pytest
from conftest import (
    IPV4,
    IPV6,
    METHODS,
    Worker,
    best_method,
    read_byte,
    row,
    running,
    until,
)
from traffic import (
    accept_in_threads,
    connect_often,
    connect_to,
    is_accepting,
    listener,
)

THREADS = 211  # more than a kretprobe has slots


def accept_blocking(server, count):
    for _ in range(count):
        with server.accept()[0] as peer:
            peer.send(b".")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """What has accepted, where, and {method: rows} of tcpaccept; the objects of -q.

    Threads and a server that were blocked before, and a server that came later.
    """
    servers = [listener(socket.AF_INET, IPV4) for _ in range(2)]
    servers.append(listener(socket.AF_INET6, IPV6))
    ports = [server.getsockname()[1] for server in servers]
    ready, tell = os.pipe()
    threads = Worker(b"blocked", accept_in_threads, servers[0], THREADS, tell)
    read_byte(ready, "threads blocked in accept()")
    early = Worker(b"early", accept_blocking, servers[1], 3)
    until("a server blocked in accept()", lambda: is_accepting(early.pid))
    commands = {method: ("tcpaccept", method) for method in METHODS}
    commands["queue"] = ("tcpaccept -q --json", best_method())
    with running(tmp_path_factory, commands) as tools:
        connect_often(IPV4, ports[0], THREADS)
        late = Worker(b"late", accept_blocking, servers[2], 3)
        both = [(socket.AF_INET6, IPV6, ports[2]), (socket.AF_INET, IPV4, ports[1])]
        Worker(b"client", connect_to, both * 3).report()
        for worker in (threads, early, late):
            worker.report()
    rows = {key: tool.rows() for key, tool in tools.items()}
    queues = [json.loads(line) for line in rows.pop("queue")]
    pids = [worker.pid for worker in (threads, early, late)]
    return SimpleNamespace(pids=pids, ports=ports, rows=rows, queues=queues)


def test_many_threads(traced):
    line = row(traced.pids[0], "blocked", 4, IPV4, IPV4, traced.ports[0])
    for rows in traced.rows.values():
        assert rows[:THREADS] == [line] * THREADS


def test_beside_a_server_that_came_later(traced):
    """Its first accept shows, and the next ones, in turns with the other's."""
    lines = [
        row(traced.pids[2], "late", 6, IPV6, IPV6, traced.ports[2]),
        row(traced.pids[1], "early", 4, IPV4, IPV4, traced.ports[1]),
    ]
    for rows in traced.rows.values():
        assert sorted(rows[THREADS:]) == sorted(lines * 3)


def test_queue(traced):
    """Which socket they waited at is not known, so neither is its queue."""
    found = {pid: [] for pid in traced.pids}
    for one in traced.queues:
        found[one["pid"]].append((one["dport"], one.get("qlen"), one.get("qmax")))
    threads, early, late = (
        (found[pid], port) for pid, port in zip(traced.pids, traced.ports)
    )
    assert threads[0] == [(threads[1], None, None)] * THREADS
    assert early[0] == [(early[1], None, None)] + [(early[1], 0, 128)] * 2
    assert late[0] == [(late[1], 0, 128)] * 3
