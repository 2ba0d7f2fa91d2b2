"""What the tools print: rows, JSON, counts, names, losses, and in what order."""

import ctypes
import errno
import functools
import itertools
import json
import mmap
import os
import re
import signal
import socket
import struct
import time
from types import SimpleNamespace

import pytest
from conftest import TOP, load, parse
from hypothesis import given, settings
from hypothesis import strategies as st

CGROUP, NETNS = 5251, 4026531840
ROW = struct.Struct("=H16s16sIIIIQ16s")
PROCESS = struct.pack("=16sI16s4x", b"java\0left over", 71, b"systemd")  # with --json
PATH = "/system.slice/docker-" + "3f2a9c41d0b7" + "0" * 52 + ".scope"
UNKNOWN = 0xFFFFFFFF  # a queue


def packed(text):
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return socket.inet_pton(family, text).ljust(16, b"\0")


def event(tool, pid, comm, first, second, port, *own, ts=5_000_000_000, **fields):
    """An event from its bytes, which end in what repeats.

    own: the error of a failed connect, or both lengths of the accept queue, and whether
    a SYN was dropped.
    """
    ids = pid, pid + 1, fields.get("uid", 0), NETNS, CGROUP, comm.encode()
    ends = (6 if ":" in first else 4), packed(first), packed(second)
    if tool.NAME == "tcpconnect":
        own = ts, *(own or (0,))
    else:
        own = (*own, 0, 0, 0)[:3]
    values = ts, *own, fields.get("other_port", 0), port, ROW.pack(*ends, *ids)
    record = tool.event_struct(parse(tool))
    return record.unpack(record.pack(*values))


def outcome(connect, ended):
    """A connect's event when it ended, at a time (ns)."""
    return (ended, *connect[1:])


def traced(maps, programs=None):
    """What start_tracing() hands over: descriptors by the names in the C program."""
    return SimpleNamespace(maps=maps, programs=programs or {})


def rows(tool, options, events, first_ts=0, queries=None, path=None):
    """The header and the rows of events. queries: for each, the name and its age.

    path: their cgroup's.
    """
    args = parse(tool, *options.split())
    if args.json:
        events = [(*others, row + PROCESS) for *others, row in events]
    names = []
    if tool.NAME == "tcpconnect":
        queried = dict(zip(events, queries or ()))
        names = [SimpleNamespace(query=queried.get) if queries else None]
    fields_of = functools.partial(tool.json_fields_of, args, *names)
    written = []
    tool.json_parts.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "cgroup_path", {CGROUP: path}.get)
        patch.setattr(tool, "write", written.append)
        columns = tool.columns(args, *names)
        tool.print_events(args, [(events, first_ts)], columns, fields_of)
    return "".join(written)


def test_the_seeds_rows(name, tool):
    if name == "tcpconnect":
        events = [
            event(tool, 1479, "telnet", "127.0.0.1", "127.0.0.1", 23),
            event(tool, 1469, "curl", "10.201.219.236", "54.245.105.25", 80),
            event(tool, 11072, "ssh", "2001:db8::8203", "2001:db8::abcd", 22),
        ]
        seed = (
            "PID     COMM         IP SADDR            DADDR            DPORT\n"
            "1479    telnet       4  127.0.0.1        127.0.0.1        23\n"
            "1469    curl         4  10.201.219.236   54.245.105.25    80\n"
            "11072   ssh          6  2001:db8::8203   2001:db8::abcd   22\n"
        )
    else:
        address = "1234:ab12:2040:5020:2299:0:5:0"
        events = [
            event(tool, 907, "sshd", "192.168.56.1", "192.168.56.102", 22),
            event(tool, 5389, "perl", address, address, 7001),
        ]
        seed = (
            "PID     COMM         IP RADDR            LADDR            LPORT\n"
            "907     sshd         4  192.168.56.1     192.168.56.102   22\n"
            f"5389    perl         6  {address} {address} 7001\n"
        )
    assert rows(tool, "", events) == seed


def test_time_column(tool):
    first = 7_123_456_789
    events = [
        event(tool, 1, "a", "192.0.2.1", "192.0.2.2", 80, ts=first + ns)
        for ns in (0, 1_500_000, 61_000_000_000)
    ]
    titles, *lines = rows(tool, "-t", events, first).splitlines()
    assert titles.startswith("TIME(s)   PID     COMM ")
    assert [line[:18] for line in lines] == [
        "0.000     1       ",
        "0.002     1       ",
        "61.000    1       ",
    ]


@pytest.fixture
def utc(monkeypatch, shared):
    monkeypatch.setenv("TZ", "UTC")
    shared.time.tzset()
    yield
    monkeypatch.undo()
    shared.time.tzset()


def at_a_time(monkeypatch, tool, monotonic, wall):
    monkeypatch.setattr(tool.time, "monotonic_ns", lambda: monotonic)
    monkeypatch.setattr(tool.time, "time_ns", lambda: wall)


def test_every_column(name, tool, monkeypatch, utc):
    """-T, -t, -U and the other port, where bcc's users look for them."""
    at_a_time(monkeypatch, tool, 9_000_000_000, 1_795_000_004_500_000_000)
    own, more, text = {
        "tcpconnect": ("-L -x", (errno.ECONNREFUSED,), "ECONNREFUSED"),
        "tcpaccept": ("-R -q", (3, 128), "3     128"),
    }[name]
    fields = {"uid": 65534, "other_port": 40001}
    found = event(tool, 181, "a", "192.0.2.1", "192.0.2.2", 80, *more, **fields)
    titles = {
        "tcpconnect": "SADDR            LPORT  DADDR            DPORT ERR",
        "tcpaccept": "RADDR            RPORT  LADDR            LPORT QLEN  QMAX",
    }
    assert rows(tool, f"-t -T -U {own}", [found], 4_000_000_000) == (
        f"TIME     TIME(s)   UID    PID     COMM         IP {titles[name]}\n"
        "11:06:40 1.000     65534  181     a            4  192.0.2.1        "
        f"40001  192.0.2.2        80    {text}\n"
    )


def test_percent_signs(tool):
    """Of a COMM and a cgroup's path; the columns behind them stay where they are."""
    found = event(tool, 7, "50%s %d", "192.0.2.1", "192.0.2.2", 80, other_port=9)
    titles, line = rows(tool, "--unit -t", [found], path="/100%.slice").splitlines()
    assert line.startswith("5.000     7       50%s %d      4  192.0.2.1  ")
    assert line.endswith(" 80    100%.slice") and titles.split()[2:4] == ["COMM", "IP"]
    fields = json.loads(rows(tool, "--json", [found], path="/100%.slice"))
    assert (fields["comm"], fields["cgroup_path"]) == ("50%s %d", "/100%.slice")


