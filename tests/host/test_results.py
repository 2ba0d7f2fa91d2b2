"""guest_results.py: what goes wrong in a guest goes red here."""

import os
import subprocess
import sys

import pytest
from conftest import TOP

GOOD = '<testcase classname="test_a" name="test_good"/>'
BAD = '<testcase classname="test_a" name="test_bad"><failure message="m">the guest said why</failure></testcase>'
SKIPPED = '<testcase classname="test_a" name="test_skip"><skipped message="no headers"/></testcase>'


@pytest.fixture
def report(tmp_path):
    """report({release: (status, testcases or None)}) gives pytest's exit status and output."""

    def run(guests):
        for release, (status, cases) in guests.items():
            folder = tmp_path / "results" / release
            folder.mkdir(parents=True)
            (folder / "status").write_text(f"{status}\n")
            (folder / "log").write_text("Oops\nKernel panic\n")
            if cases is not None:
                (folder / "report.xml").write_text(
                    f"<testsuites><testsuite>{cases}</testsuite></testsuites>"
                )
        (tmp_path / "empty").mkdir()
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-v",
                "-p",
                "guest_results",
                "--guest-results",
                tmp_path / "results",
                "empty",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(TOP / "tests")},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    return run


def test_good(report):
    status, said = report({"bookworm": (0, GOOD + SKIPPED)})
    assert status == 0 and "2 passed, 1 skipped" in said
    assert "bookworm::test_a::test_good PASSED" in said


def test_failure(report):
    status, said = report({"bookworm": (1, GOOD + BAD)})
    assert status == 1 and "the guest said why" in said and "1 failed, 2 passed" in said


@pytest.mark.parametrize(
    "guest", [(0, None), (0, ""), (1, GOOD), (124, GOOD), (255, None)]
)
def test_guest_that_did_not_finish(report, guest):
    status, said = report({"bookworm": guest})
    assert status == 1 and "the guest ended with status" in said
    assert "Oops\nKernel panic\n" in said


def test_packages_that_cannot_be_had(report):
    gone, good = (75, None), (0, GOOD)
    status, said = report({"a": good, "b": good, "c": good, "d": gone})
    assert status == 0 and "6 passed, 1 skipped" in said


def test_too_many_that_cannot_be_had(report):
    gone, good = (75, None), (0, GOOD)
    status, said = report({"a": good, "b": good, "c": gone, "d": gone})
    assert status == 1 and "2 failed" in said
