"""examples/fleet/servicemap: arguments, messages, tables and pictures."""

import argparse
import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections import Counter

import pytest

from .events import (
    EXTERNAL,
    FLEET,
    HOUR,
    SERVICEMAP,
    accept,
    connect,
    lost,
    servicemap,
    text,
)


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
    out, err, status = run("-", second, stdin=first.read_bytes())
    assert (err, status) == ("", 0)
    at0, at2 = "2026-11-24T10:00:00Z", "2026-11-24T10:00:02Z"
    assert out == (
        "CLIENT COMM SERVER       COMM  PORT NAT COUNT FIRST                LAST\n"
        f"web1   curl 198.51.100.7 -     443  -   1     {at0} {at0}\n"
        f"web1   curl db2          -     80   -   1     {at2} {at2}\n"
        f"web1   curl db2          nginx 80   -   1     {at0} {at0}\n"
    )
    assert run("--unknown", first, second)[0] == (
        "EVENT   HOST COMM ADDRESS      PORT COUNT FIRST                LAST\n"
        f"connect web1 curl 198.51.100.7 443  1     {at0} {at0}\n"
    )
    assert run("--failures", first) == (
        "CLIENT COMM SERVER PORT ERR COUNT FIRST LAST\n",
        "",
        0,
    )


def test_part_of_the_map(database):
    """--host and --top; a name is no SQL."""
    hosts = (("a", 3, 1), ("it's \\", 5, 100), ("c", 7, 200))
    events = [
        connect(n, host=host, daddr=EXTERNAL, sport=sport + n)
        for host, count, sport in hosts
        for n in range(count)
    ]
    events.append(accept(9, host="c", saddr="198.51.100.9"))
    database.load(events)
    sql = (FLEET / "servicemap.sql").read_text()

    def part(host=None, top=None):
        found = servicemap.part_of_map(sql, host, top)
        rows = servicemap.ask(database.session, found)
        return [(row["client_host"] or row["server_host"]) for row in rows]

    assert part("it's \\") == ["it's \\"]
    assert part("c") == ["c", "c"]
    assert part("nobody") == part("\udcff") == []
    assert part(top=2) == ["c", "it's \\"]
    out, err, status = run("--json", "--top", "1", "--host", "a", stdin=text(events))
    [row] = out.splitlines()
    assert (json.loads(row)["client_host"], err, status) == ("a", "", 0)
    assert run("--json", "--host", b"\xff", stdin=text(events)) == ("", "", 0)


def test_since():
    """What is new since then, all or a part of it; and what cannot be known."""
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
    assert found("2026-11-24T13:00:00+02:00", "--host", "web1")[0] == {"new": 3}
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


@pytest.fixture(scope="module")
def hostile_rows(database):
    """And one edge with an external client."""
    events = [accept(0, "sshd", saddr=EXTERNAL, dport=22)]
    for n, name in enumerate(HOSTILE):
        events.append(connect(n, name, f"web{name}", sport=40000 + n))
        events.append(accept(n + 1, name, sport=40000 + n))
    return database.answer(events)


def test_hostile_names_in_a_table(hostile_rows):
    out = "".join(servicemap.table("servicemap", hostile_rows))
    assert len(out.splitlines()) == 2 + len(HOSTILE)
    assert out.replace("\n", "").isprintable()


def test_graphviz_reads_what_dot_writes(hostile_rows):
    out = "".join(servicemap.dot(hostile_rows))
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


def test_mermaid_gets_no_character_that_it_would_understand(hostile_rows):
    """And no empty label, which it does not take."""
    out = "".join(servicemap.mermaid(hostile_rows))
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


def test_a_graph_too_large_for_mermaid(hostile_rows, capsys):
    [row] = [row for row in hostile_rows if row["port"] == 22]
    warning = (
        "servicemap: 501 edges: Mermaid draws no more than 500, unless its maxEdges is "
        "set (--top or --host gives fewer)\n"
    )
    for count, message in ((500, ""), (501, warning)):
        out = "".join(servicemap.mermaid([row] * count))
        assert (out.count("-.->"), capsys.readouterr().err) == (count, message)


@pytest.mark.parametrize("option", ["--dot", "--mermaid"])
def test_picture(option):
    out, err, status = run(option, stdin=text([connect(0), accept(1)]))
    assert ("80 (1)" in out, err, status) == (True, "", 0)
