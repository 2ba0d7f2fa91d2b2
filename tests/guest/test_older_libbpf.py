"""A kernel whose BTF has kinds that the release's libbpf, before 1.0, does not know.

As after an upgrade of the kernel alone, or in a container with an older release's bcc.
tests/run boots Debian 11's programs, with libbpf 0.3, on Debian 13's kernel.
"""

import os
import pathlib
import re
import signal
import socket

import pytest
from conftest import IPV4, TOOLS, Worker, failures, probed_functions, row
from traffic import connect_refused, listener, run_mixed_traffic

PACKAGE = f"/var/lib/dpkg/info/linux-image-{os.uname().release}.list"

pytestmark = pytest.mark.skipif(
    pathlib.Path(PACKAGE).exists(), reason="the kernel is the release's own"
)


def test_kprobes_see_every_connection_once(start):
    """They are chosen, since bcc looks up what fexit traces through the same libbpf."""
    tools = start(*TOOLS)
    assert [tool.method() for tool in tools] == ["kprobe", "kprobe"]
    hooks = {"tcp_connect", "security_sock_graft"}
    assert probed_functions() & hooks == hooks
    # libbpf 0.3 closes descriptor 0 when it refuses a BTF
    stdin = [os.readlink(f"/proc/{tool.process.pid}/fd/0") for tool in tools]
    assert stdin == [os.readlink("/proc/self/fd/0")] * 2
    connects, accepts = run_mixed_traffic()
    assert tools[0].stop(signal.SIGINT) == connects
    assert tools[1].stop(signal.SIGTERM) == accepts
    assert [tool.complaints() for tool in tools] == [[], []]
    for tool in tools:
        (reason,) = re.findall(
            r"^tcp\w+: fexit: (.+)$", tool.err.read_text(), re.MULTILINE
        )
        assert reason != "attached"


def test_fexit_alone_fails_with_a_reason():
    said = failures(env={**os.environ, "TCPTOOLS_METHOD": "fexit"})
    for name, line in said.items():
        assert re.match(rf"{name}: error: cannot trace: fexit: \w+", line)


def connect_by_name(name, port):
    with socket.create_connection((socket.gethostbyname(name), port)) as client:
        client.recv(1)


def test_columns(start, names):
    """-x, -d and -q read more structs, and -d traces more functions."""
    failing, named, queue = start("tcpconnect -x", "tcpconnect -d", "tcpaccept -q")
    server = listener(socket.AF_INET, IPV4, backlog=17)
    port = server.getsockname()[1]
    refused = Worker(b"refused", connect_refused, IPV4)
    closed = refused.report()
    client = Worker(b"client", connect_by_name, "www.example.com", port)
    with server.accept()[0] as connection:
        connection.send(b".")
    client.report()
    assert failing.stop() == [
        row(refused.pid, "refused", 4, IPV4, IPV4, f"{closed:<5} ECONNREFUSED")
    ]
    assert [line.partition(" (")[0] for line in named.stop()] == [
        row(refused.pid, "refused", 4, IPV4, IPV4, f"{closed:<5} -"),
        row(client.pid, "client", 4, IPV4, IPV4, f"{port:<5} www.example.com"),
    ]
    assert queue.stop() == [
        row(os.getpid(), "python3", 4, IPV4, IPV4, f"{port:<5} 0     17")
    ]
    assert [tool.complaints() for tool in (failing, named, queue)] == [[], [], []]