def test_errors(shared):
    """By name, or by number where Python knows none; closed before an answer; a
    question mark where the process took the errno.
    """
    events = [
        event(shared, 7, "a", "0.0.0.0", "192.0.2.2", 80, errno.ENETUNREACH),
        event(shared, 8, "b", "2001:db8::1", "2001:db8::2", 443, 524),
        event(shared, 9, "c", "192.0.2.1", "192.0.2.2", 65535, shared.CLOSED),
        event(shared, 10, "d", "192.0.2.1", "192.0.2.2", 65535, shared.UNKNOWN),
    ]
    assert rows(shared, "-x", events) == (
        "PID     COMM         IP SADDR            DADDR            DPORT ERR\n"
        "7       a            4  0.0.0.0          192.0.2.2        80    ENETUNREACH\n"
        "8       b            6  2001:db8::1      2001:db8::2      443   524\n"
        "9       c            4  192.0.2.1        192.0.2.2        65535 closed\n"
        "10      d            4  192.0.2.1        192.0.2.2        65535 ?\n"
    )


def four_outcomes(shared, last):
    """Of connects whose SYN was sent 5 s after the boot, the last with this error."""
    ends = ("192.0.2.1", "192.0.2.2", 80)
    return [
        outcome(event(shared, 7, "a", *ends, error, ts=5_000_000_000), ended)
        for error, ended in (
            (0, 5_000_012_999),
            (errno.ETIMEDOUT, 135_123_456_789),
            (shared.CLOSED, 5_250_000_000),
            (last, 5_000_000_000),
        )
    ]


def test_latency(shared):
    """-l, and -m alone: successes too, and ms between the SYN and the outcome."""
    events = four_outcomes(shared, errno.ENETUNREACH)
    titles = "PID     COMM         IP SADDR            DADDR            DPORT "
    front = "7       a            4  192.0.2.1        192.0.2.2        80    "
    for options in ("-l", "-m 0", "-m 3600000"):
        assert rows(shared, options, events) == (
            f"{titles}ERR           LAT(ms)\n"
            f"{front}-             0.013\n"
            f"{front}ETIMEDOUT     130123.457\n"
            f"{front}closed        250.000\n"
            f"{front}ENETUNREACH   0.000\n"
        )
    for options in ("-x", "-x -m 5"):
        assert rows(shared, options, events[:1]) == f"{titles}ERR\n{front}-\n"
    name = [("a.example", 1000)]
    titles, line = rows(shared, "-l -d -L -t", events[:1], 5 * 10**9, name).splitlines()
    assert titles.startswith("TIME(s)   PID ")
    assert titles.endswith(
        "LPORT  DADDR            DPORT ERR           LAT(ms)   QUERY"
    )
    assert line.startswith("0.000     7  ")
    assert line.endswith(" 80    -             0.013     a.example (1000 ms)")


def test_json_of_outcomes(shared, monkeypatch):
    at_a_time(monkeypatch, shared, 0, 0)
    events = four_outcomes(shared, shared.UNKNOWN)
    for options in ("--json -l", "--json -m 5", "--json -x", "--json -x -m 5"):
        lines = map(json.loads, rows(shared, options, events).splitlines())
        keys = ("ts", "event", "error", "latency_us")
        assert [tuple(map(line.get, keys)) for line in lines] == [
            ("1970-01-01T00:00:05.000012Z", "connected", None, 12),
            ("1970-01-01T00:02:15.123456Z", "connect_failed", "ETIMEDOUT", 130123456),
            ("1970-01-01T00:00:05.250000Z", "connect_failed", "closed", 250000),
            ("1970-01-01T00:00:05.000000Z", "connect_failed", None, 0),
        ]


def test_queries(shared):
    """The name looked up, or a dash; with -x, both columns."""
    events = [
        event(shared, 7, "a", "0.0.0.0", "192.0.2.2", 80, errno.ENETUNREACH),
        event(shared, 8, "b", "2001:db8::1", "2001:db8::2", 443, 524),
    ]
    queries = [("example.com", 1500), None]
    titles, first, second = rows(shared, "-d", events, 0, queries).splitlines()
    assert titles.endswith(" DADDR            DPORT QUERY")
    assert first.endswith(" 192.0.2.2        80    example.com (1500 ms)")
    assert second.endswith(" 2001:db8::2      443   -")
    titles, first, second = rows(shared, "-d -x", events, 0, queries).splitlines()
    assert titles.endswith(" DPORT ERR           QUERY")
    assert first.endswith(" 80    ENETUNREACH   example.com (1500 ms)")
    assert second.endswith(" 443   524           -")


def test_queue():
    """Dashes where the listening socket is not known."""
    tool = load("tcpaccept")
    events = [
        event(tool, 7, "a", "192.0.2.1", "192.0.2.2", 80, *lengths)
        for lengths in ((3, 128), (0, 4096), (UNKNOWN, UNKNOWN))
    ]
    assert rows(tool, "-q", events) == (
        "PID     COMM         IP RADDR            LADDR            LPORT QLEN  QMAX\n"
        "7       a            4  192.0.2.1        192.0.2.2        80    3     128\n"
        "7       a            4  192.0.2.1        192.0.2.2        80    0     4096\n"
        "7       a            4  192.0.2.1        192.0.2.2        80    -     -\n"
    )


def test_dropped():
    """No process: neither in the table nor in JSON."""
    tool = load("tcpaccept")
    ends = ("192.0.2.1", "192.0.2.2", 80)
    events = [event(tool, 0, "", *ends, 4, 3, syn, other_port=4711) for syn in (1, 0)]
    assert rows(tool, "-x -R -t", events, 5 * 10**9) == (
        "TIME(s)   IP RADDR            RPORT  LADDR            LPORT QLEN  QMAX  DROP\n"
        "0.000     4  192.0.2.1        4711   192.0.2.2        80    4     3     syn\n"
        "0.000     4  192.0.2.1        4711   192.0.2.2        80    4     3     ack\n"
    )
    lines = map(json.loads, rows(tool, "-x --json", events).splitlines())
    fields = "ts host event ip saddr sport daddr dport netns qlen qmax dropped"
    for line, packet in zip(lines, ("syn", "ack")):
        assert " ".join(line) == fields
        assert (line["event"], line["netns"]) == ("accept_failed", NETNS)
        assert (line["qlen"], line["qmax"], line["dropped"]) == (4, 3, packet)


def test_lines_fit_80_columns(tool):
    address, ts = "255.255.255.255", 99_999 * 10**9
    ends = (address, address, 65535)
    widest = event(tool, 4194304, "fifteen-letters", *ends, ts=ts)
    line = rows(tool, "-t", [widest]).splitlines()[1]
    assert 70 < len(line) < 80


