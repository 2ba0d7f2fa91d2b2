"""tests/bench: what tests/bench_report.py writes of its figures, and what the README
and the man pages say of them.
"""

import io
import json
import re
import shutil
import subprocess
import sys

import bench_report
import pytest
from conftest import TOP, load

VERSIONS = "Linux 6.1.0, python3-bpfcc 0.26.0"


def number(text):
    return float(text.replace(",", ""))


def parse(text):
    """{title: {figure: {column: text}}} of the tables in a Markdown text, without empty
    cells.
    """
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, rest = section.partition("\n")
        lines = re.findall(r"^\|(.*)\|$", rest, re.MULTILINE)
        if lines:
            (_, *columns), _, *rows = ([c.strip() for c in x.split("|")] for x in lines)
            assert {len(cells) for cells in rows} == {len(columns) + 1}
            found[title] = {
                row: {column: text for column, text in zip(columns, cells) if text}
                for row, *cells in rows
            }
            assert len(found[title]) == len(rows)
    return found


def measured(figures):
    """Lines as the guests write them, from {figure: {tool: values}}."""
    return [
        {"versions": VERSIONS},
        *(
            {"figure": figure, "tool": tool, "values": values}
            for figure, tools in figures.items()
            for tool, values in tools.items()
        ),
    ]


def recorded(*runs):
    """The data after these runs: (figures, date, commit) of each."""
    data = {"runs": {}, "figures": {}}
    for figures, date, commit in runs:
        bench_report.record(data, measured(figures), date, commit)
    return data


def test_tables():
    """What is added to no tool's median, as one figure per cell; no other tool's
    column; no cost below the error of measuring; what differs much is in a table of its
    own.
    """
    figures = {
        "a connect": {
            "no tool": [1000, 1010, 990],
            "fexit": [2000, 2004, 1996],
            "bcc's": [5000, 5000, 9000],
        },
        "a packet": {
            "no tool": [500, 500, 500],
            "fexit": [503, 502, 498],
            "bcc's": [501, 520, 530],
        },
        "own cost": {"fexit": [12.34]},
        "memory": {"fexit": [17.38], "bcc's": [182.4]},
        "wake-ups": {"fexit": [5.0], "bcc's": [0.0]},
    }
    data = recorded((figures, "2026-11-28", "1234567"))
    assert (
        "\n".join(bench_report.tables(data))
        == f"""\
## The tools themselves: instructions per event

| | fexit | run |
| --- | ---: | --- |
| own cost | 12.3 | 1 |

## In the kernel: instructions per event

| | fexit | bcc's | run |
| --- | ---: | ---: | --- |
| a connect | 1,000 | 4,000 | 1 |
| a packet | ≈ 0 | 20.0 | 1 |

## Start, memory, wake-ups

| | fexit | bcc's | run |
| --- | ---: | ---: | --- |
| memory | 17.4 | 182 | 1 |
| wake-ups | 5.0 | 0 | 1 |

## Minimum and maximum

Where they differ by more than 10 % of the median.

| | bcc's |
| --- | ---: |
| a connect | 4,000 to 8,000 |
| a packet | 1.0 to 30.0 |

## Runs

| run | date | tools of commit | others |
| ---: | --- | --- | --- |
| 1 | 2026-11-28 | 1234567 | {VERSIONS} |"""
    )


def test_rows_that_say_the_same_are_one():
    """Only next to each other, within 1 %, for all tools; with the values of all."""
    values = {10: 1200, 100: 1201, 1000: 1199, 5000: 1500, 20000: 1501}
    rows = {
        f"a connect, {rate:,} per second requested, 4 CPUs": {
            "fexit": {"run": "a", "values": [value]}
        }
        for rate, value in values.items()
    }
    rows["a connect, -c, 1 flows"] = {"fexit": {"run": "a", "values": [1200]}}
    found = bench_report.folded(rows)
    assert {figure: row["fexit"]["values"] for figure, row in found.items()} == {
        "a connect, 10 to 1,000 per second requested, 4 CPUs": [1200, 1201, 1199],
        "a connect, 5,000 to 20,000 per second requested, 4 CPUs": [1500, 1501],
        "a connect, -c, 1 flows": [1200],
    }
    rows["a connect, -c, 10 flows"] = {
        "fexit": {"run": "a", "values": [1200]},
        "kprobe": {"run": "a", "values": [1200]},
    }
    assert len(bench_report.folded(rows)) == 4


