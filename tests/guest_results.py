"""pytest plugin: report what several runs of pytest found, as if it were one run.

In each run, --report-to=FILE names the file that gets a line for each test as soon as
it has finished, so that it is not lost when a guest dies. Tests that are in it already
do not run: the guest may be started again for the others. (Without the = pytest takes
a FILE that exists for one of its tests, and gives them all other names.) A test that
would begin later than --seconds after the start is skipped, and the reason says so; one
that is marked `first` fails.

In the end, --guest-results DIR names a directory with a directory for each run: host,
fleet, or RELEASE for a guest. It holds `status` (the exit status of pytest or
tests/vm), `report` (that file), `log` (what was printed) and, for each start of a
guest, `console-N` (its kernel's warnings). Each test in a report becomes a test here,
with the same outcome, and `finished` is one more: it fails for a run that did not
finish with tests and a good status, or skipped too many for want of time.
"""

import json
import pathlib
import time
import warnings

import pytest

EX_TEMPFAIL = 75  # from tests/vm: the release's packages cannot be downloaded
LAST_LINES = 30  # of the log of a guest that did not finish
LAST_CONSOLE_LINES = 40  # and of each console
FEWEST_RELEASES = 3  # where packages cannot be downloaded, so many must remain
HOST = ("host", "fleet")  # the runs that are no guests
LATE = "OUT OF TIME"
MOST_LATE = 1 / 4  # of the tests of a run


def pytest_addoption(parser):
    parser.addoption("--report-to", type=pathlib.Path)
    parser.addoption("--seconds", type=int)
    parser.addoption("--guest-results", type=pathlib.Path)


def pytest_configure(config):
    if config.getoption("--report-to"):
        config.pluginmanager.register(Reporter(config.getoption("--report-to")))
    if config.getoption("--seconds") is not None:
        config.pluginmanager.register(Clock(config.getoption("--seconds")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session, config, items):
    directory = config.getoption("--guest-results")
    for run in sorted(directory.iterdir()) if directory else []:
        cases = outcomes(run / "report")
        for name, case in {"finished": finished(run, cases), **cases}.items():
            name = f"{run.name}::{name}".replace(".py::", "::")  # pytest shows dots
            items.append(
                Outcome.from_parent(session, name=name, nodeid=name, case=case)
            )


class Clock:
    """What comes too late is skipped, or fails where it says most."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        if time.monotonic() > self.end:
            if item.get_closest_marker("first"):
                pytest.fail(f"{LATE}: one of the first tests", pytrace=False)
            pytest.skip(f"{LATE}: this machine is too slow for all tests")


class Reporter:
    def __init__(self, path):
        self.path = path
        self.found = None

    def pytest_collection_modifyitems(self, config, items):
        reported = outcomes(self.path)
        finished = [item for item in items if item.nodeid in reported]
        items[:] = [item for item in items if item not in finished]
        config.hook.pytest_deselected(items=finished)

    def pytest_runtest_logreport(self, report):
        """For setup, call (unless setup failed or skipped) and teardown: the first that
        has something to say is the test's outcome.
        """
        if report.outcome != "passed" and not self.found:
            self.found = report.outcome, explanation(report)
        if report.when == "teardown":
            outcome, text = self.found or ("passed", "")
            with self.path.open("a") as file:
                print(json.dumps([report.nodeid, outcome, text]), file=file)
            self.found = None


def explanation(report):
    """The traceback of a failure, or why a test was skipped."""
    if report.outcome == "skipped":
        return report.longrepr[2]  # of its file, line and reason
    return report.longreprtext


def outcomes(path):
    """{test name: (outcome, explanation)} of a report, which may be missing."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {name: (outcome, text) for name, outcome, text in map(json.loads, lines)}


def last_lines(path, count):
    """The end of a file, under its name."""
    lines = path.read_text(errors="replace").splitlines()
    return "\n".join([f"The end of {path.name}:", *lines[-count:]])


def available(directory):
    """How many releases have a guest with their own kernel, or had one."""
    return sum(
        (guest / "status").read_text() != f"{EX_TEMPFAIL}\n"
        for guest in directory.iterdir()
        if guest.name not in HOST and "-on-" not in guest.name
    )


def finished(run, cases):
    """(outcome, explanation) of a run as a whole."""
    status = int((run / "status").read_text())
    if status == EX_TEMPFAIL and available(run.parent) >= FEWEST_RELEASES:
        return "skipped", "this release's packages cannot be downloaded today"
    consoles = [
        last_lines(console, LAST_CONSOLE_LINES)
        for console in sorted(run.glob("console-*"))
    ]
    if complaint := complaint_about(status, cases):
        log = last_lines(run / "log", LAST_LINES)
        return "failed", "\n".join([complaint, log, *consoles])
    if len(consoles) > 1:
        died = f"{run.name}'s guest died and was started again."
        return "passed", f"{died}\n{consoles[0]}"
    return "passed", ""


def complaint_about(status, cases):
    """Why this is no finished run, or None."""
    outcomes = [outcome for outcome, _ in cases.values()]
    good = (0, 1) if "failed" in outcomes else (0,)
    if not outcomes or status not in good:
        return f"It exited with status {status} and reported {len(outcomes)} tests."
    if set(outcomes) == {"skipped"}:
        return f"It skipped all of {len(outcomes)} tests."
    late = sum(LATE in text for _, text in cases.values())
    if late > MOST_LATE * len(outcomes):
        return f"{LATE}: {late} of {len(outcomes)} tests did not run."
    return None


class Outcome(pytest.Item):
    """A test here for one that ran elsewhere. What passed may say something, too."""

    def __init__(self, *, case, **rest):
        super().__init__(**rest)
        self.outcome, self.text = case

    def runtest(self):
        if self.outcome == "failed":
            pytest.fail(self.text, pytrace=False)
        if self.outcome == "skipped":
            pytest.skip(self.text)
        if self.text:
            warnings.warn(self.text, stacklevel=1)

    def reportinfo(self):
        return self.name, None, self.name
