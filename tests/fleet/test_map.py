"""The service map and the other queries of examples/fleet, on events of which it is
known what they add up to.
"""

import datetime
import random
import re
from collections import Counter

import pytest

from .events import (
    BEGIN,
    DB2,
    EXTERNAL,
    HOUR,
    SECOND,
    WEB1,
    Cases,
    accept,
    connect,
    edge,
    edges_of,
    event,
    failed,
    lost,
    moment,
    moved,
    number_of,
    servicemap,
    text,
    timestamp,
)

LONGEST_WAIT, CLOCK_DIFFERENCE = 60 * SECOND, SECOND  # as schema.sql has them
DOCKER = "172.17.0.2"
CLIENT_ONLY = edge(server=f"? {DB2}")
SERVER_ONLY = edge(client=f"? {WEB1}")

CASES = Cases()


@CASES()
def connect_and_accept_are_one_edge():
    ask = yield [
        connect(0),
        accept(250),
        connect(10, sport=40001),
        accept(9_999_999, sport=40001),
    ]
    assert ask() == [
        {
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
    ]


IPV4, MAPPED = (WEB1, DB2), (f"::ffff:{WEB1}", f"::ffff:{DB2}")
IPV6 = "2001:db8::1", "2001:db8::2"


@CASES("IPv6", "mapped client", "mapped server")
def the_same_addresses(case):
    """IPv6, and IPv4 through an IPv6 socket, at either end."""
    client, server = {
        "IPv6": (IPV6, IPV6),
        "mapped client": (MAPPED, IPV4),
        "mapped server": (IPV4, MAPPED),
    }[case]
    ask = yield [
        connect(0, saddr=client[0], daddr=client[1]),
        accept(9, saddr=server[0], daddr=server[1]),
    ]
    assert edges_of(ask()) == {edge(): 1}


@CASES()
def no_accept():
    ask = yield [connect(0)]
    assert edges_of(ask()) == {CLIENT_ONLY: 1}


@CASES()
def no_connect():
    ask = yield [accept(0)]
    assert edges_of(ask()) == {SERVER_ONLY: 1}


SSH = [
    connect(0, "ssh", "db2", saddr=DB2, daddr=WEB1, dport=22),
    accept(9, "sshd", "web1", saddr=DB2, daddr=WEB1, dport=22),
]


@CASES()
def a_server_that_is_not_known_has_its_hosts_name_where_the_fleet_has_its_address():
    ask = yield [*SSH, connect(0)]
    expected = edge(server=f"db2 ? {DB2}")
    assert edges_of(ask()) == {edge("db2 ssh", "web1 sshd", 22): 1, expected: 1}


@CASES()
def a_client_that_is_not_known_has_its_hosts_name_where_the_fleet_has_its_address():
    ask = yield [*SSH, accept(0)]
    expected = edge(client=f"web1 ? {WEB1}")
    assert edges_of(ask()) == {edge("db2 ssh", "web1 sshd", 22): 1, expected: 1}


def in_hour(hour, host, saddr):
    """A matched connection of this host, which then had this address."""
    sport = 50000 + 1000 * hour + ord(host[-1])
    return [
        connect(hour * HOUR, "cron", host, saddr=saddr, sport=sport, dport=25),
        accept(hour * HOUR + 1, "mail", "mx", saddr=saddr, sport=sport, dport=25),
    ]


def server_hosts(rows):
    """{(client host, server address): server host}, of ends that are not known."""
    return {
        (row["client_host"], row["server_address"]): row["server_host"]
        for row in rows
        if row["server_address"]
    }


# An event for the query, whose server is not known.
UNMATCHED = {"servicemap": connect, "failures": failed}


@CASES(*UNMATCHED)
def an_address_of_several_hosts_is_the_observers_or_nobodys(query):
    make = UNMATCHED[query]
    ask = yield [
        *in_hour(0, "docker1", DOCKER),
        *in_hour(0, "docker2", DOCKER),
        *(make(9, host=host, daddr=DOCKER) for host in ("web1", "docker1", "docker2")),
    ]
    assert server_hosts(ask(query)) == {
        ("web1", DOCKER): "",
        ("docker1", DOCKER): "docker1",
        ("docker2", DOCKER): "docker2",
    }


@CASES(*UNMATCHED)
def an_address_that_moved_is_its_hosts_of_that_hour(query):
    make = UNMATCHED[query]
    events = [*in_hour(0, "old", DOCKER), *in_hour(2, "new", DOCKER)]
    events += [
        make(hour * HOUR + 9, host=f"at{hour}", daddr=DOCKER, sport=41000)
        for hour in range(4)
    ]
    ask = yield events
    assert server_hosts(ask(query)) == {
        ("at0", DOCKER): "old",
        ("at1", DOCKER): "",
        ("at2", DOCKER): "new",
        ("at3", DOCKER): "",
    }
    assert ask("unknown") == []  # it is of the fleet


@CASES()
def an_edge_of_several_hours_is_one_row():
    events = [*in_hour(0, "db", DOCKER), *in_hour(1, "db", DOCKER)]
    events += [
        connect(hour * HOUR + at, daddr=DOCKER, sport=41000 + at)
        for hour in range(2)
        for at in range(3)
    ]
    ask = yield events
    [row] = [row for row in ask() if row["client_host"] == "web1"]
    assert (row["server_host"], row["server_address"]) == ("db", DOCKER)
    assert row["connections"] == 6
    assert row["first_seen"] == "2026-11-24T10:00:00.000000Z"
    assert row["last_seen"] == "2026-11-24T11:00:00.000002Z"


def known(rows):
    """How many connections have both ends, the client's only, the server's only."""
    count = Counter()
    for row in rows:
        count[row["known"]] += row["connections"]
    return count["both"], count["client"], count["server"]


def flow_events(flow):
    """The events of one flow, [(time, "C" or "A")]."""
    return [{"C": connect, "A": accept}[kind](time) for time, kind in flow]


# Connects and accepts of one flow, at times in ms, and how many connections have both
# ends, the client's only, the server's only.
@CASES(
    "C0 A1 C60000 A60001 C120000 A120001 = 3 0 0",
    "C0 A1 C60000 C120000 A120001 = 2 1 0",
    "C0 A1 A60001 C120000 A120001 = 2 0 1",
    "C0 A1 C2 A3 C4 A5 = 3 0 0",
    "C0 A40000 C40001 A79000 C79002 A79003 = 3 0 0",
    "C0 C1 A2 = 1 1 0",
    "C0 A1 A2 = 1 0 1",
    "C0 A60000 = 1 0 0",
    "C0 A60001 = 0 1 1",
    "A0 C1000 = 1 0 0",
    "A0 C1001 = 0 1 1",
    "A0 C500 C1000 = 1 1 0",
    "A0 C500 A30000 C30500 A60000 C60500 = 3 0 0",
    "A0 C500 C30500 A60000 C60500 = 2 1 0",
    "C0 A0 = 1 0 0",
)
def ports_are_reused_and_clocks_differ(case):
    flow, _, expected = case.partition(" = ")
    ask = yield flow_events((int(one[1:]) * 1000, one[0]) for one in flow.split())
    assert known(ask()) == tuple(map(int, expected.split()))


@CASES()
def a_port_that_another_process_uses_next():
    ask = yield [
        connect(0),
        accept(1),
        connect(70 * SECOND, "wget"),
        accept(70 * SECOND + 1, "haproxy"),
    ]
    assert edges_of(ask()) == {edge(): 1, edge("web1 wget", "db2 haproxy"): 1}


@CASES()
def a_connect_that_failed_is_no_edge():
    no_address = {"saddr": "0.0.0.0", "sport": 0, "daddr": EXTERNAL, "dport": 443}
    ask = yield [
        connect(0),
        failed(800),
        failed(800),
        connect(2 * SECOND),
        accept(2 * SECOND + 100),
        failed(9, error="ENETUNREACH", **no_address),
    ]
    assert edges_of(ask()) == {edge(): 1}
    rows = ask("failures")
    assert [tuple(row.values())[:7] for row in rows] == [
        ("web1", "curl", "db2", DB2, 80, "ECONNREFUSED", 1),
        ("web1", "curl", "", EXTERNAL, 443, "ENETUNREACH", 1),
    ]
    assert rows[0]["first_seen"] == rows[0]["last_seen"]
    assert rows[0]["last_seen"] == "2026-11-24T10:00:00.000800Z"


@CASES()
def the_threads_of_a_process_are_one_node():
    """Where the lines tell the process: those of before 2026-11-28 do not."""
    events = [connect(0), accept(9)]
    for port in range(3):
        flow = {"sport": 41000 + port}
        events.append(connect(port, f"Thread-{port}", process="java", **flow))
        events.append(accept(port + 9, f"io-{port}", process="nginx", **flow))
        more = {"error": "closed", "process": "java", "dport": 81}
        events.append(failed(port, f"Thread-{port}", **more))
    ask = yield events
    assert edges_of(ask()) == {edge(): 1, edge(client="web1 java"): 3}
    rows = ask("failures")
    assert [(row["client_comm"], row["failures"]) for row in rows] == [("java", 3)]


CONNECTED = event("connected", 190 * SECOND, "web1", "curl", latency_us=189_999_000)


@CASES()
def connected_is_a_connect_at_the_time_at_which_its_syn_left():
    """tcpconnect -l"""
    ask = yield [CONNECTED, accept(2_000)]
    [row] = ask()
    assert (row["known"], row["connections"]) == ("both", 1)
    assert row["first_seen"] == "2026-11-24T10:00:00.001000Z"


@CASES()
def connected_is_no_connect_at_its_own_time():
    ask = yield [CONNECTED, accept(189_999_999)]
    assert edges_of(ask()) == {
        edge(server=f"db2 ? {DB2}"): 1,
        edge(client=f"web1 ? {WEB1}"): 1,
    }


@CASES()
def a_connect_that_was_given_up():
    ask = yield [failed(9, error="closed", latency_us=SECOND)]
    assert ask() == []
    [row] = ask("failures")
    assert (row["error"], row["failures"]) == ("closed", 1)


LOOPBACK = ("127.0.0.1", "127.5.5.5", "::1")


@CASES(*LOOPBACK)
def every_host_and_namespace_has_a_loopback_of_its_own(address):
    here = {"saddr": address, "daddr": address}
    events = [
        one
        for host, netns in (("web1", 1), ("db2", 1), ("db2", 2))
        for one in (
            {**connect(0, f"curl{netns}", host, **here), "netns": netns, "pid": netns},
            {**accept(1, f"nginx{netns}", host, **here), "netns": netns, "pid": netns},
        )
    ]
    random.Random(6).shuffle(events)
    ask = yield events
    assert edges_of(ask()) == {
        edge("web1 curl1", "web1 nginx1"): 1,
        edge("db2 curl1", "db2 nginx1"): 1,
        edge("db2 curl2", "db2 nginx2"): 1,
    }


@CASES(*LOOPBACK)
def the_other_end_on_loopback_is_the_observers(address):
    ask = yield [connect(0, saddr=address, daddr=address)]
    assert edges_of(ask()) == {edge(server=f"web1 ? {address}"): 1}
    assert ask("unknown") == []


@CASES(*LOOPBACK)
def a_failure_on_loopback_is_the_observers(address):
    here = {"saddr": address, "daddr": address}
    ask = yield [
        failed(0, **here),
        connect(9, host="db2", **here),  # has the newest row
        accept(10, host="db2", **here),
    ]
    [row] = ask("failures")
    assert (row["client_host"], row["server_host"]) == ("web1", "web1")
    assert row["server_address"] == address


@CASES()
def unknown():
    ask = yield [
        *(connect(0), accept(1)),
        *(connect(n, sport=40007 + n, daddr=EXTERNAL, dport=443) for n in range(3)),
        *(accept(n, sport=50000 + n, saddr=EXTERNAL) for n in range(5)),
        connect(7, sport=40003),  # db2 has not reported it
    ]
    assert [tuple(row.values())[:6] for row in ask("unknown")] == [
        ("accept", "db2", "nginx", EXTERNAL, 80, 5),
        ("connect", "web1", "curl", EXTERNAL, 443, 3),
    ]
    assert edges_of(ask()) == {
        edge(): 1,
        edge(server=f"? {EXTERNAL}", port=443): 3,
        edge(client=f"? {EXTERNAL}"): 5,
        edge(server=f"db2 ? {DB2}"): 1,
    }


@CASES()
def lost_events():
    ask = yield [connect(0), lost("web1", 13), lost("web1", 13), lost("db2", 17)]
    rows = ask("lost")
    assert [(row["host"], row["events"]) for row in rows] == [("db2", 17), ("web1", 13)]


@CASES()
def a_host_without_a_clock():
    begin = -(BEGIN - datetime.datetime(1970, 1, 1)) // datetime.timedelta(
        microseconds=1
    )
    ask = yield [connect(begin + 5), accept(begin + 6)]
    assert edges_of(ask()) == {edge(): 1}


