"""Each two options together, in the lines of command_lines.py, on real traffic: each
filter alone hides some of it.
"""

import contextlib
import errno
import json
import os
import re
import socket

import pytest
from command_lines import LINES
from conftest import (
    IPV4,
    IPV6,
    Worker,
    best_method,
    json_count,
    json_counts,
    json_line,
    only_on,
    row,
    until,
)
from test_cgroup_filters import make_map
from test_columns import ask, without_age, without_latency
from test_options import NOBODY
from traffic import leave_mount_namespace, waiting

BACKLOG = 17
NAMES = {4: "www.example.com", 6: "six.example.com"}
ADDRESSES = {4: IPV4, 6: IPV6}
UNIT = "app.service"


def visit(server, ip, count, address=None):
    """Connect `count` times to a socket's port, and accept these if it listens. Without
    an address it is the one of ADDRESSES.

    All are open concurrently. Returns what is known of each.
    """
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[ip]
    address = address or ADDRESSES[ip]
    port = server.getsockname()[1]
    listens = server.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    with contextlib.ExitStack() as stack:
        known = []
        for left in reversed(range(count)):
            client = stack.enter_context(socket.socket(family))
            client.bind((address, 0))
            lport = client.getsockname()[1]
            error = client.connect_ex((address, port))
            assert error == (0 if listens else errno.ECONNREFUSED)
            one = {"ip": ip, "address": address, "lport": lport, "rport": port}
            known.append({**one, "left": left, "error": error})
        if listens:
            until(f"{count} connections", lambda: waiting(server) == count)
            for _ in range(count):
                server.accept()[0].close()
    return known


def visit_all(go, uid, mount_namespace, visits):
    """Once signalled, as this user, in a mount namespace of its own or not."""
    os.read(go, 1)
    os.sched_setaffinity(0, {0})
    if mount_namespace:
        leave_mount_namespace()
    os.setresuid(uid, uid, uid)
    ask(NAMES[4])
    ask(NAMES[6], "AAAA")
    return [known for args in visits for known in visit(*args)]


def visited_servers():
    """[one that listens, one that does not, two others], and all visits to them."""
    servers = [socket.socket(socket.AF_INET6) for _ in range(4)]  # IPv4 too
    for server in servers:
        server.bind(("::", 0))
    listening, closed, *others = servers
    for server in (listening, others[0]):
        server.listen(BACKLOG)
    visits = [(server, ip, 1) for server in others for ip in (4, 6)]
    visits += [(listening, 4, 5), (listening, 6, 3), (closed, 4, 2), (closed, 6, 7)]
    # Not in -a
    visits += [(listening, 4, 1, "127.0.0.1"), (listening, 6, 1, "::1")]
    visits += [(closed, 4, 1, "127.0.0.1"), (closed, 6, 1, "::1")]
    return servers, visits


def start_visitors(cgroup, elsewhere, visits):
    """[(worker, the pipe that signals it)]: each but the last fails one filter."""
    workers = []
    for comm, directory, uid, mount_namespace in (
        (b"it", cgroup, NOBODY, False),  # not in -p
        (b"it", cgroup, 0, False),  # not in -u
        (b"its", cgroup, NOBODY, False),  # not in -n
        (b"it", elsewhere, NOBODY, False),  # not in --cgroup
        (b"it", cgroup / "below", NOBODY, False),  # not in --cgroupmap
        (b"it", cgroup, NOBODY, True),  # not in --mntnsmap
        (b"it", cgroup, NOBODY, False),  # wanted
    ):
        directory.mkdir(exist_ok=True)
        reader, go = os.pipe()
        worker = Worker(comm, visit_all, reader, uid, mount_namespace, visits)
        (directory / "cgroup.procs").write_text(str(worker.pid))
        workers.append((worker, go))
    return workers


@pytest.fixture
def trace(start, cgroups, bpffs, names):
    """trace(name) gives the tools of all its lines, after the traffic, and what all
    filters but -4 and -6 let through: what one process does at two ports.
    """

    def run_lines(name):
        servers, visits = visited_servers()
        ports = [server.getsockname()[1] for server in servers[:2]]
        cgroup, elsewhere = cgroups / UNIT, cgroups / "elsewhere"
        workers = start_visitors(cgroup, elsewhere, visits)
        inodes = [directory.stat().st_ino for directory in (cgroup, elsewhere)]
        here = os.stat("/proc/self/ns/mnt").st_ino
        values = {
            "pids": ",".join(str(worker.pid) for worker, _ in workers[1:]),
            "ports": ",".join(map(str, ports)),
            "four": IPV4,
            "six": IPV6,
            "cgroup": cgroup,
            "cgroups": make_map(bpffs / "cgroups", ids=inodes),
            "namespaces": make_map(bpffs / "namespaces", ids=[here]),
        }
        commands = [f"{name} {line.format(**values)}" for line in LINES[name]]
        tools = start(*commands, TCPTOOLS_METHOD=best_method())
        for worker, go in workers:
            os.write(go, b".")
            known = worker.report()  # in the end what is known of the wanted one
        for tool in tools:
            tool.end()
            assert tool.complaints() == []
        wanted = {"pid": worker.pid, "cgroup": inodes[0]}
        return tools, [
            {**wanted, **one}
            for one in known
            if one["rport"] in ports and one["address"] in ADDRESSES.values()
        ]

    return run_lines


