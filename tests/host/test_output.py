import argparse
import ctypes
import errno
import itertools
import json
import os
import re
import socket
import struct
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import TOP, load
from hypothesis import given, settings
from hypothesis import strategies as st


def options(**given):
    names = "timestamp time print_uid lport rport json failed dns queue count"
    return argparse.Namespace(**{**dict.fromkeys(names.split(), False), **given})


PLAIN = options()
TIMED = options(timestamp=True)


CGROUP, NETNS = 5251, 4026531840
ROW = struct.Struct("=IIIQI16sHH16s16s")


def packed(text):
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return socket.inet_pton(family, text).ljust(16, b"\0")


def event(
    pid, comm, ip, first, second, port, ts=5_000_000_000, uid=0, other_port=0, error=0
):
    return (
        ts,
        other_port,
        error,
        ROW.pack(
            *(pid, pid + 1, uid, CGROUP, NETNS, comm.encode()),
            *(ip, port, packed(first), packed(second)),
        ),
    )


def queued(accept, qlen, qmax):
    """The same event with -q."""
    return (*accept[:-1], qlen, qmax, accept[-1])


def test_the_seeds_rows_of_tcpconnect():
    tool = load("tcpconnect")
    events = [
        event(1479, "telnet", 4, "127.0.0.1", "127.0.0.1", 23),
        event(1469, "curl", 4, "10.201.219.236", "54.245.105.25", 80),
        event(11072, "ssh", 6, "2001:db8::8203", "2001:db8::abcd", 22),
    ]
    assert tool.header(PLAIN) + tool.rows(PLAIN, events, 0) == (
        "PID     COMM         IP SADDR            DADDR            DPORT\n"
        "1479    telnet       4  127.0.0.1        127.0.0.1        23\n"
        "1469    curl         4  10.201.219.236   54.245.105.25    80\n"
        "11072   ssh          6  2001:db8::8203   2001:db8::abcd   22\n"
    )


def test_the_seeds_rows_of_tcpaccept():
    tool = load("tcpaccept")
    events = [
        event(907, "sshd", 4, "192.168.56.1", "192.168.56.102", 22),
        event(
            5389,
            "perl",
            6,
            "1234:ab12:2040:5020:2299:0:5:0",
            "1234:ab12:2040:5020:2299:0:5:0",
            7001,
        ),
    ]
    assert tool.header(PLAIN) + tool.rows(PLAIN, events, 0) == (
        "PID     COMM         IP RADDR            LADDR            LPORT\n"
        "907     sshd         4  192.168.56.1     192.168.56.102   22\n"
        "5389    perl         6  1234:ab12:2040:5020:2299:0:5:0 1234:ab12:2040:5020:2299:0:5:0 7001\n"
    )


def test_time_column(tool):
    first = 7_123_456_789
    events = [
        event(1, "a", 4, "192.0.2.1", "192.0.2.2", 80, ts=first + ns)
        for ns in (0, 1_500_000, 61_000_000_000)
    ]
    assert tool.header(TIMED).startswith("TIME(s)   PID     COMM ")
    lines = tool.rows(TIMED, events, first).splitlines()
    assert [line[:18] for line in lines] == [
        "0.000     1       ",
        "0.002     1       ",
        "61.000    1       ",
    ]


def test_every_column(name, tool, monkeypatch):
    """-T, -t, -U and the other port, where bcc's users look for them."""
    monkeypatch.setenv("TZ", "UTC")
    tool.time.tzset()
    monkeypatch.setattr(tool.time, "monotonic_ns", lambda: 9_000_000_000)
    monkeypatch.setattr(tool.time, "time_ns", lambda: 1_795_000_004_500_000_000)
    args = options(timestamp=True, time=True, print_uid=True, lport=True, rport=True)
    found = event(
        181, "a", 4, "192.0.2.1", "192.0.2.2", 80, uid=65534, other_port=40001
    )
    addresses = (
        "SADDR            LPORT  DADDR            DPORT"
        if name == "tcpconnect"
        else "RADDR            RPORT  LADDR            LPORT"
    )
    assert tool.header(args) + tool.rows(args, [found], 4_000_000_000) == (
        f"TIME     TIME(s)   UID    PID     COMM         IP {addresses}\n"
        "11:06:40 1.000     65534  181     a            4  192.0.2.1        40001  192.0.2.2        80\n"
    )


