"""stdin, stdout and stderr that are closed or full."""

import subprocess

import pytest
from conftest import TOP


def shell(redirection, *options):
    """(status, stdout, stderr) of tcpconnect, started by a shell with a redirection."""
    script = f'exec /usr/bin/python3 "$@" {redirection}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", TOP / "tcpconnect", *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_stdout_closed():
    line = "tcpconnect: error: stdout is closed\n"
    assert shell(">&-") == (1, "", line)
    assert shell(">&-", "-h") == (1, "", line)
    assert shell(">&- 2>&-") == (1, "", "")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
def test_stderr_takes_nothing(redirection):
    """The status tells the same, and no message goes elsewhere."""
    assert shell(redirection, "--no-such-option") == (2, "", "")
    status, text, _ = shell(redirection, "-h")
    assert (status, text[:7]) == (0, "usage: ")


@pytest.mark.parametrize("option", ["-h", "-V"])
def test_what_exits_at_once_on_a_full_disk(option):
    line = "tcpconnect: error: cannot write: No space left on device\n"
    assert shell(">/dev/full", option) == (1, "", line)
