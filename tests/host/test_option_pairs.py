"""Each two options work together, or are refused together."""

import itertools

from conftest import load, option_names, parse
from test_arguments import usage_error

LINES = load("tests/guest/command_lines.py").LINES
EVENTS = "--dns --queue --failed --latency --min-ms --buffer-pages"
COUNT = "-c/--count cannot be combined with {other}"
BOTH = {
    "--ipv4": ("--ipv6", "argument {other}: not allowed with argument {one}"),
    **dict.fromkeys(("--count", "--interval", "--per-process"), (EVENTS, COUNT)),
}
PROCESS = "--pid --uid --name --cgroup --cgroupmap --mntnsmap --print-uid --unit"
DROPS = "-p, -u, -n, --cgroup, --cgroupmap, --mntnsmap, -U, --unit or --"
DROPS = "{one} cannot be combined with " + DROPS
REFUSED = {"tcpconnect": BOTH, "tcpaccept": {**BOTH, "--failed": (PROCESS, DROPS)}}


def traced_options(tool):
    """All but those that print something and exit, whatever else is given."""
    others = (["-h", "--help"], ["-V", "--version"])
    return [names for names in option_names(tool) if names not in others]


def long_names(tool):
    """{an option as -p or --pid: as --pid}."""
    return {one: names[-1] for names in traced_options(tool) for one in names}


def pairs(options):
    return {frozenset(pair) for pair in itertools.combinations(set(options), 2)}


def refusals(tool):
    """{pair of options, by their long names: the error that they are}."""
    named = {names[-1]: "/".join(names) for names in traced_options(tool)}
    return {
        frozenset((one, other)): error.format(one=named[one], other=named[other])
        for one, (others, error) in REFUSED[tool.NAME].items()
        for other in others.split()
        if other in named
    }


def test_no_pair_is_missing(name, tool):
    """A new option fails here until lines have it with all others, or it is refused."""
    names = long_names(tool)
    lines = [
        [word for word in line.split() if word.startswith("-")]
        for line in LINES[name] + LINES.get(f"{name} -x", [])
    ]
    assert {word for line in lines for word in line} == set(names)
    together = [pairs(names[word] for word in line) for line in lines]
    every = pairs(names.values())
    assert every - set.union(*together) == set(refusals(tool))


def test_refused_pairs(name, tool, capfd, monkeypatch, tmp_path):
    """One line names both."""
    monkeypatch.setattr(tool, "cgroup_mounts", lambda: [tmp_path])
    (tmp_path / "cgroup.controllers").touch()
    refused = refusals(tool)
    assert len(refused) == {"tcpconnect": 16, "tcpaccept": 18}[name]
    values = {"--buffer-pages": ["8"], "--interval": ["3"], "--min-ms": ["0"]}
    values.update({"--pid": ["7"], "--uid": ["0"], "--name": ["sshd"]})
    paths = ("--cgroup", "--cgroupmap", "--mntnsmap")
    values.update({one: [str(tmp_path)] for one in paths})
    for pair, error in refused.items():
        words = [word for one in sorted(pair) for word in (one, *values.get(one, ()))]
        assert usage_error(tool, capfd, *words) == error


VALUES = {"-p": "1", "-P": "80", "-a": "192.0.2.1", "-u": "0", "-n": "it", "-b": "8"}
VALUES.update({"-m": "0", "-i": "7", "--cgroupmap": "/", "--mntnsmap": "/"})


def test_the_command_and_options(name, tool, capfd):
    """Each but --cgroup; what a full queue drops is no process's. All behind the first
    -- is the command's.
    """
    words = ["true", "-p", "--", "--cgroup", "x"]
    refused = ["--unit", "--cgroup", *["-x"] * (name == "tcpaccept")]
    for one, *_ in traced_options(tool):
        option = [one, VALUES[one]] if one in VALUES else [one]
        if one not in refused:
            assert parse(tool, *option, "--", *words).command == words
    error = "argument --: expected a command, and no --cgroup"
    assert usage_error(tool, capfd, "--cgroup", "/", "--", *words) == error
    assert usage_error(tool, capfd, "-t", "--") == error
    if name == "tcpaccept":
        assert usage_error(tool, capfd, "-x", "--", *words).endswith("--unit or --")
