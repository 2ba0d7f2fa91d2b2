"""-c, -q, -d: tables of counts, the accept queue, and the names that were looked up."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess

import dnslib
from conftest import (
    DEADLINE,
    IPV4,
    IPV6,
    NOBODY4,
    NOBODY6,
    TOP,
    Worker,
    best_method,
    only_at_both_ends,
    read_byte,
    row,
    until,
)
from test_options import Traffic
from traffic import (
    accept_in_threads,
    connect_nonblocking,
    connect_often,
    connect_to_itself,
    listener,
    on_cpu,
    waiting,
)

pytestmark = only_at_both_ends


def test_counts(start):
    """Two users' connections, IPv4 in an IPv6 socket as IPv4; sorted, and only what the
    filters let through.
    """
    traffic = Traffic()
    ports = [group[2] for group in traffic.workers.values()]
    connects, accepts, four, six = start(
        "tcpconnect -c",
        "tcpaccept --count",
        "tcpconnect -c -4 -u nobody",
        f"tcpaccept -c -6 -P {ports[0][1]}",
        TCPTOOLS_METHOD=best_method(),
    )
    traffic.go()
    (a4, a6, amapped), (b4, b6, bmapped) = ports
    flows = {a4: 5, a6: 3, amapped: 2, b4: 2, b6: 5, bmapped: 3}

    def address(port):
        return IPV6 if port in (a6, b6) else IPV4

    def order(port):
        return -flows[port], address(port) == IPV6, port

    ordered = sorted(flows, key=order)

    def connect_line(port):
        return f"{address(port):<16} {address(port):<16} {port:<5} {flows[port]}"

    assert connects.stop() == [connect_line(port) for port in ordered]
    assert accepts.stop() == [
        f"{address(port):<16} {port:<5} {flows[port]}" for port in ordered
    ]
    assert four.stop() == [
        connect_line(port) for port in ordered if port in (b4, bmapped)
    ]
    assert six.stop() == [f"{IPV6:<16} {a6:<5} 3"]


def test_more_flows_than_the_table_holds(start):
    """65,535 ports over IPv4 and 1,009 over IPv6, one connect each: 1,008 too many, and
    counted as such.
    """
    (tool,) = start("tcpconnect -c")
    for address, count in ((NOBODY4, 65535), (NOBODY6, 1009)):
        Worker(b"client", connect_nonblocking, 0, address, count).report()
    rows = tool.stop()
    assert len(rows) == len(set(rows)) == 65536
    assert {line.split()[-1] for line in rows} == {"1"}
    assert tool.complaints() == [
        "tcpconnect: lost 1008 events: table full (65,536 entries)",
    ]


def accept_later(server, go, count):
    """Accept `count` connections, once signalled."""
    os.read(go, 1)
    for _ in range(count):
        server.accept()[0].close()


def fill_and_accept(family, address, backlog, count):
    """A server that accepts so many connections once all wait; (its PID, its port)."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(listener(family, address, backlog))
        reader, writer = os.pipe()
        worker = Worker(b"server", accept_later, server, reader, count)
        for _ in range(count):
            stack.enter_context(socket.create_connection(server.getsockname()[:2]))
        until(f"{count} waiting connections", lambda: waiting(server) == count)
        os.write(writer, b".")
        worker.report()
        return worker.pid, server.getsockname()[1]


def test_queue(start):
    """What waits still at that accept, and how many may: of a queue of 4, filled by 5,
    and of one that is not full.
    """
    table, lines = start(
        "tcpaccept -q", "tcpaccept -q --json", TCPTOOLS_METHOD=best_method()
    )
    rows, queues = [], []
    for family, address, ip, backlog, count in (
        (socket.AF_INET, IPV4, 4, 4, 5),
        (socket.AF_INET, IPV4, 4, 17, 3),
        (socket.AF_INET6, IPV6, 6, 4, 5),
        (socket.AF_INET6, IPV6, 6, 17, 3),
    ):
        pid, port = fill_and_accept(family, address, backlog, count)
        for left in reversed(range(count)):
            queue = f"{port:<5} {left:<5} {backlog}"
            rows.append(row(pid, "server", ip, address, address, queue))
            queues.append((left, backlog))
    assert table.stop() == rows
    known = [json.loads(line) for line in lines.stop()]
    assert [(line["qlen"], line["qmax"]) for line in known] == queues