# ---- the time that is asked about

START, MIDDLE, END = HOUR // 4, HOUR // 4 + 3 * HOUR, HOUR // 4 + 6 * HOUR
EARLIER = moment(START), moment(MIDDLE)
LATER = moment(MIDDLE), moment(END)


@CASES("CA", "AC")
def a_pair_across_the_edge_of_the_time_is_on_the_connects_side(kinds):
    ask = yield flow_events(zip((MIDDLE - 500_000, MIDDLE + 400_000), kinds))
    found = [edges_of(ask("servicemap", *time)) for time in (EARLIER, LATER)]
    assert found == ([{edge(): 1}, {}] if kinds == "CA" else [{}, {edge(): 1}])


@CASES()
def a_connect_that_fails_after_the_edge_of_the_time():
    ask = yield [connect(MIDDLE - SECOND), failed(MIDDLE + 134 * SECOND)]
    for time, failures in ((EARLIER, 0), (LATER, 1)):
        assert ask("servicemap", *time) == []
        assert len(ask("failures", *time)) == failures


@CASES()
def the_time_is_exact():
    """It begins with `since`, and ends before `until`."""
    times = list(enumerate([START - 1, START, HOUR, MIDDLE - 1, MIDDLE]))
    events = [connect(at, sport=41000 + n) for n, at in times]
    events += [failed(at, dport=81, sport=42000 + n) for n, at in times]
    events += [{**lost("web1", 1, at), "tid": n} for n, at in times]
    ask = yield events
    for query, count in (
        ("servicemap", "connections"),
        ("failures", "failures"),
        ("unknown", "connections"),
        ("lost", "events"),
    ):
        [row] = ask(query, *EARLIER)
        first, last = timestamp(START), timestamp(MIDDLE - 1)
        assert (row[count], row["first_seen"], row["last_seen"]) == (3, first, last)


