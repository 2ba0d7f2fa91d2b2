"""Whose connections: -a, -n, --unit, and counts per interval."""

import argparse
import errno
import ipaddress
import os
import re
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import parse
from hypothesis import given, settings
from hypothesis import strategies as st
from test_arguments import has_mounts, usage_error

ADDRESS = "argument -a/--addr: "
NO_NETWORK = "does not appear to be an IPv4 or IPv6 network"
NETWORKS_OF_NONE = ("10.0.0.0/33", "10.1", "example.com")
NAME = "argument -n/--name: "


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("2001:db8::/33", "2001:db8::/33"),
        ("::1", "::1/128"),
        ("::ffff:192.0.2.7", "192.0.2.7/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("::/0", "::/0"),
    ],
)
def test_networks(shared, text, network):
    """An address is a network of one; IPv4 in IPv6 is IPv4."""
    assert shared.network(text) == (True, ipaddress.ip_network(network))
    assert shared.network(f"!{text}") == (False, ipaddress.ip_network(network))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("-a 10.0.0.1/8", "10.0.0.1/8 has host bits set"),
        ("-a !10.0.0.1/30", "10.0.0.1/30 has host bits set"),
        ("-a ::ffff:10.0.0.1/104", "::ffff:"),
        *((f"-a {text}", f"{text!r} {NO_NETWORK}") for text in NETWORKS_OF_NONE),
        ("-a fe80::%eth0/64", "'fe80::%eth0/64' has an interface, "),
        ("-a fe80::1%eth0", "'fe80::1%eth0' has an interface, which the filter "),
        ("-a !!::1", f"'!::1' {NO_NETWORK}"),
        ("-a ::1,", f"'' {NO_NETWORK}"),
        ("-4 -a 10.0.0.0/8,::1", "::1/128 is not IPv4: drop it, or -4"),
        ("-4 -a !2001:db8::/32", "2001:db8::/32 is not IPv4"),
        ("-6 -a 192.0.2.7", "192.0.2.7/32 is not IPv6: drop it, or -6"),
        ("-6 -a ::ffff:192.0.2.7", "192.0.2.7/32 is not IPv6"),
        ("-a ::1,!::1", "both ::1 and !::1: drop one"),
    ],
)
def test_networks_that_are_refused(shared, capfd, words, error):
    assert usage_error(shared, capfd, *words.split()).startswith(f"{ADDRESS}{error}")


def test_how_many_networks(shared, capfd):
    most = ",".join(f"10.0.0.{n}" for n in range(64))
    assert len(parse(shared, "-a", most).addr) == 64
    error = usage_error(shared, capfd, "-a", f"{most},::1")
    assert error == f"{ADDRESS}too many values: 65 (maximum 64)"


def filters(shared, text, version):
    """C text of the filter that -a makes for an IP version."""
    networks = shared.list_of(shared.network)(text)
    return shared.address_filter(networks, version)


def test_text_of_networks(shared):
    """In network order, so as they are in memory; the longest prefix comes first."""
    ten, eleven = struct.unpack("=II", bytes([10, 0, 0, 0, 10, 11, 0, 0]))
    masks = struct.unpack("=II", bytes([255, 0, 0, 0, 255, 255, 0, 0]))
    assert filters(shared, "10.0.0.0/8,!10.11.0.0/16", 4) == (
        f"((addr->word[0] & {masks[1]}u) == {eleven}u ? 0 : "
        f"((addr->word[0] & {masks[0]}u) == {ten}u ? 1 : 0))"
    )
    assert filters(shared, "10.0.0.0/8", 6) == "0"
    assert filters(shared, "!10.0.0.0/8", 6) == "1"
    assert filters(shared, "::/0", 6) == "(1 ? 1 : 0)"


