"""What tests/bench measured, as text and as a picture: tests/BENCHMARKS.md and
benchmarks.svg, written from benchmarks.json, which are beside this file.

USAGE: bench_report.py                  write both from benchmarks.json
       bench_report.py --record COMMIT  put the figures on stdin in there before; COMMIT
                                        is that of the tools that were measured
       bench_report.py --print          only print the tables of the figures on stdin

Figures on stdin are lines of JSON, as tests/guest/bench.py writes them. benchmarks.json
has what the tools added to the same work without a tool, one value for each repeat, and
of each figure in which run it was measured: a run of some parts leaves the other
figures as they are.
"""

import argparse
import collections
import html
import json
import pathlib
import re
import statistics
import sys
import time

TESTS = pathlib.Path(__file__).resolve().parent
DATA, TEXT, PICTURE = (
    TESTS / name for name in ("benchmarks.json", "BENCHMARKS.md", "benchmarks.svg")
)
# What is written is between these lines of the text; the rest is written by hand.
BEGIN, END = "<!-- From here on tests/bench wrote -->\n", "<!-- Up to here -->\n"
NO_TOOL = "no tool"
OURS = ["fexit", "kprobe"]
TOOLS = [*OURS, "bcc's", "libbpf-tools'", "bpftrace's", "tcpdump"]

# What a tool does from time to time is part of what it costs: the figure is the mean of
# these. In the kernel, a few repeats are disturbed: there it is the median.
MEAN = "own cost"
# A figure is in the first table whose pattern its name has.
TABLES = {
    "Idle, start, memory: median": "idle|wake-ups|start|memory",
    "In the kernel: instructions per event, median": "^an? ",
    "The tools themselves: instructions per event, mean": "",
}
WIDE = 0.1  # minimum and maximum are shown where they differ by more

BATCHES = {1: "a quiet machine", 20: "some 100 per second", 1000: "a busy machine"}
COLORS = {"kernel": "#1f4e79", "own": "#8ab6dc", "text": "#222222"}


def added(lines):
    """{figure: {tool: [what it adds]}}; where that adds to nothing, what it takes."""
    values = collections.defaultdict(dict)
    for line in lines:
        values[line["figure"]][line["tool"]] = line["values"]
    return {
        figure: {
            tool: [value - statistics.median(tools.get(NO_TOOL, [0])) for value in own]
            for tool, own in tools.items()
            if tool != NO_TOOL
        }
        for figure, tools in values.items()
    }


def record(data, lines, date, commit):
    """Put the figures of a run, as the guests wrote them, into data.

    Runs of which no figure is left are taken out.
    """
    versions = next(line["versions"] for line in lines if "versions" in line)
    key = f"{date} {commit}"
    data["runs"][key] = {"date": date, "tools": commit, "versions": versions}
    for figure, tools in added(line for line in lines if "figure" in line).items():
        row = data["figures"].setdefault(figure, {})
        row.update(
            {tool: {"run": key, "values": values} for tool, values in tools.items()}
        )
    used = {cell["run"] for row in data["figures"].values() for cell in row.values()}
    data["runs"] = {key: run for key, run in data["runs"].items() if key in used}


def dump(data):
    """data as JSON: a line for each run, and for each figure and tool."""

    def inner(items, indent):
        lines = [f"{indent}{json.dumps(key)}: {text}" for key, text in items]
        return "{\n" + ",\n".join(lines) + f"\n{indent[:-1]}}}"

    runs = inner(((key, json.dumps(run)) for key, run in data["runs"].items()), "  ")
    figures = inner(
        (
            (
                figure,
                inner(((tool, json.dumps(cell)) for tool, cell in row.items()), "   "),
            )
            for figure, row in data["figures"].items()
        ),
        "  ",
    )
    return inner([("runs", runs), ("figures", figures)], " ") + "\n"


def number(value):
    return f"{value:,.{0 if value == 0 or abs(value) >= 100 else 1}f}"


def average(figure, cell):
    """A figure of one tool: the mean or the median of its values."""
    kind = statistics.mean if re.search(MEAN, figure) else statistics.median
    return kind(cell["values"])


def noise(row):
    """What a row's values may be off by: a cost below zero is an error of measuring."""
    return max(0, *(-value for cell in row.values() for value in cell["values"]))


def is_wide(figure, row, tool):
    values, middle = row[tool]["values"], average(figure, row[tool])
    return abs(middle) > noise(row) and max(values) - min(values) > WIDE * middle


def cell_text(figure, row, tool):
    """One figure; none where the tool was not measured."""
    if tool not in row:
        return ""
    middle = average(figure, row[tool])
    return "≈ 0" if 0 < noise(row) >= abs(middle) else number(middle)


def both_text(figure, row, tool):
    """That, and the median where it differs much from the mean."""
    text = cell_text(figure, row, tool)
    if text and re.search(MEAN, figure):
        mean, median = (
            average(figure, row[tool]),
            statistics.median(row[tool]["values"]),
        )
        if abs(mean - median) > WIDE * median:
            text += f" (median {number(median)})"
    return text


def spread_text(figure, row, tool):
    """Minimum and maximum."""
    if tool not in row or not is_wide(figure, row, tool):
        return ""
    values = row[tool]["values"]
    return f"{number(min(values))} to {number(max(values))}"


def run_text(row, numbers):
    """The number of a row's run; of several, with their tools."""
    tools = collections.defaultdict(list)
    for tool in TOOLS:
        if tool in row:
            tools[numbers[row[tool]["run"]]].append(tool)
    *several, (last, _) = tools.items()
    if not several:
        return str(last)
    texts = [f"{', '.join(names)}: {number}" for number, names in several]
    return "; ".join([*texts, f"others: {last}"])


