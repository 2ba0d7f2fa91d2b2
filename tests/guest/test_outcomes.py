"""-x and -l: how connects end, immediately or later, with fexit and with kprobes,
against the errors that the clients got.
"""

import contextlib
import ctypes
import errno
import itertools
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import time

import pytest
from conftest import (
    IPV4,
    IPV6,
    METHODS,
    NOBODY4,
    NOBODY6,
    Worker,
    best_method,
    only_on,
    read_byte,
    row,
    rows_until,
    running,
    until,
)
from io_uring import accept_by_io_uring, connect_by_io_uring
from traffic import (
    LINGER_0,
    MAPPED,
    closed_port,
    connect_and_reset,
    connect_refused,
    listener,
    listeners,
    run_fast_opens,
    serve,
)

BEHIND_ROUTER = "198.51.100.7"  # a router answers that it cannot be reached
ROUTER, DELAY_MS = "198.18.0.2", 70
REJECTED4, REJECTED6 = "192.0.2.66", "2001:db8::66"
NO_ROUTE4, NO_ROUTE6 = "203.0.113.1", "2001:db8:ffff::1"
TCP_SYNCNT = 7
IPV6_RECVERR = 25
TCP_REPAIR = 19
TCP_ESTABLISHED, TCP_CLOSE = 1, 7  # states


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """All outcomes with each method, and failures with the one that is used here."""
    commands = {f"-l {method}": ("tcpconnect -l", method) for method in METHODS}
    commands["-x"] = ("tcpconnect -x", best_method())
    with running(tmp_path_factory, commands) as found:
        yield found


def shown(line):
    """(a row without LAT(ms), LAT(ms))."""
    text, latency = line.rsplit(maxsplit=1)
    return text.rstrip(), float(latency)


@pytest.fixture
def expect(tools):
    """expect(rows): these are what the tools print of this test.

    Returns their LAT(ms): a list for each method.
    """
    before = {key: len(tool.rows()) for key, tool in tools.items()}

    def expect_rows(rows):
        marker = Worker(b"marker", connect_refused, IPV4)
        marker.report()
        latencies = []
        for key, tool in tools.items():
            new = rows_until(tool, before[key], marker.pid)
            if key == "-x":
                assert new == [line for line in rows if not line.endswith(" -")]
            else:
                assert (key, [shown(line)[0] for line in new]) == (key, rows)
                latencies.append([shown(line)[1] for line in new])
        return latencies

    return expect_rows


@pytest.fixture(scope="module")
def router():
    """A host behind which there is no way on, and which says so."""
    commands = """\
ip netns add router
ip link add to_router type veth peer name eth0 netns router
ip address add 198.18.0.1/24 dev to_router
ip link set to_router up
ip -netns router address add 198.18.0.2/24 dev eth0
ip -netns router link set eth0 up
ip netns exec router sysctl -qw net.ipv4.ip_forward=1
ip -netns router route add unreachable 198.51.100.0/24
ip route add 198.51.100.0/24 via 198.18.0.2"""
    for command in commands.splitlines():
        subprocess.run(command.split(), check=True)


def ended_row(worker, ip, saddr, daddr, port, error):
    return row(worker.pid, "client", ip, saddr, daddr, f"{port:<5} {error}")


def connect(family, address, port, blocking):
    """Connect, wait for the outcome where connect() does not, and return its errno.

    Not before the kernel has closed the socket, lest the error is gone by then.
    """
    with socket.socket(family) as client:
        client.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, 1)
        client.setblocking(blocking)
        error = client.connect_ex((address, port))
        if error != errno.EINPROGRESS:
            return error
        return outcome(client)


def state_of(client):
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def outcome(client):
    """The errno of a non-blocking connect that fails."""
    until("the end of a connect", lambda: state_of(client) == TCP_CLOSE)
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
def test_refused_later(expect, blocking):
    """By ECONNREFUSED, in the name of who called connect()."""
    closed, (port, *_) = listeners()
    for server in closed:
        server.close()
    cases = [
        (socket.AF_INET, IPV4, 4, IPV4),
        (socket.AF_INET6, IPV6, 6, IPV6),
        (socket.AF_INET6, MAPPED, 4, IPV4),
    ]
    rows = []
    for family, address, ip, shown in cases:
        worker = Worker(b"client", connect, family, address, port, blocking)
        assert worker.report() == errno.ECONNREFUSED
        rows.append(ended_row(worker, ip, shown, shown, port, "ECONNREFUSED"))
    expect(rows)


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
def test_no_answer(expect, blocking):
    worker = Worker(b"client", connect, socket.AF_INET, NOBODY4, 80, blocking)
    assert worker.report() == errno.ETIMEDOUT
    expect([ended_row(worker, 4, IPV4, NOBODY4, 80, "ETIMEDOUT")])


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
def test_a_router_says_no(expect, router, blocking):
    worker = Worker(b"client", connect, socket.AF_INET, BEHIND_ROUTER, 443, blocking)
    assert worker.report() == errno.EHOSTUNREACH
    expect([ended_row(worker, 4, "198.18.0.1", BEHIND_ROUTER, 443, "EHOSTUNREACH")])