def timed(tool):
    """The header and the rows without TIME and TIME(s), which have their form and
    order, and without a name's age and LAT(ms).
    """
    title, *lines = tool.out.read_text().splitlines()
    lines = [without_latency(without_age(line)) for line in lines]
    shown = [line.split(maxsplit=2) for line in lines]
    for column, form in enumerate((r"\d\d:\d\d:\d\d", r"\d+\.\d{3}")):
        assert all(re.fullmatch(form, line[column]) for line in shown)
    seconds = [float(line[1]) for line in shown]
    assert seconds[0] == 0 and seconds == sorted(seconds)
    assert title.startswith("TIME     TIME(s)   ")
    return [title[len("TIME     TIME(s)   ") :], *(line[2] for line in shown)]


def table_row(one, last):
    """With a leading UID, and the client's port between the addresses."""
    address = ADDRESSES[one["ip"]]
    other = f"{one['lport']:<6} {address:<16}"
    last = f"{one['rport']:<5} {last}"
    return f"{NOBODY:<6} {row(one['pid'], 'it', one['ip'], address, other, last)}"


def objects(tool):
    """Without their times, which have their order, a name's age, and with -x and -l
    how long it took.
    """
    found = [json.loads(line) for line in tool.rows()]
    times = [line.pop("ts") for line in found]
    assert times == sorted(times)
    for line in found:
        assert (line.pop("query_age_ms", None) is None) == ("query" not in line)
        is_outcome = line["event"] == "connect_failed"
        assert (line.pop("latency_us", None) is not None) == is_outcome
    return found


def json_object(one, event, **fields):
    address = ADDRESSES[one["ip"]]
    ends = address, one["lport"], address, one["rport"]
    cgroup = one["cgroup"], f"/{UNIT}"
    return json_line(event, one["pid"], NOBODY, "it", one["ip"], ends, cgroup, **fields)


def of_ip(known, ip):
    return [one for one in known if one["ip"] == ip]


@only_on("trixie")
def test_tcpconnect(trace):
    (table4, table6, json6, json4, count4, count6), known = trace("tcpconnect")
    failed = [one for one in known if one["error"]]
    front = "UID    PID     COMM         "
    outcome = "IP SADDR            LPORT  DADDR            DPORT "
    outcome += f"ERR           LAT(ms)   {'UNIT':<24} QUERY"
    assert timed(table4) == [
        f"{front}{outcome}",
        *(
            table_row(one, f"ECONNREFUSED  {UNIT:<24} {NAMES[4]}")
            for one in of_ip(failed, 4)
        ),
    ]
    assert timed(table6) == [
        f"{front}IP SADDR            LPORT  DADDR            DPORT {'UNIT':<24} QUERY",
        *(table_row(one, f"{UNIT:<24} {NAMES[6]}") for one in of_ip(known, 6)),
    ]
    assert objects(json6) == [
        json_object(one, "connect_failed", error="ECONNREFUSED", query=NAMES[6])
        for one in of_ip(failed, 6)
    ]
    assert objects(json4) == [
        json_object(one, "connect", query=NAMES[4]) for one in of_ip(known, 4)
    ]
    listening, closed = (known[n]["rport"] for n in (0, -1))
    process = f"{known[0]['pid']:<7} it           "
    titles = "PID     COMM         SADDR            DADDR            DPORT CONNECTS"
    assert count4.rows() == [
        titles,
        f"{process}{IPV4:<16} {IPV4:<16} {listening:<5} 5",
        f"{process}{IPV4:<16} {IPV4:<16} {closed:<5} 2",
    ]
    pid, where = known[0]["pid"], (known[0]["cgroup"], f"/{UNIT}")
    assert json_counts(count6) == [
        json_count("connects", "it", IPV6, port, where, count, pid=pid)
        for port, count in ((closed, 7), (listening, 3))
    ]


@only_on("trixie")
def test_tcpaccept(trace):
    (table4, table6, json6, json4, count4, count6), known = trace("tcpaccept")
    accepted = [one for one in known if not one["error"]]
    titles = "UID    PID     COMM         IP RADDR            RPORT  LADDR            "
    for tool, ip in ((table4, 4), (table6, 6)):
        assert timed(tool) == [
            f"{titles}LPORT QLEN  QMAX  UNIT",
            *(
                table_row(one, f"{one['left']:<5} {BACKLOG:<5} {UNIT}")
                for one in of_ip(accepted, ip)
            ),
        ]
    for tool, ip in ((json4, 4), (json6, 6)):
        assert objects(tool) == [
            json_object(one, "accept", qlen=one["left"], qmax=BACKLOG)
            for one in of_ip(accepted, ip)
        ]
    port = accepted[0]["rport"]
    process = f"{known[0]['pid']:<7} it           "
    titles = "PID     COMM         RADDR            LPORT ACCEPTS"
    assert count4.rows() == [titles, f"{process}{IPV4:<16} {port:<5} 5"]
    pid, where = known[0]["pid"], (known[0]["cgroup"], f"/{UNIT}")
    assert json_counts(count6) == [
        json_count("accepts", "it", IPV6, port, where, 3, pid=pid)
    ]
