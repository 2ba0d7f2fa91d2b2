"""What the tools promise under load, faults and strange surroundings.

Every count of connections is a prime number.
"""

import collections
import ctypes
import errno
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import threading
import time

import pytest
from conftest import (
    DEADLINE,
    IPV4,
    NOBODY4,
    NOBODY6,
    TOOLS,
    TOP,
    Worker,
    best_method,
    both_methods_on_oldest,
    failures,
    only_at_both_ends,
    only_on,
    probed_functions,
    row,
    until,
)
from traffic import (
    LINGER_0,
    connect_nonblocking,
    connect_refused,
    connect_to_itself,
    listener,
    lost,
    on_cpu,
    port_of,
    run_mixed_traffic,
)

FITTING = 9362  # events of 112 bytes in one CPU's buffer of 1 MiB


@both_methods_on_oldest
def test_many_processes_connect_concurrently(start, method):
    """More of them than a kretprobe has slots, each preempted anywhere.

    Where a kernel skips an fexit program, that is reported.
    """
    (tool,) = start("tcpconnect", TCPTOOLS_METHOD=method)
    processes, each = 61, 31
    targets = [NOBODY4, NOBODY6]
    workers = [
        Worker(b"many", connect_nonblocking, i % 2, targets[i % 2], each)
        for i in range(processes)
    ]
    for worker in workers:
        worker.report()
    rows = tool.stop()
    if method == best_method():
        assert tool.complaints() == []
        pids = [int(line.split()[0]) for line in rows]
        assert all(pids.count(worker.pid) == each for worker in workers)
    assert len(rows) + lost(tool) == processes * each


NO_ROUTE6 = "2001:db8:ffff::1"


def client_errno(family, address, port):
    with socket.socket(family) as client:
        return client.connect_ex((address, port))


def fail_often(go, port, count):
    os.read(go, 1)
    for _ in range(count):
        assert client_errno(socket.AF_INET, IPV4, port) == errno.ECONNREFUSED
        assert client_errno(socket.AF_INET6, NO_ROUTE6, port) == errno.ENETUNREACH


@both_methods_on_oldest
def test_many_processes_fail_concurrently(start, method):
    """61 processes on 2 CPUs: each failure is a row, or reported as lost."""
    port = connect_refused(IPV4)
    (tool,) = start("tcpconnect -x", TCPTOOLS_METHOD=method)
    reader, writer = os.pipe()
    workers = [Worker(b"client", fail_often, reader, port, 53) for _ in range(61)]
    os.write(writer, bytes(61))
    for worker in workers:
        worker.report()
    rows = tool.stop()
    kinds = (
        f" 4  {IPV4:<16} {IPV4:<16} {port:<5} ECONNREFUSED",
        f" 6  {'::':<16} {NO_ROUTE6:<16} {port:<5} ENETUNREACH",
    )
    assert all(line.endswith(kinds) for line in rows)
    for worker in workers:
        own = [line for line in rows if line.startswith(f"{worker.pid:<7} ")]
        assert all(sum(line.endswith(kind) for line in own) <= 53 for kind in kinds)
    # One that is skipped at its call and at its return counts twice
    assert len(rows) <= 6466 <= len(rows) + lost(tool)
    if int(os.uname().release.partition(".")[0]) < 7 and method == "fexit":
        assert len(rows) == 6466


def refused_often(cpu, port, count):
    """Connect so often to where nobody listens."""
    os.sched_setaffinity(0, {cpu})
    for _ in range(count):
        assert client_errno(socket.AF_INET, IPV4, port) == errno.ECONNREFUSED


def reset_often(server, count):
    """Have so many connections reset by the server after they are established."""
    for _ in range(count):
        with socket.create_connection(server.getsockname()) as client:
            peer, _ = server.accept()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
            peer.close()
            with pytest.raises(ConnectionResetError):
                client.recv(1)


