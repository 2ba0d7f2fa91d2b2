"""Ours beside bcc's own tools, on the same traffic, with every option that both have.

bcc's need the kernel's headers, and minutes to start in an emulated machine. So few of
them run, each with several options, where they are installed: on bookworm, and on all
releases by tests/run --bcc.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from conftest import (
    DEADLINE,
    IPV4,
    IPV6,
    TOOLS,
    TOP,
    Worker,
    best_method,
    headers_shown,
    until,
)
from test_cgroup_filters import make_map
from test_columns import without_age
from test_options import NOBODY, Traffic
from traffic import leave_mount_namespace, listener, serve

THEIRS = {name: shutil.which(f"{name}-bpfcc") for name in TOOLS}
KERNEL = tuple(int(number) for number in os.uname().release.split(".")[:2])

pytestmark = pytest.mark.skipif(
    None in THEIRS.values(), reason="bcc's own tools are not installed in this guest"
)

# Each line runs both tools, theirs as it is, ours with what it needs to have the same
# columns.
LINES = {
    "tcpconnect": {
        "-t -U -L -4 -P {ports} --cgroupmap {cgroups}": "",
        "-6 -u {uid} --mntnsmap {namespaces} -d": "",
        "-c -p {tcpconnect}": "",
    },
    "tcpaccept": {
        "-T -t -4 -P {ports} -p {tcpaccept}": "-R",
        "-6 --cgroupmap {cgroups} --mntnsmap {namespaces}": "-R",
    },
}

# Where they differ, apart from widths, and from the order of rows and of columns. The
# test finds each of them.
DIFFERENCES = {
    "banner": "Their tcpconnect prints a line before the header. Ours does not: "
    "scripts read the table.",
    "RPORT": "Their tcpaccept always has this column. Ours has it with -R: the seed's "
    "table is without.",
    "mapped": "IPv4 through an IPv6 socket is IP 6 and ::ffff:192.0.2.10 in their "
    "tcpaccept, so -4 hides it and -6 shows it, and in their tcpconnect with -6, which "
    "shows it. Ours is what is on the wire.",
    "count": "Their -c calls the columns LADDR, RADDR and RPORT. Ours have the names "
    "of the other table.",
    "query": "Theirs says 'No DNS Query' where ours has -, which is one word.",
}


# Where theirs do not work. Their -d wants to know where recvmsg() puts a response,
# which changed with Linux 6.4: see
# https://github.com/iovisor/bcc/pull/5382.
ACCEPT_IS_BLIND = KERNEL in {(5, 10), (6, 12)}  # it mistakes where sk_protocol is
NAMES_DO_NOT_COMPILE = KERNEL == (6, 12)  # bcc 0.31
NO_NAMES_ARE_FOUND = KERNEL > (6, 12)  # bcc 0.37

NAME, VISITS = "six.example.com", 3
PORT_AND_LOCAL = {"tcpconnect": ("DPORT", "SADDR"), "tcpaccept": ("LPORT", "LADDR")}
RENAMED = {"LADDR": "SADDR", "RADDR": "DADDR", "RPORT": "DPORT"}  # with -c


def options_of(command):
    """The options in its help, by their short names, or the long ones of those that
    have no other.
    """
    done = subprocess.run([command, "-h"], capture_output=True, text=True, check=True)
    return set(re.findall(r"^  (-\w|--\w+)\b", done.stdout, re.MULTILINE)) - {"-h"}


def common_options(name):
    broken = {"-d"} if NAMES_DO_NOT_COMPILE else set()
    return (options_of(TOP / name) & options_of(THEIRS[name])) - broken


def words_of(line):
    """{option: itself with its value} of a command line."""
    words = re.findall(r"-\S+(?: \{\w+\})?", line)
    return {word.split()[0]: word for word in words}


@pytest.mark.parametrize("name", TOOLS)
def test_no_common_option_is_missing(name):
    tried = {option for line in LINES[name] for option in words_of(line)}
    assert common_options(name) <= tried


@pytest.fixture
def start_theirs(tmp_path):
    """start_theirs([(name, command line)]) gives (process, file of its output) of each,
    which all trace.
    """
    running = []

    def start(commands):
        for name, line in commands:  # one after the other, since it takes long
            out = tmp_path / f"theirs{len(running)}"
            command = [sys.executable, "-u", THEIRS[name], *line.split()]
            with out.open("wb") as file:
                running.append((subprocess.Popen(command, stdout=file), out))
            wait_until("bcc's header", out.read_bytes, running[-1][0])
        return running

    with headers_shown():
        yield start
    for process, _ in running:
        process.kill()
        process.wait()


def wait_until(what, is_so, process):
    def is_so_while_it_runs():
        assert process.poll() is None, "bcc's tool has exited"
        return is_so()

    until(what, is_so_while_it_runs)


def table(text):
    """The rows as {title: text}. The last column may be of several words."""
    lines = text.splitlines()
    begin = next(n for n, line in enumerate(lines) if "ADDR " in line)
    titles = lines[begin].split()
    rows = [
        line.rstrip().split(maxsplit=len(titles) - 1) for line in lines[begin + 1 :]
    ]
    return [dict(zip(titles, row)) for row in rows if row]


def evened(row):
    """A row of either without its times, which have their form; theirs with the words
    that ours has.
    """
    shown = {
        RENAMED.get(title, title) if "CONNECTS" in row else title: value
        for title, value in row.items()
    }
    assert re.fullmatch(r"(\d\d:\d\d:\d\d)?", shown.pop("TIME", ""))
    assert re.fullmatch(r"(\d+\.\d{3})?", shown.pop("TIME(s)", ""))
    query = shown.get("QUERY", "").replace("No DNS Query", "-")
    return {**shown, **({"QUERY": without_age(query)} if query else {})}


def in_order(rows):
    return sorted(tuple(sorted(row.items())) for row in rows)


def total(rows):
    return sum(int(row.get("CONNECTS", 1)) for row in rows)


def visit(go, port):
    """Look up a name and connect to its address, as nobody; again when signalled.

    This process is neither in -p nor in a map.
    """
    os.setresuid(NOBODY, NOBODY, NOBODY)
    info = socket.getaddrinfo(NAME, port, socket.AF_INET6)
    for _ in range(VISITS):
        with socket.create_connection(info[0][4][:2]) as client:
            client.recv(1)
        os.read(go, 1)


def elsewhere(function, *args):
    """function(*args) in another mount namespace."""
    leave_mount_namespace()
    return function(*args)


def meet(port, process, out):
    """Have a visitor come, whose rows bcc's tool prints one after the other.

    It reads a response before, with or after the row of a first connect, and with or
    before that of the second one.
    """
    reader, go = os.pipe()
    visitor = Worker(b"client", visit, reader, port)

    def rows():
        return [row for row in table(out.read_text()) if row["PID"] == f"{visitor.pid}"]

    for number in range(1, VISITS + 1):
        wait_until("a visitor's row", lambda n=number: len(rows()) == n, process)
        os.write(go, b".")
    visitor.report()


def expected(name, options):
    """How many rows, or connects, (of both, of theirs that are IPv4-mapped, of ours
    that are) a line's options let through.

    Nobody's client makes 2 over IPv4, 5 over IPv6 and 3 IPv4-mapped to the server; with
    -u, a visitor VISITS over IPv6.
    """
    both = 0 if "-6" in options else 2
    both += 0 if {"-4", "-P"} & options else 5
    both += VISITS if "-u" in options and "-4" not in options else 0
    hidden = name == "tcpaccept" and "-4" in options
    return both, 0 if hidden else 3, 0 if "-6" in options else 3


def is_blind(name):
    return name == "tcpaccept" and ACCEPT_IS_BLIND


def has_rows(out, count):
    return count == 0 or total(table(out.read_text())) >= count


def stop(process, out, count):
    """What bcc's tool prints, after it has printed so many rows."""
    wait_until(f"{count} rows of bcc's", lambda: has_rows(out, count), process)
    process.send_signal(signal.SIGINT)
    process.wait(DEADLINE)
    return out.read_text()


