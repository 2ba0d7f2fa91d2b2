"""examples/fleet on generated events of which the truth is known: hosts whose clocks
are off, and connections whose addresses or ports change on the way.
"""

import random
import re
from collections import Counter

import pytest

from .test_servicemap import FLEET, answer, connect, event, run, text

SECOND = 1_000_000  # µs
HOSTS = [f"host{n}" for n in range(10)]
ADDRESSES = {host: f"10.0.0.{n}" for n, host in enumerate(HOSTS, 1)}
GATEWAY = "198.51.100.7"


class Fleet:
    """What happens among hosts, as connect() makes it, and what their tools print.

    offsets: {host: by how many µs its clock is ahead}. Of the events, one in `loss` is
    lost.
    """

    def __init__(self, seed, offsets=(), loss=50):
        self.random, self.offsets, self.loss = random.Random(seed), dict(offsets), loss
        self.events, self.edges, self.halves = [], Counter(), Counter()

    def print(self, kind, at, host, *rest, **more):
        """Whether the event is not lost."""
        if self.loss and self.random.randrange(self.loss) == 0:
            return False
        at += self.offsets.get(host, 0)
        self.events.append(event(kind, at, host, *rest, **more))
        return True

    def connect(self, at, client, server, sport, seen=None, nat="", wait=300):
        """A connection. seen: its addresses and ports at the server, where these differ
        there. Its edge is expected if no event was lost.
        """
        to = {"daddr": ADDRESSES[server], "dport": 80, "sport": sport}
        to |= {"saddr": ADDRESSES[client]}
        late = at + self.random.randrange(50, wait)
        sides = (
            self.print("connect", at, client, f"c{client}", **to),
            self.print("accept", late, server, f"s{server}", **{**to, **(seen or {})}),
        )
        self.expect(sides, client, server, nat)

    def expect(self, sides, client, server, nat):
        if all(sides):
            self.edges[client, f"c{client}", server, f"s{server}", nat] += 1
        elif any(sides):
            self.halves["client" if sides[0] else "server"] += 1

    def shuffled(self):
        return self.random.sample(self.events, len(self.events))

    def traffic(self, connections):
        """Between any two hosts, three per second; no port is used again soon."""
        for n in range(connections):
            client, server = self.random.sample(HOSTS, 2)
            self.connect(n * SECOND // 3, client, server, 20000 + n)

    def check(self):
        edges, halves = map_of(self.shuffled())
        assert edges == self.edges
        assert halves == self.halves


def map_of(events):
    """({edge: connections}, {known end: connections})"""
    edges, halves = Counter(), Counter()
    for row in answer(events):
        names = ("client_host", "client_comm", "server_host", "server_comm", "nat")
        if row["known"] == "both":
            edges[tuple(row[name] for name in names)] += row["connections"]
        else:
            assert row["nat"] == ""
            halves[row["known"]] += row["connections"]
    return edges, halves


# ---- clocks


def off(events):
    """{host: by how many s its clock is ahead}, as clocks.sql reports it."""
    return {row["host"]: row["offset_us"] / SECOND for row in answer(events, "clocks")}


@pytest.mark.parametrize("seconds", [-5, -4, -1.5, 1.5, 5])
def test_a_clock_that_is_off(seconds):
    """It is found, by how much, and there is no wrong edge."""
    fleet = Fleet(6, {"host4": int(seconds * SECOND)})
    fleet.traffic(1500)
    assert off(fleet.shuffled()) == {"host4": pytest.approx(seconds, abs=0.001)}
    fleet.check()


@pytest.mark.parametrize("seed", [1, 2])
def test_all_clocks_are_off(seed):
    """Each from -5 to 5 s. It is unknown which is right; the differences are known."""
    chance = random.Random(seed)
    offsets = {host: chance.randrange(-5 * SECOND, 5 * SECOND) for host in HOSTS}
    fleet = Fleet(seed, offsets)
    fleet.traffic(1500)
    middle = sorted(offsets.values())[len(HOSTS) // 2]
    expected = {host: (offset - middle) / SECOND for host, offset in offsets.items()}
    found = off(fleet.shuffled())
    assert found == {
        host: pytest.approx(offset, abs=0.002)
        for host, offset in expected.items()
        if abs(offset) >= 0.5
    }
    assert len(found) > 5
    fleet.check()


def test_a_server_that_all_talk_to():
    """Its clock is off, and not those of its clients."""
    fleet = Fleet(6, {"host0": -4 * SECOND})
    for n in range(300):
        client = fleet.random.choice(HOSTS[1:])
        fleet.connect(n * SECOND, client, "host0", 20000 + n)
    assert off(fleet.shuffled()) == {"host0": pytest.approx(-4, abs=0.001)}
    fleet.check()


def test_hosts_that_are_far_from_each_other():
    """A chain: each only talks to the next."""
    fleet = Fleet(6, {"host4": 3 * SECOND}, loss=0)
    for n in range(300):
        first = n % (len(HOSTS) - 1)
        fleet.connect(n * SECOND, HOSTS[first], HOSTS[first + 1], 20000 + n)
    assert off(fleet.shuffled()) == {"host4": pytest.approx(3, abs=0.002)}
    fleet.check()


def test_clocks_that_are_right():
    """No network is so slow; and who waits in the accept queue waits now less, now
    more.
    """
    fleet = Fleet(6, {"host4": 400_000})
    fleet.traffic(600)
    for n in range(300):
        fleet.connect(n * SECOND, "host5", "host7", 40000 + n, wait=30 * SECOND)
    assert off(fleet.shuffled()) == {}
    fleet.check()


def test_four_flows_are_no_clock():
    """Few that are wrong, as where two hosts have the same address, show nothing."""
    fleet = Fleet(6, {"host4": 4 * SECOND}, loss=0)
    for n in range(4):
        fleet.connect(n * SECOND, "host3", "host4", 20000 + n)
    assert off(fleet.events) == {}
    fleet.connect(4 * SECOND, "host3", "host4", 20004)
    assert len(off(fleet.events)) == 1


def test_late_and_duplicated_lines_of_a_clock_that_is_off():
    fleet = Fleet(6, {"host4": -4 * SECOND})
    fleet.traffic(300)
    once = off(fleet.events)
    fleet.events *= 2
    assert off(fleet.shuffled()) == once != {}
    fleet.check()


def test_a_port_that_is_used_again_soon():
    """The same four addresses and ports every 20 ms, by processes in turn: pairs in
    order of time are wrong unless the clocks are corrected.
    """
    fleet = Fleet(6, {"host4": 2 * SECOND}, loss=0)
    fleet.traffic(300)
    to = {"saddr": ADDRESSES["host3"], "daddr": ADDRESSES["host4"], "sport": 9}
    for n in range(90):
        at = n * 20_000
        fleet.print("connect", at, "host3", f"client{n % 3}", **to)
        fleet.print("accept", at + 300, "host4", f"server{n % 3}", **to)
        fleet.edges["host3", f"client{n % 3}", "host4", f"server{n % 3}", ""] += 1
    fleet.check()


def test_the_text_of_the_clocks_is_the_same_in_both_files():
    def clocks(name):
        form = r"    -- Clocks, the same text as in .*?\n(.*?),?\n    -- Clocks end\.\n"
        return re.search(form, (FLEET / name).read_text(), re.DOTALL)[1]

    assert clocks("schema.sql") == clocks("clocks.sql")


def test_the_warning():
    fleet = Fleet(6, {"host4": -4 * SECOND, "host6": 3 * SECOND})
    fleet.traffic(600)
    out, err, status = run("--json", stdin=text(fleet.shuffled()))
    assert (len(out.splitlines()) > 50, status) == (True, 0)
    first, second = err.splitlines()
    form = (
        r"servicemap: the clock of {} is {}\.\d{{3}} s {} the others': "
        "corrected for the map, not in the times shown"
    )
    assert re.fullmatch(form.format("host4", "[34]", "behind"), first)
    assert re.fullmatch(form.format("host6", "[23]", "ahead of"), second)


# ---- address translation


def published(fleet, n, at):
    """Destination NAT: a port of one address is another host's, with another port."""
    client, server = fleet.random.sample(HOSTS, 2)
    seen = {"daddr": "172.17.0.2", "dport": 8080}
    fleet.connect(at, client, server, 10000 + n, seen, "dnat")


def masqueraded(fleet, n, at):
    """Source NAT, where the port is kept. The client's address is a container's."""
    client, server = fleet.random.sample(HOSTS, 2)
    container = f"172.18.0.{1 + n % 200}"
    to = {"daddr": ADDRESSES[server], "dport": 80, "sport": 10000 + n}
    sides = (
        fleet.print("connect", at, client, f"c{client}", saddr=container, **to),
        fleet.print("accept", at + 300, server, f"s{server}", saddr=GATEWAY, **to),
    )
    fleet.expect(sides, client, server, "snat")


@pytest.mark.parametrize("offsets", [{}, {"host4": -4 * SECOND, "host6": 5 * SECOND}])
def test_translated_connections(offsets):
    """Beside others, with lost events and, if any, clocks that are off."""
    fleet = Fleet(6, offsets)
    fleet.traffic(1000)
    for n in range(1000):
        make = published if n % 2 else masqueraded
        make(fleet, n, n * SECOND // 3)
    assert {edge[4] for edge in fleet.edges} == {"", "dnat", "snat"}
    fleet.check()


def test_in_a_row_the_clients_side_is_shown():
    events = [
        event("connect", 5, "web1", "curl", daddr="10.96.0.1", dport=443),
        event("accept", 9, "db2", "nginx", daddr="172.17.0.2", dport=8443),
    ]
    for moved in (0, -10):  # the accept may come first
        events[1]["ts"] = connect(9 + moved)["ts"]
        [row] = answer(events)
        assert (row["port"], row["known"], row["nat"]) == (443, "both", "dnat")
        assert row["first_seen"] == row["last_seen"] == "2026-11-24T10:00:00.000005Z"
        assert row["client_address"] == row["server_address"] == ""
    assert answer(events, "unknown") == []
    assert '[label="443 (1) dnat"]' in run("--dot", stdin=text(events))[0]


def is_alone(one, others):
    """Whether no other (key, time) of the same key is within 1 s. Either's accept is
    300 µs after its connect.
    """
    key, time = one
    near = [other for other in others if other[0] == key and other != one]
    return all(abs(other_time - time) > SECOND + 300 for _, other_time in near)


@pytest.mark.parametrize("nat", ["dnat", "snat"])
def test_ambiguous_translated_connections(nat):
    """Of the same source port, and source address or destination. Those within a second
    of others stay unmatched; all others are matched.
    """
    chance, events, made = random.Random(6), [], []
    changed = {"dnat": "daddr", "snat": "saddr"}[nat]
    for n in range(400):
        sport, at = chance.randrange(20), chance.randrange(100 * SECOND)
        made.append((sport, at))
        seen = {"sport": sport, changed: f"172.18.{n // 200}.{n % 200}"}
        events += [
            event("connect", at, "web1", f"c{n}", sport=sport),
            event("accept", at + 300, "db2", f"s{n}", **seen),
        ]
    alone = [n for n in range(400) if is_alone(made[n], made)]
    edges, halves = map_of(chance.sample(events, len(events)))
    assert edges == {("web1", f"c{n}", "db2", f"s{n}", nat): 1 for n in alone}
    assert halves == {"client": 400 - len(alone), "server": 400 - len(alone)}
    assert 100 < len(alone) < 300


@pytest.mark.parametrize(
    "changed",
    [
        {"sport": 40001},
        {"saddr": GATEWAY, "daddr": "172.17.0.2"},
        {"saddr": GATEWAY, "dport": 8080},
        {"saddr": "127.0.0.1"},
    ],
    ids=["another port", "both addresses", "another destination", "loopback"],
)
def test_ends_that_do_not_match(changed):
    edges, halves = map_of([connect(0), event("accept", 9, "db2", "nginx", **changed)])
    assert (edges, halves) == ({}, {"client": 1, "server": 1})


def test_a_translated_accept_is_at_most_a_second_later():
    for late, known in ((SECOND, "both"), (SECOND + 1, "client")):
        accepted = event("accept", late, "db2", "nginx", dport=8080)
        assert {row["known"] for row in answer([connect(0), accepted])} >= {known}


def test_a_lost_accept_is_not_an_external_clients():
    """That has the same source port by chance. The client is not translated, for the
    server has accepted from its address.
    """
    events = [connect(0), event("accept", 9, "db2", "nginx", saddr=GATEWAY)]
    assert map_of(events)[0] == {("web1", "curl", "db2", "nginx", "snat"): 1}
    before = {"sport": 39999}
    events += [
        connect(-7 * SECOND, **before),
        event("accept", -7 * SECOND + 9, "db2", "nginx", **before),
    ]
    assert map_of(events)[0] == {("web1", "curl", "db2", "nginx", ""): 1}
