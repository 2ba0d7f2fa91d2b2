"""examples/demo: what it says before it boots anything, and how it pairs rows. No
guests: a stand-in for tests/vm.
"""

import os
import re
import subprocess

import pytest
from conftest import TOP

CONNECTS = """\
PID     COMM         IP SADDR            LPORT  DADDR            DPORT
569     telnet       4  192.0.2.10       48636  192.0.2.20       23
570     curl         4  192.0.2.10       43200  192.0.2.20       80
578     curl         4  192.0.2.10       38464  192.0.2.20       81
"""
ACCEPTS = """\
PID     COMM         IP RADDR            RPORT  LADDR            LPORT
282     python3      4  192.0.2.10       43200  192.0.2.20       80
283     perl         4  192.0.2.10       48636  192.0.2.20       23
300     python3      4  192.0.2.99       81     192.0.2.20       80
"""
FAILED = """\
PID     COMM         IP SADDR            LPORT  DADDR            DPORT ERR
578     curl         4  192.0.2.10       38464  192.0.2.20       81    ECONNREFUSED
"""


def write_script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def demo(tmp_path):
    """demo(arguments, user, status): a finished run where tests/vm writes its arguments
    into the file "vm", and exits with that status.
    """
    write_script(tmp_path / "examples/demo", (TOP / "examples/demo").read_text())

    def run(*arguments, user=0, status=0):
        vm = f"printf '%s\\n' \"$@\" >{tmp_path}/vm; exit {status}"
        write_script(tmp_path / "tests/vm", f"#!/bin/sh\n{vm}\n")
        write_script(tmp_path / "bin/id", f"#!/bin/sh\necho {user}\n")
        return subprocess.run(
            [tmp_path / "examples/demo", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={
                "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
                "HOME": "/home/somebody",
            },
        )

    return run


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(demo, tmp_path, option):
    done = demo(option, user=1000)
    assert (done.returncode, done.stderr) == (0, "")
    for text in (
        "\nUSAGE: sudo examples/demo\n",
        "downloads about 250 MB",
        "~/.cache/tcptools",
        "sudo rm -r ",
        "TCPTOOLS_ACCEL",
    ):
        assert text in done.stdout
    assert not (tmp_path / "vm").exists()


@pytest.mark.parametrize(
    "arguments", [["--halp"], ["bookworm"], ["--help", "x"], ["x"]]
)
def test_unknown_argument(demo, tmp_path, arguments):
    done = demo(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: sudo examples/demo\n"
    assert not (tmp_path / "vm").exists()


def test_needs_root(demo, tmp_path):
    done = demo(user=1000)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"demo: needs root: try sudo {tmp_path}/examples/demo\n"
    assert not (tmp_path / "vm").exists()


def test_says_what_it_takes(demo, tmp_path):
    done = demo()
    assert (done.returncode, done.stderr) == (0, "")
    assert "downloads about 250 MB" in done.stdout
    assert "(1.3 GB) in\ndemo:     /home/somebody/.cache/tcptools\n" in done.stdout
    assert "sudo rm -r /home/somebody/.cache/tcptools\n" in done.stdout
    assert (tmp_path / "vm").read_text().splitlines() == [
        *("bookworm", "--ro", ".", "--"),
        "cd /mnt/ro && bash examples/demo --in-guest",
    ]


@pytest.mark.parametrize("status", [70, 75, 255])
def test_no_guest(demo, status):
    done = demo(status=status)
    assert done.returncode == status
    assert "sudo ./tcpconnect" not in done.stdout


def test_rows_are_numbered(tmp_path):
    """The two ends of a connection have the same number."""
    source = (TOP / "examples/demo").read_text()
    function = re.search(r"(?ms)^show_table\(\) \{.*?^\}", source)[0]
    assert "/run/" in function
    function = function.replace("/run/", f"{tmp_path}/")

    def shown(command, column, table):
        (tmp_path / command).write_text(table)
        return subprocess.run(
            ["bash", "-euc", f'{function}\nshow_table "$@"', "bash", command, column],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def numbered(command, table, numbers):
        lines = zip(["  ", *numbers], table.splitlines())
        text = "\n".join(f"{number:>2}  {line}" for number, line in lines)
        return f"\n    # {command}\n{text}\n\n"

    for command, column, table, numbers in (
        ("tcpconnect -L", "LPORT", CONNECTS, "123"),
        ("tcpaccept -R", "RPORT", ACCEPTS, "21 "),
        ("tcpconnect -L -x", "LPORT", FAILED, "3"),
    ):
        assert shown(command, column, table) == numbered(command, table, numbers)
