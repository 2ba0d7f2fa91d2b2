"""Where output goes: closed, full and non-blocking streams, and a terminal's end."""

import os
import pathlib
import re
import signal
import threading
import time

from conftest import (
    DEADLINE,
    IPV4,
    NOBODY6,
    Worker,
    best_method,
    failures,
    only_at_both_ends,
    only_on,
    row,
)
from traffic import connect_nonblocking, connect_refused, lost, run_mixed_traffic

on_trixie = only_on("trixie")  # for this is not about the kernel
CLOSED = (("tcpconnect", "2>&-"), ("tcpaccept", "<&-"), ("tcpconnect", "<&- 2>&-"))
KPROBES_ENABLED = pathlib.Path("/sys/kernel/debug/kprobes/enabled")


def shell(redirection):
    """A wrapper that starts a tool from a shell, with a redirection."""
    return ("sh", "-c", f'exec "$@" {redirection}', "sh")


@on_trixie
def test_closed_streams(start):
    """Only rows go to stdout, and nothing of ours is taken for a stream."""
    tools = []
    for name, redirection in CLOSED:
        tools += start(name, options={"wrapper": shell(redirection)})
    connects, accepts = run_mixed_traffic()
    for (name, redirection), tool in zip(CLOSED, tools):
        null = [os.readlink(f"/proc/{tool.process.pid}/fd/{n}") for n in (0, 2)]
        assert null.count("/dev/null") >= redirection.count("&-")
        assert tool.stop() == (connects if name == "tcpconnect" else accepts)


@on_trixie
def test_stderr_is_full(start):
    """What is lost cannot be said there, but in JSON it is."""
    wrapper = shell("2>/dev/full")
    tool, other = start("tcpconnect -b 1", "tcpaccept", options={"wrapper": wrapper})
    tool.process.send_signal(signal.SIGSTOP)
    Worker(b"burst", connect_nonblocking, 0, NOBODY6, 1009).report()
    tool.process.send_signal(signal.SIGCONT)
    assert 0 < len(tool.stop()) < 1009
    assert other.stop() == []


@on_trixie
def test_stdout_is_non_blocking(start):
    """As another process on the same pipe or terminal may make it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    (tool,) = start("tcpconnect -b 1", options={"pipe": writer})
    Worker(b"burst", connect_nonblocking, 0, NOBODY6, 10007).report()
    said = []

    def read():
        with open(reader) as lines:
            said.extend(lines)

    thread = threading.Thread(target=read)
    thread.start()
    tool.end()
    os.close(writer)
    thread.join(DEADLINE)
    _, *rows = said
    assert all(line.split()[1] == "burst" for line in rows)
    assert lost(tool) > 0 and len(rows) + lost(tool) == 10007


@on_trixie
def test_sighup(start):
    """A closed terminal: all that was seen is printed. Where it was ignored it stays
    so.
    """
    tools = start("tcpconnect", "tcpconnect -c")
    tools += start("tcpconnect", options={"wrapper": ("nohup",)})
    status = pathlib.Path(f"/proc/{tools[2].process.pid}/status").read_text()
    ignored = int(re.search(r"SigIgn:\s+(\w+)", status)[1], 16)
    assert ignored & 1 << signal.SIGHUP - 1
    tools[2].process.send_signal(signal.SIGHUP)
    worker = Worker(b"client", connect_refused, IPV4)
    port = worker.report()
    line = row(worker.pid, "client", 4, IPV4, IPV4, port)
    count = f"{IPV4:<16} {IPV4:<16} {port:<5} 1"
    signals = (signal.SIGHUP, signal.SIGHUP, signal.SIGINT)
    rows = [tool.stop(signum) for tool, signum in zip(tools, signals)]
    assert rows == [[line], [count], [line]]


@on_trixie
def test_ctrl_c_that_comes_twice(start):
    """A terminal sends it to timeout and the tool, and timeout passes it on."""
    (tool,) = start("tcpconnect -c", options={"wrapper": ("timeout", "600")})
    port = Worker(b"client", connect_refused, IPV4).report()
    os.killpg(tool.process.pid, signal.SIGINT)  # timeout has made it
    time.sleep(0.03)
    os.killpg(tool.process.pid, signal.SIGINT)
    assert tool.process.wait(DEADLINE) == 0
    assert tool.rows() == [f"{IPV4:<16} {IPV4:<16} {port:<5} 1"]


@only_at_both_ends
def test_kprobes_disabled(start):
    """As a whole: they would attach and see nothing. fexit does without."""
    KPROBES_ENABLED.write_text("0")
    try:
        said = failures(["tcpaccept"], env={**os.environ, "TCPTOOLS_METHOD": "kprobe"})
        (tool,) = start("tcpconnect")
        assert tool.method() == "fexit"
        connects, _ = run_mixed_traffic()
        rows = tool.stop()
    finally:
        KPROBES_ENABLED.write_text("1")
    why = f"kprobe: kprobes are disabled: write 1 to {KPROBES_ENABLED}"
    see = "(see tcptools(7), DIAGNOSTICS)"
    assert said == {"tcpaccept": f"tcpaccept: error: cannot trace: {why} {see}\n"}
    if best_method() == "fexit":
        assert rows == connects