def test_softirq_on_top_of_a_program(start):
    """While our program runs, a softirq may bring the next event to the same CPU.

    Each outcome is a row. On a preemptible kernel both programs may be skipped for one:
    it is counted as lost, and nothing else is.
    """
    port = connect_refused(IPV4)
    (tool,) = start("tcpconnect -l", TCPTOOLS_METHOD=best_method())
    failing = [Worker(b"client", refused_often, cpu, port, 4999) for cpu in (0, 1)]
    server = listener(socket.AF_INET, IPV4)
    resetting = Worker(b"client", reset_often, server, 2503)
    for worker in (*failing, resetting):
        worker.report()
    ends = [(worker, f"{port:<5} ECONNREFUSED", 4999) for worker in failing]
    ends.append((resetting, f"{server.getsockname()[1]:<5} -", 2503))
    expected = {
        row(worker.pid, "client", 4, IPV4, IPV4, last): count
        for worker, last, count in ends
    }
    rows = [line.rsplit(maxsplit=1)[0].rstrip() for line in tool.stop()]
    seen = collections.Counter(rows)
    if best_method() == "kprobe":  # preemptible
        print(f"{lost(tool)} of 12501 outcomes were lost")
        assert all(seen[line] <= count for line, count in expected.items())
        assert set(seen) <= set(expected)
        assert len(rows) + lost(tool) == 12501
    else:
        assert (seen, tool.complaints()) == (expected, [])


def refused_nonblocking(port, count):
    for _ in range(count):
        with socket.socket() as client:
            client.setblocking(False)
            assert client.connect_ex((IPV4, port)) == errno.EINPROGRESS
            select.select([], [client], [])


@only_at_both_ends
@both_methods_on_oldest
def test_outcomes_that_are_missed(start, tmp_path, method):
    """A bcc that attaches nothing to the tracepoint, as if the kernel skipped both
    programs each time. Two connects have no outcome when the tool ends.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from bcc.libbcc import lib\n"
        "lib.bpf_attach_raw_tracepoint = lambda program_fd, name: os.dup(program_fd)\n"
    )
    environment = {"TCPTOOLS_METHOD": method, "PYTHONPATH": str(tmp_path)}
    (tool,) = start("tcpconnect -l", **environment)
    port = connect_refused(IPV4)
    Worker(b"client", refused_often, 0, port, 4).report()
    Worker(b"client", refused_nonblocking, port, 7).report()
    Worker(b"client", connect_to_itself, 11).report()
    with socket.socket() as four, socket.socket(socket.AF_INET6) as six:
        for client, address in (four, NOBODY4), (six, NOBODY6):
            client.setblocking(False)
            assert client.connect_ex((address, 80)) == errno.EINPROGRESS
        assert tool.stop() == []
    assert lost(tool) == 1 + 4 + 7 + 11
    assert "tcpconnect: 2 connects were still under way" in tool.complaints()


@only_at_both_ends
def test_stopped_while_connects_happen(start):
    """9,311 fit into one CPU's buffer; of 20,011 those that fit, the first ones, and
    the exact number of the others.
    """
    tool, small = start("tcpconnect", "tcpconnect -b 1", TCPTOOLS_METHOD=best_method())
    for count in (9311, 20011):
        tool.process.send_signal(signal.SIGSTOP)
        small.process.send_signal(signal.SIGSTOP)
        Worker(b"burst", connect_nonblocking, 1, NOBODY4, count).report()
        tool.process.send_signal(signal.SIGCONT)
        small.process.send_signal(signal.SIGCONT)
        if count == 9311:
            until("9311 rows", lambda: len(tool.rows()) >= 9311)
    rows = tool.stop()
    ports = [int(line.split()[5]) for line in rows]
    fitting = len(rows) - 9311
    assert ports == [port_of(i) for i in [*range(9311), *range(fitting)]]
    assert FITTING - 32 < fitting == 20011 - lost(tool)
    few = small.stop()
    assert 110 > len(few) == 29322 - lost(small)


@only_at_both_ends
def test_slow_reader(start):
    """Of a pipe that nobody reads for a while."""
    reader, writer = os.pipe()
    (tool,) = start(
        "tcpconnect", options={"pipe": writer}, TCPTOOLS_METHOD=best_method()
    )
    Worker(b"burst", connect_nonblocking, 0, NOBODY6, 30011).report()
    said = []
    thread = threading.Thread(target=lambda: said.append(read_all(reader)))
    thread.start()
    tool.end()
    os.close(writer)
    thread.join(DEADLINE)
    rows = said[0].splitlines()[1:]
    assert lost(tool) > 0 and len(rows) == 30011 - lost(tool)
    assert all(line.split()[1] == "burst" for line in rows)


def read_all(descriptor):
    with open(descriptor) as pipe:
        return pipe.read()


def peak_kb(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def test_load(start):
    """Two CPUs that connect as fast as they can: LOAD_CONNECTS each, which tests/soak
    makes half a million.
    """
    count = int(os.environ.get("LOAD_CONNECTS", "20011"))
    (tool,) = start("tcpconnect -t")
    assert tool.method() == best_method()

    def both_cpus(count):
        workers = [
            Worker(b"four", connect_nonblocking, 0, NOBODY4, count),
            Worker(b"six", connect_nonblocking, 1, NOBODY6, count),
        ]
        for worker in workers:
            worker.report()

    pid = tool.process.pid
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets the peak
    tool.process.send_signal(signal.SIGSTOP)
    both_cpus(15013)  # fills the buffers of both
    tool.process.send_signal(signal.SIGCONT)
    fitting = 2 * (FITTING - 32)
    until(f"{fitting} rows", lambda: len(tool.rows()) >= fitting)
    warm = peak_kb(pid)
    began = time.monotonic()
    both_cpus(count)
    took = time.monotonic() - began
    grown = peak_kb(pid) - warm
    rows = tool.stop()
    made = 2 * (count + 15013)
    print(
        f"{2 * count} connects in {took:.0f} s after {2 * 15013} that filled the "
        f"buffers: {len(rows)} rows, {lost(tool)} lost, memory grew by {grown} kB "
        f"from {warm} kB"
    )
    assert len(rows) + lost(tool) == made
    times = [float(line.split(maxsplit=1)[0]) for line in rows]
    assert times == sorted(times)
    assert grown < 5000


def capabilities(*numbers):
    """A preexec_fn: another user, with these capabilities alone (linux/capability.h,
    linux/prctl.h).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    bits = sum(1 << number for number in numbers)

    def drop():
        low, high = bits & 0xFFFFFFFF, bits >> 32
        libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        data = (ctypes.c_uint32 * 6)(low, low, low, high, high, high)
        assert libc.capset(header, data) == 0
        for number in numbers:  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE
            assert libc.prctl(47, 2, number, 0, 0) == 0

    return drop