def test_failures():
    """The error by its name, or by its number where Python knows none; the name looked up, or a dash."""
    tool = load("tcpconnect")
    events = [
        event(7, "a", 4, "0.0.0.0", "192.0.2.2", 80, error=errno.ENETUNREACH),
        event(8, "b", 6, "2001:db8::1", "2001:db8::2", 443, error=524),
    ]
    names = dict(zip(events, ("example.com (1500 ms)", None)))
    args = options(failed=True)
    assert tool.header(args) + tool.rows(args, events, 0) == (
        "PID     COMM         IP SADDR            DADDR            DPORT ERR\n"
        "7       a            4  0.0.0.0          192.0.2.2        80    ENETUNREACH\n"
        "8       b            6  2001:db8::1      2001:db8::2      443   524\n"
    )
    args = options(dns=True)
    query = lambda event: names[event]
    assert tool.header(args) + tool.rows(args, events, 0, query) == (
        "PID     COMM         IP SADDR            DADDR            DPORT QUERY\n"
        "7       a            4  0.0.0.0          192.0.2.2        80    example.com (1500 ms)\n"
        "8       b            6  2001:db8::1      2001:db8::2      443   -\n"
    )
    args = options(failed=True, dns=True)
    assert tool.header(args).endswith(" DPORT ERR           QUERY\n")
    first, second = tool.rows(args, events, 0, query).splitlines()
    assert first.endswith(" 80    ENETUNREACH   example.com (1500 ms)")
    assert second.endswith(" 443   524           -")


def test_queue():
    """As inet_csk_accept() left it, or dashes where the listening socket is not known."""
    tool = load("tcpaccept")
    args = options(queue=True)
    accept = event(7, "a", 4, "192.0.2.1", "192.0.2.2", 80)
    events = [queued(accept, 3, 128), queued(accept, 0xFFFFFFFF, 0xFFFFFFFF)]
    assert tool.header(args) + tool.rows(args, events, 0) == (
        "PID     COMM         IP RADDR            LADDR            LPORT QLEN  QMAX\n"
        "7       a            4  192.0.2.1        192.0.2.2        80    3     128\n"
        "7       a            4  192.0.2.1        192.0.2.2        80    -     -\n"
    )


def test_counts(name, tool, monkeypatch, capsys):
    """Sorted by count, then address and port; and what found no room in the table."""
    flows = {
        (4, 443, packed("192.0.2.1"), packed("192.0.2.10")): 7,
        (6, 80, packed("2001:db8::1"), packed("2001:db8::2")): 65537,
        (4, 80, packed("192.0.2.1"), packed("192.0.2.9")): 7,
    }
    table = {
        tool.FLOW.pack(*flow): ctypes.c_uint64(count) for flow, count in flows.items()
    }
    lost = Counter({"no room in the table": 3})
    monkeypatch.setattr(tool, "count_losses", lambda b, no_room: lambda: lost)
    monkeypatch.setattr(tool, "stopping", [15])
    written = []
    monkeypatch.setattr(tool, "write", written.append)
    args = options(count=True)
    tool.count({"flows": table}, args, tool.header(args), tool.flow_row, [])
    assert "".join(written) == (
        "SADDR            DADDR            DPORT CONNECTS\n"
        "2001:db8::1      2001:db8::2      80    65537\n"
        "192.0.2.1        192.0.2.9        80    7\n"
        "192.0.2.1        192.0.2.10       443   7\n"
        if name == "tcpconnect"
        else "RADDR            LPORT ACCEPTS\n"
        "2001:db8::1      80    65537\n"
        "192.0.2.1        80    7\n"
        "192.0.2.1        443   7\n"
    )
    said = capsys.readouterr().err
    assert said == f"{name}: lost 3 events, no room in the table\n"


# The fields of a line of JSON, in their order, and the types of their values.
JSON_FIELDS = {
    "ts": str,
    "host": str,
    "event": str,
    "pid": int,
    "tid": int,
    "uid": int,
    "comm": str,
    "ip": int,
    "saddr": str,
    "sport": int,
    "daddr": str,
    "dport": int,
    "netns": int,
    "cgroup": int,
}
# And those that options put behind them.
MORE_JSON_FIELDS = {
    "tcpconnect": {"error": str, "query": str},
    "tcpaccept": {"qlen": int, "qmax": int},
}


def is_named(tool, host, monkeypatch):
    monkeypatch.setattr(tool.os, "uname", lambda: SimpleNamespace(nodename=host))


