"""What the tools cost, in instructions. tests/bench runs this in a guest whose clock counts instructions, 1 ns each.

USAGE: bench.py FILE PART...

PART is one of PARTS below. FILE gets a JSON line for each figure:
{"tool": ..., "figure": ..., "values": [one for each repeat]}.
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
import subprocess
import sys
import tempfile
import time

from conftest import NOBODY4, NOBODY6, TOP, add_addresses
from traffic import listener

REPEATS = 7
BURST = 200  # connects or accepts in a row, during which no other process gets the CPU
REST = 1.2  # seconds after a burst, in which each tool shows what it saw; tcpdump's buffers wait for up to 1
IDLE = 10  # seconds for which a tool is watched while nothing happens
BATCHES = {1: 20, 20: 10, 1000: 5}  # events at once: how many times
STARTS = 5
MEGABYTES = 16
RATES = (10, 100, 1000, 10000, 100000)  # connects a second
FLOWS = (1, 10, 100, 1000, 10000)

# x86's numbers of the system calls in which a tool waits: poll, select, nanosleep, epoll_wait, clock_nanosleep,
# pselect6, ppoll, epoll_pwait.
WAITS = {7, 23, 35, 230, 232, 270, 271, 281}

FAMILIES = {
    "IPv4": (socket.AF_INET, NOBODY4, "127.0.0.1"),
    "IPv6": (socket.AF_INET6, NOBODY6, "::1"),
}
SYN = "tcp[tcpflags] & tcp-syn != 0 or ip6[6] == 6 and ip6[53] & 2 != 0"
FEXIT, KPROBE = "env TCPTRACE_WAY=fexit", "env TCPTRACE_WAY=kprobe"
NO_TOOL = "no tool"

OURS = {
    "tcpconnect, fexit": f"{FEXIT} {TOP}/tcpconnect",
    "tcpconnect, kprobe": f"{KPROBE} {TOP}/tcpconnect",
}
CONNECT = {**OURS, "bcc's tcpconnect": "tcpconnect-bpfcc"}
CONNECT_OPTIONS = {
    "tcpconnect -p, fexit": f"{FEXIT} {TOP}/tcpconnect -p 1",
    "tcpconnect -p, kprobe": f"{KPROBE} {TOP}/tcpconnect -p 1",
    "tcpconnect -c, fexit": f"{FEXIT} {TOP}/tcpconnect -c",
    "tcpconnect -c, kprobe": f"{KPROBE} {TOP}/tcpconnect -c",
    "bcc's tcpconnect -p": "tcpconnect-bpfcc -p 1",
    "bcc's tcpconnect -c": "tcpconnect-bpfcc -c",
}
CONNECT_OTHERS = {
    "libbpf-tools' tcpconnect": "/usr/sbin/tcpconnect",
    "bpftrace's tcpconnect.bt": "/usr/sbin/tcpconnect.bt",
    "tcpdump": f"tcpdump -n -i any '{SYN}'",
}
ACCEPT = {
    "tcpaccept, fexit": f"{FEXIT} {TOP}/tcpaccept",
    "tcpaccept, kprobe": f"{KPROBE} {TOP}/tcpaccept",
    "bcc's tcpaccept": "tcpaccept-bpfcc",
}
ACCEPT_OTHERS = {
    "bpftrace's tcpaccept.bt": "/usr/sbin/tcpaccept.bt",
    "tcpdump": CONNECT_OTHERS["tcpdump"],
}
ALL = {**CONNECT, **CONNECT_OTHERS, **ACCEPT, **ACCEPT_OTHERS}


def proc(process, name):
    return pathlib.Path(f"/proc/{process.pid}/{name}").read_text()


def status(process, field):
    lines = proc(process, "status").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def is_waiting(process):
    number = proc(process, "syscall").split()[0]
    return number.isdigit() and int(number) in WAITS


def spent(process):
    """Instructions that a process has spent, in user space and in the kernel."""
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks)


@contextlib.contextmanager
def running(command):
    """The process of a command, once it has been waiting for a second, its output in a file; None without a command."""
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
        process.send_signal(signal.SIGINT)
        process.wait()


def started(tools):
    """(tool, its process) of each while it runs, the first of them none, for what the work costs by itself."""
    for tool, command in {NO_TOOL: None, **tools}.items():
        with running(command) as process:
            yield tool, process


def alone(function, *args):
    """What function(*args) returns, and its instructions, while no other process gets the CPU."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    begin = time.monotonic_ns()
    result = function(*args)
    took = time.monotonic_ns() - begin
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return result, took


def connects(family, count=BURST, ports=(9,)):
    """Instructions of a connect to an address that does not answer."""
    kind, address, _ = FAMILIES[family]
    flags = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    clients = [socket.socket(kind, flags) for _ in range(count)]
    targets = [(address, ports[i % len(ports)]) for i in range(count)]

    def burst():
        for client, target in zip(clients, targets):
            client.connect_ex(target)

    _, took = alone(burst)
    for client in clients:
        client.close()
    return took / count


def accepts(family, count=BURST):
    """Instructions of an accept of a connection that waits for it."""
    kind, _, address = FAMILIES[family]
    with listener(kind, address, backlog=count) as server:
        target = server.getsockname()[:2]
        clients = [socket.create_connection(target) for _ in range(count)]
        served, took = alone(lambda: [server.accept()[0] for _ in range(count)])
        for connection in clients + served:
            connection.close()
    return took / count


def loopback_packets():
    return int(pathlib.Path("/sys/class/net/lo/statistics/rx_packets").read_text())