@pytest.mark.parametrize("name", CASES.tests)
def test_case(name, database):
    CASES.check(name, database)


def test_a_query_about_some_hours_reads_few_others(database):
    database.load(
        [connect(n * HOUR, sport=40000 + m) for n in range(8) for m in range(9000)]
    )
    database.session.query("OPTIMIZE TABLE tcp_events FINAL")
    count = """
        SELECT count() AS n, min(ts) AS first, max(ts) AS last
        FROM tcp_connections(
            since = '2026-11-24 12:00:00', until = '2026-11-24 12:30:00'
        )"""
    hour = "2026-11-24T12:00:00.000000Z"
    [row] = servicemap.ask(database.session, count)
    assert row == {"n": 9000, "first": hour, "last": hour}
    explain = f"EXPLAIN indexes = 1 {count}"
    plan = database.session.query(explain, "TSVRaw").bytes().decode()
    read, of = re.findall(r"Granules: (\d+)/(\d+)", plan)[-1]
    assert int(read) * 2 < int(of)


# ---- late lines, other flows, other ways to insert


def test_late_and_duplicated_lines(database):
    """Inserted one by one, as late as can be."""
    events = [
        make(n * 1000 + offset, sport=40000 + n % 5)
        for n in range(13)
        for make, offset in ((connect, 0), (accept, 300))
        if (n, make) not in ((5, connect), (7, accept), (11, accept))
    ]
    expected = database.answer(events)
    assert known(expected) == (10, 2, 1)
    shuffled = events * 3
    random.Random(6).shuffle(shuffled)
    database.load([])
    for one in shuffled:
        servicemap.load_chunk(database.session, text([one]))
    assert database.ask() == expected


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