def test_json(name, tool, monkeypatch):
    is_named(tool, "web1", monkeypatch)
    monkeypatch.setattr(tool.time, "monotonic_ns", lambda: 9_000_000_000)
    monkeypatch.setattr(tool.time, "time_ns", lambda: 1_795_000_004_000_001_999)
    args = options(json=True)
    found = [
        event(181, "a\x1b", 6, "2001:db8::1", "2001:db8::2", 80, other_port=40001),
        event(7, "b", 4, "192.0.2.1", "192.0.2.2", 443, uid=65534, other_port=9),
    ]
    assert tool.header(args) == ""
    first, second = tool.rows(args, found, 0).splitlines()
    assert json.loads(first) == {
        "ts": "2026-11-18T11:06:40.000001Z",
        "host": "web1",
        "event": name[3:],
        "pid": 181,
        "tid": 182,
        "uid": 0,
        "comm": "a\\x1b",
        "ip": 6,
        "saddr": "2001:db8::1",
        "sport": 40001,
        "daddr": "2001:db8::2",
        "dport": 80,
        "netns": NETNS,
        "cgroup": CGROUP,
    }
    for line in (first, second):
        assert list(types_of(line).items()) == list(JSON_FIELDS.items())


def test_json_of_a_host_that_gets_another_name(tool, monkeypatch):
    found = [event(181, "a", 4, "192.0.2.1", "192.0.2.2", 80)]
    for host in ("old", 'new"\n'):
        is_named(tool, host, monkeypatch)
        line = tool.rows(options(json=True), found, 0)
        assert json.loads(line)["host"] == host


def types_of(line):
    return {key: type(value) for key, value in json.loads(line).items()}


def test_more_json(name, tool):
    """Where they apply: the error with -x, the query with -d where it is known, and so the queue with -q."""
    found = event(7, "a", 4, "192.0.2.1", "192.0.2.2", 80)
    more = {**JSON_FIELDS, **MORE_JSON_FIELDS[name]}
    if name == "tcpconnect":
        args = options(json=True, failed=True, dns=True)
        late = event(7, "a", 4, "192.0.2.1", "192.0.2.2", 80, error=errno.ETIMEDOUT)
        line = tool.rows(args, [late], 0, lambda _: "example.com")
        nothing = tool.rows(args, [found], 0, lambda _: None)
        some = {"event": "connect_failed", "error": "ETIMEDOUT", "query": "example.com"}
    else:
        args = options(json=True, queue=True)
        line = tool.rows(args, [queued(found, 0, 128)], 0)
        nothing = tool.rows(args, [queued(found, 0xFFFFFFFF, 0xFFFFFFFF)], 0)
        some = {"event": "accept", "qlen": 0, "qmax": 128}
    assert list(types_of(line).items()) == list(more.items())
    assert some.items() <= json.loads(line).items()
    assert list(types_of(nothing).items()) == list(JSON_FIELDS.items())


def test_json_fields_are_in_the_man_page(name):
    text = (TOP / f"man/man8/{name}.8").read_text()
    section = text[text.index(".SH JSON") : text.index(".SH OVERHEAD")]
    terms = re.findall(r"^\.TP\n(.*)", section, re.MULTILINE)
    fields = [*JSON_FIELDS, *MORE_JSON_FIELDS[name]]
    assert ", ".join(terms).split(", ") == fields


def test_lost_events_in_json(tool, monkeypatch, capsys):
    written = follow(tool, monkeypatch, [(1100, [900])], [{"full": 3}], json=True)
    lost = json.loads(written[-1])
    assert list(lost) == ["ts", "host", "event", "count", "reason"]
    assert (lost["event"], lost["count"], lost["reason"]) == ("lost", 3, "full")
    assert f"{tool.NAME}: lost 3 events, full\n" in capsys.readouterr().err


def test_lines_fit_80_columns(tool):
    widest = event(
        4194304,
        "fifteen-letters",
        4,
        "255.255.255.255",
        "255.255.255.255",
        65535,
        ts=99_999 * 10**9,
    )
    assert len(tool.rows(TIMED, [widest], 0).rstrip()) < 80


# RFC 5952, sections 2 and 4: every way to write an address on the left is the one on the right.
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
def test_rfc_5952(tool, text):
    assert tool.address(6, packed(text)) == RFC_5952[text]


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
def test_names(tool, comm, shown):
    assert tool.printable(comm.ljust(16, b"\0")) == shown