@pytest.fixture(scope="module")
def firewall():
    """This guest's own: it responds while connect() still has the socket."""
    rules = f"""\
table inet test {{
    chain output {{
        type filter hook output priority 0;
        ip daddr {REJECTED4} reject
        ip6 daddr {REJECTED6} reject
    }}
}}"""
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


def reported_while_it_goes_on(address):
    """Connect until one gets its error while the kernel goes on trying.

    Returns how many connects that took.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for count in range(1, 30):
        with socket.socket(family) as client:
            if family == socket.AF_INET6:  # IPv4 reports without that
                client.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
            client.setblocking(False)
            assert client.connect_ex((address, 443)) == errno.EINPROGRESS
            poller = select.poll()
            poller.register(client, 0)  # errors only
            poller.poll()
            # A socket that is closed reports its error first
            select.select([], [], [], 0.1)
            state = state_of(client)
            error = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            assert error == errno.ECONNREFUSED
        if state != TCP_CLOSE:
            return count
    raise AssertionError("each was closed when it got its error")


@pytest.mark.parametrize(
    ("ip", "saddr", "daddr"),
    [(4, IPV4, REJECTED4), (6, IPV6, REJECTED6)],
    ids=["IPv4", "IPv6"],
)
def test_a_firewall_says_no(expect, firewall, ip, saddr, daddr):
    """The process closes the socket before the kernel does, but after the answer."""
    worker = Worker(b"client", reported_while_it_goes_on, daddr)
    count = worker.report()
    expect([ended_row(worker, ip, saddr, daddr, 443, "ECONNREFUSED")] * count)


@pytest.mark.parametrize(
    ("family", "address", "error", "ip", "saddr", "daddr"),
    [
        (socket.AF_INET, NO_ROUTE4, errno.ENETUNREACH, 4, "0.0.0.0", NO_ROUTE4),
        (socket.AF_INET6, NO_ROUTE6, errno.ENETUNREACH, 6, "::", NO_ROUTE6),
        (
            socket.AF_INET6,
            f"::ffff:{NO_ROUTE4}",
            errno.ENETUNREACH,
            4,
            "0.0.0.0",
            NO_ROUTE4,
        ),
        (socket.AF_INET6, "fe80::7", errno.EINVAL, 6, "::", "fe80::7"),
    ],
    ids=["IPv4", "IPv6", "mapped", "link-local"],
)
@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
def test_immediately(expect, family, address, error, ip, saddr, daddr, blocking):
    """The destination is the caller's."""
    worker = Worker(b"client", connect, family, address, 9999, blocking)
    assert worker.report() == error
    expect([ended_row(worker, ip, saddr, daddr, 9999, errno.errorcode[error])])


def connect_twice_from_one_port(address):
    """Two connections from the same address and port to the same; that port.

    The second cannot be.
    """
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(socket.socket(socket.AF_INET)) for _ in range(2)
        )
        for client in (first, second):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind((IPV4, 0))
        second.bind(first.getsockname())
        first.connect(address)
        assert second.connect_ex(address) == errno.EADDRNOTAVAIL
        return first.getsockname()[1]


def test_address_in_use(expect):
    server = listener(socket.AF_INET, IPV4)
    worker = Worker(b"client", connect_twice_from_one_port, server.getsockname())
    worker.report()
    port = server.getsockname()[1]
    expect(
        [
            ended_row(worker, 4, IPV4, IPV4, port, error)
            for error in ("-", "EADDRNOTAVAIL")
        ]
    )


def connect_to_no_address():
    """errno of a connect() to an address of no kind that TCP knows."""
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.socket() as client:
        assert libc.connect(client.fileno(), b"\x77\x77" + bytes(14), 16) == -1
    return ctypes.get_errno()