def test_counts(name, tool, monkeypatch):
    """Sorted by count, then port and address."""
    flows = {
        (443, 4, packed("192.0.2.1"), packed("192.0.2.10")): 7,
        (80, 6, packed("2001:db8::1"), packed("2001:db8::2")): 65537,
        (80, 4, packed("192.0.2.2"), packed("192.0.2.9")): 7,
        (80, 4, packed("192.0.2.1"), packed("192.0.2.9")): 7,
    }
    args = parse(tool, "-c")
    record = tool.counted_struct(args)
    items = [
        (record.pack(*flow), struct.pack("=Q", count)) for flow, count in flows.items()
    ]
    written = []
    monkeypatch.setattr(tool, "write", written.append)
    monkeypatch.setattr(tool, "map_items", lambda fd, _: {71: items}[fd])
    table = tool.Table(args, tool.columns(args))
    tool.write_flows(args, 71, table.count)
    assert (
        "".join([table.header, *written])
        == {
            "tcpconnect": (
                "SADDR            DADDR            DPORT CONNECTS\n"
                "2001:db8::1      2001:db8::2      80    65537\n"
                "192.0.2.1        192.0.2.9        80    7\n"
                "192.0.2.2        192.0.2.9        80    7\n"
                "192.0.2.1        192.0.2.10       443   7\n"
            ),
            "tcpaccept": (
                "RADDR            LPORT ACCEPTS\n"
                "2001:db8::1      80    65537\n"
                "192.0.2.1        80    7\n"
                "192.0.2.2        80    7\n"
                "192.0.2.1        443   7\n"
            ),
        }[name]
    )


@pytest.mark.parametrize(
    ("number", "is_terminal", "between"),
    [
        (signal.SIGINT, True, ["\n"]),
        (signal.SIGINT, False, []),
        (signal.SIGTERM, True, []),
    ],
)
def test_counts_begin_below_the_echo(shared, monkeypatch, number, is_terminal, between):
    """Which is ^C, behind the header."""
    written = []
    monkeypatch.setattr(shared, "write", written.append)
    monkeypatch.setattr(shared, "stopping", [number])
    monkeypatch.setattr(shared.os, "isatty", lambda fd: fd == 1 and is_terminal)
    shared.end_line_of_echo()
    assert written == between


# The fields of a line of JSON, in their order, and the types of their values.
JSON_FIELDS = {
    "ts": str,
    "host": str,
    "event": str,
    "pid": int,
    "tid": int,
    "uid": int,
    "comm": str,
    "process": str,
    "ppid": int,
    "parent": str,
    "ip": int,
    "saddr": str,
    "sport": int,
    "daddr": str,
    "dport": int,
    "netns": int,
    "cgroup": int,
    "cgroup_path": str,
}
# And those that options add at the end.
MORE_JSON_FIELDS = {
    "tcpconnect": {
        "error": str,
        "latency_us": int,
        "query": str,
        "query_age_ms": int,
    },
    "tcpaccept": {"qlen": int, "qmax": int},
}


def is_named(tool, host, monkeypatch):
    monkeypatch.setattr(tool.os, "uname", lambda: SimpleNamespace(nodename=host))


def test_json(name, tool, monkeypatch):
    is_named(tool, "web1", monkeypatch)
    at_a_time(monkeypatch, tool, 9_000_000_000, 1_795_000_004_000_001_999)
    found = [
        event(tool, 181, "a\x1b", "2001:db8::1", "2001:db8::2", 80, other_port=40001),
        event(tool, 7, "b", "192.0.2.1", "192.0.2.2", 443, uid=65534, other_port=9),
    ]
    path = '/a b\n"\\x2d\udcff.slice'  # what an undecodable byte 0xff becomes
    first, second = rows(tool, "--json", found, path=path).splitlines()
    assert json.loads(first) == {
        "ts": "2026-11-18T11:06:40.000001Z",
        "host": "web1",
        "event": name[3:],
        "pid": 181,
        "tid": 182,
        "uid": 0,
        "comm": "a\\x1b",
        "process": "java",
        "ppid": 71,
        "parent": "systemd",
        "ip": 6,
        "saddr": "2001:db8::1",
        "sport": 40001,
        "daddr": "2001:db8::2",
        "dport": 80,
        "netns": NETNS,
        "cgroup": CGROUP,
        "cgroup_path": '/a b\n"\\x2d\\xff.slice',
    }
    for line in (first, second):
        assert list(types_of(line).items()) == list(JSON_FIELDS.items())


def test_json_of_a_host_that_gets_another_name(tool, monkeypatch):
    found = [event(tool, 181, "a", "192.0.2.1", "192.0.2.2", 80)]
    for host in ("old", 'new"\n'):
        is_named(tool, host, monkeypatch)
        assert json.loads(rows(tool, "--json", found))["host"] == host


def types_of(line):
    return {key: type(value) for key, value in json.loads(line).items()}


def test_more_json(name, tool):
    """Fields of -x, -d and -q, where they apply and are known."""
    found = [
        event(tool, 7, "a", "192.0.2.1", "192.0.2.2", 80, *own)
        for own in {
            "tcpconnect": ((errno.ETIMEDOUT,), (0xFFFF,)),
            "tcpaccept": ((0, 128), (UNKNOWN, UNKNOWN)),
        }[name]
    ]
    fields = {key: JSON_FIELDS[key] for key in JSON_FIELDS if key != "cgroup_path"}
    more = {**fields, **MORE_JSON_FIELDS[name]}
    if name == "tcpconnect":
        lines = rows(tool, "--json -x -d", found, 0, [("example.com", 4217), None])
        some = {"event": "connect_failed", "error": "ETIMEDOUT"}
        some.update({"query": "example.com", "query_age_ms": 4217})
    else:
        lines = rows(tool, "--json -q", found)
        some = {"event": "accept", "qlen": 0, "qmax": 128}
    full, bare = lines.splitlines()
    assert list(types_of(full).items()) == list(more.items())
    assert some.items() <= json.loads(full).items()
    always = {"latency_us": int} if name == "tcpconnect" else {}
    assert list(types_of(bare).items()) == list({**fields, **always}.items())


def test_json_fields_are_in_the_man_page(shared):
    """Of both tools, in the order of each."""
    text = (TOP / "man/man7/tcptools.7").read_text()
    section = text.partition("\n.SH JSON\n")[2].partition("\n.SH ")[0]
    terms = re.findall(r"^\.TP\n(.*)", section, re.MULTILINE)
    more = [*MORE_JSON_FIELDS["tcpconnect"], *MORE_JSON_FIELDS["tcpaccept"]]
    fields = [*JSON_FIELDS, *more, "dropped", "count", "interval_s"]
    assert ", ".join(terms).split(", ") == fields
    words = re.findall(r"\b[a-z]+_full\b|\bskipped\b|\bcpu_offline\b", section)
    assert set(words) == set(shared.LOSSES)