def networks_of(version):
    """(whether it is wanted, network): half of them in 10.0.0.0/12 or 2001:db8::/44."""
    size, base, length = {
        4: (32, 10 << 24, 12),
        6: (128, 0x20010DB8 << 96, 44),
    }[version]
    near = st.integers(0, (1 << (size - length)) - 1).map(lambda bits: base | bits)
    address = near | st.integers(0, (1 << size) - 1)
    network = st.tuples(address, st.integers(0, size)).map(
        lambda pair: ipaddress.ip_network(
            (pair[0].to_bytes(size // 8, "big"), pair[1]), strict=False
        )
    )
    return st.tuples(st.booleans(), network), address


@pytest.mark.parametrize("version", [4, 6])
def test_any_networks(shared, tmp_path, version):
    """What the C text says of an address is what the longest prefix does."""
    network, address = networks_of(version)
    cases = []

    @settings(deadline=None, max_examples=17, database=None)
    @given(
        st.lists(network, min_size=1, max_size=16, unique_by=lambda item: item[1]),
        st.lists(address, min_size=1, max_size=16),
    )
    def collect(networks, addresses):
        ends = [int(net[end]) for _, net in networks for end in (0, -1)]
        size = networks[0][1].max_prefixlen // 8
        every = {
            ((end + by) % (1 << 8 * size)).to_bytes(size, "big")
            for end in (*ends, *addresses)
            for by in (-1, 0, 1)
        }
        cases.append((networks, every))

    collect()
    checks, wanted = [], []
    for networks, every in cases:
        test = shared.address_filter(networks, version)
        for packed in sorted(every):
            words = struct.unpack(f"={len(packed) // 4}I", packed)
            array = ", ".join(f"{word}u" for word in words)
            checks.append(f"addr = &(struct addr_t){{{{ {array} }}}};")
            checks.append(f"putchar(({test}) + 48);")
            wanted.append(longest_match(networks, ipaddress.ip_address(packed)))
    assert False in wanted and True in wanted
    declared = "struct addr_t { unsigned word[4]; } *addr;"
    said = printed(tmp_path, declared, checks)
    assert said == "".join(str(int(one)) for one in wanted)


def printed(tmp_path, declared, statements):
    """What a C program prints."""
    source = tmp_path / "check.c"
    body = "\n".join(statements)
    source.write_text(
        f"#include <stdio.h>\n{declared}\nint main(void) {{\n{body}\nreturn 0; }}"
    )
    subprocess.run(["gcc", "-w", "-o", tmp_path / "check", source], check=True)
    return subprocess.check_output([tmp_path / "check"], text=True)


def longest_match(networks, address):
    """Whether -a wants an address. No two networks are the same."""
    found = [(net.prefixlen, wanted) for wanted, net in networks if address in net]
    return max(found)[1] if found else not any(wanted for wanted, _ in networks)


def test_any_ranges(shared, tmp_path):
    """What the C text says of a number is what Python's ranges do."""
    number = st.integers(0, 99) | st.integers(0, 4294967294)
    ends = st.tuples(number, number).map(sorted) | number.map(lambda one: [one] * 2)
    checks, wanted = [], []

    @settings(deadline=None, max_examples=71, database=None)
    @given(st.lists(st.tuples(st.booleans(), ends), min_size=1, max_size=9))
    def collect(parts):
        text = ",".join(
            f"{'' if is_wanted else '!'}{first}{f'-{last}' if last > first else ''}"
            for is_wanted, (first, last) in parts
        )
        ranges = {True: [], False: []}
        for is_wanted, (first, last) in parts:
            ranges[is_wanted].append(range(first, last + 1))
        try:
            found = shared.list_of(shared.range_of(shared.user))(text)
        except argparse.ArgumentTypeError as error:
            assert str(error).endswith(": drop one")
            assert any(one in ranges[False] for one in ranges[True])
            return
        test = shared.in_ranges("number", found)
        numbers = {
            max(0, end + by) for _, both in parts for end in both for by in (-1, 0, 1)
        }
        for one in sorted(numbers):
            checks.append(f"number = {one}u; putchar({test} + 48);")
            is_in = {kind: any(one in r for r in ranges[kind]) for kind in ranges}
            wanted.append((is_in[True] or not ranges[True]) and not is_in[False])

    collect()
    assert False in wanted and True in wanted
    said = printed(tmp_path, "typedef unsigned u32; u32 number;", checks)
    assert said == "".join(str(int(one)) for one in wanted)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("systemd-resolved", "'systemd-resolve'"),
        ("!systemd-resolved", "'!systemd-resolve'"),
        ("\u00e9" * 8, f"'{chr(0xE9) * 7}\\udcc3'"),
    ],
)
def test_names_that_are_too_long(shared, capfd, text, cut):
    why = f"{text!r} is longer than 15 bytes: use {cut}"
    assert usage_error(shared, capfd, "-n", text) == f"{NAME}{why}"