def test_queue_of_many_threads(start, tmp_path):
    """As many as are tracked, on one CPU, after the other has accepted: each CPU keeps
    entries of the map to itself. A tool that tracks 257; it is 4,096 elsewhere.
    """
    small, text = tmp_path / "tcpaccept", (TOP / "tcpaccept").read_text()
    assert text.count("THREADS = 4096 ") == 1
    small.write_text(text.replace("THREADS = 4096 ", "THREADS = 257 "))
    small.chmod(0o755)
    (tool,) = start(f"{small} -q", TCPTOOLS_METHOD="kprobe")
    Worker(b"other", on_cpu, 1, connect_to_itself, 1).report()
    server, (ready, tell) = listener(socket.AF_INET, IPV4), os.pipe()
    worker = Worker(b"blocked", on_cpu, 0, accept_in_threads, server, 257, tell)
    read_byte(ready, "257 threads blocked in accept()")
    port = server.getsockname()[1]
    connect_often(IPV4, port, 257)
    worker.report()
    _, *rows = tool.stop()
    queue = f"{port:<5} {0:<5} 128"
    assert rows == [row(worker.pid, "blocked", 4, IPV4, IPV4, queue)] * 257


def ask(name, kind="A", server="127.0.0.1"):
    """Ask the DNS server, and read its response."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    question = dnslib.DNSRecord.question(name, kind).pack()
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.sendto(question, (server, 53))
        client.recv(4096)


def ask_and_connect(questions, address, port):
    for question in questions:
        ask(*question)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as client:
        client.connect((address, port))
        client.recv(1)


def test_names(start, names):
    """What the process itself asked for, else what any did; over IPv4 and IPv6; the
    name asked for, not its alias; by the C library's resolver.
    """
    servers = [listener(socket.AF_INET, IPV4), listener(socket.AF_INET6, IPV6)]
    port4, port6 = (server.getsockname()[1] for server in servers)
    table, lines = start(
        "tcpconnect -d", "tcpconnect -d --json", TCPTOOLS_METHOD=best_method()
    )
    www, six = ["www.example.com"], ["six.example.com", "AAAA"]
    alias = ["alias.example.com", "A", "::1"]
    cases = [
        ([], IPV4, port4, None),
        ([www], IPV4, port4, "www.example.com"),
        ([alias], IPV4, port4, "alias.example.com"),
        ([], IPV4, port4, "alias.example.com"),
        ([["nonsense.example"], ["no.example"], www], IPV4, port4, "www.example.com"),
        ([six], IPV6, port6, "six.example.com"),
        ([alias, ["\x1b[31m.example"], ["six.example.com", "A"]], IPV6, port6, six[0]),
    ]
    found = []
    for questions, address, port, name in cases:
        server = servers[0] if address == IPV4 else servers[1]
        server.settimeout(DEADLINE)
        worker = Worker(b"client", ask_and_connect, questions, address, port)
        with server.accept()[0] as connection:
            connection.send(b".")
        worker.report()
        ip = 4 if address == IPV4 else 6
        found.append((row(worker.pid, "client", ip, address, address, ""), port, name))
    pid = visit_with_curl(servers[0])
    found.append((row(pid, "curl", 4, IPV4, IPV4, ""), port4, "www.example.com"))
    shown = table.stop()
    assert [without_age(line) for line in shown] == [
        f"{front}{port:<5} {name or '-'}" for front, port, name in found
    ]
    known = [json.loads(line) for line in lines.stop()]
    assert [line.get("query") for line in known] == [name for *_, name in found]
    assert all(("query_age_ms" in line) == ("query" in line) for line in known)


def without_latency(text):
    """A row without LAT(ms)."""
    return re.sub(r"(?<= )\d+\.\d{3} +(?=\S+( +\S+)?$)", "", text)


def without_age(text):
    """A name without the age of its response, which is shown when the guest is slow."""
    return text.partition(" (")[0]


def visit_with_curl(server):
    """Its PID. It looks names up by the C library's resolver."""
    url = f"http://www.example.com:{server.getsockname()[1]}/"
    curl = subprocess.Popen(["curl", "-s", "-4", url], stdout=subprocess.DEVNULL)
    with server.accept()[0] as connection:
        connection.recv(4096)
    curl.wait(DEADLINE)
    return curl.pid


def test_more_responses_than_the_buffer_holds(start, names):
    """64 pages hold 910 responses of 217 bytes, with 68 in front and 3 behind.

    1,009 that are read on one CPU while the tool is stopped are 99 too many.
    """
    (table,) = start("tcpconnect -d", TCPTOOLS_METHOD=best_method())
    table.process.send_signal(signal.SIGSTOP)
    Worker(b"client", ask_often, 1009).report()
    table.process.send_signal(signal.SIGCONT)
    assert table.stop() == []
    assert table.complaints() == ["tcpconnect: lost 99 DNS responses: buffer full"]


def ask_often(count):
    os.sched_setaffinity(0, {0})
    for _ in range(count):
        ask(".".join(["x" * 49] * 4))
