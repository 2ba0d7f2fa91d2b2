"""Start the tools in a guest, and run workloads whose connections are known to the last
column.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import select
import shlex
import signal
import socket
import subprocess
import termios
import time
import traceback

import dnslib
import pytest

TOOLS = ("tcpconnect", "tcpaccept")
BTF = pathlib.Path("/sys/kernel/btf/vmlinux")
BPFFS = pathlib.Path("/sys/fs/bpf")
TOP = pathlib.Path(__file__).parents[2]
IPV4, IPV6 = "192.0.2.10", "2001:db8::10"  # on a dummy interface
NOBODY4, NOBODY6 = "192.0.2.99", "2001:db8::99"  # behind it, where nobody answers
HOSTS = {  # that the DNS server knows
    "www.example.com": ("A", IPV4),
    "six.example.com": ("AAAA", IPV6),
    "alias.example.com": ("CNAME", "www.example.net", IPV4),
}
# Seconds until what a test waits for is held to be stuck: a guard, not a measure
DEADLINE = 180


def pytest_sessionstart(session):
    """Kernel headers are hidden, where there are any."""
    add_addresses()
    if headers():
        hide(headers())


def pytest_configure(config):
    config.addinivalue_line("markers", "first: of FIRST; fails where time runs out")
    config.addinivalue_line("markers", "last: after all others")


# Time may run out (tests/run). The files that say most about a kernel come first; the
# one that takes as long as 40 other tests comes last.
FIRST = ("test_tools", "test_kinds", "test_outcomes", "test_trust")
FIRST += ("test_dns_responses", "test_processes", "test_blocked_before")
LATE = ("test_bcc",)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    def rank(item):
        is_last = item.get_closest_marker("last") is not None
        file = pathlib.Path(item.nodeid.partition("::")[0])
        if file.stem in FIRST:
            item.add_marker("first")
        return is_last, file.stem in LATE, file.stem not in FIRST

    items.sort(key=rank)


def add_addresses():
    """Addresses from the documentation ranges."""
    for command in (
        "link add docs0 type dummy",
        f"address add {IPV4}/24 dev docs0",
        f"address add {IPV6}/64 dev docs0 nodad",
        "link set docs0 up",
        f"neighbour replace {NOBODY4} lladdr 02:00:00:00:00:01 dev docs0",
        f"neighbour replace {NOBODY6} lladdr 02:00:00:00:00:01 dev docs0",
    ):
        subprocess.run(["ip", *command.split()], check=True)


def headers():
    """The directory in which this kernel's headers are, or None."""
    build = pathlib.Path(f"/lib/modules/{os.uname().release}/build")
    return (
        build.resolve()
        if (build / "include").exists() or build.is_symlink() and build.exists()
        else None
    )


@contextlib.contextmanager
def headers_shown():
    """If there are any, which are hidden otherwise."""
    if headers():
        show(headers())
    try:
        yield
    finally:
        if headers():
            hide(headers())


def hide(directory):
    subprocess.run(["mount", "-t", "tmpfs", "none", str(directory)], check=True)


def show(directory):
    subprocess.run(["umount", str(directory)], check=True)


@contextlib.contextmanager
def hidden(directory):
    hide(directory)
    try:
        yield
    finally:
        show(directory)


@contextlib.contextmanager
def changed_btf(tmp_path, change):
    """This kernel's BTF is change(its bytes)."""
    changed = tmp_path / "btf"
    changed.write_bytes(change(BTF.read_bytes()))
    subprocess.run(["mount", "--bind", changed, BTF], check=True)
    try:
        yield
    finally:
        show(BTF)


def btf_without(tmp_path, *names):
    """In this kernel's BTF these names are others of the same length."""

    def rename(text):
        for name in names:
            old, new = b"\0%b\0" % name.encode(), b"\0%b_\0" % name[1:].encode()
            assert text.count(old) == 1
            text = text.replace(old, new)
        return text

    return changed_btf(tmp_path, rename)


def best_method():
    """The method that misses nothing and costs least: Debian's kernels are preemptible
    since 7.
    """
    return "fexit" if int(os.uname().release.partition(".")[0]) < 7 else "kprobe"