@settings(deadline=None)
@given(st.binary(max_size=15))
def test_any_name_stays_on_its_line(comm):
    shown = load("tcpconnect").printable(comm)
    assert shown.isprintable() and not shown.startswith(" ")
    assert bool(shown.encode()) == bool(comm.partition(b"\0")[0])


def test_buffers_stay_under_32_mb(tool):
    for cpus, page_bytes in itertools.product(
        (1, 2, 4, 31, 32, 33, 128, 4096), (4096, 65536)
    ):
        pages = tool.buffer_pages(cpus, page_bytes)
        assert pages & (pages - 1) == 0
        assert pages == 1 or cpus * pages * page_bytes <= 32 << 20
    assert tool.buffer_pages(4, 4096) == 256


def follow(tool, monkeypatch, batches, lost=({},) * 9, **given):
    """What follow() writes for batches of (now in ms, events); an event is a timestamp in ms. lost: by reason, each time."""
    written, clock = [], iter([now * 1_000_000 for now, _ in batches])
    queue = [[(ts * 1_000_000, None) for ts in events] for _, events in batches]

    counts = iter(lost)
    monkeypatch.setattr(tool, "open_buffers", lambda *_: lambda: queue.pop(0))
    monkeypatch.setattr(tool, "poller", lambda b: None)
    monkeypatch.setattr(tool, "rest", lambda poll, ms: len(queue) == 1)
    lost_then = lambda: Counter(next(counts))
    monkeypatch.setattr(tool, "count_losses", lambda b, no_room: lost_then)
    monkeypatch.setattr(tool.time, "monotonic_ns", lambda: next(clock))
    monkeypatch.setattr(tool, "write", written.append)
    told = tool.follow(
        None,
        options(buffer_pages=None, **given),
        tool.EVENT,
        "header",
        lambda events, first: [
            (ts // 1_000_000, first // 1_000_000) for ts, _ in events
        ],
        [],
    )
    tool.say_total(told)
    assert written.pop(0) == "header"
    return written


def test_rows_are_sorted_within_and_across_batches(tool, monkeypatch):
    """What is younger than 20 ms waits: CPU 1's event of 995 is drained after CPU 0's of 999."""
    written = follow(
        tool,
        monkeypatch,
        [(1000, [970, 960, 999]), (1100, [995, 1050]), (1200, []), (1300, [])],
    )
    assert written == [[(960, 960), (970, 960)], [(995, 960), (999, 960), (1050, 960)]]


def test_time_never_goes_backwards(tool, monkeypatch):
    written = follow(
        tool, monkeypatch, [(1000, [900]), (1100, [890, 1000]), (1200, []), (1300, [])]
    )
    assert written == [[(900, 900)], [(900, 900), (1000, 900)]]


def test_what_is_held_is_written_at_the_end(tool, monkeypatch):
    written = follow(tool, monkeypatch, [(1000, []), (1000, [999])])
    assert [ts for batch in written for ts, _ in batch] == [999]


def test_lost_events_are_said(tool, monkeypatch, capsys):
    """Once a second, and at the end."""
    follow(
        tool,
        monkeypatch,
        [(1100, [900]), (1200, []), (2200, [1000]), (2300, []), (2400, [])],
        [{"full": 3}, {"full": 2, "asleep": 1}, {"asleep": 1}],
    )
    assert capsys.readouterr().err == (
        f"{tool.NAME}: lost 3 events, full\n"
        f"{tool.NAME}: lost 2 events, full\n"
        f"{tool.NAME}: lost 1 events, asleep\n"
        f"{tool.NAME}: lost 1 events, asleep\n"
        f"{tool.NAME}: lost 7 events in all\n"
    )


def test_reader_gone_is_a_quiet_end(tool, monkeypatch):
    def broken(_fd, _data):
        raise BrokenPipeError

    monkeypatch.setattr(tool.os, "write", broken)
    with pytest.raises(SystemExit) as end:
        tool.write("row\n")
    assert end.value.code == 0


def test_a_short_write_is_completed(tool, monkeypatch):
    taken = []

    def write(fd, data):
        taken.append(data[:3])
        return len(data[:3])

    monkeypatch.setattr(tool.os, "write", write)
    tool.write("caf\u00e9 row\n")
    assert b"".join(taken).decode() == "caf\u00e9 row\n"


def test_what_libraries_print_is_held_back(tool, capfd):
    with tool.quiet() as said:
        os.write(1, b"to stdout\n")
        os.write(2, b"to stderr\n")
    assert said == ["to stdout\nto stderr\n"]
    assert capfd.readouterr() == ("", "")
