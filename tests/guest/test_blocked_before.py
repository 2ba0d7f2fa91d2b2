"""Servers that were blocked in accept() when tracing began: neither fexit on
inet_csk_accept() nor a kretprobe sees that call return.
"""

import os
import socket
from types import SimpleNamespace

import pytest
from conftest import (
    IPV4,
    IPV6,
    METHODS,
    Worker,
    read_byte,
    row,
    running,
    until,
)
from traffic import (
    IPPROTO_MPTCP,
    MPTCP_ENABLED,
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


def blocked(comm, server):
    """A worker that is blocked in accept(); it accepts 3 connections."""
    worker = Worker(comm, accept_blocking, server, 3)
    until("a server blocked in accept()", lambda: is_accepting(worker.pid))
    return worker


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """What has accepted, where, and {method: rows} of tcpaccept -q.

    Threads and servers that were blocked before, two of them for Multipath TCP, as Go's
    are (1.24 and later), and a server that came later. The clients are plain ones.
    """
    servers = [listener(socket.AF_INET, IPV4) for _ in range(2)]
    servers.append(listener(socket.AF_INET6, IPV6))
    ports = [server.getsockname()[1] for server in servers]
    ready, tell = os.pipe()
    threads = Worker(b"blocked", accept_in_threads, servers[0], THREADS, tell)
    read_byte(ready, "threads blocked in accept()")
    early = blocked(b"early", servers[1])
    mptcp = []
    if MPTCP_ENABLED.exists():
        MPTCP_ENABLED.write_text("1")
        for family, address in (socket.AF_INET, IPV4), (socket.AF_INET6, IPV6):
            server = listener(family, address, proto=IPPROTO_MPTCP)
            to = family, address, server.getsockname()[1]
            mptcp.append((blocked(b"mptcp", server), *to))
    commands = {method: ("tcpaccept -q", method) for method in METHODS}
    with running(tmp_path_factory, commands) as tools:
        connect_often(IPV4, ports[0], THREADS)
        late = Worker(b"late", accept_blocking, servers[2], 3)
        both = [(socket.AF_INET6, IPV6, ports[2]), (socket.AF_INET, IPV4, ports[1])]
        targets = [to for _, *to in mptcp]
        Worker(b"client", connect_to, [*both * 3, *targets * 3]).report()
        for worker in (threads, early, late, *[worker for worker, *_ in mptcp]):
            worker.report()
    rows = {key: tool.rows() for key, tool in tools.items()}
    pids = [worker.pid for worker in (threads, early, late)]
    servers = [(worker.pid, address, port) for worker, _, address, port in mptcp]
    return SimpleNamespace(pids=pids, ports=ports, rows=rows, mptcp=servers)


# QLEN and QMAX: which socket a thread waited at before is not known
NOT_KNOWN, EMPTY = f"{'-':<5} -", f"{0:<5} 128"


def queue_row(pid, comm, address, port, queue):
    ip = 6 if ":" in address else 4
    return row(pid, comm, ip, address, address, f"{port:<5} {queue}")


def test_many_threads(traced):
    end = IPV4, traced.ports[0], NOT_KNOWN
    for rows in traced.rows.values():
        assert rows[:THREADS] == [queue_row(traced.pids[0], "blocked", *end)] * THREADS


def test_beside_a_server_that_came_later(traced):
    """Its first accept shows, and the next ones, in turns with the other's."""
    _, early, late = zip(traced.pids, traced.ports)
    lines = [queue_row(late[0], "late", IPV6, late[1], EMPTY)] * 3
    for queue in NOT_KNOWN, EMPTY, EMPTY:
        lines.append(queue_row(early[0], "early", IPV4, early[1], queue))
    for rows in traced.rows.values():
        assert sorted(rows[THREADS : THREADS + 6]) == sorted(lines)


def test_plain_clients_of_multipath_tcp(traced):
    if not traced.mptcp:
        pytest.skip("this kernel has no Multipath TCP")
    lines = [
        queue_row(pid, "mptcp", address, port, queue)
        for queue in (NOT_KNOWN, EMPTY, EMPTY)
        for pid, address, port in traced.mptcp
    ]
    for rows in traced.rows.values():
        assert rows[THREADS + 6 :] == lines
