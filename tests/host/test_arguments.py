"""Arguments, and what keeps a tool from tracing before it tries."""

import argparse
import errno
import io
import os
import pathlib
import pwd
import queue
import re
import subprocess
import threading
from types import SimpleNamespace

import pytest
from conftest import TOP, help_of, option_names, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st

# The seed's text; argparse has "optional arguments" before Python 3.10.
HELP = """\
usage: {name} [-h] [-V] [-t] [-p PID] [-P PORT] [-a ADDR] [-4 | -6]

Trace TCP {what}s

options:
  -h, --help            show this help message and exit
  -t, --timestamp       include timestamp on output
  -p PID, --pid PID     trace this PID only

examples:
    ./{name}           # trace all TCP {what}()s
    ./{name} -t        # include timestamps
    ./{name} -p 181    # only trace PID 181
"""


def usual(text):
    """A help as of Python 3.10 to 3.12, in words."""
    text = text.replace("optional arguments:", "options:")
    return re.sub(r"(-\w), (--[\w-]+) ([A-Z]+)", r"\1 \3, \2 \3", text).split()


@pytest.fixture
def no_bcc(tmp_path):
    """An environment in which importing bcc fails loudly."""
    (tmp_path / "bcc.py").write_text("raise ImportError('bcc was imported')\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_help_has_the_seeds(name, tool, no_bcc):
    """Whatever the environment says."""
    done = run(name, "-h", env={**no_bcc, "COLUMNS": "80", "TCPTOOLS_METHOD": "foo"})
    assert (done.returncode, done.stdout, done.stderr) == (0, help_of(tool), "")
    shown = iter(usual(done.stdout))
    for word in HELP.format(name=name, what=name[3:]).split():
        assert word in shown  # and behind the one before


def test_version(name, tool, no_bcc):
    """Without root, too; and no other option matters, as with -h."""
    nobody = {"user": 65534, "group": 65534} if os.geteuid() == 0 else {}
    for arguments in (["-V"], ["-t", "--version", "--no-such-option"]):
        done = run(name, *arguments, env={**no_bcc, "TCPTOOLS_METHOD": "foo"}, **nobody)
        wanted = f"{name} {tool.VERSION}\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, wanted, "")


def test_the_example_file_shows_each_option(name, tool):
    """With what it printed."""
    text = (TOP / f"examples/{name}_example.txt").read_text()
    commands = re.findall(rf"^# \./{name}(.*)\n(?=\S)", text, re.MULTILINE)
    shown = {word for command in commands for word in command.split()}
    for names in option_names(tool):
        assert shown & set(names), names


def test_help_is_the_example_files_usage(name, tool):
    text = (TOP / "examples" / f"{name}_example.txt").read_text()
    _, shown = text.split(f"USAGE message:\n\n# ./{name} -h\n")
    assert usual(shown) == usual(help_of(tool))


def test_help_fits_a_screen(tool):
    lines = help_of(tool).splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 80


PID = "not a process ID (1 to 4194304)"
PORT = "not a port (1 to 65535)"
PAGES = "not a power of two from 1 to 16384"
NUMBERS = [
    ("-p/--pid", PID, ["0", "4194305", "1.0", "abc"]),
    ("-P/--port", PORT, ["0", "65536", "http"]),
    ("-b/--buffer-pages", PAGES, ["0", "3", "32768", "\u00b2", "1,2"]),
    ("-u/--uid", "no such user", []),
    ("-m/--min-ms", "not milliseconds (0 to 3600000)", ["3600001", "0.5", "1s"]),
]
NO_NUMBERS = (
    *("no such user", "-1", "4294967295", "99999999999", "1; x", "1)return(0", ""),
    *(" 1", "+1", "1_0", "\u0661"),
)


def usage_error(tool, capfd, *arguments):
    """What the line below the usage says, where a command line is refused."""
    with pytest.raises(SystemExit) as end:
        parse(tool, *arguments)
    out, err = capfd.readouterr()
    assert (end.value.code, out) == (2, "")
    return only_error(tool.NAME, err)


def only_error(name, text):
    """The error in what a usage error prints: two lines."""
    usage, error, end = text.split("\n")
    hint = f"({name} -h lists the options)"
    assert (usage, end) == (f"usage: {name} [OPTION]... [-- COMMAND]  {hint}", "")
    assert error.startswith(f"{name}: error: ")
    return error.partition(": error: ")[2]


@pytest.mark.parametrize(
    ("option", "what", "value"),
    [
        (option, what, value)
        for option, what, values in NUMBERS
        for value in (*NO_NUMBERS, *values)
    ],
)
def test_not_a_number(shared, capfd, option, what, value):
    error = usage_error(shared, capfd, f"{option.partition('/')[2]}={value}")
    assert error == f"argument {option}: {what}: {value!r}"


@pytest.mark.parametrize(("option", "what"), [("-p/--pid", PID), ("-P/--port", PORT)])
def test_lists_with_a_bad_value(shared, capfd, option, what):
    short = option[:2]
    error = usage_error(shared, capfd, short, "1,,2")
    assert error == f"argument {option}: {what}: ''"
    error = usage_error(shared, capfd, short, "1,2 ,3")
    assert error == f"argument {option}: {what}: '2 '"
    error = usage_error(shared, capfd, short, ",".join(["1"] * 65))
    assert error == f"argument {option}: too many values: 65 (maximum 64)"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-p"], "argument -p/--pid: expected one argument"),
        (["181"], "unrecognized arguments: 181"),
        (["-t", "-z"], "unrecognized arguments: -z"),
        (["--unit", "-z"], "unrecognized arguments: -z"),
        (
            ["--unit", "web"],
            "unrecognized arguments: web: --cgroup web traces one unit",
        ),
        (["a\x1b[1m\n\udcff"], r"unrecognized arguments: a\x1b[1m\n\udcff"),
    ],
)
def test_no_such_arguments(shared, capfd, arguments, error):
    assert usage_error(shared, capfd, *arguments) == error


