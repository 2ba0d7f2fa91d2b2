"""examples/fleet: the queries on lines whose answers are known, servicemap as a
command, and the other files there.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import pathlib
import pty
import random
import re
import subprocess
import sys
from collections import Counter
from importlib.machinery import SourceFileLoader

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

FLEET = pathlib.Path(__file__).parents[2] / "examples/fleet"
SERVICEMAP = FLEET / "servicemap"
BEGIN = datetime.datetime(2026, 11, 24, 10, 0, 0)
WEB1, DB2, EXTERNAL = "10.0.0.1", "10.0.0.2", "198.51.100.7"
LONGEST_WAIT, CLOCK_DIFFERENCE = 60_000_000, 1_000_000  # µs, as schema.sql has them


def load(path):
    """A script as a module."""
    loader = SourceFileLoader(path.name, str(path))
    spec = importlib.util.spec_from_loader(path.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


servicemap = load(SERVICEMAP)
servicemap.import_chdb()


def event(kind, at, host, comm, saddr=WEB1, sport=40000, daddr=DB2, dport=80, **more):
    """An event as the tools print it; at: µs since BEGIN."""
    ts = BEGIN + datetime.timedelta(microseconds=at)
    return {
        "ts": ts.isoformat(timespec="microseconds") + "Z",
        "host": host,
        "event": kind,
        "pid": 181,
        "tid": 182,
        "uid": 0,
        "comm": comm,
        "ip": 6 if ":" in saddr else 4,
        "saddr": saddr,
        "sport": sport,
        "daddr": daddr,
        "dport": dport,
        **dict(netns=4026531840, cgroup=5251, **more),
    }


def connect(at, comm="curl", host="web1", **more):
    return event("connect", at, host, comm, **more)


def accept(at, comm="nginx", host="db2", **more):
    return event("accept", at, host, comm, **more)


def text(events):
    return "".join(json.dumps(one) + "\n" for one in events).encode()


@contextlib.contextmanager
def database(*events):
    with servicemap.database() as session:
        assert servicemap.load_chunk(session, text(events)) == []
        yield session


def answer(events, query="servicemap"):
    with database(*events) as session:
        return servicemap.ask(session, (FLEET / f"{query}.sql").read_text())


def edges(events):
    return edges_of(answer(events))


def edges_of(rows):
    """{(client host, name, address, server host, name, address, port): connections}"""
    return {tuple(row.values())[:7]: row["connections"] for row in rows}


def edge(client="web1 curl", server="db2 nginx", port=80):
    """An edge whose ends are "host name", "host ? address" or "? address"."""

    def end(words):
        *host, last = words.split()
        if "?" in host:
            return (host[0] if host[0] != "?" else "", "", last)
        return (host[0], last, "")

    return (*end(client), *end(server), port)


CLIENT_ONLY = edge(server=f"? {DB2}")
SERVER_ONLY = edge(client=f"? {WEB1}")


def test_connect_and_accept_are_one_edge():
    [row] = answer(
        [
            connect(0),
            accept(250),
            connect(10, sport=40001),
            accept(9_999_999, sport=40001),
        ]
    )
    assert row == {
        "client_host": "web1",
        "client_comm": "curl",
        "client_address": "",
        "server_host": "db2",
        "server_comm": "nginx",
        "server_address": "",
        "port": 80,
        "known": "both",
        "connections": 2,
        "first_seen": "2026-11-24T10:00:00.000000Z",
        "last_seen": "2026-11-24T10:00:00.000010Z",
        "nat": "",
    }


@pytest.mark.parametrize(
    "client, server",
    [
        ({"saddr": "2001:db8::1", "daddr": "2001:db8::2"},) * 2,
        ({"saddr": "::ffff:10.0.0.1", "daddr": "::ffff:10.0.0.2"}, {}),
        ({}, {"saddr": "::ffff:10.0.0.1", "daddr": "::ffff:10.0.0.2"}),
    ],
    ids=["IPv6", "mapped client", "mapped server"],
)
def test_addresses(client, server):
    assert edges([connect(0, **client), accept(9, **server)]) == {edge(): 1}


def test_one_side_is_missing():
    assert edges([connect(0)]) == {CLIENT_ONLY: 1}
    assert edges([accept(0)]) == {SERVER_ONLY: 1}


def test_an_unmatched_end_has_its_hosts_name_where_the_fleet_has_its_address():
    others = [
        connect(0, saddr=DB2, daddr=WEB1, dport=22),
        accept(9, "sshd", "web1", saddr=DB2, daddr=WEB1, dport=22),
    ]
    others[0].update(host="db2", comm="ssh")
    known = {edge("db2 ssh", "web1 sshd", 22): 1}
    assert edges([*others, connect(0)]) == {**known, edge(server=f"db2 ? {DB2}"): 1}
    assert edges([*others, accept(0)]) == {**known, edge(client=f"web1 ? {WEB1}"): 1}


DOCKER = "172.17.0.2"
HOUR = 3_600_000_000  # µs


def in_hour(hour, host, saddr):
    """A matched connection of this host, which then had this address."""
    sport = 50000 + 1000 * hour + ord(host[-1])
    return [
        connect(hour * HOUR, "cron", host, saddr=saddr, sport=sport, dport=25),
        accept(hour * HOUR + 1, "mail", "mx", saddr=saddr, sport=sport, dport=25),
    ]


def server_hosts(events, query):
    """{(client host, server address): server host}, of ends that are not known."""
    return {
        (row["client_host"], row["server_address"]): row["server_host"]
        for row in answer(events, query)
        if row["server_address"]
    }


def unmatched(query):
    """An event for servicemap.sql or failures.sql, whose server is not known."""
    if query == "servicemap":
        return connect
    return lambda at, **more: event("connect_failed", at, comm="curl", **more)


@pytest.mark.parametrize("query", ["servicemap", "failures"])
def test_an_address_of_several_hosts_is_the_observers_or_nobodys(query):
    make = unmatched(query)
    events = [
        *in_hour(0, "docker1", DOCKER),
        *in_hour(0, "docker2", DOCKER),
        *(make(9, host=host, daddr=DOCKER) for host in ("web1", "docker1", "docker2")),
    ]
    assert server_hosts(events, query) == {
        ("web1", DOCKER): "",
        ("docker1", DOCKER): "docker1",
        ("docker2", DOCKER): "docker2",
    }


@pytest.mark.parametrize("query", ["servicemap", "failures"])
def test_an_address_that_moved_is_its_hosts_of_that_hour(query):
    make = unmatched(query)
    events = [*in_hour(0, "old", DOCKER), *in_hour(2, "new", DOCKER)]
    events += [
        make(hour * HOUR + 9, host=f"at{hour}", daddr=DOCKER, sport=41000)
        for hour in range(4)
    ]
    assert server_hosts(events, query) == {
        ("at0", DOCKER): "old",
        ("at1", DOCKER): "",
        ("at2", DOCKER): "new",
        ("at3", DOCKER): "",
    }
    assert answer(events, "unknown") == []  # it is of the fleet


def test_an_edge_of_several_hours_is_one_row():
    events = [*in_hour(0, "db", DOCKER), *in_hour(1, "db", DOCKER)]
    events += [
        connect(hour * HOUR + at, daddr=DOCKER, sport=41000 + at)
        for hour in range(2)
        for at in range(3)
    ]
    [row] = [row for row in answer(events) if row["client_host"] == "web1"]
    assert (row["server_host"], row["server_address"]) == ("db", DOCKER)
    assert row["connections"] == 6
    assert row["first_seen"] == "2026-11-24T10:00:00.000000Z"
    assert row["last_seen"] == "2026-11-24T11:00:00.000002Z"


def known(events):
    """How many connections have both ends, the client's only, the server's only."""
    count = Counter()
    for row in answer(events):
        count[row["known"]] += row["connections"]
    return count["both"], count["client"], count["server"]


# Connects and accepts of one flow, at times in ms, and what is known of them.
@pytest.mark.parametrize(
    "events, expected",
    [
        ("C0 A1 C60000 A60001 C120000 A120001", (3, 0, 0)),
        ("C0 A1 C60000 C120000 A120001", (2, 1, 0)),
        ("C0 A1 A60001 C120000 A120001", (2, 0, 1)),
        ("C0 A1 C2 A3 C4 A5", (3, 0, 0)),
        ("C0 A40000 C40001 A79000 C79002 A79003", (3, 0, 0)),
        ("C0 C1 A2", (1, 1, 0)),
        ("C0 A1 A2", (1, 0, 1)),
        ("C0 A60000", (1, 0, 0)),
        ("C0 A60001", (0, 1, 1)),
        ("A0 C1000", (1, 0, 0)),
        ("A0 C1001", (0, 1, 1)),
        ("A0 C500 A30000 C30500 A60000 C60500", (3, 0, 0)),
        ("A0 C500 C30500 A60000 C60500", (2, 1, 0)),
        ("C0 A0", (1, 0, 0)),
    ],
)
def test_ports_are_reused_and_clocks_differ(events, expected):
    made = {"C": connect, "A": accept}
    assert known(made[e[0]](int(e[1:]) * 1000) for e in events.split()) == expected


def test_a_port_that_another_process_uses_next():
    events = [
        connect(0),
        accept(1),
        connect(70_000_000, "wget"),
        accept(70_000_001, "haproxy"),
    ]
    assert edges(events) == {edge(): 1, edge("web1 wget", "db2 haproxy"): 1}


def test_late_and_duplicated_lines():
    events = [
        make(n * 1000 + offset, sport=40000 + n % 7)
        for n in range(31)
        for make, offset in ((connect, 0), (accept, 300))
        if (n, make) not in ((5, connect), (11, accept), (13, accept))
    ]
    expected = answer(events)
    shuffled = events * 3
    random.Random(6).shuffle(shuffled)
    with servicemap.database() as session:
        for one in shuffled:  # inserted one by one, as late as can be
            servicemap.load_chunk(session, text([one]))
        query = (FLEET / "servicemap.sql").read_text()
        assert servicemap.ask(session, query) == expected
    assert {row["known"]: row["connections"] for row in expected} == {
        "both": 28,
        "client": 2,
        "server": 1,
    }


def pairs(flow):
    """What is known of the events of a flow, [(time, kind)], found step by step,
    without runs and windows.
    """
    flow, both, alone = sorted(flow), 0, Counter()
    while flow:
        (time, kind), *flow = flow
        limit = LONGEST_WAIT if kind == "C" else CLOCK_DIFFERENCE
        if flow and flow[0][1] != kind and flow[0][0] - time <= limit:
            both, flow = both + 1, flow[1:]
        else:
            alone[kind] += 1
    return both, alone["C"], alone["A"]


TIMES = st.one_of(st.integers(0, 5), st.integers(0, 300)).map(lambda n: n * 500_000)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(TIMES, st.sampled_from("CA")),
        min_size=1,
        max_size=12,
        unique_by=lambda one: one[0],
    )
)
@example([(0, "A"), (500_000, "C"), (1_000_000, "C")])
def test_any_flow(flow):
    events = [{"C": connect, "A": accept}[kind](time) for time, kind in flow]
    assert known(events) == pairs(flow)


def test_a_connect_that_failed_is_no_edge():
    failed = event("connect_failed", 800, "web1", "curl", error="ECONNREFUSED")
    immediate = event(
        "connect_failed",
        9,
        "web1",
        "curl",
        "0.0.0.0",
        0,
        EXTERNAL,
        443,
        error="ENETUNREACH",
    )
    events = [
        connect(0),
        failed,
        failed,
        connect(2_000_000),
        accept(2_000_100),
        immediate,
    ]
    assert edges(events) == {edge(): 1}
    rows = answer(events, "failures")
    assert [tuple(row.values())[:7] for row in rows] == [
        ("web1", "curl", "db2", DB2, 80, "ECONNREFUSED", 1),
        ("web1", "curl", "", EXTERNAL, 443, "ENETUNREACH", 1),
    ]
    assert rows[0]["first_seen"] == rows[0]["last_seen"]
    assert rows[0]["last_seen"] == "2026-11-24T10:00:00.000800Z"


def test_the_threads_of_a_process_are_one_node():
    """Where the lines tell the process: those of before 2026-11-28 do not."""
    events = [connect(0), accept(9)]
    for port in range(3):
        flow = {"sport": 41000 + port}
        events.append(connect(port, f"Thread-{port}", process="java", **flow))
        events.append(accept(port + 9, f"io-{port}", process="nginx", **flow))
        failed = {"error": "closed", "process": "java", "dport": 81}
        events.append(event("connect_failed", port, "web1", f"Thread-{port}", **failed))
    assert edges(events) == {edge(): 1, edge(client="web1 java"): 3}
    rows = answer(events, "failures")
    assert [(row["client_comm"], row["failures"]) for row in rows] == [("java", 3)]


def test_connects_that_are_known_once_they_succeeded():
    """tcpconnect -l: connected is a connect at the time at which its SYN left."""
    connected = event("connected", 190_000_000, "web1", "curl", latency_us=189_999_000)
    events = [connected, accept(2_000)]
    [row] = answer(events)
    assert (row["known"], row["connections"]) == ("both", 1)
    assert row["first_seen"] == "2026-11-24T10:00:00.001000Z"
    assert edges([connected, accept(189_999_999)]) == {
        edge(server=f"db2 ? {DB2}"): 1,
        edge(client=f"web1 ? {WEB1}"): 1,
    }
    given_up = event(
        "connect_failed", 9, "web1", "curl", error="closed", latency_us=1_000_000
    )
    assert edges([given_up]) == {}
    [row] = answer([given_up], "failures")
    assert (row["error"], row["failures"]) == ("closed", 1)


@pytest.mark.parametrize("loopback", ["127.0.0.1", "127.5.5.5", "::1"])
def test_every_host_and_namespace_has_a_loopback_of_its_own(loopback):
    here = {"saddr": loopback, "daddr": loopback}
    events = [
        one
        for host, netns in (("web1", 1), ("db2", 1), ("db2", 2))
        for one in (
            {**connect(0, f"curl{netns}", host, **here), "netns": netns, "pid": netns},
            {**accept(1, f"nginx{netns}", host, **here), "netns": netns, "pid": netns},
        )
    ]
    random.Random(6).shuffle(events)
    assert edges(events) == {
        edge("web1 curl1", "web1 nginx1"): 1,
        edge("db2 curl1", "db2 nginx1"): 1,
        edge("db2 curl2", "db2 nginx2"): 1,
    }
    assert edges([connect(0, **here)]) == {edge(server=f"web1 ? {loopback}"): 1}
    assert answer([connect(0, **here)], "unknown") == []


@pytest.mark.parametrize("loopback", ["127.0.0.1", "127.5.5.5", "::1"])
def test_a_failure_on_loopback_is_the_observers(loopback):
    here = {"saddr": loopback, "daddr": loopback}
    events = [
        event("connect_failed", 0, "web1", "curl", error="ECONNREFUSED", **here),
        connect(9, host="db2", **here),  # has the newest row
        accept(10, host="db2", **here),
    ]
    [row] = answer(events, "failures")
    assert (row["client_host"], row["server_host"]) == ("web1", "web1")
    assert row["server_address"] == loopback


def test_unknown():
    events = [
        *(connect(0), accept(1)),
        *(connect(n, sport=40007 + n, daddr=EXTERNAL, dport=443) for n in range(3)),
        *(accept(n, sport=50000 + n, saddr=EXTERNAL) for n in range(5)),
        connect(7, sport=40003),  # db2 has not reported it
    ]
    assert [tuple(row.values())[:6] for row in answer(events, "unknown")] == [
        ("accept", "db2", "nginx", EXTERNAL, 80, 5),
        ("connect", "web1", "curl", EXTERNAL, 443, 3),
    ]
    assert edges(events) == {
        edge(): 1,
        edge(server=f"? {EXTERNAL}", port=443): 3,
        edge(client=f"? {EXTERNAL}"): 5,
        edge(server=f"db2 ? {DB2}"): 1,
    }


def lost(host, count, reason="buffer_full"):
    return {
        "ts": "2026-11-24T10:00:00.5Z",
        "host": host,
        "event": "lost",
        "count": count,
        "reason": reason,
    }


def test_lost():
    with database(
        connect(0), lost("web1", 13), lost("web1", 13), lost("db2", 17)
    ) as session:
        rows = servicemap.ask(session, (FLEET / "lost.sql").read_text())
    assert [(row["host"], row["events"]) for row in rows] == [("db2", 17), ("web1", 13)]


def test_the_shippers_insert():
    """What Vector's clickhouse sink sends (JSONEachRow, unknown fields skipped) gives
    the rows that servicemap makes.
    """
    events = [connect(0), accept(1, saddr="::ffff:10.0.0.1"), lost("db2", 17)]
    events += [
        event(
            "connect_failed",
            5,
            "web1",
            "curl",
            error="ETIMEDOUT",
            query="www.example.com",
            query_age_ms=7,
        )
    ]
    everything = "SELECT * FROM tcp_events ORDER BY ALL"
    with database(*events) as session:
        ours = servicemap.ask(session, everything)
    with servicemap.database() as session:
        session.query("SET input_format_skip_unknown_fields = 1")
        session.query(
            "INSERT INTO tcp_events FORMAT JSONEachRow " + text(events).decode()
        )
        assert servicemap.ask(session, everything) == ours
    assert len(ours) == 4


def between(events, since, until, query="servicemap"):
    """The answer about the time between, both as hh:mm:ss of the day of BEGIN."""
    with database(*events) as session:
        session.query(f"SET param_since = '2026-11-24 {since}'")
        session.query(f"SET param_until = '2026-11-24 {until}'")
        return servicemap.ask(session, (FLEET / f"{query}.sql").read_text())


@pytest.mark.parametrize("before, after", [(connect, accept), (accept, connect)])
def test_a_pair_that_crosses_the_edge_of_the_time_is_one(before, after):
    """It belongs to the connect's side of the edge."""
    pair = [before(HOUR - 500_000), after(HOUR + 400_000)]
    ten = edges_of(between(pair, "10:00:00", "11:00:00"))
    eleven = edges_of(between(pair, "11:00:00", "12:00:00"))
    assert (ten, eleven) == (
        ({edge(): 1}, {}) if before is connect else ({}, {edge(): 1})
    )