def test_no_address(expect):
    worker = Worker(b"client", connect_to_no_address)
    assert worker.report() == errno.EAFNOSUPPORT
    expect([ended_row(worker, 4, "0.0.0.0", "0.0.0.0", 0, "EAFNOSUPPORT")])


LIBC = ctypes.CDLL(None, use_errno=True)
GIVE_UP = (
    lambda client: client.close(),
    lambda client: LIBC.connect(client.fileno(), bytes(16), 16),  # AF_UNSPEC
    lambda client: client.shutdown(socket.SHUT_RDWR),
    lambda client: client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0),
)


def start_connect(client, address):
    client.setblocking(False)
    assert client.connect_ex(address) == errno.EINPROGRESS


def give_up(family, address):
    for give_up_on in GIVE_UP:
        with socket.socket(family) as client:
            start_connect(client, (address, 80))
            give_up_on(client)


def give_up_in_time(address):
    """As with curl --connect-timeout: only the program's own clock ends it."""
    with socket.socket() as client, contextlib.suppress(OSError):
        client.settimeout(0.1)
        client.connect((address, 80))


def wait_to_be_killed(address, ready):
    with socket.socket() as client:
        start_connect(client, (address, 80))
        os.write(ready, b".")
        signal.pause()


@pytest.mark.parametrize(
    ("family", "ip", "saddr", "daddr"),
    [(socket.AF_INET, 4, IPV4, NOBODY4), (socket.AF_INET6, 6, IPV6, NOBODY6)],
    ids=["IPv4", "IPv6"],
)
def test_given_up(expect, family, ip, saddr, daddr):
    """Closed, disconnected, shut down, closed without linger."""
    worker = Worker(b"client", give_up, family, daddr)
    worker.report()
    expect([ended_row(worker, ip, saddr, daddr, 80, "closed")] * len(GIVE_UP))


def test_given_up_by_the_programs_clock(expect):
    worker = Worker(b"client", give_up_in_time, NOBODY4)
    worker.report()
    latencies = expect([ended_row(worker, 4, IPV4, NOBODY4, 80, "closed")])
    assert all(latency >= 100 for (latency,) in latencies)


def test_killed(expect):
    reader, ready = os.pipe()
    worker = Worker(b"client", wait_to_be_killed, NOBODY4, ready)
    read_byte(reader, "a connect that waits")
    os.kill(worker.pid, signal.SIGKILL)
    os.waitpid(worker.pid, 0)
    expect([ended_row(worker, 4, IPV4, NOBODY4, 80, "closed")])


def close_after_an_answer():
    """Close a socket whose errno nobody asked for."""
    with socket.socket() as client:
        start_connect(client, (BEHIND_ROUTER, 443))
        poller = select.poll()
        poller.register(client, 0)
        poller.poll()


def test_closed_with_an_errno_in_its_queue(expect, router):
    """If the kernel has not closed it before, with the same errno."""
    worker = Worker(b"client", close_after_an_answer)
    worker.report()
    expect([ended_row(worker, 4, "198.18.0.1", BEHIND_ROUTER, 443, "EHOSTUNREACH")])