def test_what_count_implies(tool):
    for words in ("-c", "-i 7", "--per-process", "-i 7 --per-process"):
        assert parse(tool, *words.split()).count
    assert not parse(tool).count


def test_all_that_count_excludes_is_named(name, tool, capfd):
    own = {
        "tcpconnect": (
            "-x -d -l -m 0 -L -T",
            "-x/--failed, -m/--min-ms, -l/--latency, -d/--dns",
        ),
        "tcpaccept": ("-q -R -T", "-q/--queue"),
    }
    short, both = own[name]
    for count in ("-c", "-i 7", "--per-process"):
        error = usage_error(tool, capfd, *short.split(), *count.split(), "-b", "8")
        assert error == f"-c/--count cannot be combined with {both}, -b/--buffer-pages"


@pytest.mark.parametrize(
    ("arguments", "environment", "error"),
    [
        (["-p", "0"], {}, f"argument -p/--pid: {PID}: '0'"),
        (["-4", "-6"], {}, "argument -6/--ipv6: not allowed with argument -4/--ipv4"),
        (
            [],
            {"TCPTOOLS_METHOD": "a\n\x9b"},
            r"TCPTOOLS_METHOD=a\n\x9b: must be fexit, kprobe or headers",
        ),
    ],
)
def test_usage_errors_of_the_command(name, no_bcc, arguments, environment, error):
    done = run(name, *arguments, env={**no_bcc, **environment})
    assert (done.returncode, done.stdout) == (2, "")
    assert only_error(name, done.stderr) == error


def test_defaults(tool):
    args = vars(parse(tool))
    assert args.pop("cgroup") == args.pop("command") == []
    assert set(args.values()) == {None, False}