def test_a_connect_that_fails_after_the_edge_of_the_time():
    events = [
        connect(HOUR - 1_000_000),
        event("connect_failed", HOUR + 134_000_000, "web1", "curl", error="ETIMEDOUT"),
    ]
    for since, until, failures in (
        ("10:00:00", "11:00:00", 0),
        ("11:00:00", "12:00:00", 1),
    ):
        assert between(events, since, until) == []
        assert len(between(events, since, until, "failures")) == failures


def test_the_time_is_exact():
    """It begins with `since`, and ends before `until`."""
    begin, end = 15 * 60_000_000, 3 * HOUR + 15 * 60_000_000
    times = [begin - 1, begin, HOUR, end - 1, end]
    events = [connect(at, sport=41000 + n) for n, at in enumerate(times)]
    events += [
        event("connect_failed", at, "web1", "curl", dport=81, sport=42000 + n)
        for n, at in enumerate(times)
    ]
    events += [
        {**lost("web1", 1), "ts": connect(at)["ts"], "tid": n}
        for n, at in enumerate(times)
    ]
    first, last = "2026-11-24T10:15:00.000000Z", "2026-11-24T13:14:59.999999Z"
    for query, count in (
        ("servicemap", "connections"),
        ("failures", "failures"),
        ("unknown", "connections"),
        ("lost", "events"),
    ):
        [row] = between(events, "10:15:00", "13:15:00", query)
        assert (row[count], row["first_seen"], row["last_seen"]) == (3, first, last)