@pytest.mark.parametrize("text", ["", "!"])
def test_no_name(shared, capfd, text):
    assert usage_error(shared, capfd, "-n", text) == f"{NAME}{text!r} is no name"


@pytest.mark.parametrize("text", ["a", "a" * 15, "tmux: server", '"; x', "\udcff"])
def test_name_in_the_c_program(shared, text):
    """It is two numbers there."""
    macros = shared.filter_macros(parse(shared, "-n", text))
    found = re.fullmatch(
        r"\(\(x\)\[0\] == (\d+)ull && \(x\)\[1\] == (\d+)ull\)",
        macros["NAME(x)"],
    )
    comm = struct.pack("=QQ", *map(int, found.groups()))
    assert comm == os.fsencode(text).ljust(16, b"\0")
    assert macros["TASK_FILTER"] == "has_name()"
    others = shared.filter_macros(parse(shared, "-n", f"!{text}"))
    assert others == {**macros, "TASK_FILTER": "!has_name()"}


ID = "3f2a9c41d0b7" + 26 * "7e"
USERS = "/user.slice/user-1000.slice/user@1000.service"


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/", "-"),
        ("/init.scope", "init.scope"),
        ("/system.slice", "system.slice"),
        ("/system.slice/nginx.service", "nginx.service"),
        ("/system.slice/nginx.service/worker", "nginx.service"),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        ("/user.slice/user-1000.slice/user@1000.service", "user@1000.service"),
        (
            "/user.slice/user-1000.slice/user@1000.service/a.service",
            "user@1000.service",
        ),
        (f"/system.slice/docker-{ID}.scope", "docker-3f2a9c41d0b7"),
        (f"/machine.slice/libpod-{ID}.scope/container", "libpod-3f2a9c41d0b7"),
        (f"/docker/{ID}", "3f2a9c41d0b7"),
        *(
            (f"{top}{below}", unit)
            for below in ("", "/init.scope", "/system.slice/sshd.service/a.scope")
            for top, unit in (
                (f"/docker/{ID}", "3f2a9c41d0b7"),
                (f"/system.slice/docker-{ID}.scope", "docker-3f2a9c41d0b7"),
                (f"/a.slice/a-b.slice/crio-{ID}.scope", "crio-3f2a9c41d0b7"),
                (f"/kubepods/besteffort/pod1/{ID}", "3f2a9c41d0b7"),
                (f"/machine.slice/libpod-{ID}.scope/container", "libpod-3f2a9c41d0b7"),
                (f"/system.slice/web.service/libpod-payload-{ID}", "web.service"),
                (f"/libpod-payload-{ID}", "libpod-payload-3f2a9c41d0b7"),
                ("/lxc.payload.web1", "lxc.payload.web1"),
                ("/lxc.payload/web1", "lxc.payload/web1"),
                ("/lxc/101/ns", "lxc/101"),
                ("/machine.slice/machine-web.scope/payload", "machine-web.scope"),
                ("/machine.slice/systemd-nspawn@a.service", "systemd-nspawn@a.service"),
                (f"{USERS}/user.slice/libpod-{ID}.scope", "user@1000.service"),
                (f"/docker/{ID}{USERS}", "3f2a9c41d0b7"),
            )
        ),
        (f"/kubepods.slice/cri-containerd-{ID}.scope", "cri-containerd-3f2a9c41d0b7"),
        (f"/docker/{ID[1:]}", f"docker/{ID[1:]}"),
        ("/runtime/7/system.slice/sshd.service", "runtime/7/system.slice/sshd.service"),
        ("/a\nb.service", "a\\nb.service"),
    ],
)
def test_unit_of_a_path(shared, path, unit):
    assert shared.unit_name(path) == unit


