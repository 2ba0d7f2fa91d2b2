"""-- COMMAND: whose connections are shown, what the command gets, and how both end."""

import os
import pathlib
import re
import resource
import select
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import DEADLINE, TOOLS, TOP, Worker, row, until
from traffic import connect_to_itself

# Run by python3 -c: `connect N` connects and accepts N times, and says who it was on
# stderr; `child` does it in a child, `grandchild` in a child that is left running.
CONNECT = """
import os, signal, socket, sys, time

def connect(count):
    open("/proc/self/comm", "w").write("it")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        for _ in range(count):
            with socket.create_connection(server.getsockname()):
                server.accept()[0].close()
        print("did", os.getpid(), server.getsockname()[1], count, file=sys.stderr)
        sys.stderr.flush()

def child(count):
    pid = os.fork()
    if pid == 0:
        connect(count)
        os._exit(0)
    os.waitpid(pid, 0)
"""


def python(*lines):
    """The words of a command that runs these lines behind CONNECT."""
    return [sys.executable, "-c", "\n".join([CONNECT, *lines])]


def expected(err):
    """The rows of what CONNECT did, from what it said on stderr."""
    done = re.findall(r"^did (\d+) (\d+) (\d+)$", err, re.MULTILINE)
    return [
        line
        for pid, port, count in done
        for line in [row(pid, "it", 4, "127.0.0.1", "127.0.0.1", port)] * int(count)
    ]


def messages(err):
    """What a tool printed on stderr."""
    return [line for line in err.splitlines() if re.match(r"tcp\w+: ", line)]


class Run:
    """A tool that runs a command, in a process group and cgroup of its own."""

    def __init__(self, top, line, words, wrapper=(), **options):
        name, *arguments = shlex.split(line)
        self.home = top / "home"
        self.home.mkdir(exist_ok=True)
        enter = f'echo $$ >{self.home}/cgroup.procs; exec "$@"'
        self.process = subprocess.Popen(
            ["sh", "-c", enter, "sh", *wrapper, TOP / name, *arguments, "--", *words],
            **{
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
                "start_new_session": True,
                **options,
            },
        )

    def finish(self):
        """(exit status, stdout's lines, stderr)"""
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out.splitlines(), err

    def cgroups(self):
        """The cgroups that tools have made."""
        return [path.name for path in self.home.glob("tcp*")]


@pytest.fixture
def command(cgroups):
    """command(line, words) starts a tool that runs the words; none outlives the test,
    nor does a cgroup.
    """
    runs = []

    def start(line, words, **options):
        runs.append(Run(cgroups, line, words, **options))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
    left = [path.name for path in (cgroups / "home").glob("tcp*")]
    for threads in cgroups.glob("home/**/cgroup.threads"):
        until_empty(threads)
    assert left == []


def until_empty(threads):
    """Kill the processes of a cgroup."""
    for tid in threads.read_text().split():
        os.kill(int(tid), signal.SIGKILL)
    until("processes to end", lambda: threads.read_text() == "")


def test_only_the_command_and_its_children(command):
    """Not what another process does meanwhile; stdin, stdout and the status are its."""
    words = python(
        "connect(7)",
        "child(5)",
        "print('ready', file=sys.stderr, flush=True)",
        "assert input() == 'go on'",
        "print('done', flush=True)",
        "connect(3)",
        "sys.exit(3)",
    )
    for name in TOOLS:
        run = command(name, words)
        until("the command to be ready", lambda run=run: is_readable(run))
        Worker(b"other", connect_to_itself, 11).report()
        run.process.stdin.write("go on\n")
        run.process.stdin.flush()
        status, (_, *rows), err = run.finish()
        assert status == 3
        rows.remove("done")
        assert rows == expected(err) and len(rows) == 15
        assert messages(err) == []


def is_readable(run):
    """Whether the command has connected for the first time."""
    return select.select([run.process.stderr], [], [], 0)[0]


OPTIONS = {
    "tcpconnect -c -i 86400 --per-process": (
        "{pid:<7} it           127.0.0.1        127.0.0.1        {port:<5} 17"
    ),
    "tcpaccept -c": "127.0.0.1        {port:<5} 17",
}


def test_counts_when_it_ends(command):
    """And is killed by a signal."""
    words = python("connect(17)", "os.kill(os.getpid(), signal.SIGTERM)")
    runs = {line: command(line, words) for line in OPTIONS}
    for line, run in runs.items():
        status, (_, *rows), err = run.finish()
        _, pid, port, _ = err.split()
        assert (status, rows) == (128 + 15, [OPTIONS[line].format(pid=pid, port=port)])


def test_outcomes_and_json(command):
    """Of all that has ended before the command has."""
    words = python("connect(13)")
    lines = "tcpconnect -l -d -t -b 8", "tcpconnect --json --unit", "tcpaccept -q -R"
    runs = [command(line, words) for line in lines]
    (_, rows, err), *others = [run.finish() for run in runs]
    assert len(rows) == 14 and all(" - " in line for line in rows[1:])
    assert [line for line in messages(err) if "DNS" not in line] == []
    (status, lines, err), (_, rows, _) = others
    path = f"/home/tcpconnect-{runs[1].process.pid}"
    assert len(lines) == 13 and len(rows) == 14
    assert all(f'"cgroup_path": "{path}"' in line for line in lines)
    assert (status, messages(err)) == (0, [])