def table(rows, text, numbers=None):
    """The lines of a table with text(figure, row, tool) in its cells; with numbers of
    the runs, the last column has them.
    """
    titles = [tool for tool in TOOLS if any(text(*row, tool) for row in rows.items())]
    more = ["run"] if numbers else []
    yield f"| {' | '.join(['', *titles, *more])} |".replace("|  |", "| |", 1)
    yield f"| --- | {' | '.join(['---:'] * len(titles) + ['---'] * len(more))} |"
    for figure, row in rows.items():
        cells = [text(figure, row, tool) for tool in titles]
        if numbers:
            cells.append(run_text(row, numbers))
        yield f"| {figure} | {' | '.join(cells)} |"


def sections(figures):
    """{title: its rows}, of those titles that have any."""
    found = {title: {} for title in TABLES}
    for figure, row in figures.items():
        title = next(t for t, pattern in TABLES.items() if re.search(pattern, figure))
        found[title][figure] = row
    return {title: rows for title, rows in found.items() if rows}


def tables(data):
    """The lines of all tables."""
    numbers = {key: i for i, key in enumerate(data["runs"], 1)}
    column = numbers if len(numbers) > 1 else None
    for title, rows in sections(data["figures"]).items():
        yield from (f"## {title}", "", *table(rows, both_text, column), "")
    wide = {
        figure: row
        for figure, row in data["figures"].items()
        if any(is_wide(figure, row, tool) for tool in row)
    }
    if wide:
        yield from ("## Minimum and maximum", "")
        yield f"Where they differ by more than {WIDE * 100:.0f} % of the figure."
        yield from ("", *table(wide, spread_text), "")
    yield from ("## Runs", "", "| run | date | tools of commit | others |")
    yield "| ---: | --- | --- | --- |"
    for key, run in data["runs"].items():
        cells = numbers[key], run["date"], run["tools"], run["versions"]
        yield f"| {' | '.join(map(str, cells))} |"


def written(text, data):
    """The text with the picture and the tables of data between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, mark, behind = rest.partition(END)
    if not mark:
        sys.exit(f"bench_report: error: {TEXT} is without its marks")
    picture = f"![Instructions per connect, by tool]({PICTURE.name})"
    lines = "\n".join([picture, "", *tables(data)])
    return f"{before}{BEGIN}\n{lines}\n\n{END}{behind}"


def bars(figures, batch):
    """[(tool, kernel's part, its own part)] of a connect, in instructions."""
    parts = "a connect, IPv4", f"tcpconnect, own cost, batches of {batch}"
    return [
        (tool, *(average(part, figures[part][tool]) for part in parts))
        for tool in TOOLS
        if all(tool in figures[part] for part in parts)
    ]


def draw(figures):
    """The picture: of each size of batches and each tool, a bar of two parts."""
    groups = {batch: bars(figures, batch) for batch in BATCHES}
    left, width, right, step, y = 110, 430, 130, 16, 64
    rows = sum(len(group) + 2 for group in groups.values())
    height = y + (rows - 1) * step
    scale = width / max(sum(bar[1:]) for group in groups.values() for bar in group)
    size = f'width="{left + width + right}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f'<rect {size} fill="white"/>',
        f'<g fill="{COLORS["text"]}" font-family="sans-serif" font-size="12">',
    ]

    def write(text, x, y, style=""):
        lines.append(f'<text x="{x}" y="{y}" {style}>{html.escape(text)}</text>')

    def block(part, x, y, length):
        bar = f'width="{length:.1f}" height="{step - 4}" fill="{COLORS[part]}"'
        lines.append(f'<rect x="{x}" y="{y}" {bar}/>')

    write("Instructions per connect: less is better", 10, 18, 'font-weight="bold"')
    for part, text, x in (
        ("kernel", "in the kernel (median)", 10),
        ("own", "by the tool itself (mean), idle cost excluded", 190),
    ):
        block(part, x, 26, 12)
        write(text, x + 18, 36)
    for batch, group in groups.items():
        title = f"Batches of {batch} ({BATCHES[batch]})"
        write(title, 10, y - 3, 'font-style="italic"')
        for tool, kernel, own in group:
            y += step
            name = f"ours: {tool}" if tool in OURS else tool
            write(name, left - 6, y, 'text-anchor="end"')
            block("kernel", left, y - 10, kernel * scale)
            middle = round(left + kernel * scale, 1)
            block("own", middle, y - 10, own * scale)
            end = round(left + (kernel + own) * scale + 6, 1)
            write(f"{number(kernel)} + {number(own)}", end, y)
        y += 2 * step
    return "\n".join([*lines, "</g>", "</svg>", ""])


def parse_args():
    parser = argparse.ArgumentParser(
        usage="bench_report.py [--record COMMIT | --print]"
    )
    parser.add_argument("--record")
    parser.add_argument("--print", action="store_true")
    return parser.parse_args()


def main():
    args = parse_args()
    today = time.strftime("%Y-%m-%d", time.gmtime())
    if args.print:
        data = {"runs": {}, "figures": {}}
        record(data, [json.loads(line) for line in sys.stdin], today, "this tree")
        print("\n".join(tables(data)))
        return
    data = json.loads(DATA.read_text())
    if args.record:
        lines = [json.loads(line) for line in sys.stdin]
        record(data, lines, today, args.record)
        DATA.write_text(dump(data))
    TEXT.write_text(written(TEXT.read_text(), data))
    PICTURE.write_text(draw(data["figures"]))


if __name__ == "__main__":
    main()