class Kernel:
    """Cgroups of a hierarchy that is mounted on a directory, by their numbers."""

    def __init__(self, shared, monkeypatch, top, *paths):
        self.top, self.opened = str(top), 0
        has_mounts(shared, monkeypatch, f"cgroup2 {top} cgroup2 rw 0 0\n")
        for path in paths:
            (top / path).mkdir(parents=True)
        monkeypatch.setattr(shared, "libc", self)
        forget(shared)

    def open_by_handle_at(self, mount_fd, handle, flags):
        """As in open_by_handle_at(2); an inode's number is the handle."""
        assert os.path.samestat(os.fstat(mount_fd), os.stat(self.top))
        assert flags == os.O_PATH
        length, kind, number = struct.unpack("=IiQ", bytes(handle))
        assert (length, kind) == (8, 0xFE)
        self.opened += 1
        for path, _, _ in os.walk(self.top):
            if os.stat(path).st_ino == number:
                return os.open(path, flags)
        return -1


def forget(shared):
    shared.cgroup_mount.cache_clear()
    shared.cgroup_path.cache_clear()


def test_path_of_a_cgroup(shared, monkeypatch, tmp_path):
    """By its number, and also when it is gone after that; each is looked for once."""
    kernel = Kernel(shared, monkeypatch, tmp_path, "system.slice/web.service", "gone")
    web, gone = tmp_path / "system.slice/web.service", tmp_path / "gone"
    numbers = [path.stat().st_ino for path in (web, tmp_path, gone)]
    gone.rmdir()
    known = ["/system.slice/web.service", "/", None]
    before = len(os.listdir("/proc/self/fd"))
    assert [shared.cgroup_path(number) for number in numbers] == known
    assert len(os.listdir("/proc/self/fd")) == before + 1
    units = ["web.service", "-", str(numbers[2])]
    assert [shared.unit(number) for number in numbers] == units
    web.rmdir()
    assert shared.cgroup_path(numbers[0]) == known[0]
    assert kernel.opened == 3


@pytest.fixture
def nested(tmp_path, monkeypatch):
    """Makes nested directories, and this process is in the innermost one."""
    made = []

    def nest(name, levels):
        monkeypatch.chdir(tmp_path)
        for _ in range(levels):
            os.mkdir(name)
            os.chdir(name)
            made.append(name)
        return os.stat(".").st_ino

    yield nest
    for name in made:
        os.chdir("..")
        os.rmdir(name)


def opens(shared, monkeypatch, path, top):
    """Whatever the number is, the kernel opens this path; cgroups are below `top`."""
    has_mounts(shared, monkeypatch, f"cgroup2 {top} cgroup2 rw 0 0\n")
    libc = SimpleNamespace(open_by_handle_at=lambda *_: os.open(path, os.O_PATH))
    monkeypatch.setattr(shared, "libc", libc)
    forget(shared)


def test_a_cgroup_whose_path_is_too_long(shared, monkeypatch, tmp_path, nested):
    """Whoever may make cgroups can make such a one."""
    nested("a" * 250, 17)
    opens(shared, monkeypatch, ".", tmp_path)
    assert (shared.cgroup_path(71), shared.unit(71)) == (None, "71")


def test_cgroups_nested_deeper_than_python_recurses(
    shared, monkeypatch, tmp_path, nested
):
    """As deep as a path can be, which os.walk() goes down to; and deeper."""
    limit = sys.getrecursionlimit()
    nested("a", 2100)
    try:
        assert shared.cgroups_named("web", [str(tmp_path)]) == []
    finally:
        sys.setrecursionlimit(limit)