def succeed(port4, port6, blocking):
    """IPv4, IPv6, mapped, and two that are reset when they are connected."""
    for family, address, port in (
        (socket.AF_INET, IPV4, port4),
        (socket.AF_INET6, IPV6, port6),
        (socket.AF_INET6, MAPPED, port4),
    ):
        with socket.socket(family) as client:
            client.setblocking(blocking)
            if client.connect_ex((address, port)) != 0:
                select.select([], [client], [])
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            client.setblocking(True)
            client.recv(1)
    connect_and_reset((IPV4, port4))
    with socket.create_connection((IPV4, port4)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        assert client.connect_ex((NO_ROUTE4, 53)) == errno.ENETUNREACH


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
def test_success(expect, blocking):
    """And what comes after it is none of ours; nor is UDP."""
    (server4, server6, *_), (port4, port6, _) = listeners()
    acceptor = Worker(b"server", serve, [server4, server6], 3)
    client = Worker(b"client", succeed, port4, port6, blocking)
    client.report()
    acceptor.report()
    expect(
        [
            ended_row(client, 4, IPV4, IPV4, port4, "-"),
            ended_row(client, 6, IPV6, IPV6, port6, "-"),
            *[ended_row(client, 4, IPV4, IPV4, port4, "-")] * 3,
        ]
    )


def connect_again(closed, port):
    """With the same socket, after a failure, which poll() and SO_ERROR report."""
    with socket.socket() as client:
        assert client.connect_ex((IPV4, closed)) == errno.ECONNREFUSED
        assert client.connect_ex((IPV4, port)) == 0
        client.recv(1)


def test_connected_again(expect):
    server = listener(socket.AF_INET, IPV4)
    port, closed = server.getsockname()[1], closed_port(IPV4)
    acceptor = Worker(b"server", serve, [server], 1)
    client = Worker(b"client", connect_again, closed, port)
    client.report()
    acceptor.report()
    expect(
        [
            ended_row(client, 4, IPV4, IPV4, closed, "ECONNREFUSED"),
            ended_row(client, 4, IPV4, IPV4, port, "-"),
        ]
    )


def connect_to_itself():
    """A simultaneous open: the socket receives its own SYN. Returns its port."""
    with socket.socket() as client:
        client.bind((IPV4, 0))
        client.connect(client.getsockname())
        return client.getsockname()[1]


def test_simultaneous_open(expect):
    worker = Worker(b"client", connect_to_itself)
    expect([ended_row(worker, 4, IPV4, IPV4, worker.report(), "-")])


def test_io_uring(expect):
    server = listener(socket.AF_INET, IPV4)
    port, closed = server.getsockname()[1], closed_port(IPV4)
    acceptor = Worker(b"server", accept_by_io_uring, server, 2)
    worker = Worker(b"client", connect_by_io_uring, [port, closed, port])
    assert worker.report() == [0, -errno.ECONNREFUSED, 0]
    acceptor.report()
    rows = [
        ended_row(worker, 4, IPV4, IPV4, to, error)
        for to, error in ((port, "-"), (closed, "ECONNREFUSED"), (port, "-"))
    ]
    expect(rows)


def test_fast_open(expect):
    client, _, port = run_fast_opens(5)
    expect([ended_row(client, 4, IPV4, IPV4, port, "-")] * 5)


def restore(targets):
    """Have sockets that are ESTABLISHED when connect() returns, and no packet sent."""
    for family, address, port in targets:
        with socket.socket(family) as client:
            client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
            client.connect((address, port))
            assert state_of(client) == TCP_ESTABLISHED


def test_restored(expect):
    """As CRIU does it: `podman container restore --tcp-established`."""
    targets = [
        (socket.AF_INET, IPV4, 81),
        (socket.AF_INET6, IPV6, 82),
        (socket.AF_INET6, MAPPED, 83),
    ]
    worker = Worker(b"client", restore, targets)
    worker.report()
    ends = [(4, IPV4, 81), (6, IPV6, 82), (4, IPV4, 83)]
    expect([ended_row(worker, ip, to, to, port, "-") for ip, to, port in ends])


@pytest.fixture
def delay(router):
    """What goes to the router takes DELAY_MS longer."""
    netem = f"dev to_router root netem delay {DELAY_MS}ms".split()
    subprocess.run(["tc", "qdisc", "add", *netem], check=True)
    yield
    subprocess.run(["tc", "qdisc", "del", *netem[:3]], check=True)


def measure(outcomes):
    """Connect to (address, port, errno)s; how long each took this process, in ms."""
    took = []
    for address, port, error in outcomes:
        with socket.socket() as client:
            begin = time.monotonic_ns()
            assert client.connect_ex((address, port)) == error
            took.append((time.monotonic_ns() - begin) / 1e6)
    return took


def test_latency(expect, delay):
    """Between the network's delay and what the client measures around its call; 0 where
    no SYN left.
    """
    errors = [errno.ECONNREFUSED, errno.EHOSTUNREACH] * 3 + [errno.ENETUNREACH]
    hosts = [ROUTER, BEHIND_ROUTER] * 3 + [NO_ROUTE4]
    worker = Worker(b"client", measure, [(h, 81, e) for h, e in zip(hosts, errors)])
    took = worker.report()
    sources = ["198.18.0.1"] * 6 + ["0.0.0.0"]
    rows = [
        ended_row(worker, 4, source, host, 81, errno.errorcode[error])
        for source, host, error in zip(sources, hosts, errors)
    ]
    for latencies in expect(rows):
        *later, immediately = latencies
        assert immediately == 0
        assert all(
            DELAY_MS <= latency <= measured for latency, measured in zip(later, took)
        )


PORTS = range(1, 65536)


def leave_under_way(count):
    """So many connects concurrently, then none."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 99, count + 99))
    clients = [socket.socket() for _ in range(count)]
    for client, port in zip(clients, PORTS):
        start_connect(client, (NOBODY4, port))
    for client in clients:
        client.close()


def test_10007_under_way(expect):
    """When the tools end, running() sees that none is left in their tables."""
    worker = Worker(b"client", leave_under_way, 10007)
    worker.report()
    expect(
        [
            ended_row(worker, 4, IPV4, NOBODY4, port, "closed")
            for port in itertools.islice(PORTS, 10007)
        ]
    )


def hand_over(client):
    """Start a connect and leave its outcome to another process."""
    start_connect(client, (NOBODY4, 7))


def test_the_row_is_of_who_connected(expect):
    """Not of who has the socket, nor of the process that runs when it fails."""
    with socket.socket() as client:
        client.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, 1)
        worker = Worker(b"client", hand_over, client)
        worker.report()
        assert outcome(client) == errno.ETIMEDOUT
    expect([ended_row(worker, 4, IPV4, NOBODY4, 7, "ETIMEDOUT")])


TCP_AO_INFO = 40
AO_REQUIRED = struct.pack("=I44x", 1 << 2)  # struct tcp_ao_info_opt in linux/tcp.h


def connect_without_key():
    """What fails inside of tcp_connect(): a socket that has to sign, without a key."""
    with socket.socket() as client:
        client.setsockopt(socket.IPPROTO_TCP, TCP_AO_INFO, AO_REQUIRED)
        return client.connect_ex((IPV4, 9))


def test_in_tcp_connect(expect):
    """It has left SYN_SENT before the call returns, and has no address any more."""
    with socket.socket() as client:
        try:
            client.setsockopt(socket.IPPROTO_TCP, TCP_AO_INFO, AO_REQUIRED)
        except OSError as error:
            pytest.skip(f"the kernel has no TCP-AO: {error}")
    worker = Worker(b"client", connect_without_key)
    assert worker.report() == errno.EKEYREJECTED
    expect([ended_row(worker, 4, "0.0.0.0", IPV4, 9, "EKEYREJECTED")])


# The last two: what they do is seen by the tools of expect(), too, which does not wait
# for it.


@only_on("trixie")
def test_still_under_way(start):
    """7 have no outcome when the tool ends, and are no rows."""
    (tool,) = start("tcpconnect -m 0", TCPTOOLS_METHOD=best_method())
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(18)]
        for client, port in zip(clients, PORTS):
            start_connect(client, (NOBODY4, port))
        for client in clients[7:]:
            client.close()
        assert len(tool.stop()) == 11
    assert tool.complaints() == ["tcpconnect: 7 connects were still under way"]


@only_on("sid")
def test_min_ms(start, delay):
    """-m alone and with -x: what took at least that long, and no other."""
    commands = ("tcpconnect -m 60", "tcpconnect -x -l -m 60", "tcpconnect -x -m 0")
    tools = start(*commands)
    server = listener(socket.AF_INET, IPV4)
    port, closed = server.getsockname()[1], closed_port(IPV4)
    outcomes = [
        (ROUTER, 81, errno.ECONNREFUSED),
        (IPV4, closed, errno.ECONNREFUSED),
        (NO_ROUTE4, 9, errno.ENETUNREACH),
        (IPV4, port, 0),
        (ROUTER, 82, errno.ECONNREFUSED),
    ]
    worker = Worker(b"client", measure, outcomes)
    took = worker.report()
    sources = ["198.18.0.1", IPV4, "0.0.0.0", IPV4, "198.18.0.1"]
    rows = [
        ended_row(worker, 4, source, host, to, errno.errorcode.get(error, "-"))
        for source, (host, to, error) in zip(sources, outcomes)
    ]
    fast = [line for line, ms in zip(rows, took) if ms < 60]  # in a slow guest, fewer
    slow, slow_failures, failures = (tool.stop() for tool in tools)
    assert failures == [*rows[:3], rows[4]]
    for lines in (slow, slow_failures):
        found = dict(map(shown, lines))
        assert min(found.values()) >= 60
        assert {rows[0], rows[4]} <= set(found) <= set(rows) - set(fast)
    assert all(not shown(line)[0].endswith(" -") for line in slow_failures)
