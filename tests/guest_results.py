"""pytest plugin: report what pytest found in the guests, as if it had run here.

--guest-results DIR names a folder with a folder RELEASE for each guest, which holds `status` (the exit status of
tests/vm), `report.xml` (pytest's JUnit report) and `log` (what it printed). Each test case in a report becomes a test
here, with the guest's own outcome, and `finished` is one more: it fails for a guest that did not come to its end with
tests and a good status.
"""

import pathlib
from xml.etree import ElementTree

import pytest

EX_TEMPFAIL = 75  # from tests/vm: the release's packages cannot be had
LAST_LINES = 30  # of the log of a guest that did not come to its end
FEWEST_RELEASES = 3  # when packages cannot be had, so many must remain


def pytest_addoption(parser):
    parser.addoption("--guest-results", type=pathlib.Path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session, config, items):
    folder = config.getoption("--guest-results")
    for guest in sorted(folder.iterdir()) if folder else []:
        collector = Guest.from_parent(session, name=guest.name, path=guest)
        items.extend(collector.collect())


def outcomes(guest):
    """{test name: its <testcase> element} of a guest's report; empty where there is none."""
    report = guest / "report.xml"
    try:
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": case for case in cases}
    except (OSError, ElementTree.ParseError):
        return {}


def available(folder):
    """How many of the releases asked for could be had."""
    return sum(
        (guest / "status").read_text() != f"{EX_TEMPFAIL}\n"
        for guest in folder.iterdir()
    )


class Guest(pytest.Collector):
    def collect(self):
        cases = outcomes(self.path)
        yield Finished.from_parent(self, name="finished", cases=cases)
        for name, case in cases.items():
            yield Outcome.from_parent(self, name=name, case=case)


class Finished(pytest.Item):
    def __init__(self, *, cases, **rest):
        super().__init__(**rest)
        self.cases = cases

    def runtest(self):
        status = int((self.parent.path / "status").read_text())
        folder = self.parent.path.parent
        if status == EX_TEMPFAIL and available(folder) >= min(
            FEWEST_RELEASES, len(list(folder.iterdir())) - 1
        ):
            pytest.skip("this release's packages cannot be had today")
        failed = any(
            case.find("failure") is not None or case.find("error") is not None
            for case in self.cases.values()
        )
        if not self.cases or status != (1 if failed else 0):
            log = (self.parent.path / "log").read_text(errors="replace").splitlines()
            last = [
                f"the guest ended with status {status} and reported {len(self.cases)} tests. It said at last:",
                *log[-LAST_LINES:],
            ]
            pytest.fail("\n".join(last), pytrace=False)

    def reportinfo(self):
        return self.parent.name, None, self.name


class Outcome(pytest.Item):
    def __init__(self, *, case, **rest):
        super().__init__(**rest)
        self.case = case

    def runtest(self):
        for problem in self.case:
            if problem.tag in ("failure", "error"):
                pytest.fail(problem.text or problem.get("message"), pytrace=False)
            if problem.tag == "skipped":
                pytest.skip(problem.get("message"))

    def reportinfo(self):
        return self.parent.name, None, self.name