# RFC 5952, sections 2 and 4: an address however written, and how it is shown.
RFC_5952 = {
    "2001:db8:0:0:1:0:0:1": "2001:db8::1:0:0:1",
    "2001:0db8::0001": "2001:db8::1",
    "2001:db8:0:0:0:0:2:1": "2001:db8::2:1",
    "2001:db8::1:1:1:1:1": "2001:db8:0:1:1:1:1:1",
    "2001:0:0:1:0:0:0:1": "2001:0:0:1::1",
    "2001:DB8::AAAA": "2001:db8::aaaa",
    "2001:0:0:0:0:0:0:0": "2001::",
    "0:0:0:0:0:0:0:1": "::1",
    "0:0:0:0:0:0:0:0": "::",
    "2001:db8:aaaa:bbbb:cccc:dddd:eeee:1": "2001:db8:aaaa:bbbb:cccc:dddd:eeee:1",
}


@pytest.mark.parametrize("text", RFC_5952)
def test_rfc_5952(shared, text):
    assert shared.ip_address(6, packed(text)) == RFC_5952[text]


@pytest.mark.parametrize(
    ("comm", "shown"),
    [
        (b"sshd", "sshd"),
        (b"tmux: server", "tmux: server"),
        (b"\x1b[2J", "\\x1b[2J"),
        (b"a\nb\rc\td", "a\\nb\\rc\\td"),
        (b"\x7f", "\\x7f"),
        (b"\xff\xc3", "\\xff\\xc3"),
        ("\u202egnp.exe".encode(), "\\u202egnp.exe"),
        ("\u00e9t\u00e9".encode(), "\u00e9t\u00e9"),
        (b"  x", "\\x20\\x20x"),
        (b"a\\x1b", "a\\\\x1b"),
        (b"name\0left over", "name"),
    ],
)
def test_comm(shared, comm, shown):
    assert shared.printable(comm.ljust(16, b"\0")) == shown


@settings(deadline=None)
@given(st.binary(max_size=15))
def test_any_comm_stays_on_its_line(shared, comm):
    shown = shared.printable(comm)
    assert shown.isprintable() and not shown.startswith(" ")
    assert bool(shown.encode()) == bool(comm.partition(b"\0")[0])


MS = 1_000_000


def batches(shared, *steps):
    """What event_batches() gives in each poll, [batch], and the first timestamp. A step
    is (before, timestamps that have come): what is earlier is due. The last is the end.

    An event is a timestamp, twice.
    """
    given_out, to_come, current = [], list(steps), []

    def wait(_poll):
        given_out.append([])
        current[:] = to_come.pop(0)
        return not to_come

    events = SimpleNamespace(read=lambda: [(ts, ts) for ts in current[1]])
    losses = SimpleNamespace(counters=[0] * 5, report_when_due=lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "wait", wait)
        patch.setattr(shared, "time_asleep", lambda: 0)
        patch.setattr(
            shared.time, "monotonic_ns", lambda: current[0] + shared.SETTLE_NS
        )
        first = None
        for batch, first in shared.event_batches([events], losses, "poll", ()):
            given_out[-1].append(batch)
    return given_out, first


def times(given_out):
    return [[[ts for ts, _ in batch] for batch in some] for some in given_out]


def test_events_are_sorted_within_and_across_batches(shared):
    """What happened at `before` or later waits for earlier events to arrive."""
    steps = (980, [970, 960, 999]), (1080, [995, 1050, 1080]), (1081, []), (1300, [])
    given_out, first = batches(shared, *steps, (0, []))
    assert times(given_out) == [[[960, 970]], [[995, 999, 1050]], [[1080]], [], []]
    assert first == 960


def test_time_never_goes_backwards(shared):
    """An event that comes too late has the time of the newest before it."""
    steps = (980, [900, 950]), (1080, [890, 949, 960]), (1180, [970])
    given_out, first = batches(shared, *steps)
    assert times(given_out) == [[[900, 950]], [[950, 950, 960]], [[970]]]
    assert first == 900


def test_what_is_held_is_given_at_the_end(shared):
    given_out, _ = batches(shared, (0, [999, 998]), (0, [1 << 63]))
    assert times(given_out) == [[], [[998, 999, 1 << 63]]]


def test_batches_are_bounded(shared):
    given_out, _ = batches(shared, (5000, list(range(2003, 0, -1))), (5000, []))
    assert list(map(len, given_out[0])) == [1000, 1000, 3]
    assert list(itertools.chain(*times(given_out)[0])) == list(range(1, 2004))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 5000), max_size=40), max_size=8))
def test_any_order(shared, arrivals):
    """All events come out, once each, and time never goes backwards."""
    steps = [(1000 * n, timestamps) for n, timestamps in enumerate(arrivals, 1)]
    given_out, _ = batches(shared, *steps, (0, []))
    found = [event for some in given_out for batch in some for event in batch]
    assert [ts for ts, _ in found] == sorted(ts for ts, _ in found)
    assert sorted(ts for _, ts in found) == sorted(itertools.chain(*arrivals))


def test_when_buffers_are_opened_anew(shared, monkeypatch):
    """CPUs have come online, or the machine was suspended."""
    polls = [(0, 0), (1, 0), (1, 0), (2, 0), (2, 99), (2, 101), (2, 150), (2, 202)]
    to_come, counters, opened, asleep = iter(polls), [0] * 5, [], [0]

    def wait(_poll):
        counters[CPU_OFFLINE], asleep[0] = next(to_come)
        opened.append([])
        return len(opened) == len(polls)

    clock = {time.CLOCK_BOOTTIME: lambda: 5_000 * MS + asleep[0] * MS}
    monkeypatch.setattr(shared, "wait", wait)
    monkeypatch.setattr(shared.time, "monotonic_ns", lambda: 4_000 * MS)
    monkeypatch.setattr(shared.time, "clock_gettime_ns", lambda which: clock[which]())
    losses = SimpleNamespace(counters=counters, report_when_due=lambda *_: None)
    buffers = [
        SimpleNamespace(read=list, open=lambda name=name: opened[-1].append(name))
        for name in ("events", "responses")
    ]
    assert list(shared.event_batches(buffers, losses, "poll", ())) == []
    both = ["events", "responses"]
    assert opened == [[], both, [], both, [], both, [], both]


def test_clocks_are_read_together(shared, monkeypatch):
    """A wait for a CPU between two clocks shifts no event, if only one of three has
    none.
    """
    waits, now = iter([30 * MS, 0, 9 * MS]), [0]

    def read_wall():
        wall = now[0] + 5_000 * MS
        now[0] += next(waits)
        return wall

    monkeypatch.setattr(shared.time, "monotonic_ns", lambda: now[0])
    monkeypatch.setattr(shared.time, "time_ns", read_wall)
    assert shared.boot_time() == 5_000 * MS


