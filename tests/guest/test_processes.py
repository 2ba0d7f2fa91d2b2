"""Whose connections: -a, -n, --unit, the process and its parent, counts per interval.

Everybody here connects to himself, from and to the same address: what both tools show
of a connection is the same.
"""

import contextlib
import ipaddress
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import (
    DEADLINE,
    TOOLS,
    Tool,
    Worker,
    best_method,
    mounted_cgroups,
    only_at_both_ends,
    own_comm,
    row,
    until,
)
from traffic import connect_often, lost

pytestmark = only_at_both_ends

IPV6_FREEBIND = 78  # linux/in6.h
TOPS = [ipaddress.ip_network(top) for top in ("10.0.0.0/8", "2001:db8:ffff::/48")]
SCOPE = "docker-3f2a9c41d0b7" + 26 * "7e" + ".scope"
CGROUPS = {  # what UNIT is of each
    f"system.slice/{SCOPE}/system.slice/sshd.service": "docker-3f2a9c41d0b7",
    "lxc/101/ns/init.scope": "lxc/101",
    "user.slice/user@1000.service/app.slice/x.scope": "user@1000.service",
    "system.slice/two words.service/worker": "two words.service",
}
COLUMNS = r"(\d+) +(\S+) +(\S+) +(\S+) +(\d+) (\d+)"  # with -c and --per-process


def networks_in(top, seed):
    """64 networks for -a, half of them within others: [(whether it is wanted, it)]."""
    choose, found = random.Random(seed), {}
    while len(found) < 64:
        outer = choose.choice([top, *found])
        if outer.prefixlen < top.max_prefixlen:
            length = choose.randrange(outer.prefixlen + 1, top.max_prefixlen + 1)
            bits = choose.getrandbits(top.max_prefixlen) & int(outer.hostmask)
            inner = (int(outer.network_address) | bits, length)
            network = ipaddress.ip_network(inner, strict=False)
            found[network] = len(found) % 3 != 0
    return [(is_wanted, network) for network, is_wanted in found.items()]


def borders_of(networks, top):
    """The first and the last address of each, and their neighbours outside."""
    ends = {
        int(end) + by
        for _, network in networks
        for end, others in ((network[0], (-1, 0)), (network[-1], (0, 1)))
        for by in others
    }
    addresses = map(type(top[0]), sorted(ends))
    return [str(address) for address in addresses if address in top]


def is_wanted(address, networks):
    """By the longest prefix; others are not wanted, since some are."""
    address = ipaddress.ip_address(address)
    matching = [(net.prefixlen, wanted) for wanted, net in networks if address in net]
    return max(matching)[1] if matching else False


def text_of(networks):
    return ",".join(f"{'' if wanted else '!'}{net}" for wanted, net in networks)


NETWORKS = [networks_in(top, seed) for seed, top in enumerate(TOPS)]
BORDERS = [borders_of(*of_one) for of_one in zip(NETWORKS, TOPS)]


def talk(addresses):
    """Connect to oneself at each address; the port."""
    os.sched_setaffinity(0, {0})
    with socket.create_server(
        ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True
    ) as server:
        port = server.getsockname()[1]
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family) as client:
                if family == socket.AF_INET6:
                    client.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
                client.bind((address, 0))
                client.connect((address, port))
                server.accept()[0].close()
    return port


def talk_in_thread(comm, addresses):
    """The same in a thread of this name; [port, thread ID]."""
    done = []

    def thread():
        pathlib.Path("/proc/thread-self/comm").write_text(comm)
        done.extend((talk(addresses), threading.get_native_id()))

    threads = [threading.Thread(target=thread)]
    threads[0].start()
    threads[0].join()
    return done


def supervise(cgroup, addresses):
    """Have it done by a thread "io-1" of a child "job", which ends immediately, as does
    its cgroup; [child's PID, port, thread ID].
    """

    def job():
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        return talk_in_thread("io-1", addresses)

    child = Worker(b"job", job)
    report = child.report()
    cgroup.rmdir()
    return [child.pid, *report]


def in_cgroup(cgroup, function, *args):
    cgroup.mkdir(parents=True, exist_ok=True)
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    return function(*args)


def expected(pid, comm, addresses, port, **fields):
    """What is known of each of somebody's connections."""
    return [
        {"pid": pid, "tid": pid, "comm": comm, "process": comm, "address": address}
        | {"port": port, "ppid": os.getpid(), "parent": own_comm(), **fields}
        for address in addresses
    ]


