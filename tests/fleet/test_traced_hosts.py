"""The lines of three traced hosts (tests/guest/test_three_hosts.py), joined: the map
must equal what was done, edge by edge.
"""

import datetime
import json
import random
import subprocess
import sys
from collections import Counter

import pytest

from .events import ENDS, SERVICEMAP

HOSTS = ("web1", "app2", "db3")
HOUR = datetime.datetime(2026, 11, 25, 10, 0, 0)


@pytest.fixture(scope="module")
def fleet(request):
    """The directory with a file of lines for each host, and what was done."""
    results = request.config.getoption("--guest-results", None)
    guest = results / "bookworm" if results else None
    if not guest or not (guest / "fleet/done").exists():
        pytest.skip("bookworm's guest has not run test_three_hosts")
    return guest / "fleet"


def lines_of(fleet, hosts):
    """Their lines, moved to the beginning of an hour: addresses are named by the hour,
    and the work may have crossed the end of one.
    """
    everything = {host: lines_with_times(fleet, host) for host in HOSTS}
    shift = HOUR - min(ts for lines in everything.values() for ts, _ in lines)
    return b"".join(
        json.dumps({**row, "ts": (ts + shift).isoformat()}).encode() + b"\n"
        for host in hosts
        for ts, row in everything[host]
    )


def lines_with_times(fleet, host):
    """[(time, line)] of a host."""
    lines = (fleet / f"{host}.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(datetime.datetime.fromisoformat(row["ts"][:-1]), row) for row in rows]


def answer(lines, *args):
    command = [sys.executable, SERVICEMAP, "--json", *args]
    done = subprocess.run(command, input=lines, capture_output=True, check=True)
    assert done.stderr == b""
    return [json.loads(line) for line in done.stdout.splitlines()]


def work(fleet, hosts):
    """What was done and who reports it, if only these hosts' lines are there.

    Yields (what, whether the client reports it, whether the server does).
    """
    for one in json.loads((fleet / "done").read_text()):
        client = one["client_seen"] and one["client"] in hosts
        server = one["server_seen"] and one["server"] in hosts
        if client or server:
            yield one, client, server


def addresses(fleet, hosts):
    """{address: host} that the lines of these hosts know."""
    known = {}
    for one, client, server in work(fleet, hosts):
        known.update({one["source"]: one["client"]} if client else {})
        known.update({one["at_server"][1]: one["server"]} if server else {})
    return known


def connections(fleet, hosts):
    for one, client, server in work(fleet, hosts):
        if one["what"] == "connections":
            yield one, client, server


def where(one, address, port):
    """Where to connect to: loopback is each host's own."""
    return (one["server"] if address.startswith("127.") else "", address, port)


def ends(fleet, hosts):
    """What the rows of these hosts say of each: yields what was done; the server, if it
    is known who listens where the client connected to; whether it is an edge: that of a
    connect, or that of an accept whose client is not known from others.
    """
    known = list(connections(fleet, hosts))
    listeners = {
        where(one, *one["at_server"][1:]): (one["server"], one["server_comm"], "")
        for one, _, server in known
        if server
    }
    names = addresses(fleet, hosts)
    made = {
        (one["client"], one["address"], one["port"])
        for one, client, _ in known
        if client
    }
    for one, client, server in known:
        source, address, port = one["at_server"]
        if client:
            end = listeners.get(where(one, one["address"], one["port"]))
            if server and one["nat"] == "dnat":
                end = listeners[where(one, address, port)]
            yield one, True, end
        elif (names.get(source), address, port) not in made:
            yield one, False, (one["server"], one["server_comm"], "")


def expected_map(fleet, hosts):
    names, edges = addresses(fleet, hosts), Counter()
    for one, client, server in ends(fleet, hosts):
        source, _, port = one["at_server"]
        from_ = (one["client"], one["client_comm"], "")
        if not client:
            from_ = (names.get(source, ""), "", source)
        address = one["address"]
        to = server or (names.get(address, ""), "", address)
        side = "both" if client and server else "client" if client else "server"
        edges[(*from_, *to, one["port"] if client else port, side)] += one["count"]
    return edges


def found_map(lines, *args):
    """Each process is a service of its name."""
    rows = answer(lines, *args)
    for row in rows:
        for end in ("client", "server"):
            comm = row[f"{end}_comm"]
            assert row[f"{end}_unit"] == (f"{comm}.service" if comm else "")
    found = {
        (*(row[name] for name in (*ENDS, "port", "known")),): row["connections"]
        for row in rows
    }
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("missing", [None, *HOSTS])
def test_map(fleet, missing):
    """Of a host whose lines are missing, edges are known from one end."""
    hosts = [host for host in HOSTS if host != missing]
    found = found_map(lines_of(fleet, hosts))
    assert found == expected_map(fleet, hosts)
    assert len(found) > 5


def test_map_of_late_and_duplicated_lines(fleet):
    lines = lines_of(fleet, HOSTS).splitlines(keepends=True) * 2
    random.Random(6).shuffle(lines)
    assert found_map(b"".join(lines)) == expected_map(fleet, HOSTS)


def test_what_is_new(fleet):
    """Since "deploy" connected to app2, whose tools were off. What connected from there
    may be gunicorn, as before.
    """
    lines = lines_of(fleet, HOSTS)
    since = min(
        datetime.datetime.fromisoformat(row["ts"])
        - datetime.timedelta(microseconds=row["latency_us"])
        for row in map(json.loads, lines.splitlines())
        if row.get("comm") == "deploy" and "latency_us" in row
    ).isoformat()
    assert found_map(lines, "--since", f"{since}Z") == {
        edge: count
        for edge, count in expected_map(fleet, HOSTS).items()
        if edge[1] in ("deploy", "monitor")
    }


def test_latency(fleet):
    """Of every edge with a client: in this guest, from 1 us to a minute."""
    for row in answer(lines_of(fleet, HOSTS)):
        is_there = "latency_us_p50" in row
        assert is_there == (row["known"] != "server")
        if is_there:
            assert 1 <= row["latency_us_p50"] <= row["latency_us_p99"] < 60_000_000


@pytest.mark.parametrize("missing", [None, "db3"])
def test_unknown(fleet, missing):
    hosts = [host for host in HOSTS if host != missing]
    names, expected = addresses(fleet, hosts), Counter()
    for one, client, server in ends(fleet, hosts):
        address = one["address"] if client else one["at_server"][0]
        if (not client or not server) and address not in names:
            event, end = ("connect", "client") if client else ("accept", "server")
            where = one[end], one[f"{end}_comm"], address, one["port"]
            expected[(event, *where)] += one["count"]
    rows = answer(lines_of(fleet, hosts), "--unknown")
    names = "event", "host", "comm", "address", "port"
    found = {(*(row[name] for name in names),): row["connections"] for row in rows}
    assert found == expected
    assert len(rows) == len(expected) == {None: 2, "db3": 3}[missing]


def test_failures(fleet):
    [refused] = [one for one, _, _ in work(fleet, HOSTS) if one["what"] == "failures"]
    [row] = answer(lines_of(fleet, HOSTS), "--failures")
    assert (row["client_comm"], row["error"]) == (
        refused["client_comm"],
        "ECONNREFUSED",
    )
    assert (row["client_host"], row["client_unit"]) == ("web1", "nginx-worker.service")
    assert (row["server_host"], row["server_address"]) == ("app2", refused["address"])
    assert (row["port"], row["failures"]) == (refused["port"], refused["count"])