class Counters:
    """A fake of the C program's map `lost`, and of what the kernel counts."""

    def __init__(self, shared, monkeypatch, programs=("trace_connect",)):
        self.fd = os.memfd_create("lost")
        os.truncate(self.fd, mmap.PAGESIZE)
        self.map = mmap.mmap(self.fd, 0)
        self.misses, self.asked = dict.fromkeys(programs, 0), 0
        descriptors = {name: number for number, name in enumerate(programs, 71)}
        monkeypatch.setattr(shared, "recursion_misses", self.recursion_misses)
        self.traced = traced({"lost": self.fd}, descriptors)

    def recursion_misses(self, program_fd):
        self.asked += 1
        programs = self.traced.programs.items()
        return self.misses[{fd: name for name, fd in programs}[program_fd]]

    def add(self, counter, count):
        (before,) = struct.unpack_from("=Q", self.map, 8 * counter)
        struct.pack_into("=Q", self.map, 8 * counter, before + count)


BUFFER_FULL, CPU_OFFLINE, TABLE_FULL, SKIPPED, RESPONSE_LOST = range(5)


def test_the_c_programs_reasons(shared):
    names = re.search(r"enum { (BUFFER_FULL, .*), REASONS };", shared.BPF_SHARED)[1]
    reasons = names.lower().split(", ")
    assert reasons == [*shared.LOSSES, "response_lost"]
    assert reasons[shared.RESPONSE_LOST] == "response_lost"


def test_losses(shared, monkeypatch, capfd):
    counters = Counters(shared, monkeypatch)
    counters.add(BUFFER_FULL, 2)  # before tracing began
    counters.misses["trace_connect"] = 11
    losses = shared.Losses(parse(shared), counters.traced)
    losses.report()
    losses.report_total()
    assert capfd.readouterr() == ("", "")
    counters.add(BUFFER_FULL, 3)
    counters.add(RESPONSE_LOST, 5)
    losses.report()
    counters.add(BUFFER_FULL, 7)
    counters.add(TABLE_FULL, 1)
    counters.add(SKIPPED, 2)
    counters.misses["trace_connect"] = 22
    losses.report()
    losses.report()
    losses.report_total()
    assert capfd.readouterr().err == (
        "tcpconnect: lost 3 events: buffer full (try -b)\n"
        "tcpconnect: lost 7 events: buffer full (try -b)\n"
        "tcpconnect: lost 1 events: table full (65,536 entries)\n"
        "tcpconnect: lost 13 events: skipped by the kernel "
        "(see tcptools(7), Lost events)\n"
        "tcpconnect: lost 24 events in total\n"
    )


def test_losses_are_reported_once_per_second(shared, monkeypatch, capfd):
    counters = Counters(shared, monkeypatch)
    losses = shared.Losses(parse(shared), counters.traced)
    reported = []
    for now_ms in (1100, 1200, 2099, 2100, 3099, 3100):
        counters.add(BUFFER_FULL, 1)
        losses.report_when_due(now_ms * MS)
        reported += [now_ms] * capfd.readouterr().err.count("buffer full")
    assert reported == [1100, 2100, 3100]
    counters.add(BUFFER_FULL, 1)
    losses.report_when_due(float("inf"))
    assert losses.total == 7


def test_when_the_kernel_is_asked(shared, monkeypatch):
    """What it skipped: every ten seconds, once per second where events are lost
    otherwise, and in the end.
    """
    counters = Counters(shared, monkeypatch)
    losses = shared.Losses(parse(shared), counters.traced)
    asked = []
    for now, lost in (
        *((1, 0), (2, 0), (3, 1), (3.5, 1), (3.9, 0), (4, 0), (5, 0)),
        *((13.9, 0), (14, 0), (15, 0), (float("inf"), 0)),
    ):
        before = counters.asked
        counters.add(BUFFER_FULL, lost)
        losses.report_when_due(now * 1000 * MS)
        asked += [now] * (counters.asked - before)
    assert asked == [3, 4, 14, float("inf")]


def test_programs_that_lose_no_event(name, tool, monkeypatch):
    """A name or a queue is missing then, or another program ran in its place.

    bcc's prefixes come before a function.
    """
    counted, others = {
        "tcpconnect": (
            ["kretfunc__vmlinux__tcp_v4_connect", "kprobe__tcp_connect"]
            + ["kretprobe__tcp_v4_connect", "trace_v6_return"],
            ["kfunc__vmlinux__skb_consume_udp", "kprobe__skb_consume_udp"]
            + ["kfunc__vmlinux__tcp_disconnect", "kprobe__tcp_disconnect"]
            + ["trace_state", "trace_state_in_softirq", "is_missed"],
        ),
        "tcpaccept": (
            ["kretfunc__vmlinux__inet_csk_accept", "kfunc__security_sock_graft"]
            + ["kprobe__security_sock_graft"],
            ["kprobe__inet_csk_accept"],
        ),
    }[name]
    counters = Counters(tool, monkeypatch, (*counted, *others))
    losses = tool.Losses(parse(tool), counters.traced)
    for program in others:
        counters.misses[program] = 5
    assert losses.counts()["skipped"] == 0
    for program in counted:
        counters.misses[program] = 7
    assert losses.counts()["skipped"] == 7 * len(counted)


@pytest.mark.parametrize(("missed", "others"), [(0, 0), (3, 0), (0, 2), (3, 2)])
def test_connects_without_an_outcome(shared, monkeypatch, capfd, missed, others):
    """The C program is asked of each socket whether it has one that was missed."""
    sockets = [struct.pack("=Q", 71 << 40 | n) for n in range(missed + others)]
    monkeypatch.setattr(shared, "map_items", lambda _: [(s, b"") for s in sockets])

    def bpf(command, attr):
        """Source: BPF_PROG_TEST_RUN in linux/bpf.h."""
        program_fd, *zeros, length, _, address = struct.unpack("=12IQ", attr)
        assert (command, program_fd, length) == (10, 72, 8) and not any(zeros)
        is_missed = sockets.index(ctypes.string_at(address, length)) < missed
        struct.pack_into("=I", attr, 4, is_missed)

    monkeypatch.setattr(shared, "bpf", bpf)
    added = []
    losses = SimpleNamespace(add=lambda *what: added.append(what))
    shared.report_under_way(traced({"pending": 71}, {"is_missed": 72}), losses)
    assert added == [("skipped", missed)]
    said = f"tcpconnect: {others} connects were still under way\n" * (others > 0)
    assert capfd.readouterr().err == said


@pytest.mark.parametrize(("length", "misses"), [(232, 71), (216, 71), (208, 0)])
def test_recursion_misses(shared, monkeypatch, length, misses):
    """From struct bpf_prog_info, of which older kernels have less (5.10: 208 bytes).

    Source: linux/bpf.h. As much as was asked for is written at most; it is asked with
    zeros, since what is not 0 is the room for what a program has.
    """

    def bpf(command, attr):
        program_fd, room, address = struct.unpack("=IIQ", attr)
        assert (command, program_fd) == (15, 71)
        assert ctypes.string_at(address, room) == bytes(room)
        info = bytearray(os.urandom(232))
        struct.pack_into("=Q", info, 208, 71)
        ctypes.memmove(address, bytes(info), min(length, room))

    monkeypatch.setattr(shared, "bpf", bpf)
    assert shared.recursion_misses(71) == misses