def test_a_run_of_some_parts_leaves_the_other_figures():
    """A row says in which run each tool was measured; a run without figures goes."""
    first = {
        "start": {"fexit": [7], "kprobe": [7], "bcc's": [9]},
        "memory": {"fexit": [1]},
    }
    second = {"start": {"fexit": [6], "kprobe": [6]}}
    runs = [(first, "2026-11-25", "aaaaaaa"), (second, "2026-11-28", "bbbbbbb")]
    data = recorded(*runs)
    rows = parse("\n".join(bench_report.tables(data)))["Start, memory, wake-ups"]
    assert rows == {
        "start": {
            "fexit": "6.0",
            "kprobe": "6.0",
            "bcc's": "9.0",
            "run": "fexit, kprobe: 2; others: 1",
        },
        "memory": {"fexit": "1.0", "run": "1"},
    }
    data = recorded(*runs, (first, "2026-11-29", "ccccccc"))
    assert list(data["runs"]) == ["2026-11-29 ccccccc"]
    assert json.loads(bench_report.dump(data)) == data


def test_picture():
    """A bar of two parts for each tool that has both figures, and each size of
    batches.
    """
    figures = {"a connect, IPv4": {"fexit": [1000], "bcc's": [2000], "tcpdump": [5]}}
    for batch in (1, 20, 1000):
        own = {"fexit": [3000], "bcc's": [8000]}
        figures[f"tcpconnect, own cost, batches of {batch}"] = own
    picture = bench_report.draw(recorded((figures, "", ""))["figures"])
    texts = re.findall(r">([^<>]+)</text>", picture)
    assert texts[3:8] == [
        "Batches of 1 (a quiet machine)",
        *("ours: fexit", "1,000 + 3,000", "bcc's", "2,000 + 8,000"),
    ]
    assert len(texts) == 3 + 3 * 5
    widths = re.findall(r'width="([\d.]+)" height="12"', picture)[2:6]
    kernel, own, *bccs = map(float, widths)
    assert own == pytest.approx(3 * kernel, abs=0.2)
    assert sum(bccs) == pytest.approx(2.5 * (kernel + own), abs=0.2)


def test_recording_writes_all_three_files(tmp_path, monkeypatch):
    for name in ("DATA", "TEXT", "PICTURE"):
        copy = tmp_path / getattr(bench_report, name).name
        shutil.copy(getattr(bench_report, name), copy)
        monkeypatch.setattr(bench_report, name, copy)
    lines = measured({"a connect, IPv4": {"no tool": [10], "fexit": [7788]}})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr(sys, "argv", ["bench_report.py", "--record", "1234567+"])
    bench_report.main()
    data = json.loads(bench_report.DATA.read_text())
    cell = data["figures"]["a connect, IPv4"]["fexit"]
    assert cell["values"] == [7778]
    assert data["runs"][cell["run"]]["tools"] == "1234567+"
    tables = parse(bench_report.TEXT.read_text())
    row = tables["In the kernel: instructions per event"]["a connect, IPv4"]
    assert row["fexit"] == "7,778"
    assert ">7,778 + " in bench_report.PICTURE.read_text()


@pytest.mark.parametrize(
    ("arguments", "release", "guests"),
    [
        ([], "bookworm", "WHOLE"),
        (["--print", "sid"], "sid", "WHOLE"),
        (["--quick"], "bookworm", "QUICK"),
        (["accept", "connect"], "bookworm", [("bench", 1, "accept connect")]),
    ],
)
def test_guests(monkeypatch, arguments, release, guests):
    """With four CPUs, too, where growth is measured and QEMU can."""
    bench = load("tests/bench")
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    args = bench.parse_args()
    assert args.release == release
    wanted = getattr(bench, guests) if isinstance(guests, str) else guests
    for can in (False, True):
        monkeypatch.setattr(bench, "counts_on_several_cpus", lambda can=can: can)
        four = [bench.FOUR] if can and guests == "WHOLE" else []
        assert bench.guests(args) == [*wanted, *four]