def test_lines_of_a_host_without_a_clock():
    begin = -(BEGIN - datetime.datetime(1970, 1, 1)) // datetime.timedelta(
        microseconds=1
    )
    assert edges([connect(begin + 5), accept(begin + 6)]) == {edge(): 1}


def test_a_query_about_some_hours_reads_few_others():
    events = [connect(n * HOUR, sport=40000 + m) for n in range(8) for m in range(9000)]
    with database(*events) as session:
        session.query("OPTIMIZE TABLE tcp_events FINAL")
        count = """
            SELECT count() AS n, min(ts) AS first, max(ts) AS last
            FROM tcp_connections(
                since = '2026-11-24 12:00:00', until = '2026-11-24 12:30:00'
            )"""
        hour = "2026-11-24T12:00:00.000000Z"
        assert servicemap.ask(session, count) == [
            {"n": 9000, "first": hour, "last": hour}
        ]
        plan = session.query(f"EXPLAIN indexes = 1 {count}", "TSVRaw").bytes().decode()
    read, of = re.findall(r"Granules: (\d+)/(\d+)", plan)[-1]
    assert int(read) * 2 < int(of)


def changes(events, since, until=None, stored=()):
    """What is new, of events at µs since BEGIN, and rows of tcp_edges."""
    with database(*events) as session:
        for row in stored:
            insert = f"INSERT INTO tcp_edges FORMAT JSONEachRow {json.dumps(row)}"
            session.query(insert)
        session.query(f"SET param_since = '{moment(since)}'")
        if until is not None:
            session.query(f"SET param_until = '{moment(until)}'")
        return servicemap.ask(session, (FLEET / "changes.sql").read_text())


