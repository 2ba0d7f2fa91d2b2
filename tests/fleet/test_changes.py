"""examples/fleet/changes.sql: what is new, from the events and from stored hours."""

import pytest

from .events import (
    EXTERNAL,
    HOUR,
    SECOND,
    Cases,
    accept,
    connect,
    connected,
    edge,
    edges_of,
    moment,
    pair,
    timestamp,
)

SINCE, UNTIL = 2 * HOUR + 7 * SECOND, 3 * HOUR + 11 * SECOND
LATE = 5 * HOUR
NEW = "changes", moment(SINCE), moment(UNTIL)

CASES = Cases()


@CASES()
def the_time_is_exact():
    """What begins at `since` is new, what has been 1 µs before is not; nor is what
    begins at `until`.
    """
    ask = yield [
        *pair(SINCE - 1, "before", sport=1),
        *pair(SINCE + 5, "before", sport=2),
        *(one for n in range(3) for one in pair(SINCE + n, "at", sport=10 + n)),
        *pair(SINCE - 1, "only before", sport=20),
        *pair(0, "long before", sport=30),
        *pair(UNTIL - 1, "long before", sport=31),
        *(one for n in range(5) for one in pair(UNTIL - 1 - n, "end", sport=40 + n)),
        *pair(UNTIL, "end", sport=50),
        *pair(UNTIL, "after", sport=60),
    ]
    rows = ask(*NEW)
    assert edges_of(rows) == {edge("web1 at"): 3, edge("web1 end"): 5}
    assert [row["first_seen"] for row in rows] == [
        timestamp(SINCE),
        timestamp(UNTIL - 5),
    ]
    assert list(rows[0]) == list(ask()[0])
    assert len(ask("changes")) == 6


@CASES()
def an_edge_is_another_with_another_process_host_or_port():
    other = {"daddr": "10.0.0.9"}
    ask = yield [
        *pair(0),
        *pair(SINCE, sport=1),
        *pair(SINCE, "wget", sport=2),
        *pair(SINCE + SECOND, server="caddy", sport=3),
        *pair(SINCE, dport=443, sport=4),
        connect(SINCE, host="web3", sport=5),
        *(connect(SINCE, **other), accept(SINCE + 1, host="db4", **other)),
    ]
    assert edges_of(ask(*NEW)) == {
        edge("web1 wget"): 1,
        edge(server="db2 caddy"): 1,
        edge(port=443): 1,
        edge("web3 curl"): 1,
        edge(server="db4 nginx"): 1,
    }


UNIT = {"cgroup_path": "/system.slice/app.service"}
LOGIN = {"cgroup_path": "/user.slice/user-0.slice/session-3.scope"}


def container(digit):
    return {"cgroup_path": f"/system.slice/docker-{digit * 64}.scope"}


@CASES(
    "the same container: old",
    "another container: old",
    "another process of the unit: old",
    "another login: old",
    "another process in a container: new",
    "another unit: new",
)
def a_service_is_a_unit_or_a_process_in_any_container(case):
    what, _, expected = case.partition(": ")
    before, after = {
        "the same container": (("java", container("a")), ("java", container("a"))),
        "another container": (("java", container("a")), ("java", container("b"))),
        "another process of the unit": (("ruby", UNIT), ("sh", UNIT)),
        "another login": (("ssh", LOGIN), ("ssh", {})),
        "another process in a container": (
            ("java", container("a")),
            ("sh", container("b")),
        ),
        "another unit": (
            ("ruby", UNIT),
            ("ruby", {"cgroup_path": "/system.slice/app2.service"}),
        ),
    }[what]
    ask = yield [
        connect(0, before[0], sport=1, **before[1]),
        connect(SINCE, after[0], sport=2, **after[1]),
        *(accept(at, sport=n + 3) for n, at in enumerate((9, SINCE + 9))),
    ]
    assert len(ask(*NEW)) == (expected == "new")


# What is known of an edge before and after: hours apart, for a listener of the hour
# before is known, too
@CASES(
    "C A, C: old",
    "C A, A: old",
    "C, C: old",
    "A, A: old",
    "C, C A: old",
    "A, C A: new",
    "C, A: new",
    "A, C: new",
)
def an_end_that_is_not_known_is_no_change(case):
    """Of hosts whose addresses are known. Other processes there are a change."""

    def made(at, what, sport):
        both = dict(zip("CA", pair(at, sport=sport)))
        return [both[kind] for kind in what.split()]

    addresses = [
        one
        for at in (5, LATE + 5)
        for one in pair(at, "ssh", "sshd", sport=7, dport=22)
    ]
    edges, _, expected = case.partition(": ")
    before, _, after = edges.partition(", ")
    ask = yield [*made(0, before, 1), *made(LATE, after, 2), *addresses]
    assert len(ask("changes", moment(LATE))) == (expected == "new")