def test_values(tool):
    args = parse(tool, "-p", "1,4194304", "-P", "65535", "-u", "0,nobody", "-b", "64")
    assert args.pid == [(True, 1, 1), (True, 4194304, 4194304)]
    assert (args.port, args.buffer_pages) == ([(True, 65535, 65535)], 64)
    nobody = pwd.getpwnam("nobody").pw_uid
    assert args.uid == [(True, 0, 0), (True, nobody, nobody)]
    args = parse(tool, "-p", "!1", "-P", "!443,80-80,8000-8999", "-u", "!nobody,0-9")
    assert args.pid == [(False, 1, 1)]
    assert args.port == [(False, 443, 443), (True, 80, 80), (True, 8000, 8999)]
    assert args.uid == [(False, nobody, nobody), (True, 0, 9)]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("-P 9-3", "-P/--port: the lower number comes first: '9-3'"),
        ("-P !9-3", "-P/--port: the lower number comes first: '!9-3'"),
        ("-P !", f"-P/--port: {PORT}: ''"),
        ("-P !!80", f"-P/--port: {PORT}: '!80'"),
        ("-P 1-", f"-P/--port: {PORT}: '1-'"),
        ("-P=-9", f"-P/--port: {PORT}: '-9'"),
        ("-P 1-2-3", f"-P/--port: {PORT}: '1-2-3'"),
        ("-P 0-3", f"-P/--port: {PORT}: '0'"),
        ("-P 1-65536", f"-P/--port: {PORT}: '65536'"),
        ("-P 80,!80", "-P/--port: both 80 and !80: drop one"),
        ("-P !81-90,81-90", "-P/--port: both 81-90 and !81-90: drop one"),
        ("-p !4194305", f"-p/--pid: {PID}: '4194305'"),
        ("-p !2,3,2", "-p/--pid: both 2 and !2: drop one"),
        ("-u !nosuch", "-u/--uid: no such user: 'nosuch'"),
        ("-u root-nobody", "-u/--uid: no such user: 'root-nobody'"),
        ("-u 0-4294967295", "-u/--uid: no such user: '4294967295'"),
        ("-u root,!0", "-u/--uid: both root and !root: drop one"),
        ("-n !", "-n/--name: '!' is no name"),
    ],
)
def test_ranges_that_are_refused(shared, capfd, words, error):
    option, _, value = words.replace("=", " ").partition(" ")
    assert usage_error(shared, capfd, f"{option}{value}") == f"argument {error}"


def test_user_whose_name_is_no_range(shared, monkeypatch):
    users = {"www-data": SimpleNamespace(pw_uid=33)}
    monkeypatch.setattr(shared.pwd, "getpwnam", users.__getitem__)
    assert parse(shared, "-u", "www-data").uid == [(True, 33, 33)]
    assert parse(shared, "-u", "!www-data").uid == [(False, 33, 33)]


def of_kind(kind, text):
    """The value of an argument's type, or the error (text)."""
    try:
        return kind(text)
    except argparse.ArgumentTypeError as error:
        return str(error)


@settings(deadline=None)
@given(st.text() | st.integers(-9, 20000).map(str))
def test_only_powers_of_two(shared, text):
    kind = shared.number("a power of two", [1 << n for n in range(15)])
    powers = {str(1 << n): 1 << n for n in range(15)}
    wanted = powers.get(text.lstrip("0") if len(text) <= 10 else "")
    assert of_kind(kind, text) == (wanted or f"not a power of two: {text!r}")


@settings(deadline=None)
@given(st.text() | st.integers(-9, 4194400).map(str))
def test_only_numbers_in_range(shared, text):
    kind = shared.number("a PID", range(1, 4194305))
    is_number = re.fullmatch("[0-9]{1,10}", text) and 1 <= int(text) <= 4194304
    assert of_kind(kind, text) == (int(text) if is_number else f"not a PID: {text!r}")


@settings(deadline=None)
@given(st.lists(st.integers(-9, 70000) | st.text(max_size=6), max_size=70))
def test_lists(shared, values):
    """Each value is taken or refused as it would be alone."""
    port = shared.number("a port", range(1, 65536))
    kind = shared.list_of(lambda part: (True, port(part)))
    text = ",".join(map(str, values))
    parts = text.split(",")
    bad = [part for part in parts if not is_port(part)]
    if len(parts) > 64:
        wanted = f"too many values: {len(parts)} (maximum 64)"
    else:
        wanted = (
            f"not a port: {bad[0]!r}" if bad else [(True, int(part)) for part in parts]
        )
    assert of_kind(kind, text) == wanted


def is_port(text):
    return re.fullmatch("[0-9]{1,10}", text) is not None and 1 <= int(text) <= 65535


def test_users(shared):
    assert shared.user("nobody") == pwd.getpwnam("nobody").pw_uid
    assert shared.user("root") == shared.user("0") == 0
    assert shared.user("4294967294") == 4294967294
    assert of_kind(shared.user, "4294967295") == "no such user: '4294967295'"
    assert of_kind(shared.user, "a\0b") == "no such user: 'a\\x00b'"


