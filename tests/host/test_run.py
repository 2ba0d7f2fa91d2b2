"""tests/run: which tests it runs where, and when it is red. No guests: a stand-in for
tests/vm runs the guest's command here.
"""

import re
import subprocess
import sys

import pytest
from conftest import TOP, with_stand_ins, write_script

TESTS = """
def test_one(): pass

def test_other(): pass
"""
# Of what guests leave behind
AFTER_GUESTS = """
def test_quick(request): assert request.config.getoption("--guest-results")
"""
# Has DIR as /mnt/ro and /mnt/rw. A release in GONE cannot be downloaded.
VM = """#!/bin/bash
echo "$1" >>vms
[[ " $GONE " != *" $1 "* ]] || exit 75
while [ "$1" != -- ]; do
    case $1 in
    --ro) ro=$(readlink -f "$2") ;;
    --rw) rw=$2 ;;
    --console) echo "the console of start $(wc -l <vms)" >"$2" ;;
    esac
    shift
done
shift
command=${*//\\/mnt\\/ro/$ro}
exec sh -c "${command//\\/mnt\\/rw/$rw}"
"""


@pytest.fixture
def run(tmp_path):
    """run(arguments, the guests' tests, GONE) gives tests/run's status, output and
    guests.
    """
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    for path in ("bin/python", "bin/python3"):
        write_script(tmp_path / path, python)
    write_script(tmp_path / "tests/install", f"#!/bin/sh\necho {tmp_path}\n")
    write_script(tmp_path / "tests/vm", VM)
    write_script(tmp_path / "tests/run", (TOP / "tests/run").read_text())
    (tmp_path / "tests/guest_results.py").symlink_to(TOP / "tests/guest_results.py")

    def run(*arguments, tests=TESTS, gone=""):
        for room, text in {"host": TESTS, "fleet": TESTS, "guest": tests}.items():
            (tmp_path / "tests" / room).mkdir()
            (tmp_path / f"tests/{room}/test_{room}.py").write_text(text)
        for path in ("fleet/test_traced_hosts.py", "host/test_bench.py"):
            (tmp_path / "tests" / path).write_text(AFTER_GUESTS)
        done = subprocess.run(
            [tmp_path / "tests/run", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env=with_stand_ins(tmp_path, CI="", GONE=gone),
        )
        vms = tmp_path / "vms"
        guests = vms.read_text().split() if vms.exists() else []
        return done.returncode, done.stdout, guests

    return run


def test_quick(run):
    status, said, guests = run("--quick")
    assert (status, guests) == (0, []) and " 2 passed, 1 deselected in " in said
    assert "test_fleet" not in said


@pytest.mark.parametrize(
    "arguments, gone, status, summary",
    [
        # Two tests of each room, that each finished, and two after them
        (["trixie"], "", 0, " 11 passed in "),
        (["trixie"], "trixie", 1, " 1 failed, 8 passed in "),
        (["trixie", "--", "-x", "-k", "other or one"], "", 0, " 3 passed in "),
        (["trixie", "--", "tests/guest/test_guest.py::test_one"], "", 0, " 2 passed "),
        (["trixie", "--", "-k", "three"], "", 1, " 1 failed in "),  # none is selected
    ],
)
def test_release(run, arguments, gone, status, summary):
    found, said, guests = run(*arguments, gone=gone)
    assert (found, guests) == (status, ["trixie"])
    assert summary in said.splitlines()[-1]
    assert ("FAILED trixie::finished - " in said) == (status == 1)
    assert ("\ntrixie | tests/guest/" in said) == (status == 0)


DYING = """
import os, pathlib, pytest

@pytest.fixture
def teardown():
    yield
    raise OSError("in teardown")

def test_bad(): raise OSError("in call")
def test_bad_teardown(teardown): pass

@pytest.mark.skip("no headers")
def test_skipped(): pass

def test_dies():
    if not pathlib.Path("died").exists():
        pathlib.Path("died").touch()
        os._exit(255)

def test_after(): pass
"""


@pytest.mark.parametrize(
    "tests, finishes, summary",
    [
        (DYING, True, "2 failed, 3 passed, 1 skipped, 1 warning in "),
        (DYING.replace("touch", "exists"), False, "3 failed, 1 skipped in "),
    ],
)
def test_guest_that_dies(run, tests, finishes, summary):
    """It is started again, once, for the tests that it had not reported."""
    status, said, guests = run("sid", "--", "-v", tests=tests)
    assert (status, guests) == (1, ["sid", "sid"])
    assert summary in said.splitlines()[-1]
    assert said.count("\nsid | tests/guest/test_guest.py::test_bad FAILED") == 1
    for test, why in {"bad": "in call", "bad_teardown": "in teardown"}.items():
        assert f"\nFAILED sid::tests/guest/test_guest::test_{test} - " in said
        assert re.search(rf"^E +OSError: {why}$", said, re.MULTILINE)
    assert ": Skipped: no headers\n" in said
    assert ("FAILED sid::finished - " in said) != finishes
    assert ("sid's guest died and was started again." in said) == finishes
    assert "the console of start 1\n" in said
    assert ("the console of start 2\n" in said) != finishes


@pytest.mark.parametrize(
    "arguments", [["buster"], ["--quick", "sid"], ["--host", "--", "-x"], ["--all"]]
)
def test_usage(run, arguments):
    assert run(*arguments)[::2] == (2, [])
