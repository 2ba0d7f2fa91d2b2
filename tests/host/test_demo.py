"""examples/demo: what it says before it boots anything, and how it pairs rows. No
guests: a stand-in for tests/vm.
"""

import re
import subprocess

import pytest
from conftest import TOP, with_stand_ins, write_script

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
            env=with_stand_ins(tmp_path, HOME="/home/somebody", XDG_CACHE_HOME=""),
        )

    return run


def test_help_downloads_nothing(demo, tmp_path):
    done = demo("--help", user=1000)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nUSAGE: sudo examples/demo\n" in done.stdout
    assert not (tmp_path / "vm").exists()


@pytest.mark.parametrize(
    ("arguments", "user", "status", "error"),
    [
        (["--halp"], 0, 2, "usage: sudo examples/demo\n"),
        (["bookworm"], 0, 2, "usage: sudo examples/demo\n"),
        ([], 1000, 1, "demo: needs root: try sudo {}/examples/demo\n"),
    ],
)
def test_refusals(demo, tmp_path, arguments, user, status, error):
    done = demo(*arguments, user=user)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == error.format(tmp_path)
    assert not (tmp_path / "vm").exists()


@pytest.mark.parametrize("status", [0, 75])
def test_guest(demo, tmp_path, status):
    """It says first what it takes. Where no guest can be had, it ends like that."""
    done = demo(status=status)
    assert (done.returncode, done.stderr) == (status, "")
    assert "sudo rm -r /home/somebody/.cache/tcptools\n" in done.stdout
    assert ("sudo ./tcpconnect" in done.stdout) == (status == 0)
    assert (tmp_path / "vm").read_text().splitlines() == [
        *("bookworm", "--ro", ".", "--"),
        "cd /mnt/ro && bash examples/demo --in-guest",
    ]


def test_rows_are_numbered(tmp_path):
    """The two ends of a connection have the same number."""
    source = (TOP / "examples/demo").read_text()
    function = re.search(r"(?ms)^show_table\(\) \{.*?^\}", source)[0]
    assert "/run/" in function
    function = function.replace("/run/", f"{tmp_path}/")

    for command, column, table, numbers in (
        ("tcpconnect -L", "LPORT", CONNECTS, "123"),
        ("tcpaccept -R", "RPORT", ACCEPTS, "21 "),
        ("tcpconnect -L -x", "LPORT", FAILED, "3"),
    ):
        (tmp_path / command).write_text(table)
        done = subprocess.run(
            ["bash", "-euc", f'{function}\nshow_table "$@"', "bash", command, column],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        titles, *rows = table.splitlines()
        numbered = [f"{number:>2}  {row}" for number, row in zip(numbers, rows)]
        lines = ["", f"    # {command}", f"    {titles}", *numbered, "", ""]
        assert done.stdout == "\n".join(lines)