@settings(deadline=None)
@given(st.text() | st.integers(0, 1 << 33).map(str) | st.sampled_from(["root"]))
def test_no_text_reaches_the_c_program(shared, text):
    try:
        uid = shared.user(text)
    except argparse.ArgumentTypeError:
        return
    args = parse(shared)
    args.uid = [(True, uid, uid)]
    test = f"(x == {uid:d}u) && !(0)"
    expression = f"({{ u32 x = bpf_get_current_uid_gid(); {test}; }})"
    assert shared.task_filter(args) == expression


@pytest.fixture
def cgroups(tmp_path, monkeypatch, shared):
    """A cgroup2 mount that is a directory of the test's; returns it."""
    top = tmp_path / "unified"
    top.mkdir()
    make_cgroups(top, "system.slice/web.service", "system.slice/db.service", "app/web")
    mounts = f"proc /proc proc rw 0 0\ncgroup2 {top} cgroup2 rw,relatime 0 0\n"
    has_mounts(shared, monkeypatch, mounts)
    return top


def make_cgroups(top, *paths):
    for path in paths:
        (top / path).mkdir(parents=True, exist_ok=True)
        for directory in (top / path, *(top / path).parents):
            if directory.is_relative_to(top):
                (directory / "cgroup.controllers").touch()


def has_mounts(shared, monkeypatch, text):
    def opened(path, mode):
        assert (path, mode) == ("/proc/self/mounts", "rb")
        return io.BytesIO(os.fsencode(text))

    monkeypatch.setattr(shared, "open", opened, raising=False)


def test_cgroup_by_its_path(shared, cgroups):
    for path in ("system.slice/web.service", "app/web"):
        assert shared.cgroup(str(cgroups / path)) == str(cgroups / path)
        assert shared.cgroup(f"/{path}") == shared.cgroup(path) == str(cgroups / path)
    assert shared.cgroup("/") == str(cgroups)


def test_cgroup_by_its_unit(shared, cgroups):
    db = str(cgroups / "system.slice/db.service")
    assert shared.cgroup("db") == shared.cgroup("db.service") == db
    assert shared.cgroup("app") == str(cgroups / "app")


USERS = "user.slice/user-1000.slice/user@1000.service"
CONTAINER = "0123456789ab" + "c" * 52


def test_unit_of_the_system_wins(shared, cgroups):
    """Over what a user, or root in a container, calls by its name."""
    make_cgroups(cgroups, f"{USERS}/app.slice/web.service")
    make_cgroups(cgroups, f"system.slice/docker-{CONTAINER}.scope/web.service")
    web = str(cgroups / "system.slice/web.service")
    assert shared.cgroup("web") == shared.cgroup("web.service") == web


@pytest.mark.parametrize(
    "container",
    [
        f"docker/{CONTAINER}",
        f"machine.slice/a.slice/libpod-{CONTAINER}.scope/container",
        f"system.slice/web.service/libpod-payload-{CONTAINER}",
        f"{USERS}/user.slice/libpod-{CONTAINER}.scope",
        "lxc.payload.web1",
        "lxc/101/ns",
        "machine.slice/machine-web.scope/payload",
        "machine.slice/systemd-nspawn@a.service/payload",
    ],
)
def test_unit_in_a_container(shared, cgroups, container):
    """By its path only: whoever is root there chooses the name, also an ID."""
    units = [f"{container}/system.slice/{name}.service" for name in ("nginx", "db")]
    inner = f"{container}/docker-{'d' * 64}.scope"
    make_cgroups(cgroups, *units, inner)
    for path, name in ((units[0], "nginx"), (inner, "d" * 12)):
        why = "no such cgroup (v2), running unit or container"
        assert of_kind(shared.cgroup, name).startswith(f"{why}: {name!r}; ")
        assert shared.cgroup(path) == str(cgroups / path)
    assert shared.cgroup("db") == str(cgroups / "system.slice/db.service")
    make_cgroups(cgroups, f"{USERS}/nginx.service")
    assert shared.cgroup("nginx") == str(cgroups / USERS / "nginx.service")


def test_users_own_unit(shared, cgroups):
    make_cgroups(cgroups, f"{USERS}/app.slice/mine.service")
    own = str(cgroups / USERS / "app.slice/mine.service")
    assert shared.cgroup("mine") == own