def compare_names(theirs, ours):
    """Each of the visitor's connects has its name in ours, and no other. In theirs the
    last has it, which alone keeps QUERY then: see meet().
    """
    visits = [row for row in ours if row["QUERY"] == NAME]
    assert len(visits) == VISITS
    visited = [row for row in theirs if row["PID"] == visits[0]["PID"]]
    known = [row["QUERY"] for row in visited]
    assert set(known) == {"-"} if NO_NAMES_ARE_FOUND else known[-1] == NAME
    for row in visits + visited if NO_NAMES_ARE_FOUND else visits[:-1] + visited[:-1]:
        del row["QUERY"]


def compare(name, options, ours, theirs, mapped_port):
    """By their rows, and by each of DIFFERENCES where it should be."""
    why, count = DIFFERENCES, "-c" in options
    begins = theirs.startswith("Tracing connect ... Hit Ctrl-C to end\n")
    assert begins == (name == "tcpconnect"), why["banner"]
    assert (" RPORT " in theirs) == (name == "tcpaccept" or count), why["RPORT"]
    assert ("LADDR " in theirs) == (name == "tcpaccept" or count), why["count"]
    assert (" No DNS Query" in theirs) == ("-d" in options), why["query"]
    port, local = PORT_AND_LOCAL[name]
    mapped, plain = [], []
    for text in (theirs, ours):
        rows = [evened(row) for row in table(text)]
        mapped.append([row for row in rows if row[port] == mapped_port])
        plain.append([row for row in rows if row[port] != mapped_port])
    if is_blind(name):
        assert (plain[0], mapped[0]) == ([], [])
        assert total(plain[1]) == expected(name, options)[0]
        return
    if "-d" in options:
        compare_names(*plain)
    assert in_order(plain[0]) == in_order(plain[1])
    counts = (total(plain[0]), *map(total, mapped))
    assert counts == expected(name, options), why["mapped"]
    theirs_ip = "6" if name == "tcpaccept" or "-6" in options else "4"
    for rows, ip in zip(mapped, (theirs_ip, "4")):
        form = {"4": IPV4, "6": f"::ffff:{IPV4}"}[ip]
        for row in rows:  # -c has no IP
            assert (row.get("IP", ip), row[local]) == (ip, form), why["mapped"]