def moment(at):
    """A time in µs since BEGIN, as the queries take it."""
    return str(BEGIN + datetime.timedelta(microseconds=at))


def pair(at, comm="curl", server="nginx", sport=40000, **more):
    """A connect and its accept."""
    return [
        connect(at, comm, sport=sport, **more),
        accept(at + 300, server, sport=sport, **more),
    ]


def test_what_is_new_is_exact():
    """What begins at `since` is new, what has been 1 µs before is not; nor is what
    begins at `until`.
    """
    since, until = 2 * HOUR + 7_000_000, 3 * HOUR + 11_000_000
    events = [
        *pair(since - 1, "before", sport=1),
        *pair(since + 5, "before", sport=2),
        *(one for n in range(3) for one in pair(since + n, "at", sport=10 + n)),
        *pair(since - 1, "only before", sport=20),
        *pair(0, "long before", sport=30),
        *pair(until - 1, "long before", sport=31),
        *(one for n in range(5) for one in pair(until - 1 - n, "end", sport=40 + n)),
        *pair(until, "end", sport=50),
        *pair(until, "after", sport=60),
    ]
    rows = changes(events, since, until)
    assert edges_of(rows) == {edge("web1 at"): 3, edge("web1 end"): 5}
    first = [connect(at)["ts"] for at in (since, until - 5)]
    assert [row["first_seen"] for row in rows] == first
    assert list(rows[0]) == list(answer(events)[0])
    assert len(changes(events, 0)) == 6


def test_an_edge_is_another_with_another_process_host_or_port():
    since = HOUR
    events = [
        *pair(0),
        *pair(since, sport=1),
        *pair(since, "wget", sport=2),
        *pair(since, server="caddy", sport=3),
        *pair(since, dport=443, sport=4),
        *(connect(since, host="web3", sport=5), accept(since + 1, sport=5)),
        *(connect(since, sport=6), accept(since + 1, host="db4", sport=6)),
    ]
    assert edges_of(changes(events, since)) == {
        edge("web1 wget"): 1,
        edge(server="db2 caddy"): 1,
        edge(port=443): 1,
        edge("web3 curl"): 1,
        edge(server="db4 nginx"): 1,
    }