def test_recursion_misses_of_this_kernel(shared):
    """Of a program that returns 0."""
    text = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    code, licence = map(ctypes.create_string_buffer, (text, b"GPL"))
    addresses = map(ctypes.addressof, (code, licence))
    attr = shared.packed("=IIQQ100x", 1, 2, *addresses)  # a socket filter
    try:
        program_fd = shared.bpf(5, attr)
    except OSError as error:
        pytest.skip(f"this kernel loads no BPF program for this user: {error}")
    assert shared.recursion_misses(program_fd) == 0
    os.close(program_fd)
    with pytest.raises(OSError):
        shared.recursion_misses(program_fd)


def test_losses_in_json(shared, monkeypatch, capfd):
    is_named(shared, 'web"1', monkeypatch)
    at_a_time(monkeypatch, shared, 0, 1_795_000_004_000_001_999)
    written = []
    monkeypatch.setattr(shared, "write", written.append)
    counters = Counters(shared, monkeypatch)
    losses = shared.Losses(parse(shared, "--json", "-x"), counters.traced)
    for reason in (BUFFER_FULL, CPU_OFFLINE, TABLE_FULL, SKIPPED):
        counters.add(reason, 3 + reason)
    losses.report()
    losses.report_total()
    lines = [json.loads(line) for line in written]
    assert list(lines[0]) == ["ts", "host", "event", "count", "reason"]
    assert lines[0] == {
        "ts": "2026-11-18T11:06:44.000001Z",
        "host": 'web"1',
        "event": "lost",
        "count": 3,
        "reason": "buffer_full",
    }
    assert [(line["count"], line["reason"]) for line in lines] == [
        *((3, "buffer_full"), (4, "cpu_offline"), (5, "table_full"), (6, "skipped"))
    ]
    assert all(line.endswith("}\n") for line in written)
    assert capfd.readouterr().err.splitlines()[::4] == [
        "tcpconnect: lost 3 events: buffer full (try -b)",
        "tcpconnect: lost 18 events in total",
    ]


def test_calls_that_never_returned(shared, monkeypatch):
    """-x with kprobes: those that got to connect are in another table."""
    calls = [(bytes(8), shared.CALL.pack(1, 2, 16, far)) for far in (0, 1, 0, 0, 1)]
    monkeypatch.setattr(shared, "map_items", {71: calls}.get)
    added = []
    losses = SimpleNamespace(add=lambda *what: added.append(what))
    shared.report_calls_missed(traced({"events": 70}), losses)
    assert added == []
    shared.report_calls_missed(traced({"calls": 71}), losses)
    assert added == [("skipped", 3)]


@pytest.fixture
def traced_cgroups(shared, monkeypatch):
    """(slot, inode) of each cgroup as it is put into the map."""
    traced = []

    def trace(cgroups, slot, directory):
        assert cgroups.map_fd == 71
        traced.append((slot, os.stat(directory).st_ino))

    monkeypatch.setattr(shared.Cgroups, "trace", trace)
    return traced


def test_cgroups(shared, traced_cgroups, tmp_path, capfd):
    """One that is gone is reported once; one that is there again is traced again."""
    paths = [str(tmp_path / name) for name in ("a", "b\x1b")]
    old = [os.mkdir(path) or os.stat(path).st_ino for path in paths]
    cgroups = shared.Cgroups(71, paths)
    cgroups.check()
    assert traced_cgroups == [(0, old[0]), (1, old[1])]
    assert capfd.readouterr() == ("", "")
    # Recreated between two polls: renamed, for a new inode may have the same number
    os.mkdir(tmp_path / "new")
    os.rename(tmp_path / "new", paths[0])
    os.rename(paths[1], tmp_path / "elsewhere")
    cgroups.check()
    cgroups.check()
    assert traced_cgroups[2:] == [(0, os.stat(paths[0]).st_ino)]
    os.mkdir(paths[1])
    cgroups.check()
    assert traced_cgroups[3:] == [(1, os.stat(paths[1]).st_ino)]
    again = "was recreated; its first events were missed"
    assert capfd.readouterr().err == (
        f"tcpconnect: cgroup {tmp_path}/a {again}\n"
        f"tcpconnect: cgroup {tmp_path}/b\\x1b was removed\n"
        f"tcpconnect: cgroup {tmp_path}/b\\x1b {again}\n"
    )


A, AAAA, CNAME = 1, 28, 5
RESOLVER, STRANGER = "192.0.2.53", "192.0.2.66"
ANSWERED = 0x8180  # the flags of a response: QR, RD, RA
POINTER = b"\xc0\x0c"  # to the name in the question


def encoded(name):
    parts = [part.encode() for part in name.split(".")]
    return b"".join(bytes([len(part)]) + part for part in parts) + b"\0"


def record(answer):
    """A resource record (RFC 1035) of an address, or of the name that an alias has."""
    if re.fullmatch("[0-9.]+", answer):
        kind, data = A, socket.inet_pton(socket.AF_INET, answer)
    elif ":" in answer:
        kind, data = AAAA, socket.inet_pton(socket.AF_INET6, answer)
    else:
        kind, data = CNAME, encoded(answer)
    return POINTER + struct.pack(">HHIH", kind, 1, 60, len(data)) + data


def message(name, *answers, flags=ANSWERED, questions=1):
    """A DNS message (RFC 1035) that answers with addresses."""
    header = struct.pack(">6H", 7, flags, questions, len(answers), 0, 0)
    question = encoded(name) + struct.pack(">HH", A, 1)
    return header + question + b"".join(map(record, answers))


def received(message, ts, pid=181, server=RESOLVER, connected=0):
    """A response, as responses_in() gives it, in which so much of a message is."""
    if ":" in server:
        ip_header = b"\x60".ljust(8) + packed(server)
    else:
        ip_header = b"\x45".ljust(12) + packed(server)[:4]
    return ts, pid, len(message), connected, ip_header.ljust(40), message


def response(name, *answers, ts, pid=181, **fields):
    return received(message(name, *answers), ts, pid, **fields)


def names_of(shared, patch, options="-d", arrived=()):
    """Names of the DNS responses in the list `arrived`."""
    arrived = list(arrived)

    def buffers(map_fd, event, *others):
        assert (map_fd, event) == (71, shared.RESPONSE)
        assert others == (32, "poll", shared.responses_in)
        return SimpleNamespace(read=lambda: [arrived.pop(0) for _ in arrived[:]])

    patch.setattr(shared, "Buffers", buffers)
    patch.setattr(shared, "resolvers", lambda: {packed(RESOLVER)[:4]})
    args = parse(shared, *options.split())
    names = shared.Names(args, traced({"responses": 71}), 32, "poll")
    names.arrived = arrived
    return names