def paths_of_several(shared, name):
    """The paths in the message for a name that matches several cgroups."""
    message = of_kind(shared.cgroup, name)
    before = f"{name!r} matches several cgroups; give a path: "
    assert message.startswith(before)
    return sorted(message[len(before) :].split(", "))


def test_several_cgroups_of_one_name(shared, cgroups):
    paths = ("jobs/a/run", "jobs/b\x1b[2J/run", "jobs/c/run.service")
    make_cgroups(cgroups, *paths)
    shown = [str(cgroups / path) for path in paths]
    shown[1] = shown[1].replace("\x1b", "\\x1b")
    assert paths_of_several(shared, "run") == shown
    make_cgroups(cgroups, "a.slice/run.service", "run.service")
    both = [str(cgroups / path) for path in ("a.slice/run.service", "run.service")]
    assert paths_of_several(shared, "run") == both


@pytest.mark.parametrize(
    "path",
    [
        f"system.slice/docker-{CONTAINER}.scope",
        f"machine.slice/libpod-{CONTAINER}.scope",
        f"kubepods.slice/kubepods-pod1.slice/cri-containerd-{CONTAINER}.scope",
        f"kubepods.slice/kubepods-pod1.slice/crio-{CONTAINER}.scope",
        f"docker/{CONTAINER}",
        f"kubepods/besteffort/pod1/{CONTAINER}",
        f"{USERS}/user.slice/libpod-{CONTAINER}.scope",
    ],
)
def test_cgroup_of_a_container(shared, cgroups, path):
    """By its ID, whole or the first digits; not what is beside it."""
    beside = f"libpod-conmon-{CONTAINER}.scope", f"docker-{'d' * 64}.scope"
    make_cgroups(cgroups, path, *(f"machine.slice/{name}" for name in beside))
    for digits in (12, 13, 64):
        assert shared.cgroup(CONTAINER[:digits]) == str(cgroups / path)
    for name in (CONTAINER[:11], CONTAINER[1:], f"{CONTAINER}c", "0123456789AB"):
        wanted = f"no such cgroup (v2), running unit or container: {name!r}; "
        assert of_kind(shared.cgroup, name) == f"{wanted}systemd-cgls shows them"


@pytest.mark.parametrize("text", ["a\0b", "/a\0b", "\udcff", "/\udcff", "\ud800/"])
def test_cgroup_of_odd_bytes(shared, cgroups, text):
    wanted = f"no such cgroup (v2), running unit or container: {text!r}; "
    assert of_kind(shared.cgroup, text) == f"{wanted}systemd-cgls shows them"
    assert wanted.isprintable()


@pytest.mark.parametrize(
    "text", ["no-such", "", "/no/such", "web/", "w*b", "/etc", "cgroup.controllers"]
)
def test_no_such_cgroup(shared, cgroups, text):
    wanted = f"no such cgroup (v2), running unit or container: {text!r}; "
    assert of_kind(shared.cgroup, text) == f"{wanted}systemd-cgls shows them"


def test_second_mount_of_cgroup2(shared, cgroups, monkeypatch):
    """A path and a name are looked for in each; one directory in two is one."""
    other, same = cgroups.parent / "other one\u2003\r", cgroups.parent / "same"
    make_cgroups(other, "only/here")
    same.symlink_to(cgroups)
    tops = [str(top).replace(" ", "\\040") for top in (cgroups, same, other)]
    lines = "".join(f"cgroup2 {top} cgroup2 rw 0 0\n" for top in tops)
    has_mounts(shared, monkeypatch, lines)
    for text in ("only/here", "here"):
        assert shared.cgroup(text) == str(other / "only/here")
    assert shared.cgroup("db") == str(cgroups / "system.slice/db.service")


def test_no_cgroup2_mounted(shared, monkeypatch):
    has_mounts(shared, monkeypatch, "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n")
    message = "no cgroup v2 hierarchy is mounted: use -p, -u or --mntnsmap"
    assert of_kind(shared.cgroup, "web") == message
    assert of_kind(shared.cgroup, "/a/b") == message


def test_pinned_map(shared, tmp_path):
    file = tmp_path / 'a"; x'
    file.write_text("")
    path = shared.pinned_map(str(file))
    assert re.fullmatch(r"/proc/self/fd/\d+", path)
    assert os.readlink(path) == str(file)