def release():
    """Debian's name of this guest's release."""
    text = pathlib.Path("/etc/os-release").read_text()
    name = re.search(r"^VERSION_CODENAME=(\w+)", text, re.MULTILINE)[1]
    return name if name in ("bullseye", "bookworm", "trixie") else "sid"


def only_on(*releases):
    """A mark of what differs little between kernels: it is tested in these guests.

    Each start of a tool takes seconds of a CPU in a guest, and on some machines 30.
    """
    return pytest.mark.skipif(
        release() not in releases, reason=f"done on {' and '.join(releases)}"
    )


METHODS = ["fexit", "kprobe"]
both_methods_on_oldest = pytest.mark.parametrize(
    "method", METHODS if release() == "bullseye" else [best_method()]
)

# The oldest kernel, where the best method is fexit, and the newest, where it is kprobe
only_at_both_ends = only_on("bullseye", "sid")


def probed_functions():
    """The kernel functions that have a kprobe."""
    lines = pathlib.Path("/sys/kernel/debug/kprobes/list").read_text().splitlines()
    return {line.split()[2].partition("+")[0] for line in lines}


class Tool:
    """A tool that is starting.

    Its output goes to files, so that it never waits for this reader, or to a pipe.
    """

    def __init__(self, directory, command, pipe=None, wrapper=(), **options):
        name, *args = shlex.split(command)
        self.out, self.err, self.pipe = directory / "out", directory / "err", pipe
        self.titles = 0 if "--json" in args else 1
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [*wrapper, TOP / name, *args], stdout=pipe or out, stderr=err, **options
            )

    def has_header(self):
        if self.pipe:
            return fcntl.ioctl(self.pipe, termios.FIONREAD, bytes(4)) != bytes(4)
        if not self.titles:
            return ": tracing\n" in self.err.read_text()
        return b"\n" in self.out.read_bytes()

    def wait_for_header(self):
        def is_there():
            assert self.process.poll() is None, self.err.read_text()
            return self.has_header()

        until("the header", is_there)

    def wait_for(self, text):
        """Until it has printed this on stderr."""
        until(f"{text!r} on stderr", lambda: text in self.err.read_text())

    def rows(self):
        """What it has printed below the header."""
        return self.out.read_text().splitlines()[self.titles :]

    def end(self, signum=signal.SIGINT):
        self.process.send_signal(signum)
        assert self.process.wait(DEADLINE) == 0, self.err.read_text()

    def stop(self, signum=signal.SIGINT):
        """Its rows, after it has exited with status 0."""
        self.end(signum)
        return self.rows()

    def method(self):
        """Its attach method: fexit, kprobe or headers."""
        return next(
            line.split()[1].rstrip(":")
            for line in self.err.read_text().splitlines()
            if "attached" in line
        )

    def complaints(self):
        """What it printed on stderr beside what TCPTOOLS_DEBUG makes it print."""
        said = self.err.read_text().splitlines()
        debug = re.compile(r"tcp\w+: ((fexit|kprobe|headers): |tracing$)")
        return [
            line for line in said if line.startswith("tcp") and not debug.match(line)
        ]


