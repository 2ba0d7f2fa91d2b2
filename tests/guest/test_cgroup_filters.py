"""Which processes: --cgroup, --cgroupmap and --mntnsmap."""

import os
import pathlib
import shlex
import subprocess

from conftest import (
    BTF,
    DEADLINE,
    TOP,
    Worker,
    best_method,
    failures,
    hidden,
    only_at_both_ends,
    row,
)
from traffic import connect_to_itself, leave_mount_namespace

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
        leave_mount_namespace()
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


def test_cgroups(start, cgroups):
    """A cgroup and all below it, several, by path, by the path below the mount point,
    and as a unit.
    """
    web = Group(cgroups / "system.slice" / "web.service", 3)
    below = Group(cgroups / "system.slice" / "web.service" / "worker", 5)
    near = Group(cgroups / "system.slice" / "web.service2", 2)
    other = Group(cgroups / "other", 7)
    outside = Group(cgroups, 11)
    by_path = f"--cgroup /system.slice/web.service/worker --cgroup {cgroups}"
    by_unit, several, whole = tools = start(
        "tcpconnect --cgroup web",
        f"tcpaccept --cgroup other {by_path}/system.slice/web.service2",
        f"tcpconnect --cgroup {cgroups}",
        TCPTOOLS_METHOD=best_method(),
    )
    web, below, near, other, outside = (
        group.rows() for group in (web, below, near, other, outside)
    )
    assert by_unit.stop() == web + below
    assert several.stop() == below + near + other
    assert whole.stop() == web + below + near + other + outside
    assert [tool.complaints() for tool in tools] == [[]] * 3


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
        tool.wait_for("/web.service was removed\n")
    second = Group(directory, 5)
    for tool in tools:
        tool.wait_for("/web.service was recreated; its first events were missed\n")
    outside.rows()
    rows += second.rows()
    assert connecting.stop() == rows
    ports = [line.split()[-1] for line in (rows[0], rows[-1])]
    assert counting.stop() == [
        f"127.0.0.1        {ports[1]:<5} 5",
        f"127.0.0.1        {ports[0]:<5} 3",
    ]


def test_maps(start, cgroups, bpffs):
    """As bcc's tools take them: what is in the map, not what is below it.

    Both together want both.
    """
    inside = Group(cgroups / "inside", 3)
    below = Group(cgroups / "inside" / "below", 5)
    elsewhere = Group(cgroups / "inside", 7, namespace=True)
    ids = [(cgroups / name).stat().st_ino for name in ("inside", "inside/below")]
    mntns = os.stat("/proc/self/ns/mnt").st_ino
    one = shlex.quote(str(make_map(bpffs / 'a "map"', ids=ids[:1])))
    both = make_map(bpffs / "both", ids=ids)
    here = make_map(bpffs / "here", value=4, ids=[mntns])
    tools = start(
        f"tcpaccept --cgroupmap {one}",
        f"tcpconnect --mntnsmap {here} --cgroupmap {both}",
        f"tcpaccept --mntnsmap {here} --cgroupmap {one}",
        TCPTOOLS_METHOD=best_method(),
    )
    inside, below, elsewhere = (g.rows() for g in (inside, below, elsewhere))
    wanted = [inside + elsewhere, inside + below, inside]
    assert [tool.stop() for tool in tools] == wanted
    assert [tool.complaints() for tool in tools] == [[]] * 3


def test_what_is_no_map_of_ids(bpffs):
    files = [
        make_map(bpffs / "short", key=4),
        make_map(bpffs / "array", kind="array", key=4),
        pathlib.Path("/etc/passwd"),
    ]
    commands = {
        f"{command} {file}": (command.split()[0], file)
        for command in ("tcpconnect --cgroupmap", "tcpaccept --mntnsmap")
        for file in files
    }
    assert failures(commands) == {
        command: f"{name}: error: {file} is not a pinned BPF hash map with 8-byte "
        "keys; create one with: bpftool map create FILE type hash key 8 value 8 "
        "entries 128 name ids\n"
        for command, (name, file) in commands.items()
    }


def test_mntnsmap_needs_btf(bpffs):
    command = f"tcpaccept --mntnsmap {make_map(bpffs / 'ids', value=4)}"
    with hidden("/sys/kernel/btf"):
        said = failures([command])
    error = f"tcpaccept: error: --mntnsmap needs the kernel's BTF ({BTF})\n"
    assert said == {command: error}


def test_a_unit_that_needs_a_path(cgroups):
    directories = ("one", "two")
    for directory in directories:
        (cgroups / directory / "app.service").mkdir(parents=True)
    done = subprocess.run(
        [TOP / "tcpconnect", "--cgroup", "app"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    what = "'app' matches several cgroups; give a path: /"
    prefix = f"tcpconnect: error: argument --cgroup: {what}"
    assert error.startswith(prefix)
    assert all(f"/{directory}/app.service" in error for directory in directories)
