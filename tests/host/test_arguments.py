import argparse
import os

import pytest
from conftest import TOP, run
from hypothesis import given, settings
from hypothesis import strategies as st

HELP = """\
usage: {name} [-h] [-t] [-p PID]

Trace TCP {what}s

optional arguments:
  -h, --help            show this help message and exit
  -t, --timestamp       include timestamp on output
  -p PID, --pid PID     trace this PID only

examples:
    ./{name}           # trace all TCP {what}()s
    ./{name} -t        # include timestamps
    ./{name} -p 181    # only trace PID 181
"""


@pytest.fixture
def no_bcc(tmp_path):
    """An environment in which importing bcc fails loudly."""
    (tmp_path / "bcc.py").write_text("raise ImportError('bcc was imported')\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_the_seeds(name, no_bcc, option):
    done = run(name, option, env=no_bcc)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        HELP.format(name=name, what=name[3:]),
        "",
    )


def test_help_is_the_example_files_usage(name):
    text = (TOP / "examples" / f"{name}_example.txt").read_text()
    assert text.endswith(
        f"USAGE message:\n\n# ./{name} -h\n{HELP.format(name=name, what=name[3:])}"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["-p", value]
        for value in (
            "abc",
            "-1",
            "0",
            "4194305",
            "99999999999",
            "1; x",
            "1)return(0",
            "",
            " 1",
            "+1",
            "1_0",
        )
    ]
    + [["-p", "\u0661"], ["-p"], ["--pid=1.0"], ["-x"], ["181"], ["-t", "-q"]],
)
def test_bad_arguments(name, no_bcc, arguments):
    done = run(name, *arguments, env=no_bcc)
    usage, error, *rest = done.stderr.splitlines()
    assert (done.returncode, done.stdout, rest) == (2, "", [])
    assert usage == f"usage: {name} [-h] [-t] [-p PID]"
    assert error.startswith(f"{name}: error: ")


@settings(deadline=None)
@given(st.integers(1, 4194304))
def test_every_pid_is_taken(number):
    from conftest import load

    assert load("tcpconnect").pid_number(str(number)) == number


@settings(deadline=None)
@given(st.text())
def test_no_other_text_is(text):
    from conftest import load

    pid_number = load("tcpconnect").pid_number
    try:
        number = pid_number(text)
    except argparse.ArgumentTypeError as error:
        assert "not a process ID (1 to 4194304)" in str(error)
    else:
        assert 1 <= number <= 4194304 and text.lstrip("0") == str(number)


def test_bcc_missing(name, no_bcc):
    done = run(name, env=no_bcc)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"{name}: error: cannot load bcc (bcc was imported): install python3-bpfcc "
    )
    assert done.stderr.count("\n") == 1


def test_ebpf_prints_the_program(name):
    done = run(name, "--ebpf", "-p", "181")
    assert (done.returncode, done.stderr) == (0, "")
    assert "#define FILTER_PID 181\n" in done.stdout
    assert "FILTER_PID" not in run(name, "--ebpf").stdout.partition("struct event_t")[0]
    assert (
        f"{'tcp_v4_connect' if name == 'tcpconnect' else 'inet_csk_accept'}"
        in done.stdout
    )


def test_unprivileged(name):
    """Also on a kernel that could trace."""
    done = run(name, **({"user": 65534, "group": 65534} if os.geteuid() == 0 else {}))
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        f"{name}: error: needs root: try sudo {name}\n",
    )


def test_kernel_that_cannot_trace(name, tool):
    if any(map(os.path.exists, tool.KPROBES)):
        pytest.skip("this machine's kernel has kprobes")
    if os.geteuid() != 0:
        pytest.skip("needs root")
    done = run(name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"{name}: error: this kernel has no kprobes and refuses fexit programs: "
        "boot one with CONFIG_KPROBES and CONFIG_BPF_EVENTS\n"
    )