def failures(commands=TOOLS, wrapper=(), **options):
    """{command: what it prints on stderr} where all should exit with status 1.

    They print nothing on stdout.
    """
    processes = {
        command: subprocess.Popen(
            [*wrapper, TOP / name, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        for command in commands
        for name, *args in [shlex.split(command)]
    }
    said = {}
    for command, process in processes.items():
        out, said[command] = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out) == (1, "")
        assert said[command].count("\n") == 1
    return said


@pytest.fixture
def start(tmp_path):
    """start(*commands, options={}, **environment) gives a tracing Tool for each command
    line.

    None outlives the test. options: Tool's own, or subprocess.Popen's.
    """
    tools = []

    def start_tools(*commands, options=(), **env):
        new = []
        for command in commands:
            directory = tmp_path / f"tool{len(tools)}"
            directory.mkdir()
            environment = {**os.environ, "TCPTOOLS_DEBUG": "1", **env}
            new.append(Tool(directory, command, env=environment, **dict(options)))
            tools.append(new[-1])
        for tool in new:
            tool.wait_for_header()
        return new

    yield start_tools
    for tool in tools:
        if tool.process.poll() is None:
            tool.process.kill()
            tool.process.wait()


@contextlib.contextmanager
def running(directories, commands, **env):
    """{key: Tool} of {key: (command, method)}, all tracing with that method.

    In the end none has complained.
    """
    tools = {}
    for key, (command, method) in commands.items():
        environment = {
            **os.environ,
            **env,
            "TCPTOOLS_METHOD": method,
            "TCPTOOLS_DEBUG": "1",
        }
        tools[key] = Tool(directories.mktemp("tool"), command, env=environment)
    for tool in tools.values():
        tool.wait_for_header()
    wanted = [method for _, method in commands.values()]
    assert [tool.method() for tool in tools.values()] == wanted
    yield tools
    for tool in tools.values():
        tool.end()
        assert tool.complaints() == []


def until(what, there_is):
    """What there_is() gives, once it gives anything. what: for whom it does not."""
    deadline = time.monotonic() + DEADLINE
    while True:
        began = time.monotonic()
        if found := there_is():
            return found
        assert began < deadline, f"waited {DEADLINE} s for {what}"
        # A look takes the CPU from what is waited for
        time.sleep(max(0.1, time.monotonic() - began))


def read_byte(descriptor, what):
    """Wait for a worker that writes a byte when it is ready."""
    is_ready = select.select([descriptor], [], [], DEADLINE)[0]
    assert is_ready, f"waited {DEADLINE} s for {what}"
    os.read(descriptor, 1)


def rows_until(tool, begin, marker):
    """The rows of a running tool from number `begin` on, up to a row of the process
    `marker`, which must come.
    """

    def rows_if_marked():
        rows = tool.rows()
        return rows if rows and rows[-1].startswith(f"{marker:<7} ") else None

    return until("the marker's row", rows_if_marked)[begin:-1]


def first_line(process, what):
    """Of what a process prints into a pipe."""
    is_ready = select.select([process.stdout], [], [], DEADLINE)[0]
    assert is_ready, f"waited {DEADLINE} s for {what}"
    return process.stdout.readline()


@contextlib.contextmanager
def mounted_cgroups(top):
    """Mount the cgroups (v2) on a directory; in the end, what is made below goes."""
    subprocess.run(["mount", "-t", "cgroup2", "none", str(top)], check=True)
    before = {path for path in top.rglob("*") if path.is_dir()}
    try:
        yield top
    finally:
        made = {path for path in top.rglob("*") if path.is_dir()} - before
        for directory in sorted(made, reverse=True):
            directory.rmdir()
        show(top)


@pytest.fixture
def cgroups(tmp_path):
    """Where the cgroups (v2) are, with what tests make below removed in the end."""
    top = tmp_path / "cgroup2"
    top.mkdir()
    with mounted_cgroups(top):
        yield top


@pytest.fixture
def bpffs():
    """Where maps are pinned."""
    if not BPFFS.is_mount():
        subprocess.run(["mount", "-t", "bpf", "none", str(BPFFS)], check=True)
    before = set(BPFFS.iterdir())
    yield BPFFS
    for pinned in set(BPFFS.iterdir()) - before:
        pinned.unlink()


class Worker:
    """A process named comm that runs function(*args); report() waits for its end and
    gives what it returned.
    """

    def __init__(self, comm, function, *args):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reader)
            run_worker(comm, writer, function, *args)
        os.close(writer)
        self.pipe = reader

    def report(self, seconds=DEADLINE):
        """One that takes longer fails, and the message shows what it waits for."""
        if not select.select([self.pipe], [], [], seconds)[0]:
            os.kill(self.pid, signal.SIGALRM)
        with open(self.pipe) as pipe:
            text = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        assert status == 0, f"the worker failed: {text}"
        return json.loads(text)


def run_worker(comm, writer, function, *args):
    """Run a worker's function, write what it returns or its traceback, and exit."""
    text, status = "", 1
    try:
        signal.signal(signal.SIGALRM, give_up)
        pathlib.Path("/proc/self/comm").write_bytes(comm)
        text, status = json.dumps(function(*args)), 0
    finally:
        os.write(writer, (text or traceback.format_exc()).encode())
        os._exit(status)