@pytest.fixture
def names(shared, monkeypatch):
    return names_of(shared, monkeypatch)


def looked_up(shared, names, address, ts, pid=181):
    """(name, age in ms) that a connect would show, or None."""
    names.read()
    source = "2001:db8::1" if ":" in address else "192.0.2.1"
    return names.query(event(shared, pid, "a", source, address, 80, ts=ts))


def query(*what, **fields):
    """The name that a connect would show, or None."""
    return (looked_up(*what, **fields) or [None])[0]


def test_names(shared, names):
    """All addresses of a response; what a CNAME leads to has the name asked for.

    Resolvers mix upper and lower case, to know their own questions (0x20).
    """
    answers = "cdn.example.net", "192.0.2.7", "192.0.2.8", "2001:db8::7"
    names.arrived.append(response("wWw.ExAmPle.com", *answers, ts=5 * MS))
    for address in answers[1:]:
        assert query(shared, names, address, 6 * MS) == "www.example.com"
    assert query(shared, names, "192.0.2.9", 6 * MS) is None
    assert query(shared, names, "::", 6 * MS) is None


def test_no_response_at_all(shared, names, capfd):
    """Is reported if there were connects, but not where responses were lost."""

    def reported(lost=0):
        losses = SimpleNamespace(counters=[0, 0, 0, 0, lost])
        shared.report_names_missed(names, losses)
        return capfd.readouterr().err

    assert reported() == ""
    assert query(shared, names, "192.0.2.7", 1) is None
    line = "tcpconnect: no DNS response was seen: no names (see tcpconnect(8), Names)\n"
    assert reported() == line
    assert reported(3) == "tcpconnect: lost 3 DNS responses: buffer full\n"
    names.arrived.append(received(b"", 1))
    assert query(shared, names, "192.0.2.7", 2) is None
    assert reported() == ""


def test_names_with_json(shared, names):
    """Its events are longer."""
    names.arrived.append(response("www.example.com", "192.0.2.7", ts=5 * MS))
    names.read()
    *own, row = event(shared, 181, "a", "192.0.2.1", "192.0.2.7", 80, ts=6 * MS)
    assert names.query((*own, row + PROCESS)) == ("www.example.com", 1)


def test_names_are_those_at_the_time_of_the_connect(shared, names):
    """Whatever order the buffers of several CPUs are read in."""
    names.arrived += [
        response("later.example", "192.0.2.7", ts=30 * MS),
        response("first.example", "192.0.2.7", ts=10 * MS),
        response("then.example", "192.0.2.7", ts=20 * MS),
    ]
    wanted = [(9, None), (10, "first"), (19, "first"), (20, "then"), (31, "later")]
    for ts_ms, name in wanted:
        shown = query(shared, names, "192.0.2.7", ts_ms * MS)
        assert shown == (name and f"{name}.example")


def failure(shared, address, ts, failed, pid=181):
    """An event: a connect at one time (ns) that failed at another."""
    connect = event(shared, pid, "a", "192.0.2.1", address, 80, 111, ts=ts)
    return outcome(connect, failed)


def test_names_of_connects_that_fail(shared, monkeypatch):
    """-x: by the time of the connect, in whatever order they fail."""
    arrived = [
        response(f"n{ms}.example", "192.0.2.7", ts=ms * MS) for ms in (10, 20, 30)
    ]
    names = names_of(shared, monkeypatch, "-d -x", arrived)
    names.read()
    for connect, failed, shown in (
        (40, 41, ("n30.example", 10)),
        (29, 50, ("n20.example", 9)),
        (9, 60, None),
        (10, 2070, ("n10.example", 0)),
    ):
        found = failure(shared, "192.0.2.7", connect * MS, failed * MS)
        assert names.query(found) == shown


def test_lookups_that_are_kept(shared, monkeypatch):
    """-x: the last 32 of a process's name, and of any. Else one is enough."""
    arrived = [response("a.example", "192.0.2.7", ts=ms * MS) for ms in range(1, 68)]
    for options, ages in (("-d -x", [31, None]), ("-d", [None, None])):
        names = names_of(shared, monkeypatch, options, arrived)
        assert looked_up(shared, names, "192.0.2.7", 67 * MS) == ("a.example", 0)
        for pid in (181, 182):
            old = [
                failure(shared, "192.0.2.7", ms * MS, 99 * MS, pid) for ms in (36, 35)
            ]
            found = [names.query(one) for one in old]
            assert found == [ages[0] and ("a.example", 0), ages[1]]


def test_rows_of_connects_that_fail(shared, monkeypatch):
    """They have the time of the failure."""
    at_a_time(monkeypatch, shared, 0, 0)
    is_named(shared, "web1", monkeypatch)
    found = failure(shared, "192.0.2.7", 7_000_000_000, 9_500_000_000)
    shown = rows(shared, "-x -t -d", [found], 2_000_000_000, [("a.example", 1000)])
    assert shown.splitlines()[1] == (
        "7.500     181     a            4  192.0.2.1        192.0.2.7        80    "
        "ECONNREFUSED  a.example (1000 ms)"
    )
    line = json.loads(rows(shared, "-x --json", [found]))
    assert line["ts"] == "1970-01-01T00:00:09.500000Z"
    assert (line["sport"], line["dport"], line["error"]) == (0, 80, "ECONNREFUSED")


def test_names_of_the_process_come_first(shared, names):
    names.arrived += [
        response("own.example", "192.0.2.7", ts=10 * MS, pid=181),
        response("other.example", "192.0.2.7", ts=20 * MS, pid=182),
    ]
    assert query(shared, names, "192.0.2.7", 30 * MS, pid=181) == "own.example"
    assert query(shared, names, "192.0.2.7", 30 * MS, pid=182) == "other.example"
    assert query(shared, names, "192.0.2.7", 30 * MS, pid=183) == "other.example"


