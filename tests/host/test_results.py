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
    return subprocess.run(
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


def cases(**counts):
    """Lines of a report: so many tests with each outcome."""
    texts = {"passed": "", "failed": "the guest said why", "skipped": "no headers"}
    return [
        [f"test_a.py::test_{kind}_{n}", "skipped" if kind == "late" else kind, text]
        for kind, text in {**texts, "late": LATE}.items()
        for n in range(counts.get(kind, 0))
    ]


@pytest.fixture
def report(tmp_path):
    """report({run: (status, tests)}, starts) gives pytest's exit status and output."""

    def run(guests, starts=1):
        for name, (status, reported) in guests.items():
            directory = tmp_path / "results" / name
            directory.mkdir(parents=True)
            (directory / "status").write_text(f"{status}\n")
            (directory / "log").write_text(LOG)
            for start in range(1, starts + 1):
                lines = [f"line {number} of {start}\r\n" for number in range(50)]
                (directory / f"console-{start}").write_text("".join(lines))
            if reported is not None:
                lines = [json.dumps(test) + "\n" for test in reported]
                (directory / "report").write_text("".join(lines))
        (tmp_path / "empty").mkdir()
        done = run_pytest(tmp_path, "--guest-results", tmp_path / "results", "empty")
        return done.returncode, done.stdout

    return run


def test_outcomes(report):
    good = (0, cases(passed=3, skipped=2, late=1))
    status, said = report({"sid": good, "trixie": (1, cases(passed=3, failed=1))})
    assert status == 1 and "1 failed, 8 passed, 3 skipped" in said
    assert "sid::test_a::test_passed_0 PASSED" in said and "the guest said why" in said
    assert "SKIPPED (no headers)" in said and "started again" not in said


def test_guests_that_did_not_finish(report):
    ends = {
        "nothing": (0, None, "status 0 and reported 0 tests"),
        "empty": (0, [], "status 0 and reported 0 tests"),
        "none": (5, [], "status 5 and reported 0 tests"),  # pytest's: none is selected
        "unknown": (1, cases(passed=1), "status 1 and reported 1 tests"),
        "fault": (70, cases(passed=1), "status 70 and reported 1 tests"),
        "slow": (124, cases(passed=1), "status 124 and reported 1 tests"),
        "died": (255, None, "status 255 and reported 0 tests"),
        "skipped": (0, cases(skipped=9), "skipped all of 9 tests"),
        "late": (0, cases(late=9), "skipped all of 9 tests"),
        "some": (0, cases(passed=3, skipped=2, late=2), "OUT OF TIME: 2 of 7 tests"),
    }
    status, said = report({name: end[:2] for name, end in ends.items()})
    assert status == 1 and "10 failed, " in said
    for name, (_, _, why) in ends.items():
        assert f"{name}::finished FAILED" in said and why in said
    assert said.count(f"The end of log:\n{LOG}") == len(ends)
    assert said.count("The end of console-1:\nline 10 of 1\n") == len(ends)
    assert said.count("line 49 of 1\n") == len(ends)


@pytest.mark.parametrize(
    "code, reported, finished",
    [(0, cases(passed=1, failed=1), "PASSED"), (255, cases(passed=1), "FAILED")],
)
def test_guest_that_was_started_again(report, code, reported, finished):
    """What its first kernel said is shown; that of the second only if it died, too."""
    status, said = report({"bookworm": (code, reported)}, starts=2)
    assert status == 1 and f"bookworm::finished {finished}" in said
    assert ("bookworm's guest died and was started again." in said) == (code == 0)
    assert "line 9 of 1\n" not in said and "line 49 of 1\n" in said
    assert ("line 49 of 2\n" in said) == (code == 255)


@pytest.mark.parametrize(
    "good, gone, finished",
    [
        ("abc", "d", "6 passed, 1 skipped"),
        ("ab", "cd", "2 failed"),
        ("a", "d", "1 failed"),  # those asked for must be there
        (["a", "b", "a-on-b", "b-on-a", "host", "fleet"], ["c", "d"], "2 failed"),
        ("abc", ["d", "a-on-d"], "6 passed, 2 skipped"),
    ],
)
def test_packages_that_cannot_be_downloaded(report, good, gone, finished):
    guests = {name: (0, cases(passed=1)) for name in good}
    status, said = report({**guests, **{name: (75, None) for name in gone}})
    assert (status == 1) == ("failed" in finished) and finished in said


CLOCK = """
import pytest

def test_late(): pass

@pytest.mark.first
def test_first(): pass
"""


def test_out_of_time(tmp_path):
    """What would begin too late is skipped, and says so; what says most fails."""
    (tmp_path / "test_a.py").write_text(CLOCK)
    done = run_pytest(tmp_path, "-rs", "--seconds=0", "test_a.py")
    assert done.returncode == 1 and " 1 skipped, " in done.stdout
    assert LATE.partition(" ")[2] in done.stdout
    assert "OUT OF TIME: one of the first tests" in done.stdout
    done = run_pytest(tmp_path, "--seconds=1000", "test_a.py")
    assert done.returncode == 0 and " 2 passed" in done.stdout


DYING = """
import os, pathlib, pytest

@pytest.fixture
def setup():
    raise OSError("in setup")

@pytest.fixture
def teardown():
    yield
    raise OSError("in teardown")

def test_good(): pass
def test_bad(): raise OSError("in call")
def test_bad_setup(setup): pass
def test_bad_teardown(teardown): pass

@pytest.mark.skip("no headers")
def test_skipped(): pass

def test_dies():
    if not pathlib.Path("died").exists():
        pathlib.Path("died").touch()
        os._exit(255)

def test_after(): pass
"""


def test_report_of_a_guest_that_dies(tmp_path):
    """It has what finished before, and only the others run when it starts again."""
    directory, report = tmp_path / "tests", tmp_path / "report"
    directory.mkdir()
    (directory / "test_dying.py").write_text(DYING)
    ends = {  # of the tests and of what is said about them
        "good": ("passed", ""),
        "bad": ("failed", "OSError: in call"),
        "bad_setup": ("failed", "OSError: in setup"),
        "bad_teardown": ("failed", "OSError: in teardown"),
        "skipped": ("skipped", "Skipped: no headers"),
    }

    def check():
        found = [json.loads(line) for line in report.read_text().splitlines()]
        assert [name for name, _, _ in found] == [
            f"test_dying.py::test_{name}" for name in ends
        ]
        for (_, outcome, text), (expected, words) in zip(found, ends.values()):
            assert outcome == expected and words in text

    assert run_pytest(directory, f"--report-to={report}").returncode == 255
    check()
    again = run_pytest(directory, f"--report-to={report}")
    assert again.returncode == 0 and "2 passed, 5 deselected in" in again.stdout
    ends |= {"dies": ("passed", ""), "after": ("passed", "")}
    check()
