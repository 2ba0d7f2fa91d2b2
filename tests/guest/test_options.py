"""The options against the same traffic: two users' processes, over IPv4, IPv6 and IPv4
through IPv6 sockets.
"""

import calendar
import contextlib
import json
import os
import random
import re
import socket
import time

from conftest import (
    DEADLINE,
    IPV4,
    IPV6,
    TOOLS,
    Worker,
    best_method,
    btf_without,
    json_line,
    only_at_both_ends,
    own_comm,
    row,
)
from traffic import (
    MAPPED,
    connect_and_reset,
    connect_to,
    listener,
    listeners,
    run_mixed_traffic,
    serve,
)

pytestmark = only_at_both_ends

NOBODY = 65534  # the UID
ENDS = ("ip", "local", "remote", "lport", "rport")  # as traffic.ends() has them
TARGETS = [(socket.AF_INET, IPV4), (socket.AF_INET6, IPV6), (socket.AF_INET6, MAPPED)]


def as_user(uid, go, function, *args):
    """function(*args) as another user, once signalled."""
    os.read(go, 1)
    os.setresuid(uid, uid, uid)
    return function(*args)


class Traffic:
    """Clients and servers of two users that wait for go()."""

    def __init__(self):
        self.workers, self.start = {}, {}
        for uid, counts in ((0, (5, 3, 2)), (NOBODY, (2, 5, 3))):
            servers, ports = listeners()
            targets = [
                (family, address, port)
                for (family, address), port, count in zip(TARGETS, ports, counts)
                for _ in range(count)
            ]
            random.Random(uid).shuffle(targets)
            reader, self.start[uid] = os.pipe()
            wait = (uid, reader)
            self.workers[uid] = (
                Worker(b"client", as_user, *wait, connect_to, targets),
                Worker(b"server", as_user, *wait, serve, servers, len(targets)),
                ports,
            )

    def go(self):
        """{tool: [what is known of each connection]}, one user's after the other's."""
        found = {name: [] for name in TOOLS}
        for uid, (client, server, _) in self.workers.items():
            os.write(self.start[uid], b"..")
            for name, worker in zip(TOOLS, (client, server)):
                comm = "client" if name == "tcpconnect" else "server"
                process = {"uid": uid, "pid": worker.pid, "comm": comm}
                found[name] += [
                    {**process, **dict(zip(ENDS, ends))} for ends in worker.report()
                ]
        return found


def full_row(known, first, last, port=""):
    """A row with these ends ("local" or "remote") of a connection, and the first end's
    port between them or not.
    """
    return row(
        known["pid"],
        known["comm"],
        known["ip"],
        known[first],
        f"{port:<6} {known[last]:<16}" if port else known[last],
        known[f"{last[0]}port"],
    )


def connect_row(known, lport=False):
    return full_row(known, "local", "remote", known["lport"] if lport else "")


def accept_row(known, rport=False):
    return full_row(known, "remote", "local", known["rport"] if rport else "")