# What is known of an edge before, what after, and whether the latter is new
@pytest.mark.parametrize(
    "before, after, is_new",
    [
        ("C A", "C", False),
        ("C A", "A", False),
        ("C", "C", False),
        ("A", "A", False),
        ("C", "C A", False),
        ("A", "C A", True),
        ("C", "A", True),
        ("A", "C", True),
    ],
)
def test_an_end_that_is_not_known_is_no_change(before, after, is_new):
    """Of hosts whose addresses are known. Other processes there are a change."""

    def made(at, what, sport):
        both = dict(zip("CA", pair(at, sport=sport)))
        return [both[kind] for kind in what.split()]

    addresses = [
        one
        for at in (5, HOUR + 5)
        for one in pair(at, "ssh", "sshd", sport=7, dport=22)
    ]
    others = connect(HOUR, "wget", sport=8), accept(HOUR, "caddy", sport=9)
    events = [*made(0, before, 1), *made(HOUR, after, 2), *addresses, *others]
    rows = changes(events, HOUR)
    new = [row for row in rows if {"wget", "caddy"}.isdisjoint(row.values())]
    assert (len(new), len(rows)) == (is_new, 2 + is_new)


def test_an_external_host_is_its_address():
    events = [
        *(connect(at, sport=1, daddr=EXTERNAL) for at in (0, HOUR)),
        *(accept(at, sport=2, saddr=EXTERNAL) for at in (0, HOUR)),
        connect(HOUR, sport=3, daddr="198.51.100.8"),
        accept(HOUR, sport=4, saddr="198.51.100.9"),
    ]
    assert edges_of(changes(events, HOUR)) == {
        edge(server="? 198.51.100.8"): 1,
        edge(client="? 198.51.100.9"): 1,
    }


def test_an_edge_is_the_same_if_it_is_translated():
    events = [*pair(0), *pair(HOUR, sport=7)]
    events[3] = accept(HOUR + 5, daddr="172.17.0.2", sport=7)
    assert [row["nat"] for row in answer(events)] == ["", "dnat"]
    assert changes(events, HOUR) == []


def stored(at, comm="curl", connections=7, **more):
    """Rows of tcp_edges: an edge, and that its hour is stored. at: its first and last
    time, in µs since BEGIN.
    """
    hour, first, last = moment(at[0])[:13] + ":00:00", moment(at[0]), moment(at[1])
    row = {"client_host": "web1", "client_comm": comm, "server_host": "db2"}
    row |= {"server_comm": "nginx", "port": 80, "known": "both", **more}
    row |= {"first_seen": first, "last_seen": last, "connections": connections}
    return [{"hour": hour, **row}, {"hour": hour, "first_seen": hour}]


def test_what_was_before_the_events_is_known_from_tcp_edges():
    long_ago = -50 * 24 * HOUR
    rows = [*stored((long_ago, long_ago + 9)), *stored((-HOUR, -9), "wget")]
    events = [*pair(HOUR), *pair(HOUR, "wget", sport=2), *pair(HOUR, "new", sport=3)]
    assert len(changes(events, HOUR)) == 3
    assert edges_of(changes(events, HOUR, stored=rows)) == {edge("web1 new"): 1}


def test_hours_that_are_stored_count_once():
    """And the others from their events: those of the hour of `until`, too."""
    at = HOUR, 2 * HOUR - 1
    rows = [*stored(at, "stored", 5), *stored(at, connections=2)]
    events = [
        *(one for n in range(2) for one in pair(HOUR + n, sport=n + 1)),
        *(one for n in range(3) for one in pair(2 * HOUR + n, sport=n + 11)),
        *pair(2 * HOUR + 9, sport=21),
    ]
    both = {edge("web1 stored"): 5, edge(): 6}
    # An hour that is stored twice is there once
    assert edges_of(changes(events, HOUR, stored=rows + rows)) == both
    assert edges_of(changes(events, 0, stored=rows)) == both
    assert edges_of(changes(events, HOUR + 1, stored=rows)) == {}
    until = 2 * HOUR + 3
    assert edges_of(changes(events, HOUR, until, stored=rows)) == {**both, edge(): 5}
    # Its edge without events has no place in a part of the hour
    until = HOUR + 1
    assert edges_of(changes(events, HOUR, until, stored=rows)) == {edge(): 1}


CLUSTER = """
<clickhouse>
    <tcp_port>9000</tcp_port>
    <macros><cluster>fleet</cluster></macros>
    <remote_servers><fleet>{shards}</fleet></remote_servers>
</clickhouse>
"""
SHARD = "<shard><replica><host>localhost</host><port>9000</port></replica></shard>"

# chdb has no ON CLUSTER, which says where a statement runs. The servers of this cluster
# are all this process.
ASK_CLUSTER = """
import json, pathlib, sys
from chdb.session import Session
directory, config, lines = sys.argv[1:]
fleet = pathlib.Path(directory)
session = Session(f":memory:?config-file={config}")
session.query("CREATE DATABASE fleet_local; USE fleet_local")
session.query((fleet / "schema.sql").read_text())
cluster = (fleet / "cluster.sql").read_text()
session.query(cluster.replace(" ON CLUSTER '{cluster}'", ""))
session.query("USE fleet; SET distributed_foreground_insert = 1")
session.query("SET input_format_skip_unknown_fields = 1")
session.query("SET date_time_output_format = 'iso'")
session.query("SET param_since = '2000-01-01 00:00:00'")
session.query("SET param_until = '2100-01-01 00:00:00'")
rows = pathlib.Path(lines).read_text()
session.query(f"INSERT INTO tcp_events FORMAT JSONEachRow {rows}")
for name in ("servicemap", "changes", "failures", "unknown", "lost", "clocks"):
    answer = session.query((fleet / f"{name}.sql").read_text(), "JSONEachRow").bytes()
    print(json.dumps([json.loads(line) for line in answer.splitlines()]))
"""


