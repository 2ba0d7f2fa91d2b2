"""tests/bench_report.py: the tables that it writes of figures, and that the README and
the man pages say the same as these figures.
"""

import json
import re
import subprocess

import bench_report
import pytest
from conftest import TOP

VERSIONS = "Linux 6.1.0, python3-bpfcc 0.26.0"


def number(text):
    return float(text.replace(",", ""))


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


def test_tables():
    """What is added to no tool's median, as one figure per cell: the mean of own costs,
    the median of others; no other tool's column; no cost below the error of measuring;
    what differs much is in a table of its own. A run of some parts leaves the other
    figures; one without figures goes.
    """
    first = {
        "a connect": {
            "no tool": [1000, 1010, 990],
            "fexit": [2000, 2004, 1996],
            "bcc's": [5000, 5000, 9000],
        },
        "a packet": {
            "no tool": [500],
            "fexit": [503, 502, 498],
            "bcc's": [501, 520, 530],
        },
        "own cost": {"fexit": [12.34], "bcc's": [100, 104, 180]},
        "memory": {"fexit": [17.38], "kprobe": [17], "bcc's": [182.4]},
        "wake-ups": {"fexit": [5.0], "bcc's": [0.0]},
        "idle, per second": {"fexit": [1000, 1010, 2000], "bcc's": [0]},
    }
    second = {"memory": {"fexit": [16.9], "kprobe": [17]}}
    data = {"runs": {}, "figures": {}}
    for figures, date, commit in (
        (second, "2026-11-24", "0000000"),
        (first, "2026-11-25", "aaaaaaa"),
        (second, "2026-11-28", "bbbbbbb"),
    ):
        bench_report.record(data, measured(figures), date, commit)
    assert (
        "\n".join(bench_report.tables(data))
        == f"""\
## Idle, start, memory: median

| | fexit | kprobe | bcc's | run |
| --- | ---: | ---: | ---: | --- |
| memory | 16.9 | 17.0 | 182 | fexit, kprobe: 2; others: 1 |
| wake-ups | 5.0 |  | 0 | 1 |
| idle, per second | 1,010 |  | 0 | 1 |

## In the kernel: instructions per event, median

| | fexit | bcc's | run |
| --- | ---: | ---: | --- |
| a connect | 1,000 | 4,000 | 1 |
| a packet | ≈ 0 | 20.0 | 1 |

## The tools themselves: instructions per event, mean

| | fexit | bcc's | run |
| --- | ---: | ---: | --- |
| own cost | 12.3 | 128 (median 104) | 1 |

## Minimum and maximum

Where they differ by more than 10 % of the figure.

| | fexit | bcc's |
| --- | ---: | ---: |
| a connect |  | 4,000 to 8,000 |
| a packet |  | 1.0 to 30.0 |
| own cost |  | 100 to 180 |
| idle, per second | 1,000 to 2,000 |  |

## Runs

| run | date | tools of commit | others |
| ---: | --- | --- | --- |
| 1 | 2026-11-25 | aaaaaaa | {VERSIONS} |
| 2 | 2026-11-28 | bbbbbbb | {VERSIONS} |"""
    )


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
    rows = re.findall(r"^\| (a connect, .*?) \| (.*) \|$", done.stdout, re.MULTILINE)
    assert [figure for figure, _ in rows] == ["a connect, IPv4", "a connect, IPv6"]
    assert "\n| | fexit | kprobe | bcc's |\n" in done.stdout
    for _, cells in rows:
        fexit, kprobe, bcc = map(number, cells.split(" | "))
        assert 0 < fexit < kprobe < bcc
    assert re.search(r"\| Linux [^|]* \|$", done.stdout, re.MULTILINE)


def averages():
    """{figure: {tool: its value}}, as in the tables of BENCHMARKS.md."""
    data = json.loads(bench_report.DATA.read_text())
    return {
        figure: {
            tool: number(bench_report.cell_text(figure, row, tool))
            for tool in row
            if not bench_report.noise(row)
        }
        for figure, row in data["figures"].items()
    }


def test_the_readmes_figures_are_those_of_the_benchmarks():
    """Its table has the same rows; its rule of thumb is their product."""
    figures = averages()
    readme = (TOP / "README.md").read_text()
    overhead = readme.partition("\n## Overhead\n")[2].partition("\n## ")[0]
    assert f"](tests/{bench_report.PICTURE.name})" in overhead
    lines = re.findall(r"^\|(.*)\|$", overhead, re.MULTILINE)
    (_, *tools), _, *rows = ([c.strip() for c in x.split("|")] for x in lines)
    tools[0] = tools[0].removeprefix("ours: ")
    assert tools == ["fexit", "libbpf-tools'", "bcc's", "bpftrace's", "tcpdump"]
    assert len(rows) == 5
    for figure, *cells in rows:
        row = figures.get(figure) or figures[figure.partition(" (")[0]]
        assert [c and number(c) for c in cells] == [row.get(tool, "") for tool in tools]
    kernel, own, total = re.search(
        r"\(([\d,]+) \+ ([\d,]+)\) = ([\d.]+) million", overhead
    ).groups()
    assert number(kernel) == figures["a connect, IPv4"]["fexit"]
    assert number(own) == figures["tcpconnect, own cost, 1,000 per second"]["fexit"]
    memory = re.search(r"(\d+) MiB of memory, (\d+) while it starts", readme).groups()
    for text, when in zip(memory, ("memory afterwards", "peak memory")):
        assert int(text) == round(figures[f"tcpconnect, {when} (MiB)"]["fexit"])
    assert float(total) == pytest.approx(
        (number(kernel) + number(own)) / 1000, abs=0.05
    )


def test_the_man_page_has_the_versions_that_were_measured():
    page = (TOP / "man/man7/tcptools.7").read_text().replace("\\-", "-")
    *_, run = json.loads(bench_report.DATA.read_text())["runs"].values()
    for what in ("Linux", "python3-bpfcc"):
        version = re.search(rf"{what} [^\s,]+", run["versions"]).group()
        assert version in page.replace("\n", " ")


def test_the_man_pages_figures_are_those_of_the_benchmarks(name):
    """Their lines have the figures of fexit, kprobe and bcc's; - for none."""
    figures = averages()
    text = (TOP / f"man/man8/{name}.8").read_text().replace("\\-", "-")
    overhead = text[text.index(".SH OVERHEAD") : text.index(".SH CAVEATS")]
    lines = re.findall(r"^  (\S.*?)  +(\S+)  +(\S+)  +(\S+)$", overhead, re.MULTILINE)
    titles, *rows = lines
    assert titles[1:] == ("fexit", "kprobe", "bcc's")
    assert len(rows) >= 10
    for figure, *cells in rows:
        assert [c if c == "-" else number(c) for c in cells] == [
            figures[figure].get(tool, "-") for tool in titles[1:]
        ]
