import argparse
import os
import pwd
import re

import pytest
from conftest import TOP, load, run
from hypothesis import given, settings
from hypothesis import strategies as st

# The seed's text, and what has been added since.
HELP = """\
usage: {name} [-h] [-t] [-p PID] [-P PORT] [-4 | -6] [-u UID]
{usage}

Trace TCP {what}s

optional arguments:
  -h, --help            show this help message and exit
  -t, --timestamp       include timestamp on output
  -p PID, --pid PID     trace this PID only

filters (PID, PORT and UID may be lists: 80,443):
  -P PORT, --port PORT  trace this {side} port only
  -4, --ipv4            trace IPv4 only
  -6, --ipv6            trace IPv6 only
  -u UID, --uid UID     trace this user only, by number or name
  --cgroup PATH         trace this cgroup or systemd unit only (repeatable)
  --cgroupmap PATH      trace cgroups in this BPF map only
  --mntnsmap PATH       trace mount namespaces in this BPF map only
{failed}
output:
  -T, --time            include time of day on output (HH:MM:SS)
  -U, --print-uid       include UID on output
{columns}  --json                print one JSON object a line, with all fields
  -c, --count           count {what}s per {flow}
  -b PAGES, --buffer-pages PAGES
                        size of each CPU's buffer (default: 256 pages)

examples:
    ./{name}           # trace all TCP {what}()s
    ./{name} -t        # include timestamps
    ./{name} -p 181    # only trace PID 181
    ./{name} -P 80,81  # only trace ports 80 and 81
{example}"""
OWN = {
    "tcpconnect": {
        "usage": """\
                  [--cgroup PATH] [--cgroupmap PATH] [--mntnsmap PATH] [-x]
                  [-T] [-U] [-L] [-d] [--json] [-c] [-b PAGES]""",
        "side": "destination",
        "failed": """\
  -x, --failed          trace connects that fail only, with their error
""",
        "columns": """\
  -L, --lport           include LPORT, the local port, on output
  -d, --dns             include QUERY, the name looked up, on output
""",
        "flow": "source, destination and port",
        "example": """\
    ./tcpconnect -x        # only trace connects that fail
""",
    },
    "tcpaccept": {
        "usage": """\
                 [--cgroup PATH] [--cgroupmap PATH] [--mntnsmap PATH] [-T]
                 [-U] [-R] [-q] [--json] [-c] [-b PAGES]""",
        "side": "local",
        "failed": "",
        "columns": """\
  -R, --rport           include RPORT, the remote port, on output
  -q, --queue           include QLEN and QMAX, the accept queue, on output
""",
        "flow": "remote address and local port",
        "example": "",
    },
}


def help_text(name):
    return HELP.format(name=name, what=name[3:], **OWN[name])


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
        help_text(name),
        "",
    )


def test_the_example_file_shows_each_option(name, tool):
    """With what it printed."""
    text = (TOP / f"examples/{name}_example.txt").read_text()
    commands = re.findall(rf"^# \./{name}(.*)\n(?=\S)", text, re.MULTILINE)
    shown = {word for command in commands for word in command.split()}
    for line in re.findall(r"^  (-.+)", tool.HELP, re.MULTILINE):
        names = re.findall(r"-[-\w]+", line.partition("  ")[0])
        assert shown & set(names), names


def test_help_is_the_example_files_usage(name):
    text = (TOP / "examples" / f"{name}_example.txt").read_text()
    assert text.endswith(f"USAGE message:\n\n# ./{name} -h\n{help_text(name)}")


def test_help_fits_a_screen(name):
    lines = help_text(name).splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "arguments",
    [
        [option, value]
        for option in ("-p", "-P", "-b", "-u")
        for value in (
            "no such user",
            "-1",
            "4294967295",
            "99999999999",
            "1; x",
            "1)return(0",
            "",
            " 1",
            "+1",
            "1_0",
            "1,,2",
            ",".join(["1"] * 65),
        )
    ]
    + [["-p", "0"], ["-p", "4194305"], ["-P", "0"], ["-P", "65536"], ["-b", "0"]]
    + [["--cgroup", "no-such-unit"], ["--cgroup", "/no/such"], ["--cgroup", ""]]
    + [["--cgroupmap", "/no"]]
    + [["--cgroupmap", 'a"; x'], ["--mntnsmap", ""]]
    + [["-b", "1,2"], ["-p", "abc"], ["-P", "http"]]
    + [["-p", "\u0661"], ["-p"], ["--pid=1.0"], ["-y"], ["181"], ["-t", "-z"]]
    + [["-b", "3"], ["-b", "32768"], ["--buffer-pages", "\u00b2"], ["-b"]],
)
def test_bad_arguments(name, no_bcc, arguments):
    done = run(name, *arguments, env=no_bcc)
    *usage, error = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert usage == help_text(name).splitlines()[:3]
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
    options = ["-p", "181,182", "-P", "80", "-u", "0,nobody", "-6", "-U"]
    done = run(name, "--ebpf", *options)
    nobody = pwd.getpwnam("nobody").pw_uid
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "#define FILTER_PID(x) ((x) == 181u || (x) == 182u)\n"
        "#define FILTER_PORT(x) ((x) == 80u)\n"
        f"#define FILTER_UID(x) ((x) == 0u || (x) == {nobody}u)\n"
        "#define FILTER_IP 6\n"
        "#define DETAILS 1\n"
    )
    bare = run(name, "--ebpf", "-t", "-T", "-b", "8").stdout
    assert "#define FILTER" not in bare and "#define DETAILS" not in bare
    assert "#define DETAILS 1\n" in run(name, "--ebpf", "--json").stdout
    function = "tcp_v4_connect" if name == "tcpconnect" else "inet_csk_accept"
    assert function in bare


@settings(deadline=None)
@given(st.lists(st.integers(-9, 70000) | st.text(max_size=6), max_size=70))
def test_lists(values):
    """Each value is taken or refused as it would be alone."""
    tool = load("tcpconnect")
    text = ",".join(map(str, values))
    good = [part for part in text.split(",") if is_port(part)]
    try:
        assert tool.list_of(tool.port_number)(text) == [int(part) for part in good]
        assert len(good) == len(text.split(",")) <= 64
    except argparse.ArgumentTypeError:
        assert len(good) < len(text.split(",")) or len(good) > 64


def is_port(text):
    return re.fullmatch("[0-9]{1,10}", text) is not None and 1 <= int(text) <= 65535


@settings(deadline=None)
@given(st.text())
def test_no_text_reaches_the_c_program(text):
    tool = load("tcpaccept")
    try:
        uid = tool.uid_number(text)
    except argparse.ArgumentTypeError:
        return
    args = argparse.Namespace(
        pid=None,
        port=None,
        uid=[uid],
        ipv4=False,
        ipv6=False,
        print_uid=False,
        json=False,
        cgroup=[],
        cgroupmap=None,
        mntnsmap=None,
        count=False,
    )
    assert tool.filters(args) == {"FILTER_UID(x)": f"((x) == {uid:d}u)"}


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