@pytest.mark.timeout(10 * DEADLINE)  # ten starts, half of them with kernel headers
def test_side_by_side(start, start_theirs, cgroups, bpffs, names):
    traffic = Traffic()
    (_, _, root_ports), (client, server, ports) = traffic.workers.values()
    guests = listener(socket.AF_INET6, IPV6)
    host = Worker(b"server", elsewhere, serve, [guests], 2 * VISITS)
    cgroup = cgroups / "app.service"
    cgroup.mkdir()
    for worker in (client, server, host):
        (cgroup / "cgroup.procs").write_text(str(worker.pid))
    inode, mntns = cgroup.stat().st_ino, os.stat("/proc/self/ns/mnt").st_ino
    values = {
        "ports": f"{ports[0]},{ports[2]},{root_ports[2]}",
        "cgroups": make_map(bpffs / "cgroups", ids=[inode]),
        "namespaces": make_map(bpffs / "namespaces", value=4, ids=[mntns]),
        "uid": NOBODY,
        "tcpconnect": client.pid,
        "tcpaccept": server.pid,
    }
    commands = []
    for name, lines in LINES.items():
        for line, more in lines.items():
            common = common_options(name)
            words = {o: word for o, word in words_of(line).items() if o in common}
            commands.append((name, set(words), " ".join(words.values()), more))
    theirs = start_theirs([(n, line.format(**values)) for n, _, line, _ in commands])
    ours = start(
        *(f"{n} {line.format(**values)} {more}" for n, _, line, more in commands),
        TCPTOOLS_METHOD=best_method(),
    )
    traffic.go()
    reader, go = os.pipe()
    os.write(go, bytes(VISITS))
    port = guests.getsockname()[1]
    Worker(b"client", elsewhere, visit, reader, port).report()
    meet(port, *theirs[[("-u" in options) for _, options, *_ in commands].index(True)])
    host.report()
    for (name, options, *_), (process, out), tool in zip(commands, theirs, ours):
        tool.end()
        assert tool.complaints() == []
        has_none = "-c" in options or is_blind(name)
        text = stop(process, out, 0 if has_none else sum(expected(name, options)[:2]))
        compare(name, options, tool.out.read_text(), text, str(ports[2]))