def test_pinned_map_that_cannot_be_opened(shared, tmp_path):
    def error(text):
        return of_kind(shared.pinned_map, text)

    file = tmp_path / "file"
    file.write_text("")
    assert error("/no") == "cannot open '/no': No such file or directory"
    assert error("") == "cannot open '': No such file or directory"
    assert error(f"{file}/x") == f"cannot open '{file}/x': Not a directory"
    assert error("a\0b") == "cannot open 'a\\x00b': embedded null byte"
    (tmp_path / "loop").symlink_to("loop/x")
    loop = str(tmp_path / "loop")
    assert error(loop) == f"cannot open {loop!r}: Too many levels of symbolic links"


def test_pinned_map_out_of_reach(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to become nobody")
    tmp_path.chmod(0o700)
    (tmp_path / "map").write_text("")
    words = "--cgroupmap", str(tmp_path / "map")
    done = run("tcpconnect", *words, user=65534, group=65534)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        f"tcpconnect: error: argument --cgroupmap: cannot open '{tmp_path}/map': "
        "Permission denied"
    )


def exits(capfd, function, *arguments):
    """The line that a function exits with."""
    with pytest.raises(SystemExit) as end:
        function(*arguments)
    out, err = capfd.readouterr()
    assert (end.value.code, out) == (1, "")
    assert err.startswith("tcpconnect: error: ") and err.count("\n") == 1
    return err[len("tcpconnect: error: ") : -1]


def test_file_that_is_no_map(shared, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    path = shared.pinned_map(str(tmp_path / "file"))
    assert exits(capfd, shared.require_hash, path) == (
        f"{tmp_path}/file is not a pinned BPF hash map with 8-byte keys; create one "
        "with: bpftool map create FILE type hash key 8 value 8 entries 128 name ids"
    )


SYS_ADMIN, PERFMON, BPF = 1 << 21, 1 << 38, 1 << 39


@pytest.mark.parametrize(
    ("effective", "is_enough"),
    [
        (SYS_ADMIN, True),
        (PERFMON | BPF, True),
        ((1 << 41) - 1, True),
        (0, False),
        (PERFMON, False),
        (BPF, False),
        ((1 << 41) - 1 & ~SYS_ADMIN & ~BPF, False),
    ],
)
def test_capabilities(shared, monkeypatch, capfd, effective, is_enough):
    text = f"Name:\ta: b\nCapPrm:\t{0:016x}\nCapEff:\t{effective:016x}\n"
    monkeypatch.setattr(shared, "open", lambda _: io.StringIO(text), raising=False)
    monkeypatch.setattr(shared.sys, "argv", ["./tcpconnect", "-t"])
    if is_enough:
        shared.require_rights(parse(shared))
    else:
        error = exits(capfd, shared.require_rights, parse(shared))
        assert error == "needs root: try sudo ./tcpconnect"


def test_32_bit_python(shared, monkeypatch, capfd):
    monkeypatch.setattr(shared, "MACHINE", "aarch64")
    monkeypatch.setattr(shared.sys, "maxsize", 2**31 - 1)
    assert exits(capfd, shared.require_rights, parse(shared)) == (
        "this Python is a 32-bit program: on aarch64 take a 64-bit one"
    )


def test_32_bit_kernel():
    """Which reports its machine like that, as it does to a process that asks for it."""
    if os.uname().machine != "x86_64":
        pytest.skip("this machine has no 32-bit personality of that name")
    command = ["setarch", "i686", "/usr/bin/python3", TOP / "tcpconnect"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("tcpconnect: error: cannot trace on i686: only ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "is_taken"),
    [
        ("monotonic           0         0\nboottime           -9         0\n", True),
        ("monotonic         -15 500000000\nboottime            0         0\n", False),
        ("monotonic           0 500000000\nboottime            0         0\n", False),
        (None, True),
    ],
)
def test_time_namespace(shared, monkeypatch, tmp_path, capfd, text, is_taken):
    """As in time_namespaces(7), whose kernels have it since 5.6."""
    file = tmp_path / "timens_offsets"
    if text:
        file.write_text(text)
    files = {"/proc/self/timens_offsets": file}
    opened = lambda path: files.get(path, tmp_path / "no").open()
    monkeypatch.setattr(shared, "open", opened, raising=False)
    monkeypatch.setattr(shared, "has_capabilities", lambda *_: True)
    args = parse(shared)
    if is_taken:
        shared.require_rights(args)
        assert capfd.readouterr() == ("", "")
    else:
        assert exits(capfd, shared.require_rights, args) == (
            "cannot trace in a time namespace with an offset: run it on the host"
        )


NO_PROCESS = "tcpconnect: no such process seen yet (-p takes PIDs of the host): "


PID_NAMESPACE = {"/proc/self/ns/pid": SimpleNamespace(st_ino=0xEFFFFFFC)}


def test_no_such_process(shared, monkeypatch, capfd):
    """A process that we may not send signals to is one; /proc may hide it (hidepid)."""
    errors = {7: errno.ESRCH, 11: errno.EPERM, 13: errno.ESRCH}

    def kill(pid, number):
        assert number == 0
        if pid in errors:
            raise OSError(errors[pid], "")

    def hidden(path, _):
        raise FileNotFoundError(path)

    monkeypatch.setattr(shared, "open", hidden, raising=False)
    monkeypatch.setattr(shared.os, "stat", PID_NAMESPACE.__getitem__)
    monkeypatch.setattr(shared.os, "kill", kill)
    shared.warn_of_pids([5, 11])
    assert capfd.readouterr() == ("", "")
    shared.warn_of_pids([5, 7, 11, 13])
    assert capfd.readouterr() == ("", f"{NO_PROCESS}7, 13\n")


def test_thread_of_a_process(shared, monkeypatch, capfd):
    """kill(2) finds it, too. It may have any name."""
    is_over, ids = threading.Event(), queue.Queue()

    def work():
        pathlib.Path("/proc/thread-self/comm").write_bytes(b"Tgid:\t7\n\xff")
        ids.put(threading.get_native_id())
        is_over.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    tid, pid = ids.get(timeout=60), os.getpid()
    monkeypatch.setattr(shared.os, "stat", PID_NAMESPACE.__getitem__)
    shared.warn_of_pids([pid, tid])
    monkeypatch.undo()
    is_over.set()
    said = f"tcpconnect: {tid} is a thread of process {pid}: try -p {pid}\n"
    assert capfd.readouterr() == ("", said)


def test_unprivileged(name):
    """Also on a kernel that could trace, and without bcc."""
    done = run(name, **({"user": 65534, "group": 65534} if os.geteuid() == 0 else {}))
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        f"{name}: error: needs root: try sudo {TOP / name}\n",
    )


def test_bcc_missing(name, no_bcc):
    if os.geteuid() != 0:
        pytest.skip("needs root: permissions come first")
    done = run(name, env=no_bcc)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"{name}: error: cannot load bcc (bcc was imported): install python3-bpfcc "
        "(Debian, Ubuntu), python3-bcc (Fedora, RHEL, openSUSE) or python-bcc (Arch)\n"
    )


