"""Every kind of connection, shown by both tools, each tracing with fexit and with
kprobes concurrently.

The tools run under a locale that has no letters but ASCII's.
"""

import contextlib
import ctypes
import errno
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import (
    DEADLINE,
    IPV4,
    IPV6,
    METHODS,
    TOOLS,
    Worker,
    first_line,
    own_comm,
    read_byte,
    row,
    rows_until,
    running,
    until,
)
from io_uring import accept_by_io_uring, connect_by_io_uring
from traffic import (
    CLONE_NEWNS,
    IPPROTO_MPTCP,
    MPTCP_ENABLED,
    accept_in_threads,
    connect_and_reset,
    connect_often,
    connect_refused,
    connect_to_itself,
    listener,
    run_fast_opens,
    serve,
)

CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
SOL_MPTCP, MPTCP_INFO = 284, 1
JOIN_SECONDS = 5  # within which subflows come, unless an MP_JOIN failed


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """{(name, method): Tool}, all tracing."""
    commands = {(name, method): (name, method) for name in TOOLS for method in METHODS}
    with running(
        tmp_path_factory, commands, LANG="C", PYTHONIOENCODING="ascii"
    ) as found:
        yield found


@pytest.fixture
def expect(tools):
    """expect(connects, accepts): these are the rows of this test, in every tool."""
    before = {key: len(tool.rows()) for key, tool in tools.items()}

    def expect_rows(connects, accepts):
        marker = Worker(b"marker", connect_to_itself, 1)
        marker.report()
        for (name, method), tool in tools.items():
            new = rows_until(tool, before[name, method], marker.pid)
            wanted = connects if name == "tcpconnect" else accepts
            assert (name, method, new) == (name, method, wanted)

    return expect_rows


def run_container():
    """[PID on the host, PID in the container, port] of a process in namespaces of its
    own, which connects 3 times.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWPID) == 0
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            os.write(writer, f"{os.getpid()} {connect_to_itself(3)}".encode())
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    return [pid, *map(int, os.read(reader, 100).split())]


def test_container(expect):
    pid, inner, port = Worker(b"contained", run_container).report()
    assert inner == 1 != pid
    line = row(pid, "contained", 4, "127.0.0.1", "127.0.0.1", port)
    expect([line] * 3, [line] * 3)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"\x1b[31mred", "\\x1b[31mred"),
        (b"two\nlines", "two\\nlines"),
        (b"  blanks", "\\x20\\x20blanks"),
        (b"\xff\xfe", "\\xff\\xfe"),
        ("\u00e9t\u00e9".encode(), "\u00e9t\u00e9"),
        (b"back\\slash", "back\\\\slash"),
        (b"plain", "plain"),
    ],
    ids=["escape", "newline", "blanks", "not-utf8", "utf8", "backslash", "plain"],
)
def test_hostile_names_stay_on_their_row(expect, name, shown):
    worker = Worker(name, connect_to_itself, 1)
    port = worker.report()
    line = row(worker.pid, shown, 4, "127.0.0.1", "127.0.0.1", port)
    expect([line], [line])


def test_refused_later_is_a_row(expect):
    worker = Worker(b"refused", connect_refused, IPV4)
    port = worker.report()
    expect([row(worker.pid, "refused", 4, IPV4, IPV4, port)], [])


def test_reset_before_accept_keeps_its_port(expect):
    server = listener(socket.AF_INET, IPV4)
    server.settimeout(DEADLINE)
    port = server.getsockname()[1]
    for _ in range(7):
        connect_and_reset((IPV4, port))
    for _ in range(7):
        with contextlib.suppress(OSError):
            server.accept()[0].close()
    lines = [row(os.getpid(), own_comm(), 4, IPV4, IPV4, port)] * 7
    expect(lines, lines)


def test_many_threads_blocked_in_accept(expect):
    """More of them than a kretprobe has slots."""
    server = listener(socket.AF_INET, IPV4)
    port = server.getsockname()[1]
    ready, tell = os.pipe()
    worker = Worker(b"blocked", accept_in_threads, server, 211, tell)
    read_byte(ready, "211 threads blocked in accept()")
    client = Worker(b"client", connect_often, IPV4, port, 211)
    client.report()
    assert len(worker.report()) == 211
    connects = [row(client.pid, "client", 4, IPV4, IPV4, port)] * 211
    expect(connects, [row(worker.pid, "blocked", 4, IPV4, IPV4, port)] * 211)


def test_real_programs(expect):
    """curl by its name, against Python's own web server."""
    assert shutil.which("curl"), "curl is not in this guest"
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "--bind", IPV4, "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd="/mnt",
    )
    line = first_line(server, "a web server")
    port = int(line.split(" port ")[1].split()[0])
    comm = pathlib.Path(f"/proc/{server.pid}/comm").read_text().rstrip("\n")
    pids = []
    for _ in range(3):
        curl = subprocess.Popen(
            ["curl", "-s", "-o", "/dev/null", f"http://{IPV4}:{port}/"]
        )
        assert curl.wait(DEADLINE) == 0
        pids.append(curl.pid)
    server.kill()
    server.communicate()
    expect(
        [row(pid, "curl", 4, IPV4, IPV4, port) for pid in pids],
        [row(server.pid, comm, 4, IPV4, IPV4, port)] * 3,
    )


