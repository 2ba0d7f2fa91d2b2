"""Each two options work together, or are refused together."""

import itertools
import re

from conftest import load, run

LINES = load("tests/guest/pairs.py").LINES  # run by tests/guest/test_pairs.py
COLUMNS = "--timestamp --time --print-uid --lport --rport"
REFUSED = {
    "--ipv4": "--ipv6",
    "--json": COLUMNS,
    "--count": f"{COLUMNS} --dns --queue --failed --json --buffer-pages",
}


def long_names(tool):
    """{an option as -p or --pid: as --pid} of all options in the help but --help."""
    found = {}
    for options in re.findall(r"^  (-.+?)(?:  |$)", tool.HELP, re.MULTILINE):
        spellings = re.findall(r"(?<!\S)--?\w[\w-]*", options)
        found.update(dict.fromkeys(spellings, spellings[-1]))
    del found["-h"], found["--help"]
    return found


def pairs(options):
    return {frozenset(pair) for pair in itertools.combinations(set(options), 2)}


def refused(options):
    """The pairs of these options that are in REFUSED."""
    return pairs(options) & {
        frozenset((one, other))
        for one, others in REFUSED.items()
        for other in others.split()
    }


def test_no_pair_is_missing(name, tool):
    """A new option fails here until it is in the lines with all others, or refused with them."""
    names = long_names(tool)
    lines = [
        [word for word in line.split() if word.startswith("-")] for line in LINES[name]
    ]
    assert {word for line in lines for word in line} == set(names)
    together = [pairs(names[word] for word in line) for line in lines]
    every = pairs(names.values())
    assert every - set.union(*together) == refused(names.values())


def test_refused_pairs(name, tool):
    """By one line that names both, below the usage, before anything is done."""
    pairs_refused = refused(long_names(tool).values())
    assert len(pairs_refused) == {"tcpconnect": 13, "tcpaccept": 12}[name]
    for pair in map(sorted, pairs_refused):
        words = " ".join(pair).replace("--buffer-pages", "--buffer-pages 8").split()
        done = run(name, *words)
        assert (done.returncode, done.stdout) == (2, "")
        *usage, error = done.stderr.splitlines(keepends=True)
        assert tool.HELP.startswith("".join(usage) + "\n")
        assert error.startswith(f"{name}: error: ") and error.endswith("\n")
        assert all(option in error for option in pair)
