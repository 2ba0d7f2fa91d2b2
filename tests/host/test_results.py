"""guest_results.py: what goes wrong in a guest goes red here, and so does one that
tested nothing.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import TOP

LOG = "test_a.py::test_good PASSED\n"
LATE = "Skipped: OUT OF TIME: this machine is too slow for all tests"


def run_pytest(directory, *args):
    """(exit status, what it prints) of pytest with guest_results."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "guest_results", *args],
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": str(TOP / "tests"),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "CI": "",  # with it, pytest says each failure whole a second time
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def report(directory, guests):
    """What is reported of {run: (status, its tests' outcomes)}."""
    for name, (status, kinds) in guests.items():
        run = directory / "results" / name
        run.mkdir(parents=True)
        (run / "status").write_text(f"{status}\n")
        (run / "log").write_text(LOG)
        (run / "console-1").write_text("".join(f"line {n}\r\n" for n in range(50)))
        texts = {"skipped": "no headers", "late": LATE}
        for n, kind in enumerate(kinds.split()):
            outcome = "skipped" if kind == "late" else kind
            test = [f"test_a.py::test_{n}", outcome, texts.get(kind, "")]
            with (run / "report").open("a") as file:
                print(json.dumps(test), file=file)
    (directory / "empty").mkdir()
    return run_pytest(directory, "--guest-results", directory / "results", "empty")


def test_finished(tmp_path):
    """A run finished with a good status and enough tests, or it is red and says why."""
    one = "status {} and reported 1 tests"
    ends = {
        "nothing": (0, "", "status 0 and reported 0 tests"),
        "none": (5, "", "status 5 and reported 0 tests"),  # pytest's: none is selected
        "unknown": (1, "passed", one.format(1)),
        "fault": (70, "passed failed", "status 70 and reported 2 tests"),
        "slow": (124, "passed", one.format(124)),
        "died": (255, "passed", one.format(255)),
        "skipped": (0, "skipped " * 9, "skipped all of 9 tests"),
        "late": (0, "passed passed skipped late", ""),
        "later": (0, "passed passed late", "OUT OF TIME: 1 of 3 tests"),
        "bad": (1, "passed failed", ""),
    }
    status, said = report(tmp_path, {name: end[:2] for name, end in ends.items()})
    assert status == 1
    for name, (_, _, why) in ends.items():
        assert f"{name}::finished {'FAILED' if why else 'PASSED'}" in said
        assert why in said
    red = sum(bool(why) for _, _, why in ends.values())
    assert said.count(f"The end of log:\n{LOG}") == red
    assert said.count("The end of console-1:\nline 10\n") == red
    assert said.count("line 49\n") == red


@pytest.mark.parametrize(
    "good, gone, summary",
    [
        ("trixie sid bookworm", "bullseye bullseye-on-sid", "6 passed, 2 skipped"),
        # Three releases must be there, and these are none
        ("trixie sid bullseye-on-trixie host fleet", "bookworm bullseye", "2 failed"),
    ],
)
def test_packages_that_cannot_be_downloaded(tmp_path, good, gone, summary):
    guests = {name: (0, "passed") for name in good.split()}
    gone = {name: (75, "") for name in gone.split()}
    status, said = report(tmp_path, {**guests, **gone})
    assert (status == 1) == ("failed" in summary) and summary in said


CLOCK = """
import pytest

def test_late(): pass

@pytest.mark.first
def test_first(): pass
"""


def test_out_of_time(tmp_path):
    """What would begin too late is skipped, and says so; what says most fails."""
    (tmp_path / "test_a.py").write_text(CLOCK)
    status, said = run_pytest(tmp_path, "-rs", "--seconds=0", "test_a.py")
    assert status == 1 and " 1 skipped, " in said
    assert LATE.partition(" ")[2] in said
    assert "OUT OF TIME: one of the first tests" in said
    status, said = run_pytest(tmp_path, "--seconds=1000", "test_a.py")
    assert status == 0 and " 2 passed" in said
