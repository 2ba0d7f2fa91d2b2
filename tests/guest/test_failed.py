"""-x: connects that fail, immediately or later, with fexit and with kprobes; and what
is no failure.
"""

import contextlib
import ctypes
import errno
import select
import socket
import struct
import subprocess

import pytest
from conftest import (
    IPV4,
    IPV6,
    NOBODY4,
    Worker,
    row,
    rows_until,
    running,
)
from traffic import (
    LINGER_0,
    MAPPED,
    connect_and_reset,
    connect_refused,
    listener,
    listeners,
    serve,
)

METHODS = ("fexit", "kprobe")
BEHIND_ROUTER = "198.51.100.7"  # a router answers that it cannot be reached
REJECTED4, REJECTED6 = "192.0.2.66", "2001:db8::66"
NO_ROUTE4, NO_ROUTE6 = "203.0.113.1", "2001:db8:ffff::1"
TCP_SYNCNT = 7
IPV6_RECVERR = 25
TCP_CLOSE = 7  # a state


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    commands = {method: ("tcpconnect -x", method) for method in METHODS}
    with running(tmp_path_factory, commands) as found:
        yield found


@pytest.fixture
def expect(tools):
    """expect(rows): these are what the tools print of this test."""
    before = {method: len(tool.rows()) for method, tool in tools.items()}

    def expect_rows(rows):
        marker = Worker(b"marker", connect_refused, IPV4)
        marker.report()
        for method, tool in tools.items():
            new = rows_until(tool, before[method], marker.pid)
            assert (method, new) == (method, rows)

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


def failed_row(worker, ip, saddr, daddr, port, error):
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


def outcome(client):
    """The errno of a non-blocking connect that fails."""
    while client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_CLOSE:
        select.select([], [client], [], 0.01)
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
        rows.append(failed_row(worker, ip, shown, shown, port, "ECONNREFUSED"))
    expect(rows)


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
def test_no_answer(expect, blocking):
    worker = Worker(b"client", connect, socket.AF_INET, NOBODY4, 80, blocking)
    assert worker.report() == errno.ETIMEDOUT
    expect([failed_row(worker, 4, IPV4, NOBODY4, 80, "ETIMEDOUT")])


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "nonblocking"])
def test_a_router_says_no(expect, router, blocking):
    worker = Worker(b"client", connect, socket.AF_INET, BEHIND_ROUTER, 443, blocking)
    assert worker.report() == errno.EHOSTUNREACH
    expect([failed_row(worker, 4, "198.18.0.1", BEHIND_ROUTER, 443, "EHOSTUNREACH")])


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
            state = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
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
    expect([failed_row(worker, ip, saddr, daddr, 443, "ECONNREFUSED")] * count)


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
    expect([failed_row(worker, ip, saddr, daddr, 9999, errno.errorcode[error])])


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
    expect([failed_row(worker, 4, IPV4, IPV4, port, "EADDRNOTAVAIL")])


def connect_to_no_address():
    """errno of a connect() to an address of no kind that TCP knows."""
    libc = ctypes.CDLL(None, use_errno=True)
    with socket.socket() as client:
        assert libc.connect(client.fileno(), b"\x77\x77" + bytes(14), 16) == -1
    return ctypes.get_errno()


def test_no_address(expect):
    worker = Worker(b"client", connect_to_no_address)
    assert worker.report() == errno.EAFNOSUPPORT
    expect([failed_row(worker, 4, "0.0.0.0", "0.0.0.0", 0, "EAFNOSUPPORT")])


def give_up(port):
    """What is no failure: closed before the answer, disconnected, connected, and reset
    when connected; UDP.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for give_up in (
        lambda client: client.close(),
        lambda client: libc.connect(client.fileno(), bytes(16), 16),
        lambda client: client.shutdown(socket.SHUT_RDWR),
        lambda client: client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0),
    ):
        with socket.socket() as client:
            client.setblocking(False)
            assert client.connect_ex((NOBODY4, 80)) == errno.EINPROGRESS
            give_up(client)
    with socket.create_connection((IPV4, port)) as client:
        client.recv(1)
    connect_and_reset((IPV4, port))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        assert client.connect_ex((NO_ROUTE4, 53)) == errno.ENETUNREACH


def test_no_failure(expect):
    server = listener(socket.AF_INET, IPV4)
    acceptor = Worker(b"server", serve, [server], 1)
    client = Worker(b"client", give_up, server.getsockname()[1])
    client.report()
    acceptor.report()
    expect([])


def hand_over(client):
    """Start a connect and leave its outcome to another process."""
    client.setblocking(False)
    assert client.connect_ex((NOBODY4, 7)) == errno.EINPROGRESS


def test_the_row_is_of_who_connected(expect):
    """Not of who has the socket, nor of the process that runs when it fails."""
    with socket.socket() as client:
        client.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, 1)
        worker = Worker(b"client", hand_over, client)
        worker.report()
        assert outcome(client) == errno.ETIMEDOUT
    expect([failed_row(worker, 4, IPV4, NOBODY4, 7, "ETIMEDOUT")])


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
    expect([failed_row(worker, 4, "0.0.0.0", IPV4, 9, "EKEYREJECTED")])
