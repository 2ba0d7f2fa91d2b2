"""Each two options work together, or are refused together."""

import itertools
import re

from conftest import help_of, load, run
from test_arguments import only_error

LINES = load("tests/guest/pairs.py").LINES  # run by tests/guest/test_pairs.py
EVENTS = "--dns --queue --failed --latency --min-ms --json --buffer-pages"
COUNT = "-c/--count cannot be combined with {other}"
REFUSED = {
    "--ipv4": ("--ipv6", "argument {other}: not allowed with argument {one}"),
    **dict.fromkeys(("--count", "--interval", "--per-process"), (EVENTS, COUNT)),
}


def option_names(tool):
    """All options in the help, each as a list of its names: -p, --pid.

    But not those that print something and exit, whatever else is given.
    """
    lines = re.findall(r"^  (-.+?)(?:  |$)", help_of(tool), re.MULTILINE)
    names = [re.findall(r"(?<!\S)--?\w[\w-]*", line) for line in lines]
    return [of_one for of_one in names if of_one[-1] not in ("--help", "--version")]


def long_names(tool):
    """{an option as -p or --pid: as --pid}."""
    return {one: names[-1] for names in option_names(tool) for one in names}


def pairs(options):
    return {frozenset(pair) for pair in itertools.combinations(set(options), 2)}


def refusals(tool):
    """{pair of options, by their long names: the error that they are}."""
    named = {names[-1]: "/".join(names) for names in option_names(tool)}
    return {
        frozenset((one, other)): error.format(one=named[one], other=named[other])
        for one, (others, error) in REFUSED.items()
        for other in others.split()
        if other in named
    }


def test_no_pair_is_missing(name, tool):
    """A new option fails here until lines have it with all others, or it is refused."""
    names = long_names(tool)
    lines = [
        [word for word in line.split() if word.startswith("-")] for line in LINES[name]
    ]
    assert {word for line in lines for word in line} == set(names)
    together = [pairs(names[word] for word in line) for line in lines]
    every = pairs(names.values())
    assert every - set.union(*together) == set(refusals(tool))


def test_refused_pairs(name, tool):
    """One line names both, below the usage, before anything is done."""
    refused = refusals(tool)
    assert len(refused) == {"tcpconnect": 19, "tcpaccept": 10}[name]
    for pair, error in refused.items():
        words = " ".join(sorted(pair))
        words = words.replace("--buffer-pages", "--buffer-pages 8")
        words = words.replace("--interval", "--interval 3")
        words = words.replace("--min-ms", "--min-ms 0").split()
        done = run(name, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert only_error(name, done.stderr) == error