def test_cgroup_outside_of_a_container(shared, monkeypatch, tmp_path):
    """The kernel opens it, at a path that is not below the mount."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "top").mkdir()
    opens(shared, monkeypatch, tmp_path / "outside", tmp_path / "top")
    assert (shared.cgroup_path(71), shared.unit(71)) == (None, "71")


def test_no_cgroup2_mounted(shared, monkeypatch, capfd):
    mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"
    has_mounts(shared, monkeypatch, mounts)
    assert usage_error(shared, capfd, "--unit") == (
        "argument --unit: no cgroup v2 hierarchy is mounted"
    )
    forget(shared)
    assert (shared.cgroup_path(71), shared.unit(71)) == (None, "71")


def test_cgroups_out_of_reach(shared, monkeypatch):
    def forbidden(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    has_mounts(shared, monkeypatch, "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")
    monkeypatch.setattr(shared.os, "open", forbidden)
    forget(shared)
    assert shared.cgroup_path(71) is None


@pytest.mark.parametrize("value", ["0", "86401", "0.5", "1s"])
def test_intervals_that_are_refused(shared, capfd, value):
    error = usage_error(shared, capfd, "-c", "-i", value)
    assert error == f"argument -i/--interval: not seconds (1 to 86400): {value!r}"


class Counting:
    """A fake of the kernel that counts by turns, and of the clock, in s."""

    def __init__(self, tool, monkeypatch, flow, ends):
        """flow: what is counted. ends: times at which wait() returns, the last one for
        the end.
        """
        self.flow = flow
        self.now, self.done, self.ends = 100.0, [], iter(ends)
        self.last, self.tool = ends[-1], tool
        self.maps = {"flows": 70, "odd_flows": 71, "interval": 72}
        monkeypatch.setattr(tool, "poller", lambda: "poll")
        monkeypatch.setattr(tool, "wait", self.wait)
        monkeypatch.setattr(tool, "map_update", self.map_update)
        monkeypatch.setattr(tool, "map_items", self.map_items)
        monkeypatch.setattr(tool, "write", self.done.append)
        monkeypatch.setattr(tool.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(tool.time, "sleep", self.sleep)
        monkeypatch.setattr(tool.time, "time", lambda: self.now)
        monkeypatch.setattr(tool.time, "localtime", lambda seconds: seconds)
        monkeypatch.setattr(tool.time, "strftime", "at {1} {0}".format)

    def wait(self, poll, ms):
        """POLL_MS at most, else as long as is left of the interval."""
        assert poll == "poll" and 0 < ms <= self.tool.POLL_MS
        self.now = next(self.ends)
        return self.now == self.last

    def sleep(self, seconds):
        self.done.append(f"sleep {seconds}")
        self.now += seconds

    def map_update(self, map_fd, key, value):
        assert (map_fd, key) == (72, bytes(4))
        self.done.append(f"interval {struct.unpack('=I', value)[0]}")

    def map_items(self, map_fd, command):
        """The flow, as often as the map's descriptor is; reading empties it."""
        assert command == 25  # BPF_MAP_LOOKUP_AND_DELETE_BATCH in linux/bpf.h
        return [(self.flow, struct.pack("=Q", map_fd))]


def counted(tool, monkeypatch, options, ends, *process):
    """What -c does, in order, with a blank line as "" and each row as its count."""
    args = parse(tool, "-c", *options.split())
    flow = tool.counted_struct(args).pack(80, 4, bytes(16), bytes(16), *process)
    counting = Counting(tool, monkeypatch, flow, ends)
    losses = SimpleNamespace(
        report=lambda: counting.done.append("losses"),
        report_total=lambda: counting.done.append("total"),
    )
    cgroups = SimpleNamespace(check=lambda: None)
    tool.print_counts(args, SimpleNamespace(maps=counting.maps), losses, cgroups)
    titles = tool.Table(args, tool.columns(args)).header
    lines = [text.replace(titles, "titles\n").rstrip("\n") for text in counting.done]
    return [line.split()[-1] if line[0:7] == "0.0.0.0" else line for line in lines]


def test_intervals(tool, monkeypatch):
    """The kernel counts in the other map, 20 ms later this one is read and emptied."""
    steps = counted(tool, monkeypatch, "-i 3", [100.2, 103.0, 103.2, 106.1, 107.0])
    assert steps == [
        *("titles", "interval 1", "sleep 0.02", "70", "losses", ""),
        *("titles", "interval 2", "sleep 0.02", "71", "losses", ""),
        *("titles", "70", "losses", "total"),
    ]


