"""guest_results.py: what goes wrong in a guest goes red here."""

import json
import os
import subprocess
import sys

import pytest
from conftest import TOP

GOOD = [("test_a.py::test_good", "passed", "")]
BAD = [("test_a.py::test_bad", "failed", "the guest said why")]
SKIPPED = [("test_a.py::test_skip", "skipped", "no headers")]


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


@pytest.fixture
def report(tmp_path):
    """report({release: (status, tests or None)}, starts) gives pytest's exit status and
    output.
    """

    def run(guests, starts=1):
        for release, (status, tests) in guests.items():
            directory = tmp_path / "results" / release
            directory.mkdir(parents=True)
            (directory / "status").write_text(f"{status}\n")
            (directory / "log").write_text("test_a.py::test_good PASSED\n")
            for start in range(1, starts + 1):
                lines = [f"line {number} of {start}\r\n" for number in range(50)]
                (directory / f"console-{start}").write_text("".join(lines))
            if tests is not None:
                lines = [json.dumps(test) + "\n" for test in tests]
                (directory / "report").write_text("".join(lines))
        (tmp_path / "empty").mkdir()
        done = run_pytest(tmp_path, "--guest-results", tmp_path / "results", "empty")
        return done.returncode, done.stdout

    return run


def test_out_of_time(tmp_path):
    """What would begin too late is skipped, and says so."""
    (tmp_path / "test_a.py").write_text("def test_late(): pass\n")
    done = run_pytest(tmp_path, "-rs", "--seconds=0", "test_a.py")
    assert done.returncode == 0 and " 1 skipped " in done.stdout
    assert "OUT OF TIME: this machine is too slow for all tests" in done.stdout
    done = run_pytest(tmp_path, "--seconds=1000", "test_a.py")
    assert done.returncode == 0 and " 1 passed " in done.stdout


def test_good(report):
    status, said = report({"bookworm": (0, GOOD + SKIPPED)})
    assert status == 0 and "2 passed, 1 skipped" in said
    assert "bookworm::test_a::test_good PASSED" in said
    assert "SKIPPED (no headers)" in said and "started again" not in said


def test_failure(report):
    status, said = report({"bookworm": (1, GOOD + BAD)})
    assert status == 1 and "the guest said why" in said and "1 failed, 2 passed" in said


def test_guests_that_did_not_finish(report):
    ends = {
        "nothing": (0, None),
        "empty": (0, []),
        "unknown": (1, GOOD),
        "fault": (70, GOOD),
        "late": (124, GOOD),
        "died": (255, None),
    }
    status, said = report(ends)
    assert status == 1 and "6 failed, 3 passed" in said
    for name, (code, tests) in ends.items():
        assert f"{name}::finished FAILED" in said
        assert f"status {code} and reported {len(tests or [])} tests.\n" in said
    assert said.count("The end of log:\ntest_a.py::test_good PASSED\n") == 6
    assert said.count("The end of console-1:\nline 10 of 1\n") == 6
    assert said.count("line 49 of 1\n") == 6


def test_guest_that_died_and_was_started_again(report):
    status, said = report({"bookworm": (0, GOOD + BAD)}, starts=2)
    assert status == 1 and "bookworm::finished PASSED" in said
    assert "1 failed, 2 passed, 1 warning" in said
    assert "bookworm's guest died and was started again." in said
    assert "line 9 of 1\n" not in said and "line 49 of 1\n" in said
    assert "line 49 of 2\n" not in said


def test_guest_that_died_twice(report):
    status, said = report({"bookworm": (255, GOOD)}, starts=2)
    assert status == 1 and "bookworm::finished FAILED" in said
    assert "line 49 of 1\n" in said and "line 49 of 2\n" in said


DYING = """
import os
import pathlib

import pytest


@pytest.fixture
def setup():
    raise OSError("in setup")


@pytest.fixture
def teardown():
    yield
    raise OSError("in teardown")


def test_good():
    pass


def test_bad():
    raise OSError("in call")


def test_bad_setup(setup):
    pass


def test_bad_teardown(teardown):
    pass


@pytest.mark.skip("no headers")
def test_skipped():
    pass


def test_dies():
    if not pathlib.Path("died").exists():
        pathlib.Path("died").touch()
        os._exit(255)


def test_after():
    pass
"""


def test_report_of_a_guest_that_dies(tmp_path):
    """It has what finished before, and only the others run when it starts again."""
    directory, report = tmp_path / "tests", tmp_path / "results/report"
    directory.mkdir()
    report.parent.mkdir()
    (directory / "test_dying.py").write_text(DYING)
    ends = {  # of the tests and of what is said about them
        "good": ("passed", ""),
        "bad": ("failed", "OSError: in call"),
        "bad_setup": ("failed", "OSError: in setup"),
        "bad_teardown": ("failed", "OSError: in teardown"),
        "skipped": ("skipped", "Skipped: no headers"),
    }

    def check():
        lines = report.read_text().splitlines()
        found = [json.loads(line) for line in lines]
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


def test_packages_that_cannot_be_had(report):
    gone, good = (75, None), (0, GOOD)
    status, said = report({"a": good, "b": good, "c": good, "d": gone})
    assert status == 0 and "6 passed, 1 skipped" in said


def test_too_many_that_cannot_be_had(report):
    gone, good = (75, None), (0, GOOD)
    status, said = report({"a": good, "b": good, "c": gone, "d": gone})
    assert status == 1 and "2 failed" in said


def test_guests_on_newer_kernels_are_no_further_releases(report):
    gone, good = (75, None), (0, GOOD)
    on = {"a-on-b": good, "b-on-a": good, "a-on-d": gone}
    status, said = report({"a": good, "b": good, "c": gone, "d": gone, **on})
    assert status == 1 and "3 failed" in said
