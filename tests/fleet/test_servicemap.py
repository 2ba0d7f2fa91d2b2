"""examples/fleet/servicemap: arguments, messages, tables and pictures."""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from .events import (
    END,
    EXTERNAL,
    HOUR,
    SERVICEMAP,
    accept,
    connect,
    connected,
    failed,
    lost,
    pair,
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


WEB = {"cgroup_path": "/system.slice/nginx.service"}


def test_table(tmp_path):
    """Of lines in a compressed file and on stdin."""
    first, second = tmp_path / "web's {1}.json.gz", tmp_path / "db2.json"
    lines = [
        connected(0, latency_us=300),
        failed(2_000_000, sport=40001, latency_us=300),
        connect(5, sport=40009, daddr=EXTERNAL, dport=443),
    ]
    first.write_bytes(gzip.compress(text(lines)))
    second.write_bytes(text([accept(300, **WEB)]))
    out, err, status = run(first, "-", stdin=second.read_bytes())
    assert (err, status) == ("", 0)
    at0, at2 = "2026-11-24T10:00:00Z", "2026-11-24T10:00:01Z"
    assert out == (
        "CLIENT UNIT COMM SERVER       UNIT          COMM  PORT COUNT FAILED P50(ms) "
        "P99(ms) FIRST                LAST\n"
        "web1   -    curl 198.51.100.7 -             -     443  1     0      -       "
        f"-       {at0} {at0}\n"
        "web1   -    curl db2          nginx.service nginx 80   1     1      0.362   "
        f"0.362   {at0} {at2}\n"
    )
    assert run("--unknown", first, second)[0] == (
        "EVENT   HOST UNIT COMM ADDRESS      PORT COUNT FIRST                LAST\n"
        f"connect web1 -    curl 198.51.100.7 443  1     {at0} {at0}\n"
    )
    assert run("--failures", first)[0] == (
        "CLIENT UNIT COMM SERVER   PORT ERR          COUNT FIRST                LAST\n"
        "web1   -    curl 10.0.0.2 80   ECONNREFUSED 1     "
        "2026-11-24T10:00:02Z 2026-11-24T10:00:02Z\n"
    )


def test_json():
    """The fields that README names; without a latency there is none."""
    lines = [*pair(0), connected(5, "wget", sport=7, **WEB)]
    out, err, status = run("--json", stdin=text(lines))
    rows = list(map(json.loads, out.splitlines()))
    latency = {"latency_us_p50", "latency_us_p99"}
    assert [latency <= set(row) for row in rows] == [False, True]
    assert [row["client_unit"] for row in rows] == ["", "nginx.service"]
    assert set(rows[0]) | latency == {
        *(f"{end}_{name}" for end in ("client", "server") for name in END),
        *("client_unit", "server_unit", "port", "known", "connections", "failures"),
        *("first_seen", "last_seen", *latency),
    }
    assert (err, status) == ("", 0)


def test_part_of_the_map():
    """--host and --top, also of --rows; a name is no SQL."""
    hosts = (("a", 3, 1), ("it's \\", 5, 100), ("c", 7, 200))
    events = [
        connect(n, host=host, daddr=EXTERNAL, sport=sport + n)
        for host, count, sport in hosts
        for n in range(count)
    ]
    events.append(accept(9, host="c", saddr="198.51.100.9"))
    whole, _, _ = run("--json", stdin=text(events))

    def part(*args):
        out, err, status = run("--json", *args, stdin=text(events))
        assert (err, status) == ("", 0)
        assert run("--json", "--rows", *args, stdin=whole.encode()) == (out, "", 0)
        rows = map(json.loads, out.splitlines())
        return [(row["client_host"] or row["server_host"]) for row in rows]

    assert part("--host", "it's \\") == ["it's \\"]
    assert part("--host", "c") == ["c", "c"]
    assert part("--host", b"\xff") == []
    assert part("--top", "2") == ["c", "it's \\"]
    assert part("--top", "1", "--host", "a") == ["a"]


ROWS = {
    "the map": ((), [*pair(0), connect(5, sport=3, daddr=EXTERNAL)]),
    "failures": (["--failures"], [failed(0)]),
    "unknown": (["--unknown"], [connect(0, daddr=EXTERNAL), *pair(0, sport=7)]),
}


@pytest.mark.parametrize("what", ROWS)
def test_rows_of_a_server_are_shown_as_those_of_files(what, tmp_path):
    """Latencies that are null, as ClickHouse prints them, too."""
    args, events = ROWS[what]
    lines, _, _ = run("--json", *args, stdin=text(events))
    rows = tmp_path / "rows"
    with rows.open("w") as file:
        for row in map(json.loads, lines.splitlines()):
            null = {"latency_us_p50": None, "latency_us_p99": None}
            file.write(json.dumps({**(null if "known" in row else {}), **row}) + "\n")
    assert run("--rows", rows) == run(*args, stdin=text(events))
    if what == "the map":
        for output in ("--json", "--dot", "--mermaid"):
            lines = run(output, stdin=text(events))
            assert sorted(run("--rows", output, rows)[0]) == sorted(lines[0])
    _, err, status = run("--rows", stdin=b"rubbish")
    assert "error: row 1 is no JSON object" in err
    assert status == 1


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
        "CLIENT UNIT COMM SERVER       UNIT COMM PORT COUNT FAILED P50(ms) P99(ms) "
        "FIRST                LAST\n"
        "h2     -    b    198.51.100.7 -    -    80   5     0      -       -       "
        "2026-11-24T11:00:00Z 2026-11-24T11:00:00Z\n"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2026-11-29T10:00:00Z", "2026-11-29 10:00:00"),
        ("2026-11-29 10:00:00.500+02:00", "2026-11-29 08:00:00.500000"),
        ("1970-01-01T00:00:00z", "1970-01-01 00:00:00"),
        *((text, None) for text in ("", "today", "2026-11-29T10:00:00")),
        *((text, None) for text in ("2026-13-29T10:00:00Z", "2026-11-29T10:00:00Z'")),
        *((text, None) for text in ("0001-01-01T00:00:00+02:00",)),
        *((text, None) for text in ("1970-01-01T00:00:00+00:01",)),
        *((text, None) for text in ("2106-02-07T00:00:00Z",)),
    ],
)
def test_times(text, expected):
    if expected:
        assert servicemap.utc_time(text) == expected
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="not a time as 2026-11-2"):
            servicemap.utc_time(text)