@CASES()
def an_external_host_is_its_address():
    ask = yield [
        *(connect(at, sport=1, daddr=EXTERNAL) for at in (0, SINCE)),
        *(accept(at, sport=2, saddr=EXTERNAL) for at in (0, SINCE)),
        connect(SINCE, sport=3, daddr="198.51.100.8"),
        accept(SINCE, sport=4, saddr="198.51.100.9"),
    ]
    assert edges_of(ask(*NEW)) == {
        edge(server="? 198.51.100.8"): 1,
        edge(client="? 198.51.100.9"): 1,
    }


@pytest.mark.parametrize("name", CASES.tests)
def test_case(name, database):
    CASES.check(name, database)


# ---- with stored hours


def stored(at, comm="curl", connections=7):
    """Rows of tcp_edges: an edge, and that its hour is stored. at: its first and last
    time, in µs since BEGIN.
    """
    hour, first, last = moment(at[0])[:13] + ":00:00", moment(at[0]), moment(at[1])
    row = {"client_host": "web1", "client_comm": comm, "server_host": "db2"}
    row |= {"server_comm": "nginx", "port": 80, "known": "both"}
    row |= {"first_seen": first, "last_seen": last, "connections": connections}
    row |= {"failures": 2, "latency": {"7": connections}}
    return [{"hour": hour, **row}, {"hour": hour, "first_seen": hour}]


def test_what_was_before_the_events_is_known_from_tcp_edges(database):
    long_ago = -50 * 24 * HOUR
    rows = [*stored((long_ago, long_ago + 9)), *stored((-HOUR, -9), "wget")]
    events = [*pair(HOUR), *pair(HOUR, "wget", sport=2), *pair(HOUR, "new", sport=3)]
    database.load(events)
    assert len(database.ask("changes", moment(HOUR))) == 3
    database.load(events, rows)
    new = edges_of(database.ask("changes", moment(HOUR)))
    assert new == {edge("web1 new"): 1}


def test_hours_that_are_stored_count_once(database):
    """And the others from their events: those of the hour of `until`, too."""
    at = HOUR, 2 * HOUR - 1
    rows = [*stored(at, "stored", 5), *stored(at, connections=2)]
    events = [
        *(one for n in range(2) for one in pair(HOUR + n, sport=n + 1)),
        *(one for n in range(3) for one in pair(2 * HOUR + n, sport=n + 11)),
        *pair(2 * HOUR + 9, sport=21),
    ]
    database.load(events, rows)

    def changes(*times):
        return edges_of(database.ask("changes", *map(moment, times)))

    both = {edge("web1 stored"): 5, edge(): 6}
    assert changes(0) == both
    assert changes(HOUR) == both
    assert changes(HOUR + 1) == {}
    assert changes(HOUR, 2 * HOUR + 3) == {**both, edge(): 5}
    # Its edge without events has no place in a part of the hour
    assert changes(HOUR, HOUR + 1) == {edge(): 1}


def test_the_map_of_stored_hours_and_today_is_one(database):
    """Whole hours that are stored, the events of all others; failures and latency of
    both.
    """
    events = [*pair(HOUR + 5, sport=1), *pair(2 * HOUR + 5, sport=2)]
    events += [connected(2 * HOUR + 7, sport=3, latency_us=3000)]
    database.load(events, stored((HOUR, HOUR + 9), connections=11))

    def found(*times):
        rows = database.ask("servicemap", *map(moment, times))
        return [(row["connections"], row["failures"]) for row in rows]

    assert found(0, 3 * HOUR) == [(13, 2)]
    assert found(HOUR, 2 * HOUR) == [(11, 2)]
    assert found(HOUR + 1, 3 * HOUR) == [(3, 0)]
    assert found(HOUR, 2 * HOUR - 1) == [(1, 0)]
    [row] = database.ask()
    assert 64 < row["latency_us_p50"] < 128
    assert 2048 < row["latency_us_p99"] < 4096
