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

from .events import SERVICEMAP

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


def expected_map(fleet, hosts):
    names, edges = addresses(fleet, hosts), Counter()
    for one, client, server in work(fleet, hosts):
        if one["what"] != "connections":
            continue
        from_ = (one["client"], one["client_comm"], "")
        to = (one["server"], one["server_comm"], "")
        source, _, port = one["at_server"]
        if not client:
            from_ = (names.get(source, ""), "", source)
        if not server:
            to = (names.get(one["address"], ""), "", one["address"])
        side = "both" if client and server else "client" if client else "server"
        port = one["port"] if client else port
        nat = one["nat"] if side == "both" else ""
        edges[(*from_, *to, port, side, nat)] += one["count"]
    return edges


def found_map(lines, *args):
    rows = [((*row.values(),)[:8], row) for row in answer(lines, *args)]
    found = {(*first, row["nat"]): row["connections"] for first, row in rows}
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
    rows = map(json.loads, lines.splitlines())
    since = min(row["ts"] for row in rows if row.get("comm") == "deploy")
    assert found_map(lines, "--since", f"{since}Z") == {
        edge: count
        for edge, count in expected_map(fleet, HOSTS).items()
        if edge[1] in ("deploy", "monitor")
    }


@pytest.mark.parametrize("missing", [None, "db3"])
def test_unknown(fleet, missing):
    hosts = [host for host in HOSTS if host != missing]
    names, expected = addresses(fleet, hosts), Counter()
    for one, client, server in work(fleet, hosts):
        if one["what"] == "connections" and not server and one["address"] not in names:
            expected[
                "connect",
                one["client"],
                one["client_comm"],
                one["address"],
                one["port"],
            ] += one["count"]
        source, _, port = one["at_server"]
        if one["what"] == "connections" and not client and source not in names:
            expected["accept", one["server"], one["server_comm"], source, port] += one[
                "count"
            ]
    rows = [(*row.values(),) for row in answer(lines_of(fleet, hosts), "--unknown")]
    assert {row[:5]: row[5] for row in rows} == expected
    assert len(rows) == len(expected) == {None: 2, "db3": 3}[missing]


def test_failures(fleet):
    [refused] = [one for one, _, _ in work(fleet, HOSTS) if one["what"] == "failures"]
    [row] = answer(lines_of(fleet, HOSTS), "--failures")
    assert (*row.values(),)[:7] == (
        refused["client"],
        refused["client_comm"],
        refused["server"],
        refused["address"],
        refused["port"],
        "ECONNREFUSED",
        refused["count"],
    )


def test_without_failures_a_refused_connect_looks_unmatched(fleet):
    """Where tcpconnect -x does not run, nothing shows that it was refused."""
    lines = [
        line
        for line in lines_of(fleet, HOSTS).splitlines(keepends=True)
        if b'"connect_failed"' not in line
    ]
    [refused] = [one for one, _, _ in work(fleet, HOSTS) if one["what"] == "failures"]
    unmatched = (
        refused["client"],
        refused["client_comm"],
        "",
        refused["server"],
        "",
        refused["address"],
        refused["port"],
        "client",
        "",
    )
    assert found_map(b"".join(lines)) == {
        **expected_map(fleet, HOSTS),
        unmatched: refused["count"],
    }
