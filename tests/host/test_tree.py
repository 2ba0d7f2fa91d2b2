"""What holds for the files as they are."""

import pathlib
import re
import subprocess
import sys

import pytest
from conftest import TOOLS, TOP, load

SHELL = (
    "tests/run",
    "tests/soak",
    "tests/vm",
    "tests/install",
    ".ci/run",
    "examples/demo",
)


def shared(name):
    text = (TOP / name).read_text()
    return text[
        text.index("# ---- shared") : text.index("# ---- end of what is shared")
    ]


def test_shared_block_is_the_same():
    assert shared("tcpconnect") == shared("tcpaccept")


def check(*command):
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, done.stdout)
    return done.stdout


def test_ruff():
    python = (*TOOLS, "examples/fleet/servicemap", "tests", "tests/bench")
    ruff = pathlib.Path(sys.prefix) / "bin/ruff"
    check(ruff, "check", "--no-cache", *python)
    check(ruff, "format", "--check", "--no-cache", *python)


def test_shellcheck():
    assert check("shellcheck", *SHELL, "examples/completion.bash") == ""


@pytest.mark.parametrize("name", TOOLS)
def test_man_page(name):
    page = f"man/man8/{name}.8"
    assert check("mandoc", "-T", "lint", "-W", "warning", page) == ""
    text = (TOP / page).read_text()
    sections = re.findall(r'^\.SH "?(.*?)"?$', text, re.MULTILINE)
    wanted = "NAME SYNOPSIS DESCRIPTION REQUIREMENTS OPTIONS EXAMPLES FIELDS JSON OVERHEAD CAVEATS,EXIT STATUS,SEE ALSO"
    order = [section for section in sections if section in wanted]
    assert order == wanted.replace(",EXIT STATUS,SEE ALSO", "").split() + [
        "EXIT STATUS",
        "SEE ALSO",
    ]
    for option in re.findall(r"-[a-zA-Z]\b|--[a-z]+", load(name).HELP):
        assert option.replace("-", "\\-") in text


def test_modes_and_top_level():
    for script in (*TOOLS, *SHELL, "examples/fleet/servicemap"):
        assert (TOP / script).stat().st_mode & 0o111 == 0o111
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files"],
        cwd=TOP,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    visible = {
        path.split("/")[0] for path in listed.splitlines() if not path.startswith(".")
    }
    assert visible == {*TOOLS, "man", "examples", "tests", "README.md", "LICENSE"}