CAP_IPC_LOCK, CAP_SYS_RESOURCE, CAP_PERFMON, CAP_BPF = 14, 24, 38, 39


@only_at_both_ends
@both_methods_on_oldest
def test_few_capabilities(start, method):
    """Those that the man page names, and no root.

    By default Debian's kernels forbid perf events even then.
    """
    numbers = [CAP_BPF, CAP_PERFMON, CAP_IPC_LOCK]
    if os.uname().release.startswith("5.10."):
        numbers.append(CAP_SYS_RESOURCE)
    options = {"preexec_fn": capabilities(*numbers)}
    paranoid = pathlib.Path("/proc/sys/kernel/perf_event_paranoid")
    before = paranoid.read_text()
    paranoid.write_text("2")
    try:
        tools = start(*TOOLS, options=options, TCPTOOLS_METHOD=method)
    finally:
        paranoid.write_text(before)
    connects, accepts = run_mixed_traffic()
    assert [tool.stop() for tool in tools] == [connects, accepts]
    assert [tool.complaints() for tool in tools] == [[], []]


@only_at_both_ends
@pytest.mark.parametrize("numbers", [(), (CAP_BPF,), (CAP_PERFMON,)])
def test_too_few_capabilities(numbers):
    assert failures(preexec_fn=capabilities(*numbers)) == {
        name: f"{name}: error: needs root: try sudo {TOP / name}\n" for name in TOOLS
    }


@only_on("bullseye")
@pytest.mark.parametrize("stage", ["load_func", "attach_kfunc", "attach_kretfunc"])
def test_trampolines_refused(start, tmp_path, stage):
    """A bcc whose kernel rejects fexit programs, at load or at attach.

    kprobes are next, and nothing else stays.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "from bcc import BPF\n"
        f"real = BPF.{stage}\n"
        "def refuse(self, name, *rest, **named):\n"
        "    text = name if isinstance(name, bytes) else str(name).encode()\n"
        "    if b'func__' in text:\n"
        f"        raise Exception('{stage}: Operation not permitted')\n"
        "    return real(self, name, *rest, **named)\n"
        "def refuse_attach(self, *rest, **named):\n"
        "    raise Exception('Device or resource busy')\n"
        f"BPF.{stage} = refuse if '{stage}' == 'load_func' else refuse_attach\n"
    )
    before = loaded("prog")
    name = "tcpaccept" if stage == "attach_kfunc" else "tcpconnect"
    (tool,) = start(name, PYTHONPATH=str(tmp_path))
    if best_method() == "fexit":
        assert "fexit: " in tool.err.read_text()
    assert tool.method() == "kprobe"
    assert len(loaded("prog") - before) == 1
    connects, accepts = run_mixed_traffic()
    assert tool.stop() == (accepts if name == "tcpaccept" else connects)


def without_function(tmp_path, function):
    """The environment in which a kprobe on this function cannot be had, as if the
    kernel had none of the name.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "from bcc import BPF\n"
        "real = BPF.attach_kprobe\n"
        "def refuse(self, event, fn_name):\n"
        f"    if event in ('{function}', b'{function}'):\n"
        "        raise Exception('Failed to attach BPF program')\n"
        "    return real(self, event=event, fn_name=fn_name)\n"
        "BPF.attach_kprobe = refuse\n"
    )
    return {"TCPTOOLS_METHOD": "kprobe", "PYTHONPATH": str(tmp_path)}


