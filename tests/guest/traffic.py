"""Traffic whose connections are known to the last column, and what the tools should
print of it.
"""

import ctypes
import errno
import os
import pathlib
import random
import re
import select
import socket
import struct
import threading

from conftest import IPV4, IPV6, Worker, row, until

MAPPED = f"::ffff:{IPV4}"
LINGER_0 = b"\1\0\0\0\0\0\0\0"  # close() resets the connection
CLONE_NEWNS = 0x00020000
TCP_FASTOPEN_CONNECT = 30  # linux/tcp.h
IPPROTO_MPTCP = 262
MPTCP_ENABLED = pathlib.Path("/proc/sys/net/mptcp/enabled")  # if the kernel has it


def listener(family, address, backlog=128, proto=0):
    server = socket.socket(family, proto=proto)
    if family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind((address, 0))
    server.listen(backlog)
    return server


def listeners():
    """One for IPv4, one for IPv6, one that takes both, and their ports."""
    servers = [
        listener(socket.AF_INET, IPV4),
        listener(socket.AF_INET6, IPV6),
        listener(socket.AF_INET6, "::"),
    ]
    return servers, [server.getsockname()[1] for server in servers]


def waiting(server):
    """How many connections wait to be accepted: tcpi_unacked, which means that for a
    listening socket.
    """
    info = server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
    return struct.unpack_from("=I", info, 24)[0]


def connect_and_reset(address):
    """A connection that its client resets immediately."""
    client = socket.create_connection(address)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
    client.close()


def plain(address):
    return address.replace("::ffff:", "")


def ends(sock):
    """[IP version on the wire, local address, remote address, local port, remote port]
    as the socket reports them.
    """
    local, remote = sock.getsockname(), sock.getpeername()
    ip = 6 if ":" in plain(remote[0]) else 4
    return [ip, plain(local[0]), plain(remote[0]), local[1], remote[1]]


def serve(servers, count):
    """Accept `count` connections from several listeners, each greeted and closed; their
    ends in order.
    """
    seen = []
    while len(seen) < count:
        for server in select.select(servers, [], [])[0]:
            with server.accept()[0] as connection:
                seen.append(ends(connection))
                connection.sendall(b".")
    return seen


def connect_to(targets):
    """Connect to (family, address, port) after (family, address, port), each accepted
    before the next; their ends.
    """
    os.sched_setaffinity(0, {0})
    seen = []
    for family, address, port in targets:
        with socket.socket(family) as client:
            client.connect((address, port))
            seen.append(ends(client))
            client.recv(1)
    return seen


def make_noise(count):
    """What must not show: UDP and unix sockets connected, unix sockets accepted, TCP
    connects that fail immediately.

    On a CPU of its own: a preemptible kernel may skip an fexit program for a connect
    while it is busy with another.
    """
    os.sched_setaffinity(0, {1})
    for _ in range(count):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect((IPV4, 53))
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
            udp.connect((IPV6, 53))
        with (
            socket.socket(socket.AF_UNIX) as server,
            socket.socket(socket.AF_UNIX) as client,
        ):
            server.bind("")
            server.listen()
            client.connect(server.getsockname())
            server.accept()[0].close()
        for family, address in (
            (socket.AF_INET, "203.0.113.1"),
            (socket.AF_INET6, "2001:db8:ffff::1"),
        ):
            with socket.socket(family) as tcp:
                assert tcp.connect_ex((address, 9)) == errno.ENETUNREACH


def run_mixed_traffic():
    """23 IPv4, 19 IPv6 and 7 IPv4-mapped connections in mixed order, among noise:
    (connect rows, accept rows).
    """
    servers, ports = listeners()
    targets = [(socket.AF_INET, IPV4, ports[0])] * 23 + [
        (socket.AF_INET6, IPV6, ports[1])
    ] * 19
    targets += [(socket.AF_INET6, MAPPED, ports[2])] * 7
    random.Random(49).shuffle(targets)
    server = Worker(b"server", serve, servers, len(targets))
    noise = Worker(b"noise", make_noise, 5)
    client = Worker(b"client", connect_to, targets)
    connects = [
        row(client.pid, "client", ip, s, d, dport)
        for ip, s, d, _, dport in client.report()
    ]
    accepts = [
        row(server.pid, "server", ip, r, local, lport)
        for ip, local, r, lport, _ in server.report()
    ]
    noise.report()
    for sock in servers:
        sock.close()
    assert len(connects) == len(accepts) == 49
    return connects, accepts


