"""What the tools cost, in instructions. tests/bench runs this in a guest whose clock
counts instructions, 1 ns each.

USAGE: bench.py FILE PART...

PART is one of PARTS below. FILE gets a JSON line for each figure:
{"tool": ..., "figure": ..., "values": [one for each repeat]}, and one for the versions:
{"versions": "Linux ..., ..."}.
"""

import contextlib
import json
import os
import pathlib
import pty
import random
import resource
import shlex
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

from conftest import NOBODY4, NOBODY6, TOP, add_addresses
from traffic import listener

REPEATS = 7
BURST = 200  # in a row, during which no other process gets the CPU
WAIT = 0.6  # seconds after a burst, in which each tool shows what it saw
LONG_WAIT = 1.2  # where that is watched: tcpdump's buffers wait for up to 1
IDLE = 10  # seconds for which a tool is watched while nothing happens
IDLE_TIMES = 5
BATCHES = {1: 50, 20: 20, 1000: 5}  # events per batch: how many times
STARTS = 5
PIECES = 64  # of 64 KiB
RATES = (10, 100, 1000, 10000, 100000)  # connects per second
FLOWS = (1, 100, 10000)

# x86's numbers of the system calls in which a tool waits: poll, select, nanosleep,
# epoll_wait, clock_nanosleep, pselect6, ppoll, epoll_pwait.
WAITS = {7, 23, 35, 230, 232, 270, 271, 281}

FAMILIES = {
    "IPv4": (socket.AF_INET, NOBODY4, "127.0.0.1"),
    "IPv6": (socket.AF_INET6, NOBODY6, "::1"),
}
SYN = "(tcp[tcpflags] & tcp-syn != 0) or (ip6[6] == 6 and ip6[53] & 2 != 0)"
FEXIT, KPROBE = "env TCPTOOLS_METHOD=fexit", "env TCPTOOLS_METHOD=kprobe"
NO_TOOL = "no tool"
CGROUP = pathlib.Path("/sys/fs/cgroup/bench")

# The tools, each a column of the table.
TCPDUMP = {"tcpdump": f"tcpdump -n -i any '{SYN}'"}


def ours(command):
    return {
        "fexit": f"{FEXIT} {TOP}/{command}",
        "kprobe": f"{KPROBE} {TOP}/{command}",
    }


CONNECT = {**ours("tcpconnect"), "bcc's": "tcpconnect-bpfcc"}
CONNECT_OTHERS = {
    "libbpf-tools'": "/usr/sbin/tcpconnect",
    "bpftrace's": "/usr/sbin/tcpconnect.bt",
}
# By the name of the figure, options; those that bcc's has too.
CONNECT_OPTIONS = {
    "-p of another process": "-p 1",
    "-c": "-c",
    "--cgroup of others": f"--cgroup {CGROUP}",
    "--json": "--json",
}
OUTCOMES = ("-x", "-l")
# Both networks are looked at: the longer one first, and the address is in the other.
WHOSE = {
    "-a, 2 networks": "-a 198.51.100.0/24,192.0.2.0/23",
    "-P of a range": "-P 1-1023",
    "-n of another name": "-n nobody",
    "-c --per-process": "-c --per-process",
    "-c -i": "-c -i 86400",
    "-c --json": "-c --json",
}
# RFC 1035: a standard query's response, www.example.com is 192.0.2.7.
NAME = b"\3www\7example\3com\0"
RESPONSE = (
    struct.pack("!6H", 7, 0x8180, 1, 1, 0, 0)
    + struct.pack("!17sHH", NAME, 1, 1)
    + struct.pack("!HHHIH4B", 0xC00C, 1, 1, 60, 4, 192, 0, 2, 7)
)
BCC_OPTIONS = ("-p 1", "-c")
ACCEPT_OPTIONS = {"-c": "-c", "-q": "-q"}
ACCEPT = {
    **ours("tcpaccept"),
    "bcc's": "tcpaccept-bpfcc",
    "bpftrace's": "/usr/sbin/tcpaccept.bt",
}


def proc(process, name):
    return pathlib.Path(f"/proc/{process.pid}/{name}").read_text()


def status(process, field):
    lines = proc(process, "status").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def has_children(process):
    """Whether it has any: ours have one while they compile."""
    return proc(process, f"task/{process.pid}/children") != ""


def is_waiting(process):
    number = proc(process, "syscall").split()[0]
    return number.isdigit() and int(number) in WAITS and not has_children(process)