@only_on("bullseye")
def test_no_security_sock_graft(tmp_path):
    """As with CONFIG_SECURITY_NETWORK=n."""
    environment = {**os.environ, **without_function(tmp_path, "security_sock_graft")}
    said = failures(["tcpaccept"], env=environment)
    assert said["tcpaccept"].startswith("tcpaccept: error: cannot trace: kprobe: ")


@only_on("bullseye")
def test_no_tcp_v6_connect(start, tmp_path):
    """As with IPv6 in a module that is not there yet: -x traces the rest, and reports
    what it does not see.
    """
    environment = without_function(tmp_path, "tcp_v6_connect")
    (tool,) = start("tcpconnect -x", **environment)
    note = (
        "cannot trace tcp_v6_connect(): "
        "immediate IPv6 connect failures will not be reported"
    )
    assert f"tcpconnect: {note}\n" in tool.err.read_text()
    run_mixed_traffic()
    assert [line.split()[1:6] for line in tool.stop()] == [
        ["noise", "4", "0.0.0.0", "203.0.113.1", "9"]
    ] * 5


@only_at_both_ends
def test_ftrace_disabled():
    """Fexit programs and kprobes would attach, and see nothing."""
    switch = pathlib.Path("/proc/sys/kernel/ftrace_enabled")
    switch.write_text("0")
    try:
        said = failures()
    finally:
        switch.write_text("1")
    what = "error: ftrace is disabled: try sudo sysctl kernel.ftrace_enabled=1"
    assert said == {name: f"{name}: {what}\n" for name in TOOLS}


@only_on("sid")
def test_pid_that_does_not_exist_yet(start):
    """Is traced all the same, once it does. A thread is not."""
    is_over = threading.Event()
    thread = threading.Thread(target=is_over.wait)
    thread.start()
    tid, own = thread.native_id, os.getpid()
    last = pathlib.Path("/proc/sys/kernel/ns_last_pid")
    pid = int(last.read_text()) + 997
    (tool,) = start(f"tcpconnect -p {pid},{tid}")
    is_over.set()
    assert tool.complaints() == [
        f"tcpconnect: {tid} is a thread of process {own}: try -p {own}",
        f"tcpconnect: no such process seen yet (-p takes PIDs of the host): {pid}",
    ]
    last.write_text(str(pid - 1))
    worker = Worker(b"late", connect_nonblocking, 0, NOBODY4, 3)
    worker.report()
    assert worker.pid == pid
    assert tool.stop() == [
        f"{pid:<7} {'late':<12} 4  {IPV4:<16} {NOBODY4:<16} {port_of(i)}"
        for i in range(3)
    ]


@only_on("sid")
def test_pid_in_a_pid_namespace_of_its_own(start):
    wrapper = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    (tool,) = start("tcpaccept -p 1", options={"wrapper": wrapper})
    assert tool.method() == best_method()
    assert tool.complaints() == [
        "tcpaccept: no such process seen yet (-p takes PIDs of the host): 1"
    ]


def connect_and_accept_on_cpu(cpu, count):
    """So many connections from a process to itself; its PID."""

    def connect_and_accept():
        with listener(socket.AF_INET, IPV4) as server:
            for _ in range(count):
                with socket.create_connection(server.getsockname()):
                    server.accept()[0].close()

    worker = Worker(b"hotplug", on_cpu, cpu, connect_and_accept)
    worker.report()
    return worker.pid


@only_at_both_ends
def test_cpu_comes_online(start):
    """After it was offline: as CPUs are in every suspend."""
    tools = start("tcpconnect", TCPTOOLS_METHOD="fexit")
    tools += start("tcpaccept", TCPTOOLS_METHOD="kprobe")
    switch = pathlib.Path("/sys/devices/system/cpu/cpu1/online")
    switch.write_text("0")
    switch.write_text("1")
    connect_and_accept_on_cpu(1, 1)
    lines = [f"{t.process.args[0].name}: lost 1 events: " for t in tools]
    lines = [f"{line}their CPU had just come online" for line in lines]
    for tool, line in zip(tools, lines):
        tool.wait_for(line)
    pid = connect_and_accept_on_cpu(1, 13)
    for tool, line in zip(tools, lines):
        rows = tool.stop()
        assert [row.split()[0] for row in rows] == [str(pid)] * 13
        in_total = line.partition(": their")[0] + " in total"
        assert tool.complaints() == [line, in_total]


