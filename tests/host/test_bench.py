"""tests/bench: the table that it prints, and what BENCHMARKS.md, the README and the man
pages say of it.
"""

import re
import subprocess

import pytest
from conftest import TOP, load

CELL = re.compile(r"(-?[\d,.]+)(?: \((-?[\d,.]+) to (-?[\d,.]+)\))?(?: (\d+\.\d\d))?")


def number(text):
    return float(text.replace(",", ""))


def cell(text):
    """(median, minimum, maximum, ratio to bcc's or None) of a cell of the table; None
    of an empty one.
    """
    if not text:
        return None
    middle, least, most, ratio = CELL.fullmatch(text).groups()
    least, most = least or middle, most or middle
    return number(middle), number(least), number(most), ratio and float(ratio)


def parse(text):
    """{figure: {tool: what cell() gives}} of a table in a Markdown text.

    It is the first one that begins as the bench's does.
    """
    lines = text[text.index("| | fexit |") :].partition("\n\n")[0].splitlines()
    (_, *tools), rule, *rows = ([c.strip() for c in x[1:-1].split("|")] for x in lines)
    assert rule == ["---"] + ["---:"] * len(tools)
    figures = {}
    for figure, *cells in rows:
        assert len(cells) == len(tools)
        found = {tool: cell(text) for tool, text in zip(tools, cells)}
        figures[figure] = {tool: found for tool, found in found.items() if found}
    assert len(figures) == len(rows)
    return figures


def versions(text):
    """The line below the table."""
    return re.search(r"^Linux \S+, .*python3-bpfcc \S.*$", text, re.MULTILINE).group()


def test_a_table():
    """What is added to no tool's median; the ratio to bcc's where that is more than
    nothing; no other tool's column.
    """
    bench = load("tests/bench")
    measured = {
        ("a connect", "no tool"): [1000, 1010, 990],
        ("a connect", "fexit"): [2000, 2004, 1996],
        ("a connect", "bcc's"): [5000, 5000, 5000],
        ("a packet", "no tool"): [500, 500, 500],
        ("a packet", "fexit"): [500, 499, 502],
        ("a packet", "bcc's"): [500, 499, 501],
        ("memory", "fexit"): [12.34],
    }
    lines = [
        {"figure": figure, "tool": tool, "values": values}
        for (figure, tool), values in measured.items()
    ]
    text = "\n".join(bench.table(bench.added(lines)))
    assert text == (
        "| | fexit | bcc's |\n"
        "| --- | ---: | ---: |\n"
        "| a connect | 1,000 (996 to 1,004) 0.25 | 4,000 (4,000 to 4,000) |\n"
        "| a packet | 0.0 (-1.0 to 2.0) | 0.0 (-1.0 to 1.0) |\n"
        "| memory | 12.3 |  |"
    )
    assert parse(text) == {
        "a connect": {
            "fexit": (1000, 996, 1004, 0.25),
            "bcc's": (4000, 4000, 4000, None),
        },
        "a packet": {"fexit": (0, -1, 2, None), "bcc's": (0, -1, 1, None)},
        "memory": {"fexit": (12.3, 12.3, 12.3, None)},
    }


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
    figures = parse(done.stdout)
    assert list(figures) == ["a connect, IPv4", "a connect, IPv6"]
    for tools in figures.values():
        assert list(tools) == ["fexit", "kprobe", "bcc's"]
        assert 0 < tools["fexit"][0] < tools["kprobe"][0] < tools["bcc's"][0]
    assert versions(done.stdout).endswith("; QEMU counts the instructions.")


def benchmarks():
    return (TOP / "tests/BENCHMARKS.md").read_text()


def test_the_benchmarks_table():
    figures = parse(benchmarks())
    for tools in figures.values():
        for middle, least, most, ratio in tools.values():
            assert least <= middle <= most
            if ratio is not None:
                assert ratio == pytest.approx(middle / tools["bcc's"][0], abs=0.01)


def test_the_readmes_figures_are_those_of_the_benchmarks():
    """Its table has medians of the same rows; its picture those of two, and one
    character per thousand; its rule of thumb is their product.
    """
    figures = parse(benchmarks())
    readme = (TOP / "README.md").read_text()
    overhead = readme.partition("\n## Overhead\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", overhead, re.MULTILINE)
    (_, *tools), _, *rows = ([c.strip() for c in x.split("|")] for x in lines)
    tools[0] = tools[0].removeprefix("ours: ")
    assert tools == ["fexit", "libbpf-tools'", "bcc's", "bpftrace's", "tcpdump"]
    assert len(rows) == 4
    for figure, *cells in rows:
        medians = figures.get(figure) or figures[figure.partition(" (")[0]]
        assert [c and number(c) for c in cells] == [
            medians[tool][0] if tool in medians else "" for tool in tools
        ]
    bar = r"^(?:ours: )?(\S+) +(-+)(#+) +([\d,]+) \+ +([\d,]+)$"
    picture = re.findall(bar, overhead, re.MULTILINE)
    assert [tool for tool, *_ in picture] == tools
    for tool, kernel, own, *medians in picture:
        rows = ("a connect, IPv4", "tcpconnect, own cost, batches of 20")
        assert [number(m) for m in medians] == [figures[r][tool][0] for r in rows]
        drawn = len(kernel) * 1000, len(own) * 1000
        assert drawn == pytest.approx([number(m) for m in medians], abs=500)
    kernel, own, total = re.search(
        r"\(([\d,]+) \+ ([\d,]+)\) = ([\d.]+) million", overhead
    ).groups()
    assert number(kernel) == figures["a connect, IPv4"]["fexit"][0]
    assert number(own) == figures["tcpconnect, own cost, 1,000 per second"]["fexit"][0]
    assert float(total) == pytest.approx(
        (number(kernel) + number(own)) / 1000, abs=0.05
    )


@pytest.mark.parametrize("name", ["tcpconnect", "tcpaccept"])
def test_the_man_pages_figures_are_those_of_the_benchmarks(name):
    """Their lines have the medians of fexit, kprobe and bcc's; - for none."""
    figures = parse(benchmarks())
    text = (TOP / f"man/man8/{name}.8").read_text().replace("\\-", "-")
    overhead = text[text.index(".SH OVERHEAD") : text.index(".SH CAVEATS")]
    for what in ("Linux", "python3-bpfcc"):
        version = re.search(rf"{what} [^\s,]+", versions(benchmarks())).group()
        assert version in overhead.replace("\n", " ")
    lines = re.findall(r"^  (\S.*?)  +(\S+)  +(\S+)  +(\S+)$", overhead, re.MULTILINE)
    titles, *rows = lines
    assert titles[1:] == ("fexit", "kprobe", "bcc's")
    assert len(rows) >= 10
    for figure, *cells in rows:
        medians = [figures[figure].get(tool, "-") for tool in titles[1:]]
        assert [c if c == "-" else number(c) for c in cells] == [
            m if m == "-" else m[0] for m in medians
        ]