def test_what_is_left_running(command, cgroups):
    """Is in the tool's own cgroup then, also from a cgroup that the command made."""
    script = """
        own=$(sed -n 's/^0:://p' /proc/self/cgroup)
        mkdir $TOP$own/below
        sleep 1000 >/dev/null 2>&1 &
        echo $! >$TOP$own/below/cgroup.procs
        sleep 1000 >/dev/null 2>&1 &
        exit 0
    """
    words = ["sh", "-c", script]
    run = command("tcpaccept", words, env={**os.environ, "TOP": str(cgroups)})
    status, _, err = run.finish()
    assert status == 0
    (line,) = err.splitlines()
    pids = re.fullmatch(r"tcpaccept: left running: PID (\d+), (\d+)", line).groups()
    for pid in pids:
        path = pathlib.Path(f"/proc/{pid}/cgroup").read_text()
        assert path.endswith("0::/home\n")
        assert pathlib.Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    assert run.cgroups() == []


def test_signals(command):
    """Ctrl-C reaches both, and what the command does on it is shown. SIGTERM and SIGHUP
    are passed on.
    """
    runs = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handler = "lambda *_: connect(2) or sys.exit(7)"
        lines = f"signal.signal({int(signum)}, {handler})", "connect(5)"
        runs[signum] = command("tcpconnect", python(*lines, "signal.pause()"))
    for signum, run in runs.items():
        until("the command to be ready", lambda run=run: is_readable(run))
        if signum == signal.SIGINT:
            os.killpg(run.process.pid, signum)
        else:
            run.process.send_signal(signum)
        status, (_, *rows), err = run.finish()
        assert (status, messages(err)) == (7, [])
        assert rows == expected(err) and len(rows) == 7


def test_ctrl_c_twice(command):
    """A second one a second later kills both."""
    lines = "signal.signal(2, signal.SIG_IGN)", "connect(1)", "time.sleep(1000)"
    run = command("tcpaccept", python(*lines))
    until("the command to be ready", lambda: is_readable(run))
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert run.process.poll() is None
    os.killpg(run.process.pid, signal.SIGINT)
    status, _, err = run.finish()
    assert (status, messages(err), run.cgroups()) == (-signal.SIGINT, [], [])
    _, pid, *_ = err.split()
    assert not pathlib.Path(f"/proc/{pid}").exists()


def test_ctrl_c_before_it_starts(command, tmp_path):
    """It does not, and nothing stays."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        run = command("tcpconnect", ["touch", tmp_path / "ran"])
        until("its cgroup", run.cgroups)
        os.killpg(run.process.pid, signum)
        status, _, err = run.finish()
        assert (status, err, run.cgroups()) == (0, "", [])
    assert not (tmp_path / "ran").exists()


def test_reader_that_is_gone(command, tmp_path):
    """The tool exits as ever; the command runs on, and to its end."""
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    script = f"read line <{ready}; echo done >{tmp_path}/end"
    run = command("tcpconnect", ["sh", "-c", script])
    assert select.select([run.process.stdout], [], [], DEADLINE)[0]
    until("the command", lambda: children(run.process.pid))
    run.process.stdout.close()
    assert run.process.wait(DEADLINE) == 0
    line = run.process.stderr.readline()
    assert re.fullmatch(r"tcpconnect: left running: PID \d+\n", line)
    ready.write_text("go on\n")
    until("its end", (tmp_path / "end").exists)


def children(pid):
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


# The last by exec: a shell blocks all signals while it starts a process
SIGNALS = "exec grep -E '^Sig(Blk|Ign)' /proc/self/status"
STATE = f"ulimit -n; ulimit -l; ls /proc/self/fd; {SIGNALS}"


def test_what_the_command_gets(command):
    """Limits, descriptors, signals that are ignored: what the tool got."""

    def prepare():
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (107, hard))
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 8192))
        os.dup2(os.open("/dev/null", os.O_RDONLY), 23)
        for signum in (signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)

    words = ["sh", "-c", STATE]
    options = {"preexec_fn": prepare, "close_fds": False}
    direct = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, **options
    )
    status, (_, *lines), err = command("tcpconnect", words, **options).finish()
    assert (status, err) == (0, "")
    assert lines == direct.stdout.splitlines()
    assert "107" in lines and "23" in lines


def failure(run):
    """(exit status, the one line) of a tool that prints no header."""
    status, out, err = run.finish()
    assert out == [] and err.count("\n") == 1
    return status, err


def test_where_it_cannot_be(command, cgroups):
    """Nothing is loaded, and nothing stays."""
    home = cgroups / "home"
    home.mkdir()
    what = "tcpconnect: error: cannot make a cgroup for the command: "
    remount = "findmnt -nro TARGET -t cgroup2 | xargs -n 1 mount -o remount,bind,ro"
    wrapper = ("unshare", "-m", "sh", "-c", f'{remount}; exec "$@"', "sh")
    status, line = failure(command("tcpconnect", ["true"], wrapper=wrapper))
    assert status == 1 and line.startswith(f"{what}[Errno 30] Read-only file system")
    (home / "cgroup.max.depth").write_text("0")
    status, line = failure(command("tcpconnect", ["true"]))
    assert status == 1 and line.startswith(f"{what}[Errno 11] Resource temporarily")
    (home / "cgroup.max.depth").write_text("max")
    (home / "cgroup.type").write_text("threaded")
    status, line = failure(command("tcpconnect", ["true"]))
    assert (status, line) == (1, f"{what}[Errno 95] Operation not supported\n")
    assert list(home.glob("tcp*")) == []


def test_what_cannot_be_run(command, tmp_path):
    """As is known only by trying."""
    (tmp_path / "bad").write_text("\x7fELF")
    (tmp_path / "bad").chmod(0o755)
    status, out, err = command("tcpaccept", [tmp_path / "bad"]).finish()
    assert (status, len(out)) == (126, 1)
    line = f"tcpaccept: error: cannot run '{tmp_path}/bad': Exec format error\n"
    assert err == line
