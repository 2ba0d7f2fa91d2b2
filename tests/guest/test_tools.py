"""Both tools against known traffic on this guest's own kernel.

Every count of connections is a prime number.
"""

import contextlib
import os
import pathlib
import signal
import socket
import threading

from conftest import (
    BTF,
    DEADLINE,
    IPV4,
    IPV6,
    TOOLS,
    TOP,
    Worker,
    best_method,
    both_methods_on_oldest,
    btf_without,
    changed_btf,
    failures,
    hidden,
    json_count,
    json_counts,
    only_at_both_ends,
    only_on,
    probed_functions,
    row,
    until,
)
from test_kinds import run_container
from test_options import NOBODY, as_user
from test_processes import in_cgroup
from traffic import (
    connect_often,
    connect_to,
    listener,
    listeners,
    run_mixed_traffic,
    serve,
)


def test_every_connection_once(start):
    """Two instances of each tool beside each other, with both methods."""
    titles = (
        "PID     COMM         IP SADDR            DADDR            DPORT\n",
        "PID     COMM         IP RADDR            LADDR            LPORT\n",
    )
    hooks = {"tcp_connect", "security_sock_graft"}
    with_fexit = start(*TOOLS, TCPTOOLS_METHOD="fexit")
    assert probed_functions() & hooks == set()
    with_kprobes = start(*TOOLS, TCPTOOLS_METHOD="kprobe")
    assert probed_functions() & hooks == hooks
    connects, accepts = run_mixed_traffic()
    for method, tools in (("fexit", with_fexit), ("kprobe", with_kprobes)):
        assert [tool.method() for tool in tools] == [method, method]
        assert tools[0].stop(signal.SIGINT) == connects
        assert tools[1].stop(signal.SIGTERM) == accepts
        assert [tool.complaints() for tool in tools] == [[], []]
        for tool, title in zip(tools, titles):
            assert tool.out.read_text().startswith(title)
    # They compile with a file of one symbol in its place, which nobody else sees
    assert pathlib.Path("/proc/kallsyms").read_bytes().count(b"\n") > 50021


