"""Where there is no BTF, the kernel's headers serve."""

import contextlib

import pytest
from conftest import DEADLINE, IPV4, Worker, headers, headers_shown, hidden, row
from test_dropped import FAMILIES, Full, knock, without_repeats
from traffic import connect_refused, run_mixed_traffic


@pytest.mark.timeout(3 * DEADLINE)
def test_layout_from_kernel_headers(start):
    """With BTF hidden. One release has headers; it is slow."""
    if not headers():
        pytest.skip("the kernel's headers are not installed in this guest")
    with contextlib.ExitStack() as stack:
        stack.enter_context(headers_shown())
        stack.enter_context(hidden("/sys/kernel/btf"))
        full = Full(stack, *FAMILIES[0])
        tools = start("tcpconnect -l -d") + start("tcpaccept -q")
        tools += start("tcpaccept -x -R")
        assert [tool.method() for tool in tools] == ["headers"] * 3
        connects, accepts = run_mixed_traffic()
        refused = Worker(b"refused", connect_refused, IPV4)
        port = refused.report()
        *others, dropping = tools
        outcomes, queue = [tool.stop() for tool in others]
        dropped = [knock(full, False)]
        last = row(refused.pid, "refused", 4, IPV4, IPV4, port)
        wanted = [(line, "-") for line in connects] + [(last, "ECONNREFUSED")]
        shown = [line.rsplit(maxsplit=3)[:2] for line in outcomes]
        assert [tuple(one) for one in shown if one[1] != "ENETUNREACH"] == wanted
        assert [line.rsplit(maxsplit=2)[0] for line in queue] == accepts
        assert {line.split()[-1] for line in queue} == {"128"}
        assert without_repeats(dropping.stop()) == dropped
