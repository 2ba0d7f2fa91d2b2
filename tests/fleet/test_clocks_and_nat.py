"""examples/fleet on generated events of which the truth is known: hosts whose clocks
are off, and connections whose addresses or ports change on the way.
"""

import random
import re
from collections import Counter

import pytest

from .events import FLEET, SECOND, Cases, accept, connect, event, servicemap, text
from .test_servicemap import run

HOSTS = [f"host{n}" for n in range(10)]
ADDRESSES = {host: f"10.0.0.{n}" for n, host in enumerate(HOSTS, 1)}
GATEWAY = "198.51.100.7"

CASES = Cases()


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

    def check(self, ask):
        edges, halves = map_of(ask())
        assert edges == self.edges
        assert halves == self.halves


def map_of(rows):
    """({edge: connections}, {known end: connections})"""
    edges, halves = Counter(), Counter()
    for row in rows:
        names = ("client_host", "client_comm", "server_host", "server_comm", "nat")
        if row["known"] == "both":
            edges[tuple(row[name] for name in names)] += row["connections"]
        else:
            assert row["nat"] == ""
            halves[row["known"]] += row["connections"]
    return edges, halves


# ---- clocks


def off(ask):
    """{host: by how many s its clock is ahead}, as clocks.sql reports it."""
    return {row["host"]: row["offset_us"] / SECOND for row in ask("clocks")}


@CASES(-5, -4, -1.5, 1.5, 5)
def a_clock_that_is_off(seconds):
    """It is found, by how much, and there is no wrong edge."""
    fleet = Fleet(6, {"host4": int(seconds * SECOND)})
    fleet.traffic(1500)
    ask = yield fleet.shuffled()
    assert off(ask) == {"host4": pytest.approx(seconds, abs=0.001)}
    fleet.check(ask)