def spent(process):
    """Instructions that a process and its children that have ended have spent, in user
    space and in the kernel; the children's to one tick of the clock, 10 million.
    """
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    own = sum(int(task.read_text().split()[0]) for task in tasks)
    behind_comm = proc(process, "stat").rpartition(")")[2].split()
    ticks = sum(map(int, behind_comm[13:15]))  # cutime and cstime of proc(5)
    return own + ticks * 10**9 // os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(command):
    """The process of a command, once it has been waiting for a second, its output in a
    file; None without a command.
    """
    if not command:
        yield None
        return
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(shlex.split(command), stdout=out, stderr=err)
        waited = 0
        while waited < 10:
            time.sleep(0.1)
            if process.poll() is not None:
                err.seek(0)
                sys.exit(f"{command}: {err.read().decode()}")
            waited = waited + 1 if is_waiting(process) else 0
        yield process
        stop(process)


def stop(process):
    """Stop a tool by signals: bpftrace does not heed every one.

    Returns the peak memory (kB) of the largest of the tool and its children.
    """
    pid = waited = 0
    while not pid:
        if waited % 50 == 0:
            process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        waited += 1
        pid, process.returncode, usage = os.wait4(process.pid, os.WNOHANG)
    return usage.ru_maxrss


def started(tools):
    """(tool, its process) of each while it runs, the first of them none, for what the
    work costs by itself.
    """
    for tool, command in {NO_TOOL: None, **tools}.items():
        with running(command) as process:
            yield tool, process


def alone(function, *args):
    """What function(*args) returns, while no other process gets the CPU."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    result = function(*args)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return result


def timed(function, *args):
    """(what function(*args) returns, its instructions)"""
    begin = time.monotonic_ns()
    result = function(*args)
    return result, time.monotonic_ns() - begin


def connects(family, count=BURST, ports=(9,)):
    """Instructions of a connect to an address that does not answer, in the median:
    without the ticks of the clock.
    """
    kind, address, _ = FAMILIES[family]
    flags = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    clients = [socket.socket(kind, flags) for _ in range(count)]
    targets = [(address, ports[i % len(ports)]) for i in range(count)]
    took = alone(
        lambda: [
            timed(client.connect_ex, target)[1]
            for client, target in zip(clients, targets)
        ]
    )
    for client in clients:
        client.close()
    return statistics.median(took)


def successes(family, count=BURST):
    """Instructions of a connect that succeeds, in the median: both its sides, over
    loopback.
    """
    kind, _, address = FAMILIES[family]
    with listener(kind, address, backlog=count) as server:
        target = server.getsockname()[:2]
        clients = [socket.socket(kind) for _ in range(count)]
        took = alone(lambda: [timed(client.connect, target)[1] for client in clients])
        for client in clients:
            client.close()
    return statistics.median(took)


def accepts(family, count=BURST):
    """Instructions of an accept of a connection that waits for it, in the median."""
    kind, _, address = FAMILIES[family]
    with listener(kind, address, backlog=count) as server:
        target = server.getsockname()[:2]
        clients = [socket.create_connection(target) for _ in range(count)]
        served = alone(lambda: [timed(server.accept) for _ in range(count)])
        for connection in clients + [connection for (connection, _), _ in served]:
            connection.close()
    return statistics.median(took for _, took in served)


def datagrams(family, port=0, data=bytes(64)):
    """Instructions of reading a UDP datagram that waits for it, in the median.

    port: from which it comes; data: what is in it.
    """
    kind, _, address = FAMILIES[family]
    with (
        socket.socket(kind, socket.SOCK_DGRAM) as server,
        socket.socket(kind, socket.SOCK_DGRAM) as client,
    ):
        server.bind((address, port))
        client.bind((address, 0))
        for _ in range(BURST):
            server.sendto(data, client.getsockname()[:2])
        took = alone(lambda: [timed(client.recv, 4096)[1] for _ in range(BURST)])
    return statistics.median(took)


def responses(family):
    """The same of a DNS response with one address."""
    return datagrams(family, 53, RESPONSE)


def loopback_packets():
    return int(pathlib.Path("/sys/class/net/lo/statistics/rx_packets").read_text())


def packets():
    """Instructions of a packet of a bulk transfer over loopback, its sender and its
    receiver together.

    In the median of its pieces: in some the clock ticks, or more packets than usual say
    only what has arrived.
    """
    data = bytes(65536)
    with listener(socket.AF_INET, "127.0.0.1") as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()

    def transfer():
        client.sendall(data)
        left = len(data)
        while left:
            left -= len(peer.recv(left))

    def measure():
        before = loopback_packets()
        _, took = timed(transfer)
        return took / (loopback_packets() - before)

    with client, peer:
        return statistics.median(alone(lambda: [measure() for _ in range(PIECES)]))


def repeated(measure, *args):
    """REPEATS values of a measurement, after one that warms up; the tool shows what it
    saw in between.
    """
    values = []
    for _ in range(1 + REPEATS):
        values.append(measure(*args))
        time.sleep(WAIT)
    return values[1:]


def other_ports(family, count):
    """As connects(), each to another port, so that none is like one before."""
    return connects(family, count, random.sample(range(1, 65536), count))


def idle(process):
    """([instructions], [wake-ups]) per second of a tool while nothing happens."""
    values = []
    for _ in range(IDLE_TIMES):
        before, wakeups = spent(process), status(process, "voluntary_ctxt_switches")
        time.sleep(IDLE)
        cost = spent(process) - before
        wakeups = status(process, "voluntary_ctxt_switches") - wakeups
        values.append((cost / IDLE, wakeups / IDLE))
    return tuple(zip(*values))


def watched(process, idle_costs, work, *args):
    """What work(*args) returns, and the instructions that the tool spent on it beside
    its idle costs (per second): their median, for each is a mean, and what a tool does
    only once is in one of them.
    """
    before, begin = spent(process), time.monotonic()
    result = work(*args)
    time.sleep(LONG_WAIT)
    seconds = time.monotonic() - begin
    return result, spent(process) - before - statistics.median(idle_costs) * seconds


def user_side(process, idle_costs, work, batch):
    """The tool's own cost per event (instructions) in each of several batches, beside
    what it spends anyway.
    """
    values = []
    for _ in range(1 + BATCHES[batch]):
        _, own = watched(process, idle_costs, work, "IPv4", batch)
        values.append(own / batch)
    return values[1:]


def paced(rate):
    """(instructions of a connect, in the median, connects, connects per second) where
    so many per second are requested: it may not get that far.
    """
    kind, address, _ = FAMILIES["IPv4"]
    count = max(50, min(rate // 2, 10000))
    took, begin = [], time.monotonic()
    due = begin
    for _ in range(count):
        with socket.socket(kind, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
            took.append(timed(client.connect_ex, (address, 9))[1])
        due += 1 / rate
        time.sleep(max(0, due - time.monotonic()))
    return statistics.median(took), count, count / (time.monotonic() - begin)


def put(line):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(line) + "\n")


def report(tool, figure, values):
    put({"tool": tool, "figure": figure, "values": values})
    mean, median = statistics.mean(values), statistics.median(values)
    print(f"{tool}: {figure}: mean {mean:,.1f}, median {median:,.1f}", flush=True)


def watch_kernel(tools, work, figure, families=tuple(FAMILIES)):
    """What one event costs the kernel, with each tool."""
    for tool, _ in started(tools):
        for family in families:
            report(tool, f"{figure}, {family}", repeated(work, family))


def watch_packets(tools, name):
    for tool, _ in started(tools):
        report(tool, f"a packet of a bulk transfer, {name}", repeated(packets))


def watch_own_cost(tools, work, name):
    """A tool's own cost per event, and what it does while there is none."""
    for tool, command in tools.items():
        with running(command) as process:
            idle_costs, wakeups = idle(process)
            report(tool, f"{name}, idle, per second", idle_costs)
            report(tool, f"{name}, wake-ups per second", wakeups)
            for batch in BATCHES:
                values = user_side(process, idle_costs, work, batch)
                report(tool, f"{name}, own cost, batches of {batch}", values)