def connect_strangely(port, port6):
    """Four IPv4 connects with something odd about them, and a plain IPv6 one."""
    with socket.socket() as client:  # the second connect() does nothing
        client.connect((IPV4, port))
        assert client.connect_ex((IPV4, port)) == errno.EISCONN
        client.recv(1)
    with socket.socket() as client:  # non-blocking, asked again for the outcome
        client.setblocking(False)
        assert client.connect_ex((IPV4, port)) == errno.EINPROGRESS
        connected = (0, errno.EISCONN)
        until("EISCONN", lambda: client.connect_ex((IPV4, port)) in connected)
        client.setblocking(True)
        client.recv(1)
    with socket.socket() as client:  # disconnected (AF_UNSPEC) and connected anew: two
        client.connect((IPV4, port))
        client.recv(1)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.connect(client.fileno(), bytes(16), 16) == 0
        client.connect((IPV4, port))
        client.recv(1)
    with socket.socket(socket.AF_INET6) as client:
        client.connect((IPV6, port6))
        client.recv(1)


def test_strange_connects(expect):
    servers = [listener(socket.AF_INET, IPV4), listener(socket.AF_INET6, IPV6)]
    port, port6 = (server.getsockname()[1] for server in servers)
    server = Worker(b"server", serve, servers, 5)
    client = Worker(b"client", connect_strangely, port, port6)
    client.report()
    server.report()
    expect(
        *(
            [row(worker.pid, comm, 4, IPV4, IPV4, port)] * 4
            + [row(worker.pid, comm, 6, IPV6, IPV6, port6)]
            for worker, comm in ((client, "client"), (server, "server"))
        )
    )


def take_turns(cpu, family, address, port, count, my_turn, your_turn):
    """Connect `count` times from one CPU, in turns with another process."""
    os.sched_setaffinity(0, {cpu})
    for _ in range(count):
        os.read(my_turn, 1)
        with socket.socket(family) as client:
            client.connect((address, port))
        os.write(your_turn, b".")


def test_order_across_cpus_and_families(expect):
    servers = [listener(socket.AF_INET, IPV4), listener(socket.AF_INET6, IPV6)]
    port, port6 = (server.getsockname()[1] for server in servers)
    (a, to_a), (b, to_b) = os.pipe(), os.pipe()
    workers = [
        Worker(b"a", take_turns, 0, socket.AF_INET, IPV4, port, 101, a, to_b),
        Worker(b"b", take_turns, 1, socket.AF_INET6, IPV6, port6, 101, b, to_a),
    ]
    os.write(to_a, b".")
    for worker in workers:
        worker.report()
    one, other = (worker.pid for worker in workers)
    rows = [row(one, "a", 4, IPV4, IPV4, port), row(other, "b", 6, IPV6, IPV6, port6)]
    expect(rows * 101, [])