def test_command_that_cannot_be_run(name, no_bcc, tmp_path):
    """As a shell has it, and before anything is loaded."""
    if os.geteuid() != 0:
        pytest.skip("needs root: permissions come first")
    (tmp_path / "file").touch()
    for word, why, status in (
        ("no such\n", "not found", 127),
        (str(tmp_path / "no"), "not found", 127),
        (str(tmp_path / "file"), "not executable", 126),
    ):
        done = run(name, "-t", "--", word, "-t", env=no_bcc)
        error = f"{name}: error: cannot run {word!r}: {why}\n"
        assert (done.returncode, done.stdout, done.stderr) == (status, "", error)


def test_command_without_cgroups(shared, monkeypatch, capfd):
    monkeypatch.setattr(shared, "cgroup_mounts", list)
    assert exits(capfd, shared.prepare_command, parse(shared, "--", "true")) == (
        "cannot make a cgroup for the command: no cgroup v2 hierarchy is mounted: use "
        "-p, -u or --mntnsmap"
    )


LOCKDOWN = "/sys/kernel/security/lockdown"
NO_KPROBES = (
    "this kernel cannot trace: it has no kprobes and rejects fexit programs (it needs "
    "CONFIG_KPROBES and CONFIG_BPF_EVENTS); in a container or a microVM, run it on the "
    "host"
)