def start(command):
    """(instructions from exec to the header, peak memory, memory afterwards, in MiB) of
    a tool that writes to a terminal.

    Its own instructions: the guest's clock also counts what it waits for the disk.
    """
    terminal, output = pty.openpty()
    process = subprocess.Popen(shlex.split(command), stdout=output, stderr=output)
    os.close(output)
    with open(terminal, errors="replace") as lines:
        said = ""
        for line in lines:
            said += line
            if "PID" in line:
                break
        else:
            sys.exit(f"{command}: {said}")
        took = spent(process)
        time.sleep(1)
        assert not has_children(process)
        resident, own_peak = status(process, "VmRSS"), status(process, "VmHWM")
        peak = stop(process)
        # What this script had when it started the tool counts as the tool's there
        if peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss:
            peak = own_peak
    return took, peak / 1024, resident / 1024


def watch_starts(tools, name):
    """What a tool takes to start, and its memory, after one start that fills the page
    cache.
    """
    for tool, command in tools.items():
        starts = [start(command) for _ in range(1 + STARTS)][1:]
        took, peak, resident = zip(*starts)
        report(tool, f"{name}, start (millions)", [n / 1e6 for n in took])
        report(tool, f"{name}, peak memory (MiB)", peak)
        report(tool, f"{name}, memory afterwards (MiB)", resident)


def reached_rates():
    """Those of RATES that a guest without a tool gets at least nine tenths of."""
    return [rate for rate in RATES if paced(rate)[2] >= 0.9 * rate]