def expect_between(expect, client, server, port, count):
    """So many connections between two workers, which have reported."""
    expect(
        [row(client.pid, "client", 4, IPV4, IPV4, port)] * count,
        [row(server.pid, "server", 4, IPV4, IPV4, port)] * count,
    )


def test_fast_open(expect):
    expect_between(expect, *run_fast_opens(5), 5)


def test_io_uring(expect):
    server = listener(socket.AF_INET, IPV4)
    port = server.getsockname()[1]
    acceptor = Worker(b"server", accept_by_io_uring, server, 5)
    client = Worker(b"client", connect_by_io_uring, [port] * 5)
    client.report()
    acceptor.report()
    expect_between(expect, client, acceptor, port, 5)


def connect_mptcp(port, count):
    for _ in range(count):
        with socket.socket(proto=IPPROTO_MPTCP) as client:
            client.connect((IPV4, port))
            client.recv(1)


@pytest.fixture
def mptcp_server():
    if not MPTCP_ENABLED.exists():
        pytest.skip("this kernel has no Multipath TCP")
    MPTCP_ENABLED.write_text("1")
    with listener(socket.AF_INET, IPV4, proto=IPPROTO_MPTCP) as server:
        yield server


def test_multipath_tcp(expect, mptcp_server):
    """A connection with one subflow."""
    port = mptcp_server.getsockname()[1]
    acceptor = Worker(b"server", serve, [mptcp_server], 5)
    client = Worker(b"client", connect_mptcp, port, 5)
    client.report()
    acceptor.report()
    expect_between(expect, client, acceptor, port, 5)


def connect_with_subflows(port, subflows, count):
    """Connect until `count` connections have so many more subflows; how many had to be
    made: one whose MP_JOIN failed does not try that again. The last one says so.
    """
    made = 0
    while count:
        with socket.socket(proto=IPPROTO_MPTCP) as client:
            client.connect((IPV4, port))
            client.recv(1)
            made += 1
            count -= gains(client, subflows)
            client.send(b"." if count else b"!")
    return made


def gains(client, subflows):
    """Whether a connection has so many more subflows within some seconds."""
    deadline = time.monotonic() + JOIN_SECONDS
    while time.monotonic() < deadline:
        if client.getsockopt(SOL_MPTCP, MPTCP_INFO, 1)[0] == subflows:
            return True
        time.sleep(0.01)
    return False


def accept_until_the_last(server):
    told = b"."
    while told == b".":
        with server.accept()[0] as peer:
            peer.send(b".")
            told = peer.recv(1)
    assert told == b"!"


@pytest.fixture
def endpoints():
    """Two addresses from which the kernel adds subflows to each connection."""
    addresses = ("192.0.2.11", "192.0.2.12")
    run_ip("mptcp limits set subflows 2")
    for address in addresses:
        run_ip(f"address add {address}/24 dev docs0")
        run_ip(f"mptcp endpoint add {address} subflow")
    yield addresses
    run_ip("mptcp endpoint flush")
    for address in addresses:
        run_ip(f"address delete {address}/24 dev docs0")


def run_ip(command):
    subprocess.run(["ip", *command.split()], check=True)


def test_multipath_tcp_with_three_subflows(expect, mptcp_server, request):
    """The two that the kernel adds are no rows."""
    endpoints = request.getfixturevalue("endpoints")  # where there is Multipath TCP
    port = mptcp_server.getsockname()[1]
    acceptor = Worker(b"server", accept_until_the_last, mptcp_server)
    client = Worker(b"client", connect_with_subflows, port, len(endpoints), 5)
    made = client.report()
    acceptor.report()
    expect_between(expect, client, acceptor, port, made)