@pytest.fixture
def kernel(shared, monkeypatch, tmp_path):
    """What explain() looks at: lockdown and kprobes; a test changes it."""
    kernel = SimpleNamespace(
        lockdown=tmp_path / "lockdown", kprobes=tmp_path / "kprobe"
    )
    kernel.lockdown.write_text("[none] integrity confidentiality\n")
    kernel.kprobes.touch()
    monkeypatch.setattr(shared, "LOCKDOWN", str(kernel.lockdown))
    monkeypatch.setattr(shared, "KPROBES", [str(tmp_path / "no"), str(kernel.kprobes)])
    return kernel


FAILURES = {"fexit": "no such function", "kprobe": "Operation not permitted"}


def test_why_nothing_can_be_traced(shared, kernel):
    assert shared.explain(FAILURES) == (
        "cannot trace: fexit: no such function; kprobe: Operation not permitted "
        "(see tcptools(7), DIAGNOSTICS)"
    )
    kernel.lockdown.unlink()
    assert shared.explain(FAILURES).startswith("cannot trace: fexit: ")
    kernel.kprobes.unlink()
    assert shared.explain(FAILURES) == NO_KPROBES


def test_lockdown(shared, kernel):
    kernel.lockdown.write_text("none integrity [confidentiality]\n")
    message = (
        "kernel lockdown (confidentiality) does not allow this: "
        "see tcptools(7), Permission"
    )
    assert shared.explain(FAILURES) == message
    kernel.lockdown.write_text("none [integrity] confidentiality\n")
    assert shared.explain(FAILURES) != message


def test_no_btf_and_headers(shared, kernel):
    assert shared.explain({"headers": "unknown type name 'x'"}) == (
        "no usable BTF (/sys/kernel/btf/vmlinux) and no kernel headers that compile: "
        "install linux-headers-$(uname -r) (Debian, Ubuntu), linux-headers-rpi-v8 or "
        "raspberrypi-kernel-headers (Raspberry Pi OS), kernel-devel-$(uname -r) "
        "(Fedora, RHEL), kernel-default-devel (openSUSE) or linux-headers (Arch)"
    )


def test_method_that_this_kernel_does_not_offer(shared, kernel, monkeypatch):
    monkeypatch.setenv("TCPTOOLS_METHOD", "fexit")
    assert shared.explain({}) == (
        "this kernel does not offer TCPTOOLS_METHOD=fexit: unset it"
    )


def test_first_error_of_the_compiler(shared):
    said = "a.c:1:2: warning: w\na.c:3:4: error: first\n1 error:\nerror: second\n"
    assert shared.reason(Exception("Failed to compile"), said) == "first"
    error = Exception("Failed to load")
    assert shared.reason(error, "warning: w\n") == "Failed to load"


def test_kernel_that_cannot_trace(name, tool):
    if any(map(os.path.exists, tool.KPROBES)):
        pytest.skip("this machine's kernel has kprobes")
    if os.geteuid() != 0:
        pytest.skip("needs root")
    done = run(name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{name}: error: {NO_KPROBES}\n"


def test_ebpf_prints_the_program(name, tool):
    options = ["-p", "181,182", "-P", "80", "-u", "0,nobody", "-6", "-U"]
    done = run(name, "--ebpf", *options)
    nobody = pwd.getpwnam("nobody").pw_uid
    assert (done.returncode, done.stderr) == (0, "")
    task = "u32 x = bpf_get_current_pid_tgid() >> 32; (x == 181u || x == 182u)"
    user = f"u32 x = bpf_get_current_uid_gid(); (x == 0u || x == {nobody}u)"
    both = " && ".join(f"({{ {one} && !(0); }})" for one in (task, user))
    assert f"#define TASK_FILTER {both}\n" in done.stdout
    flow = "ip == 6 && ({ u32 x = port; (x == 80u) && !(0); })"
    assert f"#define FLOW_FILTER {flow}\n" in done.stdout
    bare = run(name, "--ebpf", "-t", "-T", "-b", "8").stdout
    assert "#define TASK_FILTER true\n#define FLOW_FILTER true\n" in bare
    assert f"#define EVENT_SIZE {tool.event_struct(parse(tool)).size}\n" in bare


def test_ebpf_without_root():
    """It reads no more than BTF, which everyone may."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become nobody")
    done = run("tcpconnect", "--ebpf", user=65534, group=65534)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("tcpconnect", "--ebpf").stdout