def watch_growth(tools):
    """What one connect costs at each rate, in the kernel and in the tool."""
    rates = reached_rates()
    for tool, process in started(tools):
        for rate in rates:
            figure = f"a connect, {rate:,} per second requested"
            if not process:
                report(tool, figure, [paced(rate)[0] for _ in range(1 + STARTS)][1:])
                continue
            idle_costs, kernel, own_cost = idle(process)[0], [], []
            for _ in range(1 + STARTS):
                (took, count, _), own = watched(process, idle_costs, paced, rate)
                kernel.append(took)
                own_cost.append(own / count)
            report(tool, figure, kernel[1:])
            report(tool, f"tcpconnect, own cost, {rate:,} per second", own_cost[1:])


def watch_flows(tools):
    """What one connect costs with -c, among so many flows."""
    for flows in FLOWS:
        ports = range(1, flows + 1)
        some = random.Random(flows).choices(ports, k=BURST)
        for tool, _ in started(tools):
            connects("IPv4", flows, ports)
            values = repeated(connects, "IPv4", BURST, some)
            report(tool, f"a connect, -c, {flows:,} flows", values)


def put_versions():
    """Of the kernel, and of the packages of the tools that are installed."""
    listed = subprocess.run(
        [
            *("dpkg-query", "--show", "--showformat=${Package} ${Version}\n"),
            *("python3-bpfcc", "libbpf-tools", "bpftrace", "tcpdump"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # those that are not installed
        text=True,
        check=False,
    )
    versions = [f"Linux {os.uname().release}", *listed.stdout.splitlines()]
    put({"versions": ", ".join(versions)})


def quick():
    watch_kernel(CONNECT, connects, "a connect")


def connect():
    tools = {**CONNECT, **CONNECT_OTHERS, **TCPDUMP}
    watch_kernel(tools, connects, "a connect")
    for name, given in CONNECT_OPTIONS.items():
        some = ours(f"tcpconnect {given}")
        if given in BCC_OPTIONS:
            some["bcc's"] = f"tcpconnect-bpfcc {given}"
        watch_kernel(some, connects, f"a connect, {name}", ["IPv4"])
    watch_packets(tools, "tcpconnect")


def outcomes():
    """What is known once a connect is under way, and when it has succeeded."""
    for name in OUTCOMES:
        some = ours(f"tcpconnect {name}")
        watch_kernel(some, connects, f"a connect, {name}", ["IPv4"])
        watch_kernel(some, successes, f"a connect that succeeds, {name}", ["IPv4"])


def whose():
    """What is decided by address and by name, and what else is counted by."""
    for name, given in WHOSE.items():
        some = ours(f"tcpconnect {given}")
        watch_kernel(some, connects, f"a connect, {name}", ["IPv4"])
    some = ours("tcpconnect -a 2001:db8:ffff::/48,2001:db8::/47")
    watch_kernel(some, connects, "a connect, -a, 2 networks", ["IPv6"])


def names():
    """What is read of the names that processes look up."""
    some = ours("tcpconnect -d")
    watch_kernel(some, datagrams, "a UDP datagram that is read, -d", ["IPv4"])
    watch_kernel(some, responses, "a DNS response that is read, -d", ["IPv4"])


def accept():
    watch_kernel(ACCEPT, accepts, "an accept")
    for name, given in ACCEPT_OPTIONS.items():
        some = ours(f"tcpaccept {given}")
        watch_kernel(some, accepts, f"an accept, {name}", ["IPv4"])
    watch_packets(ACCEPT, "tcpaccept")
    watch_own_cost(ACCEPT, accepts, "tcpaccept")


def own_cost():
    watch_own_cost({**CONNECT, **CONNECT_OTHERS, **TCPDUMP}, connects, "tcpconnect")
    for tool, command in CONNECT.items():
        with running(command) as process:
            values = user_side(process, idle(process)[0], other_ports, 1000)
            report(tool, "tcpconnect, own cost, batches of 1000, distinct", values)
    for option in ("-L", "-t", "-T", "--json"):
        for tool, command in ours(f"tcpconnect {option}").items():
            with running(command) as process:
                values = user_side(process, idle(process)[0], connects, 20)
                report(tool, f"tcpconnect {option}, own cost, batches of 20", values)


def starts():
    watch_starts({**CONNECT, **CONNECT_OTHERS}, "tcpconnect")
    watch_starts(ACCEPT, "tcpaccept")


def growth():
    watch_growth(ours("tcpconnect"))
    watch_flows(ours("tcpconnect -c"))


PARTS = {
    part.__name__: part
    for part in (
        quick,
        connect,
        outcomes,
        whose,
        names,
        accept,
        own_cost,
        starts,
        growth,
    )
}


if __name__ == "__main__":
    add_addresses()
    CGROUP.mkdir()
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * max(FLOWS), 2 * max(FLOWS)))
    subprocess.run(
        ["ip", "link", "set", "lo", "mtu", "1500", "gso_max_segs", "1"], check=True
    )
    put_versions()
    for part in sys.argv[2:]:
        PARTS[part]()