def test_filters_and_columns(start):
    traffic = Traffic()
    (root_client, root_server, ports), (client, server, other) = (
        traffic.workers.values()
    )
    some = f"{ports[0]},{ports[2]},{other[1]}"
    pids = f"{root_client.pid},{root_server.pid}"
    began = int(time.time())
    four, timed, accept_four, accept_six = start(
        f"tcpconnect -4 -U -L -P {some}",
        f"tcpconnect -u root --pid {pids},{client.pid} --time --timestamp",
        f"tcpaccept -4 -U -R -P {some}",
        f"tcpaccept -6 -u {NOBODY},0 -p {server.pid}",
        TCPTOOLS_METHOD=best_method(),
    )
    known = traffic.go()
    connects, accepts = known["tcpconnect"], known["tcpaccept"]
    assert len(connects) == len(accepts) == 20
    picked = [int(port) for port in some.split(",")]
    assert four.stop() == [
        f"{c['uid']:<6} {connect_row(c, lport=True)}"
        for c in connects
        if c["ip"] == 4 and c["rport"] in picked
    ]
    assert accept_four.stop() == [
        f"{a['uid']:<6} {accept_row(a, rport=True)}"
        for a in accepts
        if a["ip"] == 4 and a["lport"] in picked
    ]
    assert accept_six.stop() == [
        accept_row(a) for a in accepts if a["ip"] == 6 and a["pid"] == server.pid
    ]
    clocks = [
        time.strftime("%H:%M:%S", time.localtime(second))
        for second in range(began, int(time.time()) + 2)
    ]
    shown = [line.split(maxsplit=2) for line in timed.stop()]
    assert [line[2] for line in shown] == [
        connect_row(c) for c in connects if c["uid"] == 0
    ]
    assert all(line[0] in clocks for line in shown)
    seconds = [float(line[1]) for line in shown]
    assert seconds[0] == 0 and seconds == sorted(seconds)
    assert timed.out.read_text().startswith("TIME     TIME(s)   PID     COMM ")


def test_json(start, cgroups):
    """The same four addresses and ports in both tools; the one user's processes in a
    cgroup of their own.
    """
    traffic = Traffic()
    cgroup = cgroups / "tcp-test"
    cgroup.mkdir()
    for worker in traffic.workers[NOBODY][:2]:
        (cgroup / "cgroup.procs").write_text(str(worker.pid))
    began = time.time()
    tools = start(
        "tcpconnect --json", "tcpaccept --json", TCPTOOLS_METHOD=best_method()
    )
    known = traffic.go()
    addresses = ("saddr", "sport", "daddr", "dport")
    joined = []
    for tool, name in zip(tools, TOOLS):
        lines = [json.loads(line) for line in tool.stop()]
        for line in lines:
            stamp = line.pop("ts")
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
            at = calendar.timegm(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S"))
            assert began - 2 < at < time.time() + 1
        client = ("local", "lport", "remote", "rport")
        server = ("remote", "rport", "local", "lport")
        ends = client if name == "tcpconnect" else server
        paths = {0: (cgroups.stat().st_ino, "/")}
        paths[NOBODY] = (cgroup.stat().st_ino, "/tcp-test")
        assert lines == [
            json_line(
                name[3:],
                *(one[key] for key in ("pid", "uid", "comm", "ip")),
                [one[end] for end in ends],
                paths[one["uid"]],
            )
            for one in known[name]
        ]
        joined.append([tuple(line[key] for key in addresses) for line in lines])
    assert sorted(joined[0]) == sorted(joined[1])


def test_reset_before_accept_under_a_port_filter(start):
    """Its socket's port is 0 by then, and it is found all the same."""
    server, other = listener(socket.AF_INET, IPV4), listener(socket.AF_INET, IPV4)
    port = server.getsockname()[1]
    (tool,) = start(f"tcpaccept -P {port}", TCPTOOLS_METHOD=best_method())
    for listening in (server, other) * 7:
        listening.settimeout(DEADLINE)
        connect_and_reset(listening.getsockname())
        with contextlib.suppress(OSError):
            listening.accept()[0].close()
    rows = [row(os.getpid(), own_comm(), 4, IPV4, IPV4, port)] * 7
    assert tool.stop() == rows


def test_the_other_family_is_not_attached(start, tmp_path):
    """-4 works where the kernel has no tcp_v6_connect, and -6 where it has no
    tcp_v4_connect.
    """
    with btf_without(tmp_path, "tcp_v6_connect"):
        (four,) = start("tcpconnect -4", TCPTOOLS_METHOD="fexit")
    with btf_without(tmp_path, "tcp_v4_connect"):
        (six,) = start("tcpconnect -6", TCPTOOLS_METHOD="fexit")
    connects, _ = run_mixed_traffic()
    assert four.stop() == [line for line in connects if IPV6 not in line]
    assert six.stop() == [line for line in connects if IPV6 in line]