@CASES(1, 2)
def all_clocks_are_off(seed):
    """Each from -5 to 5 s. It is unknown which is right; the differences are known."""
    chance = random.Random(seed)
    offsets = {host: chance.randrange(-5 * SECOND, 5 * SECOND) for host in HOSTS}
    fleet = Fleet(seed, offsets)
    fleet.traffic(1500)
    middle = sorted(offsets.values())[len(HOSTS) // 2]
    expected = {host: (offset - middle) / SECOND for host, offset in offsets.items()}
    ask = yield fleet.shuffled()
    found = off(ask)
    assert found == {
        host: pytest.approx(offset, abs=0.002)
        for host, offset in expected.items()
        if abs(offset) >= 0.5
    }
    assert len(found) > 5
    fleet.check(ask)


@CASES()
def a_server_that_all_talk_to():
    """Its clock is off, and not those of its clients."""
    fleet = Fleet(6, {"host0": -4 * SECOND})
    for n in range(300):
        client = fleet.random.choice(HOSTS[1:])
        fleet.connect(n * SECOND, client, "host0", 20000 + n)
    ask = yield fleet.shuffled()
    assert off(ask) == {"host0": pytest.approx(-4, abs=0.001)}
    fleet.check(ask)


@CASES()
def hosts_that_are_far_from_each_other():
    """A chain: each only talks to the next."""
    fleet = Fleet(6, {"host4": 3 * SECOND}, loss=0)
    for n in range(300):
        first = n % (len(HOSTS) - 1)
        fleet.connect(n * SECOND, HOSTS[first], HOSTS[first + 1], 20000 + n)
    ask = yield fleet.shuffled()
    assert off(ask) == {"host4": pytest.approx(3, abs=0.002)}
    fleet.check(ask)


@CASES()
def clocks_that_are_right():
    """No network is so slow; and who waits in the accept queue waits now less, now
    more.
    """
    fleet = Fleet(6, {"host4": 400_000})
    fleet.traffic(600)
    for n in range(300):
        fleet.connect(n * SECOND, "host5", "host7", 40000 + n, wait=30 * SECOND)
    ask = yield fleet.shuffled()
    assert off(ask) == {}
    fleet.check(ask)


@CASES(4, 5)
def four_flows_are_no_clock(count):
    """Few that are wrong, as where two hosts have the same address, show nothing."""
    fleet = Fleet(6, {"host4": 4 * SECOND}, loss=0)
    for n in range(count):
        fleet.connect(n * SECOND, "host3", "host4", 20000 + n)
    ask = yield fleet.events
    assert len(off(ask)) == (count > 4)


@CASES()
def late_and_duplicated_lines_of_a_clock_that_is_off():
    fleet = Fleet(6, {"host4": -4 * SECOND})
    fleet.traffic(300)
    fleet.events *= 2
    ask = yield fleet.shuffled()
    assert off(ask) == {"host4": pytest.approx(-4, abs=0.001)}
    fleet.check(ask)


@CASES()
def a_port_that_is_used_again_soon():
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
    ask = yield fleet.shuffled()
    fleet.check(ask)


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


@CASES("right", "off")
def translated_connections(clocks):
    """Beside others, with lost events and clocks."""
    offsets = {"host4": -4 * SECOND, "host6": 5 * SECOND}
    fleet = Fleet(6, offsets if clocks == "off" else {})
    fleet.traffic(1000)
    for n in range(1000):
        make = published if n % 2 else masqueraded
        make(fleet, n, n * SECOND // 3)
    assert {edge[4] for edge in fleet.edges} == {"", "dnat", "snat"}
    ask = yield fleet.shuffled()
    fleet.check(ask)


@CASES(9, -1)
def in_a_row_the_clients_side_is_shown(accepted):
    """The accept may come first."""
    ask = yield [
        connect(5, daddr="10.96.0.1", dport=443),
        accept(accepted, daddr="172.17.0.2", dport=8443),
    ]
    [row] = ask()
    assert (row["port"], row["known"], row["nat"]) == (443, "both", "dnat")
    assert row["first_seen"] == row["last_seen"] == "2026-11-24T10:00:00.000005Z"
    assert row["client_address"] == row["server_address"] == ""
    assert ask("unknown") == []
    assert '[label="443 (1) dnat"]' in "".join(servicemap.dot([row]))


def is_alone(one, others):
    """Whether no other (key, time) of the same key is within 1 s. Either's accept is
    300 µs after its connect.
    """
    key, time = one
    near = [other for other in others if other[0] == key and other != one]
    return all(abs(other_time - time) > SECOND + 300 for _, other_time in near)


@CASES("dnat", "snat")
def ambiguous_translated_connections(nat):
    """Of the same source port, and source address or destination. Those within a second
    of others stay unmatched; all others are matched.
    """
    chance, events, made = random.Random(6), [], []
    changed = {"dnat": "daddr", "snat": "saddr"}[nat]
    for n in range(400):
        sport, at = chance.randrange(20), chance.randrange(100 * SECOND)
        made.append((sport, at))
        seen = {"sport": sport, changed: f"172.{16 + n // 200}.0.{n % 200}"}
        events += [
            event("connect", at, "web1", f"c{n}", sport=sport),
            event("accept", at + 300, "db2", f"s{n}", **seen),
        ]
    alone = [n for n in range(400) if is_alone(made[n], made)]
    ask = yield chance.sample(events, len(events))
    edges, halves = map_of(ask())
    assert edges == {("web1", f"c{n}", "db2", f"s{n}", nat): 1 for n in alone}
    assert halves == {"client": 400 - len(alone), "server": 400 - len(alone)}
    assert 100 < len(alone) < 300


UNRELATED = {
    "another port": {"sport": 40001},
    "both addresses": {"saddr": GATEWAY, "daddr": "172.17.0.2"},
    "another destination": {"saddr": GATEWAY, "dport": 8080},
    "loopback": {"saddr": "127.0.0.1"},
}


@CASES(*UNRELATED)
def ends_that_do_not_match(changed):
    ask = yield [connect(0), accept(9, **UNRELATED[changed])]
    assert map_of(ask()) == ({}, {"client": 1, "server": 1})


@CASES(SECOND, SECOND + 1)
def a_translated_accept_is_at_most_a_second_later(late):
    ask = yield [connect(0), accept(late, dport=8080)]
    expected = {"both"} if late == SECOND else {"client", "server"}
    assert {row["known"] for row in ask()} == expected


# Of an external client that has the same source port by chance
BY_CHANCE = [connect(0), accept(9, saddr=GATEWAY)]


@CASES()
def an_accept_of_the_same_source_port_is_a_translated_clients():
    ask = yield BY_CHANCE
    assert map_of(ask())[0] == {("web1", "curl", "db2", "nginx", "snat"): 1}


@CASES()
def a_lost_accept_is_not_an_external_clients():
    """The client is not translated, for the server has accepted from its address."""
    before = -7 * SECOND
    ask = yield [
        *BY_CHANCE,
        connect(before, sport=39999),
        accept(before + 9, sport=39999),
    ]
    assert map_of(ask())[0] == {("web1", "curl", "db2", "nginx", ""): 1}


@pytest.mark.parametrize("name", CASES.tests)
def test_case(name, database):
    CASES.check(name, database)