@only_on("sid")
def test_time_namespace():
    """Whose clock is a day ahead of the kernel's, by which events are timed."""
    wrapper = ("unshare", "--time", "--monotonic=86400", "--fork")
    why = "cannot trace in a time namespace with an offset: run it on the host"
    said = failures(wrapper=wrapper)
    assert said == {name: f"{name}: error: {why}\n" for name in TOOLS}


def loaded(kind):
    """IDs of all BPF programs ("prog"), maps ("map") or links ("link")."""
    lines = subprocess.run(
        ["bpftool", kind, "list"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return set(re.findall(r"^(\d+):", lines, re.MULTILINE))


def settings():
    """{name: value} of the sysctls that a tool might be tempted to change."""
    names = [
        *pathlib.Path("/proc/sys/kernel").glob("*"),
        *pathlib.Path("/proc/sys/net/core").glob("*"),
    ]
    return {
        path.name: path.read_text()
        for path in names
        if path.is_file()
        and os.stat(path).st_mode & 0o400
        and path.name not in ("ns_last_pid", "random", "stat_refresh")
    }


def left_behind():
    """All that could stay: probes, programs, maps, links, trace events, temporary
    files, settings.
    """
    events = pathlib.Path("/sys/kernel/debug/tracing/kprobe_events").read_text()
    directories = set(os.listdir("/tmp")) | set(os.listdir("/dev/shm"))
    kinds = [loaded(kind) for kind in ("prog", "map", "link")]
    return [probed_functions(), *kinds, events, directories, settings()]


@only_at_both_ends
def test_nothing_is_left_behind(start):
    """After every kind of exit, and with each method."""
    before = left_behind()
    reader, writer = os.pipe()
    killed = start("tcpconnect", TCPTOOLS_METHOD="fexit")
    killed += start("tcpaccept", TCPTOOLS_METHOD="kprobe")
    (stopped,) = start("tcpaccept", TCPTOOLS_METHOD="fexit")
    (piped,) = start("tcpconnect", options={"pipe": writer}, TCPTOOLS_METHOD="kprobe")
    os.close(writer)
    during = left_behind()
    assert all(during[kind] > before[kind] for kind in range(3))
    assert during[4:] == before[4:]
    os.close(reader)
    stopped.stop(signal.SIGTERM)
    for tool in killed:
        tool.process.kill()
        tool.process.wait()
    assert piped.process.wait(DEADLINE) == 0
    deadline = time.monotonic() + DEADLINE
    while left_behind() != before and time.monotonic() < deadline:
        time.sleep(0.1)  # the kernel frees maps a little later
    assert left_behind() == before


def lock_down(level):
    subprocess.run(
        ["mount", "-t", "securityfs", "none", "/sys/kernel/security"], check=False
    )
    pathlib.Path("/sys/kernel/security/lockdown").write_text(level)


@only_at_both_ends
@pytest.mark.last  # for there is no way back
def test_locked_down(start):
    """For integrity, how the kernel is preempted cannot be read: it may be any way.

    For confidentiality, no program may read kernel memory by helper. With fexit,
    tcpconnect needs no such helper, but for what some options show.
    """
    lock_down("integrity")
    (tool,) = start("tcpaccept")
    assert tool.method() == ("kprobe" if "PREEMPT" in os.uname().version else "fexit")
    _, accepts = run_mixed_traffic()
    assert tool.stop() == accepts
    lock_down("confidentiality")
    tool, counting = start("tcpconnect", "tcpconnect -c")
    assert tool.method() == counting.method() == "fexit"
    connects, _ = run_mixed_traffic()
    assert tool.stop() == connects
    counts = [int(line.split()[-1]) for line in counting.stop()]
    assert sum(counts) == len(connects)
    assert tool.complaints() == counting.complaints() == []
    why = "error: kernel lockdown (confidentiality) does not allow this"
    commands = ("tcpconnect -x", "tcpconnect --json", "tcpaccept")
    assert failures(commands, env={**os.environ, "TCPTOOLS_METHOD": "fexit"}) == {
        command: f"{name}: {why}: see tcptools(7), Permission\n"
        for command in commands
        for name in [command.split()[0]]
    }