def work(top):
    """All that is done in cgroups below `top`; what is known of each connection."""
    known, (some4, some6) = [], (addresses[::41] for addresses in BORDERS)
    for number, (path, unit) in enumerate(CGROUPS.items()):
        addresses = [*some4, *some6] if number else BORDERS[0] + BORDERS[1]
        worker = Worker(b"job", in_cgroup, top / path, talk, addresses)
        where = {"path": f"/{path}", "unit": unit}
        known += expected(worker.pid, "job", addresses, worker.report(), **where)
    where, addresses = {"path": "/", "unit": "-"}, [*some6, *some4]
    for comm in ("jobs", "jo"):
        worker = Worker(comm.encode(), talk, addresses)
        known += expected(worker.pid, comm, addresses, worker.report(), **where)
    worker = Worker(b"other", talk_in_thread, "job", addresses)
    port, tid = worker.report()
    thread = {"tid": tid, "process": "other"}
    known += expected(worker.pid, "job", addresses, port, **thread, **where)
    return known


def work_of_a_short_life(top):
    """The same, where the process and its cgroup are gone immediately."""
    addresses = [BORDERS[0][0], BORDERS[1][0], *BORDERS[0][7::43], *BORDERS[1][7::43]]
    gone = top / "gone.service"
    gone.mkdir()
    number = gone.stat().st_ino
    worker = Worker(b"supervisor", supervise, gone, addresses)
    pid, port, tid = worker.report()
    process = {"process": "job", "ppid": worker.pid, "parent": "supervisor"}
    where = {"tid": tid, "path": None, "unit": str(number)}
    return expected(pid, "io-1", addresses, port, **process, **where)


def serve_forever(server):
    while True:
        with server.accept()[0] as connection:
            connection.sendall(b".")


def load(server, counting):
    """211 connects by two processes, over and over, until each tool has printed three
    tables; {PID: how many}.
    """
    done = {}
    address = server.getsockname()
    deadline = time.monotonic() + DEADLINE
    while not all(has_tables(tool, 3) for tool in counting):
        assert time.monotonic() < deadline, f"waited {DEADLINE} s for three tables"
        workers = [
            (Worker(b"client", connect_often, *address, count), count)
            for count in (101, 110)
        ]
        for worker, count in workers:
            worker.report()
            done[worker.pid] = count
    return done


def has_tables(tool, number):
    """Whether so many intervals are over."""
    return tool.out.read_text().count("\n\n") >= number


def has_empty_table(tool):
    """Whether an interval without a connection is over."""
    return re.search(r"(CONNECTS|ACCEPTS)\n\n", tool.out.read_text())