@pytest.mark.parametrize(
    ("sent", "is_believed"),
    [
        ({}, True),
        ({"server": STRANGER}, False),
        ({"server": STRANGER, "connected": 1}, True),
        ({"server": "2001:db8::53"}, True),
        ({"server": "2001:db8::66"}, False),
        ({"server": "127.0.0.53"}, False),
    ],
)
def test_whose_responses_name_addresses_for_all(
    shared, names, monkeypatch, sent, is_believed
):
    """A resolver's, or what came to a connected socket; others for who read them."""
    believed = {packed(RESOLVER)[:4], packed("2001:db8::53")}
    monkeypatch.setattr(shared, "resolvers", lambda: believed)
    names.arrived += [
        response("good.example", "192.0.2.7", ts=10 * MS, pid=183),
        response("new.example", "192.0.2.7", ts=20 * MS, pid=181, **sent),
    ]
    shown = [query(shared, names, "192.0.2.7", 30 * MS, pid=pid) for pid in (181, 182)]
    assert shown == ["new.example", "new.example" if is_believed else "good.example"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, ["127.0.0.1"]),
        ("search example.com\n", ["127.0.0.1"]),
        (
            (
                "# nameserver 192.0.2.1\n nameserver\t192.0.2.53 # ours\nnameserver\n"
                "nameserver ::1\nnameserver fe80::1%eth0\nnameserver \xff\0 x\n"
            ),
            ["192.0.2.53", "::1", "fe80::1"],
        ),
        ("nameserver 127.0.0.53\noptions edns0 trust-ad\n", ["127.0.0.53"]),
    ],
)
def test_resolvers(shared, monkeypatch, tmp_path, text, found):
    path = tmp_path / "resolv.conf"
    monkeypatch.setattr(shared, "RESOLV_CONF", str(path))
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    assert shared.resolvers() == {
        packed(address)[: 16 if ":" in address else 4] for address in found
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 0x0100},  # a query
        {"flags": ANSWERED | 2},  # SERVFAIL
        {"flags": ANSWERED | 3},  # NXDOMAIN
        {"flags": ANSWERED | 5 << 11},  # an update
        {"questions": 0},
        {"questions": 2},
    ],
)
def test_messages_that_are_not_believed(shared, names, fields):
    """Not even for who read them, from a resolver, on a connected socket."""
    text = message("a.example", "192.0.2.7", **fields)
    names.arrived.append(received(text, 1, connected=1))
    assert query(shared, names, "192.0.2.7", 2) is None
    names.arrived.append(received(text[:30], 1))
    assert query(shared, names, "192.0.2.7", 2) is None


def test_responses_that_are_cut(shared, names):
    """What is there before the end is taken."""
    text = message("a.example", "cdn.example", "192.0.2.7", "192.0.2.8")
    begin = len(text) - 32  # of the two addresses, 16 bytes each
    for length in range(len(text) + 1):
        names.arrived.append(received(text[:length], 5))
        shown = [query(shared, names, f"192.0.2.{n}", 5) for n in (7, 8)]
        there = (length >= begin + 16, length >= begin + 32)
        assert shown == [is_there and "a.example" or None for is_there in there]
        names.names.clear()


def test_records_of_other_kinds(shared, names):
    """An address has its type, class and length."""
    text = message("a.example", *["192.0.2.7"] * 3, "192.0.2.8")
    first = len(text) - 64 + 2
    for at, change in ((0, (AAAA, 1)), (16, (A, 3)), (32, (16, 1))):
        at += first
        text = text[:at] + struct.pack(">HH", *change) + text[at + 4 :]
    names.arrived.append(received(text, 1))
    assert query(shared, names, "192.0.2.7", 2) is None
    assert query(shared, names, "192.0.2.8", 2) == "a.example"


def test_names_are_bounded(shared, names, monkeypatch):
    """The one that was looked up the longest time ago goes; a day later, all are gone.
    Each is kept for its process and for all.
    """
    monkeypatch.setattr(shared, "NAMES", 4)
    names.arrived += [
        response(f"n{i}.example", f"192.0.2.{i}", ts=ts * MS)
        for ts, i in enumerate((1, 2, 1, 3))
    ]
    shown = [query(shared, names, f"192.0.2.{i}", 9 * MS) for i in (1, 2, 3)]
    assert shown == ["n1.example", None, "n3.example"]
    assert len(names.names) == 4
    day = 86_400_000
    assert query(shared, names, "192.0.2.3", (day + 2) * MS) == "n3.example"
    assert query(shared, names, "192.0.2.3", (day + 3) * MS) is None


@pytest.mark.parametrize("age_ms", [0, 999, 1000, 86_399_999])
def test_age_of_names(shared, names, age_ms):
    """The table shows it from a second on, JSON always."""
    names.arrived.append(response("a.example", "192.0.2.7", ts=10 * MS))
    ts = (10 + age_ms) * MS
    assert looked_up(shared, names, "192.0.2.7", ts) == ("a.example", age_ms)
    found = [event(shared, 181, "a", "192.0.2.1", "192.0.2.7", 80)]
    shown = rows(shared, "-d", found, 0, [("a.example", age_ms)])
    age = f" ({age_ms} ms)" if age_ms >= 1000 else ""
    assert shown.endswith(f" 80    a.example{age}\n")
    line = rows(shared, "-d --json", found, 0, [("a.example", age_ms)])
    fields = json.loads(line)
    assert (fields["query"], fields["query_age_ms"]) == ("a.example", age_ms)


def test_names_are_made_harmless(shared, names):
    names.arrived.append(response("a\x1b[2J\n.example", "192.0.2.7", ts=1))
    assert query(shared, names, "192.0.2.7", 2) == "a\\x1b[2j\\n.example"
    names.arrived.append(response("good.example\0.evil", "192.0.2.7", ts=3))
    assert query(shared, names, "192.0.2.7", 4) == r"good.example\\0.evil"


def test_responses_that_wait_are_bounded(shared, names, monkeypatch):
    """The earliest need not wait for a connect."""
    monkeypatch.setattr(shared, "NAMES", 4)
    names.arrived += [
        response(f"n{i}.example", f"192.0.2.{i}", ts=i * MS) for i in (5, 3, 8, 4, 7, 6)
    ]
    names.read()
    assert [ts for ts, *_ in sorted(names.waiting)] == [5 * MS, 6 * MS, 7 * MS, 8 * MS]
    assert query(shared, names, "192.0.2.3", 3 * MS) == "n3.example"
    assert query(shared, names, "192.0.2.3", 2 * MS) is None


@settings(deadline=None)
@given(st.binary(max_size=512), st.binary(min_size=40, max_size=40))
def test_any_response(shared, found, ip_header):
    """Whatever is in it, no error comes of it."""
    whole = response("a.example", "192.0.2.7", ts=1)[-1]
    with pytest.MonkeyPatch.context() as patch:
        names = names_of(shared, patch)
        for text in (found, found.ljust(4095, b"\0"), whole[:40] + found):
            fields = 1, 181, len(text), 0, ip_header, text
            names.arrived.append(fields)
        assert looked_up(shared, names, "192.0.2.66", 2) is None
    for lookups in names.names.values():
        assert all(name.isprintable() for _, name in lookups)


def test_work_for_a_response_is_bounded(shared):
    """As many records as fit, whose names lead from one to the next: none is followed.

    Each byte is read one time at most, however many labels they would have.
    """
    text = bytearray(struct.pack(">6H", 7, ANSWERED, 1, 65535, 0, 0))
    text += b"\1a\0" + struct.pack(">HH", A, 1)
    before = 12
    while len(text) < 4095 - 14:
        at = len(text)
        text += b"\1a" + struct.pack(">HHHIH", 0xC000 | before, A, 1, 60, 0)
        before = at
    read = []

    class Message(bytes):
        def __getitem__(self, at):
            read.append(at)
            return super().__getitem__(at)

    assert shared.answers(Message(text)) == [b"a"]
    assert len(read) < len(text)