@pytest.mark.parametrize("servers", [1, 2])
def test_cluster(tmp_path, servers):
    """The same queries on distributed tables.

    Two servers are both this one here: each joins, and counts everything.
    """
    day = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    noon = day.replace(hour=12, minute=5, second=0, microsecond=0)  # within the TTL
    events = [connect(n, sport=40000 + n) for n in range(31)] + [
        accept(n + 5 - 4_000_000, sport=40000 + n) for n in range(3, 37)
    ]
    events += [
        event("connect_failed", 5, "web1", "curl", error="ETIMEDOUT", dport=81),
        lost("db2", 17),
    ]
    shift = noon.replace(tzinfo=None) - BEGIN
    for one in events:
        moved = (
            datetime.datetime.fromisoformat(one["ts"].rstrip("Z").ljust(26, "0"))
            + shift
        )
        one["ts"] = moved.isoformat(timespec="microseconds") + "Z"
    config, lines = tmp_path / "config.xml", tmp_path / "lines"
    config.write_text(CLUSTER.format(shards=SHARD * servers))
    lines.write_bytes(text(events))
    said = subprocess.run(
        [sys.executable, "-c", ASK_CLUSTER, FLEET, config, lines],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = ("servicemap", "changes", "failures", "unknown", "lost", "clocks")
    for name, line in zip(names, said.splitlines()):
        expected = answer(events, name)
        assert expected or name == "unknown"
        for row in expected:
            for count in {"connections", "failures", "events"} & set(row):
                row[count] *= servers
        assert json.loads(line) == expected
    assert len(said.splitlines()) == len(names)


# ---- servicemap as a command


def run(*args, stdin=b"", **options):
    """(stdout, stderr, exit status)"""
    done = subprocess.run(
        [sys.executable, SERVICEMAP, *args],
        input=stdin,
        capture_output=True,
        timeout=300,
        check=False,
        **options,
    )
    return done.stdout.decode(), done.stderr.decode(), done.returncode


def test_table(tmp_path):
    first, second = tmp_path / "web1.json", tmp_path / "db2.json"
    first.write_bytes(
        text(
            [
                connect(0),
                connect(2_000_000, sport=40001),
                connect(5, sport=40009, daddr=EXTERNAL, dport=443),
            ]
        )
    )
    second.write_bytes(text([accept(300)]))
    out, err, status = run(first, second)
    assert (err, status) == ("", 0)
    at0, at2 = "2026-11-24T10:00:00Z", "2026-11-24T10:00:02Z"
    assert out == (
        "CLIENT COMM SERVER       COMM  PORT NAT COUNT FIRST                LAST\n"
        f"web1   curl 198.51.100.7 -     443  -   1     {at0} {at0}\n"
        f"web1   curl db2          -     80   -   1     {at2} {at2}\n"
        f"web1   curl db2          nginx 80   -   1     {at0} {at0}\n"
    )
    assert run("-", second, stdin=first.read_bytes())[0] == out
    assert run("--unknown", first, second)[0] == (
        "EVENT   HOST COMM ADDRESS      PORT COUNT FIRST                LAST\n"
        f"connect web1 curl 198.51.100.7 443  1     {at0} {at0}\n"
    )
    assert run("--failures", first) == (
        "CLIENT COMM SERVER PORT ERR COUNT FIRST LAST\n",
        "",
        0,
    )


def test_part_of_the_map():
    """--host and --top; a name is no SQL."""
    events = [
        connect(n, host=host, daddr=EXTERNAL, sport=sport + n)
        for host, count, sport in (("a", 3, 1), ("it's \\", 5, 100), ("c", 7, 200))
        for n in range(count)
    ]
    lines = text([*events, accept(9, host="c", saddr="198.51.100.9")])

    def hosts(*args):
        out, err, status = run("--json", *args, stdin=lines)
        assert (err, status) == ("", 0)
        rows = map(json.loads, out.splitlines())
        return [(row["client_host"] or row["server_host"]) for row in rows]

    assert hosts("--host", "it's \\") == ["it's \\"]
    assert hosts("--host", "c") == ["c", "c"]
    assert hosts("--host", "nobody") == hosts("--host", b"\xff") == []
    assert hosts("--top", "2") == ["c", "it's \\"]
    assert hosts("--top", "1", "--host", "a") == ["a"]


def test_since():
    """What is new since then: by default all of it, or of a host, or the largest."""
    events = [
        *(connect(at, daddr=EXTERNAL, sport=n) for n, at in enumerate((0, HOUR))),
        *(connect(HOUR + n, "new", daddr=EXTERNAL, sport=n + 10) for n in range(3)),
        *(connect(HOUR + n, "b", "h2", daddr=EXTERNAL, sport=n + 20) for n in range(5)),
    ]
    lines = text([*events, lost("web1", 17)])

    def found(since, *args):
        out, err, status = run("--json", "--since", since, *args, stdin=lines)
        assert status == 0
        rows = map(json.loads, out.splitlines())
        return {row["client_comm"]: row["connections"] for row in rows}, err

    said = (
        "servicemap: web1 lost 17 events (buffer_full): what they were is missing here"
    )
    assert found("2026-11-24T11:00:00Z") == ({"new": 3, "b": 5}, f"{said}\n")
    assert found("2026-11-24T13:00:00.000001+02:00")[0] == {}
    assert found("2026-11-24T11:00:00Z", "--host", "h2")[0] == {"b": 5}
    assert found("2026-11-24T11:00:00Z", "--top", "1")[0] == {"b": 5}
    first = "servicemap: no events before 2026-11-24T10:00:00Z: all edges look new"
    assert found("2026-11-24T12:00:00+02:00") == (
        {"curl": 2, "new": 3, "b": 5},
        f"{first}\n{said}\n",
    )
    after = "servicemap: no events since 2026-11-24T12:00:00Z: no edge can be new"
    assert found("2026-11-24T12:00:00Z") == ({}, f"{after}\n{said}\n")
    out, _, _ = run("--since", "2026-11-24 11:00:00z", "--top", "1", stdin=lines)
    assert out == (
        "CLIENT COMM SERVER       COMM PORT NAT COUNT FIRST                LAST\n"
        "h2     b    198.51.100.7 -    80   -   5     "
        "2026-11-24T11:00:00Z 2026-11-24T11:00:00Z\n"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2026-11-29T10:00:00Z", "2026-11-29 10:00:00"),
        ("2026-11-29t10:00:00z", "2026-11-29 10:00:00"),
        ("2026-11-29 10:00:00.5+02:00", "2026-11-29 08:00:00.500000"),
        ("2026-11-29T10:00:00.123456789-00:30", "2026-11-29 10:30:00.123456"),
        ("1970-01-01T00:00:00Z", "1970-01-01 00:00:00"),
    ],
)
def test_times(text, expected):
    assert servicemap.utc_time(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "today",
        "2026-11-29",
        "2026-11-29T10:00:00",
        "2026-11-29T10:00Z",
        "2026-13-29T10:00:00Z",
        "2026-11-29T25:00:00Z",
        "2026-11-29T10:00:00.Z",
        "2026-11-29T10:00:00+24:00",
        "2026-11-29T10:00:00Z'",
        "2026-11-29T10:00:00Z\n",
        "\u0662026-11-29T10:00:00Z",
        "0001-01-01T00:00:00+02:00",
        "9999-12-31T23:59:59-02:00",
        "1970-01-01T00:00:00+00:01",
        "2106-02-07T00:00:00Z",
    ],
)
def test_what_is_no_time(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a time as 2026-11-29T1"):
        servicemap.utc_time(text)


def test_a_graph_too_large_for_mermaid():
    events = [accept(n, saddr=f"198.51.{n // 250}.{n % 250}") for n in range(501)]
    out, err, status = run("--mermaid", stdin=text(events))
    assert (out.count("-.->"), status) == (501, 0)
    assert err == (
        "servicemap: 501 edges: Mermaid draws no more than 500, unless its maxEdges is "
        "set (--top or --host gives fewer)\n"
    )
    out, err, status = run("--mermaid", "--top", "500", stdin=text(events))
    assert (out.count("-.->"), err, status) == (500, "", 0)


def test_bad_lines(tmp_path):
    """Each is counted and the first few named, at its number; blank lines are not."""
    good, refusals = connect(0), []
    for change in (
        *(
            {"sport": 65536},
            {"sport": -1},
            {"saddr": "10.0.0"},
            {"daddr": 7},
            {"ts": "today"},
        ),
        *({"event": "closed"}, {"pid": None}, {"host": ""}),
    ):
        refusals.append(json.dumps({**good, **change}).encode())
    refusals += [
        b"rubbish",
        b"\xff\xfe{",
        b"[]",
        b"{}",
        b"5",
        json.dumps(good).encode()[:-1],
        b"rubbish\r",
    ]
    refusals += [
        json.dumps(
            {key: value for key, value in good.items() if key != "daddr"}
        ).encode()
    ]
    lines = [
        json.dumps(good).encode(),
        b"",
        b" \r",
        *refusals,
        json.dumps(accept(1)).encode() + b"\r",
    ]
    file = tmp_path / "lines"
    file.write_bytes(b"\n".join(lines))
    out, err, status = run("--json", file)
    assert (json.loads(out)["connections"], status) == (1, 0)
    *named, total = err.splitlines()
    assert total == (
        f"servicemap: {len(refusals)} of {len(lines)} lines are not the tools', "
        "and skipped"
    )
    assert [
        re.match(r"servicemap: .*/lines, line (\d+) ", line)[1] for line in named
    ] == list("45678")


def test_lost_events_are_reported():
    out, err, status = run(stdin=text([connect(0), lost("web\x1b1", 17)]))
    assert (len(out.splitlines()), status) == (2, 0)
    assert err == (
        "servicemap: web\\x1b1 lost 17 events (buffer_full): "
        "what they were is missing here\n"
    )


def test_usage_errors_are_one_line():
    out, err, status = run("--no\x1b[1m\nsuch")
    assert (out, status) == ("", 2)
    assert err.splitlines()[-1] == (
        "servicemap: error: unrecognized arguments: --no\\x1b[1m\\nsuch"
    )


@pytest.mark.parametrize(
    "args, stdin, message",
    [
        (["missing"], b"", "cannot read missing: No such file or directory"),
        (["/"], b"", "cannot read /: Is a directory"),
        (
            [],
            b"\n",
            "no events: it takes lines of tcpconnect --json or tcpaccept --json",
        ),
    ],
)
def test_errors(args, stdin, message):
    assert run(*args, stdin=stdin) == ("", f"servicemap: error: {message}\n", 1)


@pytest.mark.parametrize(
    "args",
    [
        ["--dot", "--mermaid"],
        ["--failures", "--unknown"],
        ["--dot", "--unknown"],
        ["--host", "web1", "--unknown"],
        ["--top", "3", "--failures"],
        ["--top", "0"],
        ["--since", "2026-11-29T10:00:00Z", "--unknown"],
        ["--since", "2026-11-29T10:00:00Z", "--failures"],
        ["--since", "2026-11-29"],
        ["-", "-"],
        ["--nonsense"],
    ],
)
def test_bad_arguments(args):
    out, err, status = run(
        *args, env={"PATH": os.environ["PATH"], "PYTHONPATH": "/nowhere"}
    )
    assert (out, status) == ("", 2)
    assert "servicemap: error: " in err


def test_without_chdb():
    done = subprocess.run(
        ["/usr/bin/python3", "-S", SERVICEMAP],
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr == (
        "servicemap: error: cannot load chdb (No module named 'chdb'): "
        "pip install --no-deps chdb-core\n"
    )


def test_the_reader_goes_and_the_disk_is_full(tmp_path):
    lines = text(
        connect(n, sport=n + 1, daddr=f"10.1.{n >> 8}.{n & 255}") for n in range(5000)
    )
    file = tmp_path / "lines"
    file.write_bytes(lines)
    with subprocess.Popen(
        [sys.executable, SERVICEMAP, file],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, SERVICEMAP, file],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.stderr, done.returncode) == (
        b"servicemap: error: cannot write: No space left on device\n",
        1,
    )


def test_no_space_for_the_database(tmp_path):
    small = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=2m none "$0" && exec "$@"',
        tmp_path,
    ]
    if subprocess.run([*small, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    lines = text(
        connect(n, sport=n & 65535, daddr=f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")
        for n in range(200_000)
    )
    done = subprocess.run(
        [*small, sys.executable, SERVICEMAP],
        input=lines,
        capture_output=True,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert (done.stdout, done.returncode) == (b"", 1)
    form = (
        f"servicemap: error: no space left in {tmp_path} \\(.*\\): "
        "set TMPDIR to a directory with more\n"
    )
    assert re.fullmatch(form, done.stderr.decode())


def test_nothing_stays_behind(tmp_path):
    run(stdin=text([connect(0)]), env={**os.environ, "TMPDIR": str(tmp_path)})
    run(stdin=b"rubbish", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


def test_progress_for_a_person(tmp_path):
    file = tmp_path / "lines"
    file.write_bytes(text([connect(0), accept(1)]))
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, SERVICEMAP, file], stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        out = process.stdout.read()
        said = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while more := os.read(ours, 1000):
                said += more
    os.close(ours)
    assert b"servicemap: 0 MB read\x1b[K\rservicemap: joining" in said
    assert out.startswith(b"CLIENT")


# ---- pictures

HOSTILE = [
    "a\nb",
    "\x1b[31mred",
    'quote"] --> x',
    "back\\slash\\",
    "`md` **b**",
    "<img src=x>",
    "end",
    "a|b;c#d&amp;",
    "\u202eabc",
    "]]}}",
    "",
    " ",
]


def hostile_events():
    for n, name in enumerate(HOSTILE):
        yield connect(n, name, f"web{name}", sport=40000 + n)
        yield accept(n + 1, name, sport=40000 + n)


def test_hostile_names_in_a_table():
    out, err, status = run(stdin=text(hostile_events()))
    assert (err, status) == ("", 0)
    assert len(out.splitlines()) == 1 + len(HOSTILE)
    assert out.replace("\n", "").isprintable()


def test_graphviz_reads_what_dot_writes():
    out, _, _ = run(
        "--dot",
        stdin=text([*hostile_events(), accept(0, "sshd", saddr=EXTERNAL, dport=22)]),
    )
    read = subprocess.run(
        ["dot", "-Tjson"], input=out, capture_output=True, text=True, check=True
    )
    assert read.stderr == ""
    picture = json.loads(read.stdout)
    objects, drawn = picture["objects"], picture["edges"]
    labels = Counter(one["label"] for one in objects)
    names = [servicemap.printable(name).replace("\\", "\\\\") for name in HOSTILE]
    assert labels == Counter(
        [*names * 2, *(f"web{name}" for name in names), "db2", "sshd", EXTERNAL]
    )
    assert Counter(one["label"] for one in drawn) == {
        "80 (1)": len(HOSTILE),
        "22 (1)": 1,
    }
    [dashed] = [one for one in drawn if one.get("style") == "dashed"]
    assert objects[dashed["tail"]]["label"] == EXTERNAL


def test_mermaid_gets_no_character_that_it_would_understand():
    """And no empty label, which it does not take."""
    events = [*hostile_events(), accept(0, "sshd", saddr=EXTERNAL, dport=22)]
    out, _, _ = run("--mermaid", stdin=text(events))
    label = r'"(?:[\w .:/()-]|#\d+;)+"'
    node, arrow = rf"n\d+\[{label}\]", r"(-->|-\.->)"
    form = (
        rf"flowchart LR|    subgraph h\d+\[{label}\]|    end| +{node}|"
        rf"    n\d+ {arrow}\|{label}\| n\d+"
    )
    lines = out.splitlines()
    assert [line for line in lines if not re.fullmatch(form, line)] == []
    shown = {
        re.sub(r"#(\d+);", lambda found: chr(int(found[1])), name)
        for name in re.findall(r'\["(.*?)"\]', out)
    }
    names = [servicemap.printable(name) for name in HOSTILE]
    hosts = {"db2", *(f"web{name}" for name in names)}
    assert shown == hosts | {name or " " for name in names} | {"sshd", EXTERNAL}
    dashed = [line for line in lines if "-.->" in line]
    assert dashed == [line for line in lines if '"22 (1)"' in line] != []


# ---- the shipper


def test_vectors_configuration():
    """As far as can be said without Vector: it reads the units' journal, and inserts
    where the schema is.
    """
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    config = tomllib.loads((FLEET / "vector.toml").read_text())
    source, sink = config["sources"]["journal"], config["sinks"]["clickhouse"]
    common = (FLEET / "tcptools-.service.d/common.conf").read_text()
    assert f"\nLogNamespace={source['journal_namespace']}\n" in common
    assert (FLEET / f"journald@{source['journal_namespace']}.conf").exists()
    units = {path.stem for path in FLEET.glob("tcptools-*.service")}
    assert set(source["include_units"]) == units
    assert f"{sink['database']}.{sink['table']} " in (FLEET / "cluster.sql").read_text()
    known = set(config["sources"]) | set(config["transforms"]) | {"rows.dropped"}
    parts = [*config["transforms"].values(), *config["sinks"].values()]
    assert all(name in known for part in parts for name in part["inputs"])
    assert (sink["buffer"]["type"], sink["buffer"]["when_full"]) == ("disk", "block")
    assert sink["acknowledgements"]["enabled"]