@pytest.mark.parametrize("words", [["sid"], ["--quick", "sid", "bookworm"]])
def test_what_is_no_part(monkeypatch, capsys, words):
    bench = load("tests/bench")
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit):
        bench.parse_args()
    assert "PART is one of connect, outcomes, whose, names," in capsys.readouterr().err


def test_what_is_committed_was_written_from_the_figures():
    data = json.loads(bench_report.DATA.read_text())
    assert bench_report.DATA.read_text() == bench_report.dump(data)
    text = bench_report.TEXT.read_text()
    assert bench_report.written(text, data) == text
    assert bench_report.PICTURE.read_text() == bench_report.draw(data["figures"])


def test_quick(request):
    """Ours costs less than bcc's, on a real kernel.

    Where the guests are tested, for it boots one of them.
    """
    results = request.config.getoption("--guest-results", default=None)
    if not results or not (results / "bookworm").exists():
        pytest.skip("no guests")
    done = subprocess.run(
        [TOP / "tests/bench", "--quick"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tables = parse(done.stdout)
    rows = tables["In the kernel: instructions per event"]
    assert list(rows) == ["a connect, IPv4", "a connect, IPv6"]
    for row in rows.values():
        assert list(row) == ["fexit", "kprobe", "bcc's", "run"]
        fexit, kprobe, bcc = (number(row[tool]) for tool in list(row)[:3])
        assert 0 < fexit < kprobe < bcc
    assert tables["Runs"]["1"]["others"].startswith("Linux ")


def medians():
    """{figure: {tool: its median}}, as in the tables of BENCHMARKS.md."""
    data = json.loads(bench_report.DATA.read_text())
    return {
        figure: {
            tool: number(bench_report.cell_text(row, tool))
            for tool in row
            if not bench_report.noise(row)
        }
        for figure, row in data["figures"].items()
    }


def test_the_readmes_figures_are_those_of_the_benchmarks():
    """Its table has medians of the same rows; its rule of thumb is their product."""
    figures = medians()
    readme = (TOP / "README.md").read_text()
    overhead = readme.partition("\n## Overhead\n")[2].partition("\n## ")[0]
    assert f"](tests/{bench_report.PICTURE.name})" in overhead
    lines = re.findall(r"^\|(.*)\|$", overhead, re.MULTILINE)
    (_, *tools), _, *rows = ([c.strip() for c in x.split("|")] for x in lines)
    tools[0] = tools[0].removeprefix("ours: ")
    assert tools == ["fexit", "libbpf-tools'", "bcc's", "bpftrace's", "tcpdump"]
    assert len(rows) == 4
    for figure, *cells in rows:
        row = figures.get(figure) or figures[figure.partition(" (")[0]]
        assert [c and number(c) for c in cells] == [row.get(tool, "") for tool in tools]
    kernel, own, total = re.search(
        r"\(([\d,]+) \+ ([\d,]+)\) = ([\d.]+) million", overhead
    ).groups()
    assert number(kernel) == figures["a connect, IPv4"]["fexit"]
    assert number(own) == figures["tcpconnect, own cost, 1,000 per second"]["fexit"]
    assert float(total) == pytest.approx(
        (number(kernel) + number(own)) / 1000, abs=0.05
    )


@pytest.mark.parametrize("name", ["tcpconnect", "tcpaccept"])
def test_the_man_pages_figures_are_those_of_the_benchmarks(name):
    """Their lines have the medians of fexit, kprobe and bcc's; - for none."""
    figures = medians()
    text = (TOP / f"man/man8/{name}.8").read_text().replace("\\-", "-")
    overhead = text[text.index(".SH OVERHEAD") : text.index(".SH CAVEATS")]
    *_, run = json.loads(bench_report.DATA.read_text())["runs"].values()
    for what in ("Linux", "python3-bpfcc"):
        version = re.search(rf"{what} [^\s,]+", run["versions"]).group()
        assert version in overhead.replace("\n", " ")
    lines = re.findall(r"^  (\S.*?)  +(\S+)  +(\S+)  +(\S+)$", overhead, re.MULTILINE)
    titles, *rows = lines
    assert titles[1:] == ("fexit", "kprobe", "bcc's")
    assert len(rows) >= 10
    for figure, *cells in rows:
        assert [c if c == "-" else number(c) for c in cells] == [
            figures[figure].get(tool, "-") for tool in titles[1:]
        ]