def lost(tool):
    """How many events the tool reported as lost in the end, after it reported them in
    parts.
    """
    said = [line for line in tool.complaints() if "under way" not in line]
    if not said:
        return 0
    parts = [re.fullmatch(r"tcp\w+: lost (\d+) events: .+", line) for line in said[:-1]]
    total = sum(int(part[1]) for part in parts)
    assert said[-1] == f"{said[-1].partition(':')[0]}: lost {total} events in total"
    return total


def connect_nonblocking(cpu, address, count):
    """Start `count` connects, on one CPU, to where nobody answers: ports 1, 2, 3 and so
    on, to 65535 and again.
    """
    os.sched_setaffinity(0, {cpu})
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for i in range(count):
        with socket.socket(family) as client:
            client.setblocking(False)
            assert client.connect_ex((address, port_of(i))) == errno.EINPROGRESS


def port_of(i):
    return i % 65535 + 1


def accept_in_threads(server, count, ready):
    """Accept `count` connections, each in a thread of its own, all blocked in accept()
    concurrently; the remote ports.
    """
    ports = []

    def accept():
        pathlib.Path("/proc/thread-self/comm").write_text(
            "blocked"
        )  # Python 3.14 names threads
        connection, peer = server.accept()
        ports.append(peer[1])
        connection.close()

    threads = [threading.Thread(target=accept) for _ in range(count)]
    for thread in threads:
        thread.start()
    until("threads blocked in accept()", lambda: count_accepting() == count)
    os.write(ready, b".")
    for thread in threads:
        thread.join()
    return ports


def count_accepting():
    """How many threads of this process are blocked in accept()."""
    return sum(map(is_accepting, os.listdir("/proc/self/task")))


def is_accepting(tid):
    """Whether a thread is blocked in accept()."""
    call = pathlib.Path(f"/proc/{tid}/syscall").read_text().split()[0]
    return call in ("43", "288")  # accept, accept4 on x86-64


def on_cpu(cpu, function, *args):
    os.sched_setaffinity(0, {cpu})
    return function(*args)


def connect_often(address, port, count):
    for _ in range(count):
        with socket.create_connection((address, port)) as client:
            client.recv(1)


def closed_port(address):
    """One where nobody listens."""
    with listener(socket.AF_INET, address) as closed:
        return closed.getsockname()[1]


def connect_refused(address):
    """Connect to a port where nobody listens; the port."""
    port = closed_port(address)
    with socket.socket() as client:
        assert client.connect_ex((address, port)) == errno.ECONNREFUSED
    return port


def connect_to_itself(count):
    """Connect and accept, one after the other; the port."""
    with listener(socket.AF_INET, "127.0.0.1") as server:
        port = server.getsockname()[1]
        for _ in range(count):
            with socket.create_connection(("127.0.0.1", port)):
                server.accept()[0].close()
    return port


def leave_mount_namespace():
    """This process gets a mount namespace of its own."""
    assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0


def run_fast_opens(count):
    """Connections by TCP Fast Open: (client, server, port)."""
    switch = pathlib.Path("/proc/sys/net/ipv4/tcp_fastopen")
    before, counter = switch.read_text(), count_fast_opens()
    switch.write_text("3")
    with listener(socket.AF_INET, IPV4) as listening:
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        port = listening.getsockname()[1]
        server = Worker(b"server", accept_fast_open, listening, count)
        client = Worker(b"client", connect_fast_open, port, count)
        client.report()
        server.report()
    switch.write_text(before)
    assert count_fast_opens() > counter
    return client, server, port


def count_fast_opens():
    """How many connects since the boot had data in their SYN."""
    names, values, *_ = pathlib.Path("/proc/net/netstat").read_text().splitlines()
    return int(dict(zip(names.split(), values.split()))["TCPFastOpenActive"])


def connect_fast_open(port, count):
    """By sendto() and by a connect() that waits for the data. The first one asks for a
    cookie, the others carry data in their SYN; each is greeted.
    """
    for i in range(count):
        with socket.socket() as client:
            if i % 2:
                client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
                client.connect((IPV4, port))
                client.send(b"data")
            else:
                assert client.sendto(b"data", socket.MSG_FASTOPEN, (IPV4, port)) == 4
            client.recv(1)


def accept_fast_open(server, count):
    for _ in range(count):
        with server.accept()[0] as peer:
            assert peer.recv(4) == b"data"
            peer.send(b".")
