"""The child process that compiles: what stays in memory, and every way to die."""

import contextlib
import os
import pathlib
import re
import resource
import signal
import subprocess

import pytest
from conftest import (
    DEADLINE,
    IPV4,
    TOOLS,
    TOP,
    Worker,
    best_method,
    failures,
    only_at_both_ends,
    only_on,
    probed_functions,
    until,
)
from test_trust import left_behind, loaded
from traffic import connect_refused

MB = 1 << 20
on_trixie = only_on("trixie")  # for this is not about the kernel
OPTIONS = {
    "tcpconnect": ["-c", "-d -x -T -t -U -L"],
    "tcpaccept": ["-q --json"],
}


def children(pid):
    """PIDs of a process's children."""
    text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def resident_bytes(pid):
    """VmRSS of a process and all below it."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    own = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10
    return own + sum(map(resident_bytes, children(pid)))


@only_at_both_ends
def test_memory(start):
    """Before the first event: 25 MB, and 30 with -d."""
    commands = [f"{name} {given}" for name in TOOLS for given in OPTIONS[name]]
    tools = start(*commands, TCPTOOLS_METHOD=best_method())
    taken = {
        command: resident_bytes(tool.process.pid)
        for command, tool in zip(commands, tools)
    }
    print({command: f"{size / MB:.1f} MB" for command, size in taken.items()})
    for command, size in taken.items():
        assert size < (30 if "-d" in command else 25) * MB, command


def piped(name, tmpdir, **options):
    """The process of a tool that writes to pipes, and has its files in a directory."""
    return subprocess.Popen(
        [TOP / name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmpdir)},
        **options,
    )


@pytest.fixture
def compiling(tmp_path):
    """compiling(name) starts a tool; gives (process, its child) while that compiles."""
    started = []

    def start(name):
        process = piped(name, tmp_path)
        started.append(process)
        # When it writes files, signals and its parent's end are taken care of.
        until("the child that compiles", lambda: list(tmp_path.glob(f"{name}-*/*")))
        (child,) = children(process.pid)
        return process, child

    yield start
    for process in started:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []


@on_trixie
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_a_child_that_dies(compiling, signum):
    before = left_behind()
    for name in TOOLS:
        process, child = compiling(name)
        os.kill(child, signum)
        out, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out) == (1, "")
        what = "the process that compiles the C program was killed by"
        assert re.fullmatch(rf"{name}: error: {what} {signum.name}(: .+)?\n", err), err
    assert left_behind() == before


@on_trixie
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_compiles(compiling, signum):
    """It ends immediately and quietly: nothing was traced yet. As a terminal sends it,
    SIGINT is the child's, too, which leaves it to its parent.
    """
    for name in TOOLS:
        process, child = compiling(name)
        if signum == signal.SIGINT:
            os.kill(child, signum)
        process.send_signal(signum)
        out, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out, err) == (0, "", "")
        assert not pathlib.Path(f"/proc/{child}").exists()


def has_ended(pid):
    with contextlib.suppress(OSError):
        return ") Z " in pathlib.Path(f"/proc/{pid}/stat").read_text()
    return True


@on_trixie
def test_a_parent_that_is_killed(tmp_path, compiling):
    """Takes its child with it. Only its directory stays."""
    for name in TOOLS:
        process, child = compiling(name)
        os.kill(child, signal.SIGSTOP)  # it would end when it has compiled
        process.kill()
        process.wait()
        until("the child to end", lambda pid=child: has_ended(pid))
    subprocess.run(["find", tmp_path, "-mindepth", "1", "-delete"], check=True)


def limited(which, value):
    return lambda: resource.setrlimit(which, (value, value))


@on_trixie
@pytest.mark.parametrize("megabytes", [60, 180])
def test_little_memory(megabytes):
    """Too little to load libclang or LLVM, of 260 MB that it takes: memory is what one
    line names, and no package.
    """
    before = loaded("prog")
    said = failures(preexec_fn=limited(resource.RLIMIT_AS, megabytes * MB))
    for name, line in said.items():
        assert line.startswith(f"{name}: error: not enough memory to load bcc ("), line
    assert loaded("prog") == before


@on_trixie
@pytest.mark.parametrize("descriptors", [5, 8, 11])
def test_few_descriptors(descriptors):
    """They run out in the child, on their way from it, or in what the parent opens."""
    limit = limited(resource.RLIMIT_NOFILE, descriptors)
    said = failures(preexec_fn=limit)
    for name in TOOLS:
        why = r"(cannot open perf buffers: )?Too many open files( \(see .*\))?"
        assert re.fullmatch(rf"{name}: error: {why}\n", said[name])
    assert probed_functions() & {"tcp_connect", "security_sock_graft"} == set()


@on_trixie
def test_a_low_soft_limit_is_raised(start):
    """With 20 and a hard limit above, as 512 CPUs need of 1,024."""

    def lower():
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))

    (tool,) = start("tcpconnect", options={"preexec_fn": lower})
    worker = Worker(b"client", connect_refused, IPV4)
    worker.report()
    assert tool.method() == best_method()
    assert len(tool.stop()) == 1


@on_trixie
def test_a_parent_that_ignores_its_children(tmp_path):
    """SIGCHLD is ignored then in the tool, too, when it starts."""

    def ignore():
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    process = piped("tcpconnect", tmp_path, preexec_fn=ignore)
    assert process.stdout.readline().startswith("PID ")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=DEADLINE) == ("", "")
    assert process.returncode == 0


@on_trixie
def test_no_temporary_directory():
    said = failures(env={**os.environ, "TMPDIR": "/nowhere"})
    why = r"No such file or directory \(set TMPDIR to a directory\)"
    what = f"cannot write to /nowhere: {why}"
    for name, line in said.items():
        assert re.fullmatch(rf"{name}: error: {what}\n", line)