def any_flow(chance):
    """Up to 12 events, close together or not."""
    times = range(chance.choice((13, 40, 300)))
    count = chance.randrange(1, 13)
    return [
        (time * SECOND // 2, chance.choice("CA"))
        for time in chance.sample(times, count)
    ]


def test_any_flow(database):
    chance = random.Random(6)
    flows = [any_flow(chance) for _ in range(250)]
    events = [
        one for n, flow in enumerate(flows) for one in moved(flow_events(flow), n)
    ]
    found = {n: [] for n in range(len(flows))}
    for row in database.answer(events):
        found[number_of(row)].append(row)
    wrong = [
        (sorted(flow), pairs(flow), known(found[n]))
        for n, flow in enumerate(flows)
        if known(found[n]) != pairs(flow)
    ]
    assert wrong == []


def test_the_shippers_insert(database):
    """What a shipper sends (JSONEachRow, unknown fields skipped) gives the rows that
    servicemap makes.
    """
    more = {"query": "www.example.com", "query_age_ms": 7}
    events = [
        connect(0),
        accept(1, saddr="::ffff:10.0.0.1"),
        lost("db2", 17),
        failed(5, error="ETIMEDOUT", **more),
    ]
    everything = "SELECT * FROM tcp_events FINAL ORDER BY ALL"
    database.load(events)
    ours = servicemap.ask(database.session, everything)
    assert len(ours) == 4
    database.load([])
    rows = text(events).decode()
    database.session.query(
        "INSERT INTO tcp_events SETTINGS input_format_skip_unknown_fields = 1 "
        f"FORMAT JSONEachRow {rows}"
    )
    assert servicemap.ask(database.session, everything) == ours