@only_at_both_ends
def test_neither_btf_nor_headers(tmp_path):
    """No BTF, or one that is cut short, and no headers either."""
    half = changed_btf(tmp_path, lambda whole: whole[: len(whole) // 2])
    for without_btf in (hidden("/sys/kernel/btf"), half):
        with without_btf:
            said = failures()
        for name, line in said.items():
            error = f"no usable BTF ({BTF}) and no kernel headers "
            assert line.startswith(f"{name}: error: {error}")


@only_at_both_ends
def test_unprivileged():
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    said = failures(wrapper=nobody)
    assert said == {
        name: f"{name}: error: needs root: try sudo {TOP / name}\n" for name in TOOLS
    }


@only_on("sid")
def test_kernel_without_ipv6(start, tmp_path):
    """As the BTF of one has it.

    With fexit the IPv6 connections that this kernel makes all the same do not show. It
    has no sockets that make IPv4-mapped ones, so there are none here.
    """
    with btf_without(tmp_path, "skc_v6_daddr", "skc_v6_rcv_saddr", "tcp_v6_connect"):
        (tool,) = start("tcpconnect", TCPTOOLS_METHOD="fexit")
    servers, (port, port6, _) = listeners()
    both = [(socket.AF_INET, IPV4, port), (socket.AF_INET6, IPV6, port6)]
    server = Worker(b"server", serve, servers, 14)
    client = Worker(b"client", connect_to, both * 7)
    client.report()
    server.report()
    assert tool.stop() == [row(client.pid, "client", 4, IPV4, IPV4, port)] * 7
    assert tool.complaints() == [
        "tcpconnect: this kernel has no IPv6: tracing IPv4 only"
    ]


@only_on("sid")
def test_ipv6_in_a_module(start, tmp_path):
    """Its functions are not in the kernel's BTF: no fexit, and kprobes see all."""
    with btf_without(tmp_path, "tcp_v6_connect"):
        (tool,) = start("tcpconnect")
    assert tool.method() == "kprobe"
    connects, _ = run_mixed_traffic()
    assert tool.stop() == connects
    assert tool.complaints() == []


@both_methods_on_oldest
def test_counts_as_json(start, cgroups, method):
    """A line for each name of a process, cgroup and network namespace, and with
    --per-process for each process. A cgroup that is gone has no path.
    """
    connects, accepts = start(
        "tcpconnect -c --json",
        "tcpaccept --json --per-process",
        TCPTOOLS_METHOD=method,
    )
    server = listener(socket.AF_INET, IPV4)
    port = server.getsockname()[1]
    acceptor = Worker(b"server", serve, [server], 31)
    directories = [cgroups / name for name in (".", "web.service", "gone")]
    for comm, at, count in (
        *((b"client", 0, 3), (b"client", 0, 4), (b"client", 1, 5)),
        *((b"other", 1, 2), (b"client", 2, 17)),
    ):
        visit = connect_often, IPV4, port, count
        Worker(comm, in_cgroup, directories[at], *visit).report()
    acceptor.report()
    contained = Worker(b"contained", run_container)
    pid, _, inner = contained.report()
    root, web, gone = (directory.stat().st_ino for directory in directories)
    directories[2].rmdir()
    connects.end()
    accepts.end()
    found = json_counts(connects)
    within = next(line for line in found if line["process"] == "contained")
    elsewhere = {"netns": within["netns"]}
    assert within["netns"] != os.stat("/proc/self/ns/net").st_ino
    one = "contained", "127.0.0.1", inner, (root, "/"), 3
    assert found == [
        json_count("connects", "client", IPV4, port, (gone,), 17),
        json_count("connects", "client", IPV4, port, (root, "/"), 7),
        json_count("connects", "client", IPV4, port, (web, "/web.service"), 5),
        json_count("connects", *one, **elsewhere),
        json_count("connects", "other", IPV4, port, (web, "/web.service"), 2),
    ]
    assert json_counts(accepts) == [
        json_count("accepts", "server", IPV4, port, (root, "/"), 31, pid=acceptor.pid),
        json_count("accepts", *one, pid=pid, **elsewhere),
    ]
    assert [tool.complaints() for tool in (connects, accepts)] == [[], []]


def visit_in_thread(comm, ports):
    """Connect to each port, in a thread of this name."""

    def visit():
        pathlib.Path("/proc/thread-self/comm").write_text(comm)
        for port in ports:
            connect_often(IPV4, port, 1)

    thread = threading.Thread(target=visit)
    thread.start()
    thread.join()


def test_ranges_and_not(start):
    """Both ends of ranges and what is beside them; what a ! excludes, also within."""
    ports = [7000, 7001, 7002, 7003, 7004, 7005, 7008]
    servers = [socket.create_server((IPV4, port)) for port in ports]
    accepts = [
        Worker(b"server", serve, some, 7 * len(some))
        for some in (servers[:-1], servers[-1:])
    ]
    clients = []
    for comm, thread, uid in (
        *(("client", "client", 0), ("other", "client", 0), ("client", "other", 0)),
        *(("client", "client", NOBODY), ("clients", "clients", 0)),
        *(("other", "other", 0), ("client", "client", 0)),
    ):
        reader, go = os.pipe()
        visit = uid, reader, visit_in_thread, thread, ports
        client = Worker(comm.encode(), as_user, *visit)
        clients.append((client, go, comm, thread, uid))
    pids = sorted(client.pid for client, *_ in clients)
    by_port, by_pid, accepted = start(
        "tcpconnect -P '!7003,7001-7004' -n '!other' -u '!nobody'",
        f"tcpconnect -P 7001,7008-7009 -p '{pids[1]}-{pids[5]},!{pids[2]}-{pids[3]}'",
        f"tcpaccept -P '7000-7100,!7001-7002,!7005' -p '!{accepts[1].pid}'",
        TCPTOOLS_METHOD=best_method(),
    )
    known = []
    for client, go, comm, thread, uid in clients:
        os.write(go, b".")
        client.report()
        for port in ports:
            shown = row(client.pid, thread, 4, IPV4, IPV4, port)
            known.append((shown, port, client.pid, {comm, thread}, uid))
    for server in accepts:
        server.report()
    assert by_port.stop() == [
        line
        for line, port, _, names, uid in known
        if port in (7001, 7002, 7004) and "other" not in names and uid != NOBODY
    ]
    assert by_pid.stop() == [
        line
        for line, port, pid, *_ in known
        if port in (7001, 7008) and pid in (pids[1], pids[4], pids[5])
    ]
    assert accepted.stop() == [
        row(accepts[0].pid, "server", 4, IPV4, IPV4, port)
        for _, port, *_ in known
        if port in (7000, 7003, 7004)
    ]
    assert [tool.complaints() for tool in (by_port, by_pid, accepted)] == [[]] * 3


def connect_in_threads(port, count, go):
    """Once signalled, connect `count` times, each in a thread."""
    os.sched_setaffinity(0, {0})
    os.read(go, 1)
    for _ in range(count):
        thread = threading.Thread(target=connect_often, args=(IPV4, port, 1))
        thread.start()
        thread.join()


@only_at_both_ends
def test_pid_is_a_process_not_a_thread(start):
    server = listener(socket.AF_INET, IPV4)
    port = server.getsockname()[1]
    go, tell = os.pipe()
    client = Worker(b"client", connect_in_threads, port, 11, go)
    (tool,) = start(f"tcpconnect -p {client.pid}", TCPTOOLS_METHOD=best_method())
    os.write(tell, b".")
    serve([server], 11)
    client.report()
    rows = tool.stop()
    assert len(rows) == 11
    assert all(line.startswith(f"{client.pid:<7} ") for line in rows)


@only_on("trixie")
def test_reader_gone(start):
    """As with | head -3: exits by itself, quietly, once the reader is gone.

    It needs no further row for that.
    """
    reader, writer = os.pipe()
    (tool,) = start("tcpconnect", options={"pipe": writer})
    os.close(writer)
    connects, _ = run_mixed_traffic()
    os.set_blocking(reader, False)
    read = []

    def has_rows():
        with contextlib.suppress(BlockingIOError):
            read.append(os.read(reader, 4096))
        return b"".join(read).count(b"\n") > 2

    until("two rows", has_rows)
    os.close(reader)
    assert tool.process.wait(DEADLINE) == 0
    assert b"".join(read).decode().splitlines()[1:3] == connects[:2]
    assert tool.complaints() == []


@only_on("trixie")
def test_disk_full():
    said = failures(["tcpaccept"], ("sh", "-c", 'exec "$0" >/dev/full'))
    error = "tcpaccept: error: cannot write: No space left on device\n"
    assert said == {"tcpaccept": error}
