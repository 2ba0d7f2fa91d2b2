"""Which processes: --cgroup, --cgroupmap and --mntnsmap."""

import ctypes
import os
import pathlib
import subprocess
import time

import pytest
from conftest import (
    BTF,
    DEADLINE,
    TOOLS,
    TOP,
    Worker,
    best_method_only,
    hide,
    only_at_both_ends,
    row,
    show,
)
from test_kinds import CLONE_NEWNS, connect_to_itself

pytestmark = only_at_both_ends


def make_map(path, kind="hash", key=8, value=8, ids=()):
    """A pinned map as bcc's special_filtering guide makes it, with IDs; its path."""
    words = f"type {kind} key {key} value {value} entries 128 name ids flags 0"
    subprocess.run(["bpftool", "map", "create", str(path), *words.split()], check=True)
    for number in ids:
        update = ["bpftool", "map", "update", "pinned", str(path), "key", "hex"]
        pair = [number.to_bytes(key, "little").hex(" "), bytes(value).hex(" ")]
        words = [*pair[0].split(), "value", "hex", *pair[1].split()]
        subprocess.run([*update, *words], check=True)
    return path


def after(go, namespace, count):
    """Once signalled, connect and accept `count` times, in a mount namespace of its own
    or not; the port.
    """
    os.read(go, 1)
    if namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(CLONE_NEWNS) == 0
    return connect_to_itself(count)


class Group:
    """A process in this cgroup that connects to itself `count` times when signalled."""

    def __init__(self, directory, count, namespace=False):
        directory.mkdir(parents=True, exist_ok=True)
        reader, self.writer = os.pipe()
        self.worker = Worker(b"member", after, reader, namespace, count)
        (directory / "cgroup.procs").write_text(str(self.worker.pid))
        self.count = count

    def rows(self):
        """Let it go; its rows."""
        os.write(self.writer, b".")
        port = self.worker.report()
        pid = self.worker.pid
        return [row(pid, "member", 4, "127.0.0.1", "127.0.0.1", port)] * self.count


@best_method_only
def test_cgroups(start, cgroups, method):
    """A cgroup and all below it, several, by path, by the path below the mount point,
    and as a unit.
    """
    web = Group(cgroups / "system.slice" / "web.service", 3)
    below = Group(cgroups / "system.slice" / "web.service" / "worker", 5)
    near = Group(cgroups / "system.slice" / "web.service2", 2)
    other = Group(cgroups / "other", 7)
    outside = Group(cgroups, 11)
    by_unit, by_path, several, whole = tools = start(
        "tcpconnect --cgroup web",
        "tcpaccept --cgroup /system.slice/web.service/worker",
        f"tcpaccept --cgroup other --cgroup {cgroups}/system.slice/web.service2",
        f"tcpconnect --cgroup {cgroups}",
        TCPTOOLS_METHOD=method,
    )
    web, below, near, other, outside = (
        group.rows() for group in (web, below, near, other, outside)
    )
    assert by_unit.stop() == web + below
    assert by_path.stop() == below
    assert several.stop() == near + other
    assert whole.stop() == web + below + near + other + outside
    assert [tool.complaints() for tool in tools] == [[]] * 4


def wait_for(tool, text):
    """Wait until the tool has printed this on stderr."""
    deadline = time.monotonic() + DEADLINE
    while text not in tool.err.read_text():
        assert time.monotonic() < deadline, tool.err.read_text()
        time.sleep(0.05)


def test_a_service_that_restarts(start, cgroups):
    """Its cgroup goes, another comes at the same path: reported both times, and traced
    again.
    """
    directory = cgroups / "web.service"
    first, outside = Group(directory, 3), Group(cgroups, 2)
    connecting, counting = tools = start(
        "tcpconnect --cgroup web.service", "tcpaccept -c --cgroup web"
    )
    rows = first.rows()
    directory.rmdir()
    for tool in tools:
        wait_for(tool, "/web.service was removed\n")
    second = Group(directory, 5)
    for tool in tools:
        wait_for(tool, "/web.service was recreated; its first events were missed\n")
    outside.rows()
    rows += second.rows()
    assert connecting.stop() == rows
    ports = [line.split()[-1] for line in (rows[0], rows[-1])]
    assert counting.stop() == [
        f"127.0.0.1        {ports[1]:<5} 5",
        f"127.0.0.1        {ports[0]:<5} 3",
    ]


@best_method_only
def test_maps(start, cgroups, bpffs, method):
    """As bcc's tools take them: what is in the map, not what is below it.

    Both together want both.
    """
    inside = Group(cgroups / "inside", 3)
    below = Group(cgroups / "inside" / "below", 5)
    elsewhere = Group(cgroups / "inside", 7, namespace=True)
    ids = [(cgroups / name).stat().st_ino for name in ("inside", "inside/below")]
    mntns = os.stat("/proc/self/ns/mnt").st_ino
    one = make_map(bpffs / 'a "map"', ids=ids[:1])
    both = make_map(bpffs / "both", ids=ids)
    here = make_map(bpffs / "here", value=4, ids=[mntns])
    filters = [
        ["--cgroupmap", one],
        ["--mntnsmap", here, "--cgroupmap", both],
        ["--mntnsmap", here, "--cgroupmap", one],
    ]
    processes = [
        subprocess.Popen(
            [TOP / name, *options],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TCPTOOLS_METHOD": method},
        )
        for options in filters
        for name in TOOLS
    ]
    for process in processes:
        assert process.stdout.readline().startswith("PID ")
    inside, below, elsewhere = (g.rows() for g in (inside, below, elsewhere))
    wanted = [inside + elsewhere, inside + below, inside]
    for number, process in enumerate(processes):
        process.terminate()
        rows = process.communicate(timeout=DEADLINE)[0].splitlines()
        assert (number, process.returncode, rows) == (number, 0, wanted[number // 2])


@pytest.mark.parametrize("option", ["--cgroupmap", "--mntnsmap"])
def test_what_is_no_map_of_ids(bpffs, option):
    files = [
        make_map(bpffs / "short", key=4),
        make_map(bpffs / "array", kind="array", key=4),
        pathlib.Path("/etc/passwd"),
    ]
    for name in TOOLS:
        for file in files:
            done = subprocess.run(
                [TOP / name, option, file], capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr == (
                f"{name}: error: {file} is not a pinned BPF hash map with 8-byte keys; "
                "create one with: bpftool map create FILE type hash key 8 value 8 "
                "entries 128 name ids\n"
            )


def test_mntnsmap_needs_btf(bpffs):
    pinned = make_map(bpffs / "ids", value=4)
    hide("/sys/kernel/btf")
    try:
        done = subprocess.run(
            [TOP / "tcpaccept", "--mntnsmap", pinned],
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        show("/sys/kernel/btf")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"tcpaccept: error: --mntnsmap needs the kernel's BTF ({BTF})\n"
    )


def test_a_unit_of_two_names_nothing(cgroups):
    for directory in ("one", "two"):
        (cgroups / directory / "app.service").mkdir(parents=True)
    done = subprocess.run(
        [TOP / "tcpconnect", "--cgroup", "app"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith(
        "tcpconnect: error: argument --cgroup: "
        "'app' matches several cgroups; give a path: /"
    )
    assert all(f"/{directory}/app.service" in error for directory in ("one", "two"))
