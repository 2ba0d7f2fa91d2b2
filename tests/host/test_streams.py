"""stdin, stdout and stderr that are closed or full."""

import subprocess

import pytest
from conftest import TOP


def shell(name, redirection, *options):
    """(status, stdout, stderr) of a tool that a shell starts with a redirection."""
    script = f'exec /usr/bin/python3 "$@" {redirection}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", TOP / name, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_stdout_closed(name):
    line = f"{name}: error: stdout is closed\n"
    assert shell(name, ">&-") == (1, "", line)
    assert shell(name, ">&-", "-h") == (1, "", line)
    assert shell(name, ">&- 2>&-") == (1, "", "")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_stderr_takes_nothing(name, redirection):
    """The status tells the same, and no message goes elsewhere."""
    assert shell(name, redirection, "--no-such-option") == (2, "", "")
    status, text, _ = shell(name, redirection, "-h")
    assert (status, text[:7]) == (0, "usage: ")


def test_stdin_closed(name):
    assert shell(name, "<&-", "-h") == shell(name, "", "-h")


@pytest.mark.parametrize("option", ["-h", "-V"])
def test_what_exits_at_once_on_a_full_disk(name, option):
    line = f"{name}: error: cannot write: No space left on device\n"
    assert shell(name, ">/dev/full", option) == (1, "", line)
