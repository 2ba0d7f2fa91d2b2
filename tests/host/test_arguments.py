import argparse
import os

import pytest
from conftest import TOP, load, run
from hypothesis import given, settings
from hypothesis import strategies as st

HELP = """\
usage: {name} [-h] [-t] [-p PID] [-b PAGES]

Trace TCP {what}s

optional arguments:
  -h, --help            show this help message and exit
  -t, --timestamp       include timestamp on output
  -p PID, --pid PID     trace this PID only
  -b PAGES, --buffer-pages PAGES
                        size of each CPU's buffer (default: 256 pages)

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
        [option, value]
        for option in ("-p", "-b")
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
    + [["-p", "\u0661"], ["-p"], ["--pid=1.0"], ["-x"], ["181"], ["-t", "-q"]]
    + [["-b", "3"], ["-b", "32768"], ["--buffer-pages", "\u00b2"], ["-b"]],
)
def test_bad_arguments(name, no_bcc, arguments):
    done = run(name, *arguments, env=no_bcc)
    usage, error, *rest = done.stderr.splitlines()
    assert (done.returncode, done.stdout, rest) == (2, "", [])
    assert usage == f"usage: {name} [-h] [-t] [-p PID] [-b PAGES]"
    assert error.startswith(f"{name}: error: ")


@settings(deadline=None)
@given(st.text() | st.integers().map(str))
def test_pages_are_a_power_of_two(text):
    page_count = load("tcpconnect").page_count
    powers = {str(1 << n): 1 << n for n in range(15)}
    try:
        assert page_count(text) == powers[text.lstrip("0")]
    except argparse.ArgumentTypeError as error:
        assert "not a power of two from 1 to 16384" in str(error)
        assert text not in powers


@pytest.mark.parametrize("number", [1 << n for n in range(15)])
def test_every_power_of_two_is_taken(tool, number):
    assert tool.page_count(str(number)) == number


@settings(deadline=None)
@given(st.integers(1, 4194304))
def test_every_pid_is_taken(number):
    assert load("tcpconnect").pid_number(str(number)) == number


@settings(deadline=None)
@given(st.text())
def test_no_other_text_is(text):
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