def packets():
    """Instructions of a packet of a bulk transfer over loopback, its sender and its receiver together."""
    data = bytes(65536)
    with listener(socket.AF_INET, "127.0.0.1") as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()

    def transfer():
        for _ in range(MEGABYTES * 16):
            client.sendall(data)
            left = len(data)
            while left:
                left -= len(peer.recv(left))

    with client, peer:
        before = loopback_packets()
        _, took = alone(transfer)
        return took / (loopback_packets() - before)


def repeated(measure, *args):
    """REPEATS values of a measurement, after one that warms up; the tool shows what it saw in between."""
    values = []
    for _ in range(1 + REPEATS):
        values.append(measure(*args))
        time.sleep(REST)
    return values[1:]


def idle(process):
    """(instructions, wake-ups) a second of a tool while nothing happens."""
    before, wakeups = spent(process), status(process, "voluntary_ctxt_switches")
    time.sleep(IDLE)
    return (spent(process) - before) / IDLE, (
        status(process, "voluntary_ctxt_switches") - wakeups
    ) / IDLE


def watched(process, resting, work, *args):
    """What work(*args) returns, and the instructions that the tool spent on it beside its resting ones a second."""
    before, begin = spent(process), time.monotonic()
    result = work(*args)
    time.sleep(REST)
    seconds = time.monotonic() - begin
    return result, spent(process) - before - resting * seconds


def user_side(process, work, batch):
    """Instructions that the tool spends for an event itself, for each of several batches, beside what it spends anyway."""
    values, (resting, _) = [], idle(process)
    for _ in range(1 + BATCHES[batch]):
        _, own = watched(process, resting, work, "IPv4", batch)
        values.append(own / batch)
    return values[1:]


def paced(rate):
    """(instructions that this process spends for a connect, connects) of so many a second, or as near as it gets."""
    kind, address, _ = FAMILIES["IPv4"]
    count = max(50, min(rate // 2, 10000))
    before, due = time.process_time_ns(), time.monotonic()
    for _ in range(count):
        with socket.socket(kind, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
            client.connect_ex((address, 9))
        due += 1 / rate
        time.sleep(max(0, due - time.monotonic()))
    return (time.process_time_ns() - before) / count, count


def report(tool, figure, values):
    with open(sys.argv[1], "a") as file:
        line = {"tool": tool, "figure": figure, "values": values}
        file.write(json.dumps(line) + "\n")
    print(f"{tool}: {figure}: {statistics.median(values):,.1f}", flush=True)


def watch(tools, work, further=True):
    """What one event costs the kernel, with each tool; further: and all else that one start can tell."""
    for tool, process in started(tools):
        for family in FAMILIES:
            report(tool, f"{work.__name__}, {family}", repeated(work, family))
        if not further:
            continue
        report(tool, "packets", repeated(packets))
        if process:
            report(tool, "wake-ups", [idle(process)[1]])
            for batch in BATCHES:
                values = user_side(process, work, batch)
                report(tool, f"user side, {batch} at once", values)


def start(command):
    """(instructions from exec to the header, peak memory in MB) of a tool whose output is a terminal."""
    terminal, output = pty.openpty()
    begin = time.monotonic_ns()
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
        took = time.monotonic_ns() - begin
        memory = status(process, "VmHWM") / 1024
        process.send_signal(signal.SIGINT)
        process.wait()
    return took, memory


def watch_starts(tools):
    """How long a tool takes to start, and its peak memory, after one start that fills the page cache."""
    for tool, command in tools.items():
        figures = [start(command) for _ in range(1 + STARTS)][1:]
        report(tool, "start", [instructions for instructions, _ in figures])
        report(tool, "memory", [memory for _, memory in figures])


def watch_growth(tools):
    """What one connect costs at each rate, in the kernel and in the tool."""
    for tool, process in started(tools):
        for rate in RATES:
            if not process:
                kernel = [paced(rate)[0] for _ in range(1 + STARTS)]
                report(tool, f"{rate} a second", kernel[1:])
                continue
            resting, kernel, user = idle(process)[0], [], []
            for _ in range(1 + STARTS):
                (took, count), own = watched(process, resting, paced, rate)
                kernel.append(took)
                user.append(own / count)
            report(tool, f"{rate} a second", kernel[1:])
            report(tool, f"user side, {rate} a second", user[1:])


def watch_flows(tools):
    """What one connect costs with -c, among so many flows."""
    for flows in FLOWS:
        ports = range(1, flows + 1)
        some = random.Random(flows).choices(ports, k=BURST)
        for tool, _ in started(tools):
            connects("IPv4", flows, ports)
            report(tool, f"{flows} flows", repeated(connects, "IPv4", BURST, some))


PARTS = {
    "quick": lambda: watch(CONNECT, connects, further=False),
    "connect": lambda: watch({**CONNECT, **CONNECT_OTHERS}, connects),
    "options": lambda: watch(CONNECT_OPTIONS, connects, further=False),
    "accept": lambda: watch({**ACCEPT, **ACCEPT_OTHERS}, accepts),
    "start": lambda: watch_starts(
        {tool: command for tool, command in ALL.items() if tool != "tcpdump"}
    ),
    "growth": lambda: watch_growth(OURS),
    "flows": lambda: watch_flows(
        {"tcpconnect -c, fexit": f"{FEXIT} {TOP}/tcpconnect -c"}
    ),
}


if __name__ == "__main__":
    add_addresses()
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * max(FLOWS), 2 * max(FLOWS)))
    subprocess.run(
        ["ip", "link", "set", "lo", "mtu", "1500", "gso_max_segs", "1"], check=True
    )
    for part in sys.argv[2:]:
        PARTS[part]()