@contextlib.contextmanager
def all_addresses_local():
    """Those of TOPS are this guest's own."""
    routes = [f"-{top.version} route {{}} local {top} dev lo" for top in TOPS]
    for route in routes:
        subprocess.run(["ip", *route.format("add").split()], check=True)
    yield
    for route in routes:
        subprocess.run(["ip", *route.format("del").split()], check=True)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What is known of all connections, and the tools, which have exited."""
    with mounted_cgroups(tmp_path_factory.mktemp("cgroup2")) as top:
        yield see(tmp_path_factory, best_method(), top)


def see(tmp_path_factory, method, top):
    """The same, with an attach method, and cgroups below `top`."""
    server = socket.create_server(("127.0.0.1", 0), backlog=128)
    acceptor = Worker(b"acceptor", serve_forever, server)
    four, six = map(text_of, NETWORKS)
    count = {"count": f"-T -c -i 1 --per-process -P {server.getsockname()[1]}"}
    rows = {"json": f"--json -a {four}", "table": f"--unit -n job -a {six}"}

    def started(options):
        return running_tools(tmp_path_factory, method, options)

    try:
        # Not beside the others: after each interval it makes system calls on maps, and
        # the kernel may skip all kprobes' programs meanwhile
        with started(count) as counting:
            done = load(server, counting.values())
            until(
                "an interval without a connection",
                lambda: all(map(has_empty_table, counting.values())),
            )
        with started(rows) as printing, all_addresses_local():
            known = work(top)
            for tool in printing.values():  # so that it looks after the end of them
                tool.process.send_signal(signal.SIGSTOP)
            known += work_of_a_short_life(top)
            for tool in printing.values():
                tool.process.send_signal(signal.SIGCONT)
    finally:
        os.kill(acceptor.pid, signal.SIGKILL)
        os.waitpid(acceptor.pid, 0)
    tools = {**counting, **printing}
    return SimpleNamespace(known=known, done=done, tools=tools, acceptor=acceptor.pid)


@contextlib.contextmanager
def running_tools(tmp_path_factory, method, options):
    """{(name, kind): Tool} of both tools with the options of each kind, which trace
    with this method. In the end they exit.
    """
    environment = {"TCPTOOLS_METHOD": method, "TCPTOOLS_DEBUG": "1"}
    environment = {"env": {**os.environ, **environment}}
    tools = {
        (name, kind): Tool(
            tmp_path_factory.mktemp("tool"), f"{name} {words}", **environment
        )
        for name in TOOLS
        for kind, words in options.items()
    }
    try:
        for tool in tools.values():
            tool.wait_for_header()
            assert tool.method() == method
        yield tools
        for tool in tools.values():
            tool.end()
    finally:
        for tool in tools.values():
            tool.process.kill()


@pytest.mark.parametrize("name", TOOLS)
def test_process_and_parent(seen, name):
    """In JSON, of those with -a's IPv4 addresses; the path of a cgroup that exists."""
    tool = seen.tools[name, "json"]
    assert tool.complaints() == []
    fields = ("pid", "tid", "comm", "process", "ppid", "parent", "saddr", "daddr")
    found = [json.loads(line) for line in tool.rows()]
    assert [
        [*(line[field] for field in (*fields, "dport")), line.get("cgroup_path")]
        for line in found
    ] == [
        [*(one[f] for f in fields[:6]), *[one["address"]] * 2, one["port"], one["path"]]
        for one in seen.known
        if "." in one["address"] and is_wanted(one["address"], NETWORKS[0])
    ]


@pytest.mark.parametrize("name", TOOLS)
def test_unit_and_name(seen, name):
    """Of those with -a's IPv6 addresses whose thread or process is called "job"."""
    tool = seen.tools[name, "table"]
    assert tool.complaints() == []
    assert tool.rows() == [
        row(
            one["pid"],
            one["comm"],
            6,
            one["address"],
            one["address"],
            f"{one['port']:<5} {one['unit']}",
        )
        for one in seen.known
        if ":" in one["address"] and is_wanted(one["address"], NETWORKS[1])
        if "job" in (one["comm"], one["process"])
    ]


def tables(tool, titles):
    """[rows] of each interval, of a tool with -T; the titles are as they should be."""
    found = []
    for table in tool.out.read_text().split("\n\n"):
        began, title, *rows = table.splitlines()
        assert re.fullmatch(r"\d\d:\d\d:\d\d", began)
        assert title.split() == titles
        found.append(rows)
    return found


def test_connects_per_interval(seen):
    """No connect is in two tables, and none is missing but those reported lost."""
    tool = seen.tools["tcpconnect", "count"]
    found = dict.fromkeys(seen.done, 0)
    titles = ["PID", "COMM", "SADDR", "DADDR", "DPORT", "CONNECTS"]
    for rows in tables(tool, titles):
        for pid, comm, saddr, daddr, _, count in (
            re.fullmatch(COLUMNS, line).groups() for line in rows
        ):
            assert (comm, saddr, daddr) == ("client", "127.0.0.1", "127.0.0.1")
            found[int(pid)] += int(count)
    missing = sum(seen.done.values()) - sum(found.values())
    assert missing == lost(tool)
    assert all(found[pid] <= count for pid, count in seen.done.items())


def test_accepts_per_interval(seen):
    tool = seen.tools["tcpaccept", "count"]
    titles = ["PID", "COMM", "RADDR", "LPORT", "ACCEPTS"]
    rows = [line.split() for rows in tables(tool, titles) for line in rows]
    process = [str(seen.acceptor), "acceptor", "127.0.0.1"]
    assert all(columns[:3] == process for columns in rows)
    assert sum(int(columns[-1]) for columns in rows) + lost(tool) == sum(
        seen.done.values()
    )


def test_an_interval_without_a_connection_has_its_titles(seen):
    assert all(has_empty_table(seen.tools[name, "count"]) for name in TOOLS)
