"""pytest plugin: report what pytest found in the guests, as if it had run here.

In a guest, --report-to=FILE names the file that gets a line for each test as soon as it
has finished, so that it is not lost when the guest dies. Tests that are in it already
do not run: the guest may be started again for the others. (Without the = pytest takes
a FILE that exists for one of its tests, and gives them all other names.) A test that
would begin later than --seconds after the start is skipped, and the reason says so.

On the host, --guest-results DIR names a directory with a directory RELEASE for each
guest, which holds `status` (the exit status of tests/vm), `report` (that file), `log`
(what was printed) and, for each start, `console-N` (its kernel's warnings). Each test
in a report becomes a test here, with the guest's own outcome, and `finished` is one
more: it fails for a guest that did not finish with tests and a good status.
"""

import json
import pathlib
import time
import warnings

import pytest

EX_TEMPFAIL = 75  # from tests/vm: the release's packages cannot be had
LAST_LINES = 30  # of the log of a guest that did not finish
LAST_CONSOLE_LINES = 40  # and of each console
FEWEST_RELEASES = 3  # when packages cannot be had, so many must remain


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
    for guest in sorted(directory.iterdir()) if directory else []:
        collector = Guest.from_parent(session, name=guest.name, path=guest)
        items.extend(collector.collect())


class Clock:
    """Skips what comes too late."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        if time.monotonic() > self.end:
            pytest.skip("OUT OF TIME: this machine is too slow for all tests")


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


def releases(directory):
    """The guests with their release's own kernel, one per release."""
    return [guest for guest in directory.iterdir() if "-on-" not in guest.name]


def available(directory):
    """How many of the releases asked for could be had."""
    return sum(
        (guest / "status").read_text() != f"{EX_TEMPFAIL}\n"
        for guest in releases(directory)
    )


class Guest(pytest.Collector):
    def collect(self):
        cases = outcomes(self.path / "report")
        yield Finished.from_parent(self, name="finished", cases=cases)
        for name, case in cases.items():
            name = name.replace(".py::", "::", 1)  # as pytest shows other dots
            yield Outcome.from_parent(self, name=name, case=case)


class Finished(pytest.Item):
    def __init__(self, *, cases, **rest):
        super().__init__(**rest)
        self.cases = cases

    def runtest(self):
        guest = self.parent.path
        status = int((guest / "status").read_text())
        if status == EX_TEMPFAIL and available(guest.parent) >= min(
            FEWEST_RELEASES, len(releases(guest.parent)) - 1
        ):
            pytest.skip("this release's packages cannot be had today")
        failed = any(outcome == "failed" for outcome, _ in self.cases.values())
        consoles = [
            last_lines(console, LAST_CONSOLE_LINES)
            for console in sorted(guest.glob("console-*"))
        ]
        if not self.cases or status not in ((0, 1) if failed else (0,)):
            what = (
                f"the guest exited with status {status} and reported "
                f"{len(self.cases)} tests."
            )
            log = last_lines(guest / "log", LAST_LINES)
            pytest.fail("\n".join([what, log, *consoles]), pytrace=False)
        if len(consoles) > 1:
            what = f"{guest.name}'s guest died and was started again."
            warnings.warn("\n".join([what, consoles[0]]), stacklevel=1)

    def reportinfo(self):
        return self.parent.name, None, self.name


class Outcome(pytest.Item):
    def __init__(self, *, case, **rest):
        super().__init__(**rest)
        self.outcome, self.text = case

    def runtest(self):
        if self.outcome == "failed":
            pytest.fail(self.text, pytrace=False)
        if self.outcome == "skipped":
            pytest.skip(self.text)

    def reportinfo(self):
        return self.parent.name, None, self.name