def test_intervals_in_which_the_tool_was_stopped(tool, monkeypatch):
    """Ctrl-Z: what it missed is one table, and the next ends when it would have."""
    steps = counted(tool, monkeypatch, "-i 3 -T", [110.5, 111.9, 112.0, 113.0])
    assert steps == [
        *("at 100.0 %H:%M:%S\ntitles", "interval 1", "sleep 0.02", "70", "losses", ""),
        *("at 110.5 %H:%M:%S\ntitles", "interval 2", "sleep 0.02", "71", "losses", ""),
        *("at 112.0 %H:%M:%S\ntitles", "70", "losses", "total"),
    ]


@pytest.mark.parametrize(
    ("option", "number", "pid"), [("", 0, ""), ("--per-process", 71, '"pid": 71, ')]
)
def test_counts_as_json(name, tool, monkeypatch, option, number, pid):
    """No titles and no blank lines; how long an interval was in fact, at least 1 s; the
    path of a cgroup, until it is gone.
    """
    process = number, b"b\xff", 4026531840, 91
    paths = iter(["/web", "/web", None])
    monkeypatch.setattr(tool, "cgroup_path", lambda number: {91: next(paths)}[number])
    monkeypatch.setattr(tool, "utc", "{} ns".format)
    ends = [100.2, 103.0, 110.6, 110.7]
    steps = counted(tool, monkeypatch, f"--json -T -i 3 {option}", ends, *process)

    def line(at, path, count, seconds):
        return (
            f'{{"ts": "{at}00000000 ns", "host": "{os.uname().nodename}", '
            f'"event": "{name[3:]}s", {pid}"process": "b\\\\xff", "ip": 4, '
            '"saddr": "0.0.0.0", "daddr": "0.0.0.0", "dport": 80, '
            f'"netns": 4026531840, "cgroup": 91{path}, "count": {count}, '
            f'"interval_s": {seconds}}}'
        )

    path = ', "cgroup_path": "/web"'
    assert steps == [
        *("interval 1", "sleep 0.02", line(1030, path, 70, 3), "losses"),
        *("interval 2", "sleep 0.02", line(1106, path, 71, 8), "losses"),
        *(line(1107, "", 70, 1), "losses", "total"),
    ]


def test_rows_of_processes(name, tool, monkeypatch):
    """With --per-process: by count, then port, addresses, and PID."""
    keys = [(256, b"b\nc"), (9, b"nginx"), (80, b"nginx")]
    args = parse(tool, "-c", "--per-process")
    record = tool.counted_struct(args)
    flow = 80, 4, bytes([10, 0, 0, 1]) * 4, bytes([10, 0, 0, 2]) * 4
    items = [
        (record.pack(*flow, *key), struct.pack("=Q", count))
        for key, count in zip(keys, (7, 7, 65537))
    ]
    written = []
    monkeypatch.setattr(tool, "map_items", lambda *_: items)
    monkeypatch.setattr(tool, "write", written.append)
    table = tool.Table(args, tool.columns(args))
    tool.write_flows(args, 71, table.count)
    between = {
        "tcpconnect": "10.0.0.1         10.0.0.2         80    ",
        "tcpaccept": "10.0.0.1         80    ",
    }[name]
    assert "".join(written) == (
        f"80      nginx        {between}65537\n"
        f"9       nginx        {between}7\n"
        f"256     b\\nc         {between}7\n"
    )
    assert table.header.startswith("PID     COMM         ")


def test_processes_with_which_options(shared):
    """struct process_t is there for those that need it, and for no other."""
    for words, has_process in (("", False), ("-U", False), ("--json", True)):
        text = shared.c_program(parse(shared, *words.split()), "kprobe", None)
        assert ("struct process_t {" in text) == has_process
        assert ("read_process_comm(" in text) == has_process
    for words in ("-n nginx", "-c --per-process"):
        text = shared.c_program(parse(shared, *words.split()), "kprobe", None)
        assert "read_process_comm(" in text and "struct process_t {" not in text