def give_up(*_):
    raise AssertionError("the worker takes too long")


def json_line(event, pid, uid, comm, ip, ends, cgroup, **fields):
    """An object of --json but its time, of a child of this process. ends: saddr, sport,
    daddr and dport. cgroup: its inode and path.
    """
    return {
        "host": os.uname().nodename,
        "event": event,
        "pid": pid,
        "tid": pid,
        "uid": uid,
        "comm": comm,
        "process": comm,
        "ppid": os.getpid(),
        "parent": own_comm(),
        "ip": ip,
        **dict(zip(("saddr", "sport", "daddr", "dport"), ends)),
        "netns": os.stat("/proc/self/ns/net").st_ino,
        **dict(zip(("cgroup", "cgroup_path"), cgroup)),
        **fields,
    }


def json_count(event, process, address, port, cgroup, count, **fields):
    """An object of -c --json, but its time and the interval's, of connections from an
    address to itself. cgroup: its inode and path.
    """
    return {
        "host": os.uname().nodename,
        "event": event,
        "process": process,
        "ip": 6 if ":" in address else 4,
        **dict.fromkeys(("saddr", "daddr"), address),
        "dport": port,
        "netns": os.stat("/proc/self/ns/net").st_ino,
        **dict(zip(("cgroup", "cgroup_path"), cgroup)),
        "count": count,
        **fields,
    }


def json_counts(tool):
    """The lines of -c --json of a tool that ends now. All have the same time, which has
    its form, and the same interval.
    """
    lines = [json.loads(line) for line in tool.rows()]
    assert len({(line["ts"], line["interval_s"]) for line in lines}) == 1
    for line in lines:
        stamp, seconds = line.pop("ts"), line.pop("interval_s")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
        assert 1 <= seconds == int(seconds)
    return lines


def own_comm():
    return pathlib.Path("/proc/self/comm").read_text().rstrip("\n")


def response_to(question):
    """The DNS response (bytes) to a question: what HOSTS has, or an empty one."""
    query = dnslib.DNSRecord.parse(question)
    reply = query.reply()
    name = str(query.q.qname).rstrip(".")
    kind, *data = HOSTS.get(name, ("",))
    if kind == "CNAME":
        alias, address = data
        reply.add_answer(*dnslib.RR.fromZone(f"{name}. 60 CNAME {alias}."))
        reply.add_answer(*dnslib.RR.fromZone(f"{alias}. 60 A {address}"))
    elif dnslib.QTYPE[query.q.qtype] == kind:
        reply.add_answer(*dnslib.RR.fromZone(f"{name}. 60 {kind} {data[0]}"))
    return reply.pack()


def serve_names(servers):
    """Answer over IPv4 and IPv6, until killed.

    A question for nonsense gets nonsense.
    """
    while True:
        for server in select.select(servers, [], [])[0]:
            question, client = server.recvfrom(4096)
            is_nonsense = b"nonsense" in question
            response = bytes(range(7, 77)) if is_nonsense else response_to(question)
            server.sendto(response, client)


@pytest.fixture
def names():
    """A DNS server on this guest's port 53, which its resolver asks."""
    servers = [
        socket.socket(family, socket.SOCK_DGRAM)
        for family in (socket.AF_INET, socket.AF_INET6)
    ]
    for server, address in zip(servers, ("127.0.0.1", "::1")):
        server.bind((address, 53))
    worker = Worker(b"names", serve_names, servers)
    for server in servers:
        server.close()
    resolver = pathlib.Path("/etc/resolv.conf")
    before = resolver.read_text() if resolver.exists() else ""
    resolver.write_text("nameserver 127.0.0.1\nnameserver ::1\noptions timeout:30\n")
    yield
    resolver.write_text(before)
    os.kill(worker.pid, 9)
    os.waitpid(worker.pid, 0)


def row(pid, comm, ip, address, other, port):
    """A row as the tools print it: the seed's layout."""
    return f"{pid:<7} {comm:<12} {ip:<2} {address:<16} {other:<16} {port}"
