"""Where there is no BTF, the kernel's headers serve."""

import pytest
from conftest import IPV4, Worker, headers, hide, row, show
from traffic import connect_refused, run_mixed_traffic


def test_layout_from_kernel_headers(start):
    """With BTF hidden. One release has headers; it is slow."""
    if not headers():
        pytest.skip("the kernel's headers are not installed in this guest")
    show(headers())
    hide("/sys/kernel/btf")
    try:
        tools = start("tcpconnect", "tcpconnect -x -d", "tcpaccept -q")
        assert [tool.method() for tool in tools] == ["headers"] * 3
        connects, accepts = run_mixed_traffic()
        refused = Worker(b"refused", connect_refused, IPV4)
        port = refused.report()
        attempt = row(refused.pid, "refused", 4, IPV4, IPV4, port)
        plain, failing, queue = [tool.stop() for tool in tools]
        assert plain == [*connects, attempt]
        assert [line for line in failing if "ENETUNREACH" not in line] == [
            row(refused.pid, "refused", 4, IPV4, IPV4, f"{port:<5} ECONNREFUSED  -")
        ]
        assert [line.rsplit(maxsplit=2)[0] for line in queue] == accepts
        assert {line.split()[-1] for line in queue} == {"128"}
    finally:
        show("/sys/kernel/btf")
        hide(headers())