def test_lines_that_are_not_the_tools(tmp_path):
    """They are counted per file, and none stops the others."""
    good, accepted = (json.dumps(one).encode() for one in (connect(0), accept(1)))
    refusals = [b"rubbish", b"\xff\xfe{", b"[]", b"{}", b"5", good[:-1], b"rubbish\r"]
    for change in (
        *({"sport": "no"}, {"saddr": "10.0.0"}, {"ts": "today"}, {"ts": None}),
        *({"event": "closed"}, {"event": None}, {"host": ""}),
    ):
        refusals.append(json.dumps({**connect(0), **change}).encode())
    bad, one = tmp_path / "bad", tmp_path / "one\n"
    bad.write_bytes(b"\n".join([good, b"", b" \r", *refusals, good]))
    one.write_bytes(accepted + b"\r\n{}")
    out, err, status = run("--json", bad, one)
    assert (json.loads(out)["connections"], status) == (1, 0)
    skipped = "lines are not the tools', and skipped\n"
    assert err == (
        f"servicemap: {bad}: {len(refusals)} of {len(refusals) + 2} {skipped}"
        f"servicemap: {tmp_path}/one\\n: 1 of 2 {skipped}"
    )


def test_lost_events_are_reported():
    out, err, status = run(stdin=text([connect(0), lost("web\x1b1", 17)]))
    assert (len(out.splitlines()), status) == (2, 0)
    assert err == (
        "servicemap: web\\x1b1 lost 17 events (buffer_full): "
        "what they were is missing here\n"
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
        ["--top", "3", "--failures"],
        ["--top", "0"],
        ["--rows", "--unknown"],
        ["--rows", "--since", "2026-11-29T10:00:00Z"],
        ["--since", "2026-11-29T10:00:00Z", "--unknown"],
        ["--since", "2026-11-29"],
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
    file = tmp_path.parent / "large.json"
    file.write_bytes(lines)
    done = subprocess.run(
        [*small, sys.executable, SERVICEMAP, file],
        capture_output=True,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert (done.stdout, done.returncode) == (b"", 1)
    form = (
        "servicemap: error: chdb: .*: set TMPDIR to a directory with more space "
        f"than {tmp_path}\n"
    )
    assert re.fullmatch(form, done.stderr.decode())


def test_nothing_stays_behind(tmp_path):
    run(stdin=text([connect(0)]), env={**os.environ, "TMPDIR": str(tmp_path)})
    run(stdin=b"rubbish", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


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
        flow = {"sport": 40000 + n, "dport": 80 + n}
        events.append(connect(n, name, f"web{name}", **flow))
        events.append(accept(n + 1, name, **flow))
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
        [*(name or "-" for name in names * 2), *(f"web{name}" for name in names)]
        + ["db2", "sshd", EXTERNAL]
    )
    ports = [*range(80, 80 + len(HOSTILE)), 22]
    assert sorted(one["label"] for one in drawn) == sorted(f"{n} (1)" for n in ports)
    [dashed] = [one for one in drawn if one.get("style") == "dashed"]
    assert objects[dashed["tail"]]["label"] == EXTERNAL


def test_mermaid_gets_no_character_that_it_would_understand(hostile_rows):
    """And no empty label, which it does not take."""
    out = "".join(servicemap.mermaid(hostile_rows))
    label = r'"(?:[\w .,:/()-]|#\d+;)+"'
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
    assert shown == hosts | {name or "-" for name in names} | {"sshd", EXTERNAL}
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


GOES = '"80 (1), 1 failed, 0.362 / 0.362 ms"'
RED = {
    "--dot": f"n0 -> n1 [label={GOES} color=red",
    "--mermaid": f"n0 -->|{GOES}| n1\n    linkStyle 0 stroke:red",
}


@pytest.mark.parametrize("option", RED)
def test_picture(option):
    """Units and processes; what fails is red."""
    lines = [connected(0, latency_us=300), failed(5, sport=9, latency_us=5)]
    out, err, status = run(option, stdin=text([*lines, accept(1, **WEB)]))
    assert (err, status) == ("", 0)
    assert RED[option] in out
    assert '"nginx.service (nginx)"' in out
    assert "red" not in run(option, stdin=text([lines[0], accept(1)]))[0]
