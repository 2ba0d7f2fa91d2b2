"""tests/run: which tests it runs where, and when it is red. No guests: a stand-in for
tests/vm runs the guest's command here.
"""

import os
import subprocess
import sys

import pytest
from conftest import TOP

TESTS = """
def test_one(): pass

def test_other(): assert {good}
"""
# Has DIR as /mnt/ro and /mnt/rw. A release in GONE cannot be downloaded.
VM = """#!/bin/bash
echo "$1" >>vms
[[ " $GONE " != *" $1 "* ]] || exit 75
while [ "$1" != -- ]; do
    case $1 in --ro) ro=$(readlink -f "$2") ;; --rw) rw=$2 ;; esac
    shift
done
shift
command=${*//\\/mnt\\/ro/$ro}
exec sh -c "${command//\\/mnt\\/rw/$rw}"
"""


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def run(tmp_path):
    """run(arguments, good, GONE) gives tests/run's status, lines and guests, where the
    second test of tests/guest is good or not.
    """
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for path in ("bin/python", "bin/python3"):
        write_script(tmp_path / path, python)
    write_script(tmp_path / "tests/install", f"#!/bin/sh\necho {tmp_path}\n")
    write_script(tmp_path / "tests/vm", VM)
    write_script(tmp_path / "tests/run", (TOP / "tests/run").read_text())
    (tmp_path / "tests/guest_results.py").symlink_to(TOP / "tests/guest_results.py")

    def run(*arguments, good=True, **environment):
        for room in ("host", "fleet", "guest"):
            text = TESTS.format(good=good or room != "guest")
            (tmp_path / "tests" / room).mkdir()
            (tmp_path / f"tests/{room}/test_{room}.py").write_text(text)
        done = subprocess.run(
            [tmp_path / "tests/run", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
            | {"CI": "", "GONE": "", **environment},
        )
        vms = tmp_path / "vms"
        guests = vms.read_text().split() if vms.exists() else []
        return done.returncode, done.stdout.splitlines(), sorted(guests)

    return run


def test_quick(run):
    status, lines, guests = run("--quick")
    assert (status, guests) == (0, []) and " 2 passed in " in lines[-1]
    assert not any("test_fleet" in line for line in lines)


def test_release(run):
    """Two tests of each room, and that each finished."""
    status, lines, guests = run("trixie", good=False)
    assert (status, guests) == (1, ["trixie"])
    assert " 1 failed, 8 passed in " in lines[-1]
    assert any(line.startswith("trixie | tests/guest/") for line in lines)


def test_release_that_cannot_be_downloaded(run):
    status, lines, guests = run("bookworm", GONE="bookworm")
    assert (status, guests) == (1, ["bookworm"])
    assert " 1 failed, 6 passed in " in lines[-1]


@pytest.mark.parametrize(
    "arguments, status, summary",
    [
        (["-x", "-k", "other or one"], 0, " 3 passed in "),
        (["tests/guest/test_guest.py::test_one"], 0, " 2 passed in "),
        (["-k", "three"], 1, " 1 failed in "),  # none is selected
    ],
)
def test_selected(run, arguments, status, summary):
    found, lines, guests = run("sid", "--", *arguments)
    assert (found, guests) == (status, ["sid"]) and summary in lines[-1]


@pytest.mark.parametrize(
    "arguments", [["buster"], ["--quick", "sid"], ["--host", "--", "-x"], ["--all"]]
)
def test_usage(run, arguments):
    assert run(*arguments)[::2] == (2, [])
