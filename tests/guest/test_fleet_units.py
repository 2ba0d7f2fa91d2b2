"""examples/fleet's units under a real systemd, one of its own in a PID namespace."""

import contextlib
import gzip
import http.server
import json
import pathlib
import shutil
import subprocess
import threading

import pytest
from conftest import DEADLINE, TOP, only_on, until
from traffic import connect_refused, connect_to_itself, run_mixed_traffic

SHIPPER = "ship-tcptools"
EVENTS = ("tcptools-connect", "tcptools-accept")
COUNTS = ("tcptools-connects", "tcptools-accepts")
PARANOID = pathlib.Path("/proc/sys/kernel/perf_event_paranoid")
CAP_DAC_READ_SEARCH, CAP_PERFMON, CAP_BPF = 2, 38, 39
OFTEN = 37
IMMEDIATE = 10  # failures, in the noise of mixed traffic
PROBE = """\
[Service]
ExecStart=/bin/bash -c 'while sleep 1; do true </dev/tcp/127.0.0.1/9; done'
"""


@pytest.fixture
def package():
    """Installed where only root may trace, and nothing has used the journal yet."""
    before = PARANOID.read_text()
    PARANOID.write_text("3")
    build = [TOP / ".packaging/deb", "/var/tmp"]  # that systemd has another /tmp
    done = subprocess.run(build, stdout=subprocess.PIPE, text=True, check=True)
    package = done.stdout.strip()
    subprocess.run(["dpkg", "--install", package], check=True)
    pathlib.Path("/etc/systemd/system/probe.service").write_text(PROBE)
    shutil.rmtree("/var/log/journal", ignore_errors=True)
    yield package
    subprocess.run(["dpkg", "--purge", "tcptools"], check=True)
    PARANOID.write_text(before)


# systemd as the first process of a container: with a /run and a /tmp of its own, and
# without what would touch the guest's devices or, in bullseye, cannot write where
# virtme-ng has mounted a file. Units get credentials by a mount that is shared.
START = """
mount --make-rshared /
mount -t tmpfs none /run
mount -t tmpfs none /tmp
mkdir -p /run/systemd/system
for unit in udevd udev-trigger modules-load sysctl sysusers; do
    ln -s /dev/null /run/systemd/system/systemd-$unit.service
done
exec env container=guest /lib/systemd/systemd --unit=basic.target
"""


@contextlib.contextmanager
def systemd():
    """Yields run(*command): runs a command where that systemd is; gives its stdout."""
    namespaces = ("--pid", "--mount", "--cgroup")
    alone = ("unshare", *namespaces, "--fork", "--mount-proc", "--kill-child")
    command = [*alone, "sh", "-c", START]
    with subprocess.Popen(command) as process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        enter = (
            "nsenter",
            f"--target={until('systemd', children.read_text).strip()}",
            *namespaces,
        )

        def run(*command):
            command = [*enter, *command]
            return subprocess.run(
                command,
                stdout=subprocess.PIPE,
                text=True,
                timeout=DEADLINE,
                check=False,
            ).stdout

        try:
            state = ("systemctl", "is-system-running")
            until("systemd to be running", lambda: run(*state) == "running\n")
            yield run
        except BaseException:
            print(run("journalctl", "--namespace=*", "--boot", "--no-hostname"))
            raise


class Database(http.server.BaseHTTPRequestHandler):
    """In ClickHouse's place: keeps what is inserted, but refuses the first two inserts.

    tests/fleet/test_shipper.py has ClickHouse itself.
    """

    logins, inserts = set(), []
    statuses = iter((404, 503))

    def do_POST(self):
        body = gzip.decompress(self.rfile.read(int(self.headers["Content-Length"])))
        self.logins.add(self.headers["Authorization"])
        status = next(self.statuses, 200)
        if status == 200:
            self.inserts.append(body.decode())
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"Code: 81. DB::Exception" if status != 200 else b"")

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def database():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Database) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join(DEADLINE)


class Unit:
    """A unit of that systemd."""

    def __init__(self, run, name):
        self.run, self.name = run, name

    def lines(self):
        where = ("--namespace=tcptools", "--output=cat", f"--unit={self.name}")
        return self.run("journalctl", *where).splitlines()

    def rows(self):
        return [json.loads(line) for line in self.lines() if line.startswith("{")]

    def wait_for_rows(self, count):
        until(f"{count} rows of {self.name}", lambda: len(self.rows()) == count)
        return self.rows()

    def wait_for_start(self, number):
        def starts():
            return sum(line.endswith(": tracing") for line in self.lines())

        until(f"start {number} of {self.name}", lambda: starts() == number)

    def pid(self):
        what = ("--value", "--property=MainPID", self.name)
        return self.run("systemctl", "show", *what).strip()

    def status(self):
        """/proc/PID/status of its process."""
        text = self.run("cat", f"/proc/{self.pid()}/status")
        return dict(line.split(":\t", 1) for line in text.splitlines())


def running(run):
    """The units of the package that are."""
    units = "--plain", "--no-legend", "tcptools-*.service", f"{SHIPPER}.service"
    lines = run("systemctl", "list-units", "--state=active", *units).splitlines()
    return sorted(line.partition(".service")[0] for line in lines)


def columns(rows):
    """Of objects: what a table has of them."""
    keys = ("pid", "comm", "ip", "saddr", "daddr", "dport")
    return [[str(row[key]) for key in keys] for row in rows]


def check_rows(connecting, accepting):
    """Of traffic that is known."""
    connects, accepts = run_mixed_traffic()
    port = connect_refused("127.0.0.1")
    rows = connecting.wait_for_rows(len(connects) + IMMEDIATE + 1)
    assert all(row["latency_us"] >= 0 for row in rows)
    connected = [row for row in rows if row["event"] == "connected"]
    assert columns(connected) == [row.split() for row in connects]
    accepted = accepting.wait_for_rows(len(accepts))
    assert columns(accepted) == [row.split() for row in accepts]
    *immediate, later = [
        (row["event"], row["comm"], row["dport"], row["error"])
        for row in rows
        if row not in connected
    ]
    assert immediate == [("connect_failed", "noise", 9, "ENETUNREACH")] * IMMEDIATE
    assert later == ("connect_failed", "python3", port, "ECONNREFUSED")


@only_on("sid")
@pytest.mark.timeout(3 * DEADLINE)
@pytest.mark.usefixtures("package")
def test_units():
    """They trace, as nobody with three capabilities; their rows are in a journal; and a
    killed one comes back. So do counts, and what counts stops what does not.
    """
    with systemd() as run:
        units = [Unit(run, name) for name in EVENTS]
        # Which prints when tracing is on
        run("systemctl", "set-environment", "TCPTOOLS_DEBUG=1")
        run("systemctl", "enable", "--now", *EVENTS)
        for unit in units:
            unit.wait_for_start(1)
            status = unit.status()
            for which in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
                assert int(status[which], 16) == sum(
                    1 << cap for cap in (CAP_DAC_READ_SEARCH, CAP_PERFMON, CAP_BPF)
                )
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
            assert "0" not in status["Uid"].split()
        check_rows(*units)

        # They may open a cgroup by its number
        run("systemctl", "start", "probe")
        path, connecting = "/system.slice/probe.service", units[0]
        until(path, lambda: path in {r.get("cgroup_path") for r in connecting.rows()})
        run("systemctl", "stop", "probe")

        run("kill", "-9", connecting.pid())
        connecting.wait_for_start(2)

        # Those that count write the interval that has begun when they stop
        counting = Unit(run, COUNTS[0])
        run("systemctl", "start", counting.name)
        assert running(run) == [counting.name]
        counting.wait_for_start(1)
        port = connect_to_itself(OFTEN)
        run("systemctl", "stop", counting.name)

        def counted():
            rows = [row for row in counting.rows() if row["event"] == "connects"]
            return sum(row["count"] for row in rows if row["dport"] == port)

        until(f"{OFTEN} connects", lambda: counted() == OFTEN)
        assert run("systemctl", "list-units", "--failed", "--no-legend") == ""


# In the tools' place: starts faster, and what it prints is known
STUB = """#!/bin/bash
for n in {1..15}; do echo "{\\"row\\": \\"$0 $* $n\\"}"; done
echo "$0: lost 5 events" >&2
exec sleep infinity
"""


def set_up_shipper(url):
    """As the README says, but with small inserts, so that there are some, and with all
    of the CPU, which is slow enough here.
    """
    config = pathlib.Path("/etc/ship-tcptools.conf")
    config.write_text(f'url = "{url}"\nuser = "tcptools:PASSWORD"\n')
    config.chmod(0o600)
    changes = pathlib.Path(f"/etc/systemd/system/{SHIPPER}.service.d/test.conf")
    changes.parent.mkdir(exist_ok=True)
    start = f"ExecStart=\nExecStart=/usr/lib/tcptools/{SHIPPER} 1 20\n"
    changes.write_text(f"[Service]\n{start}RestartSec=1\nCPUQuota=\n")


def stub_rows(*commands):
    return {
        f'{{"row": "/usr/bin/{command} --json {n}"}}'
        for command in commands
        for n in range(1, 16)
    }


@only_on("bullseye", "trixie")
def test_shipper(package):
    """The rows of the units' journal arrive, each once, after inserts were refused.
    Those that count and those that do not exclude each other.
    """
    for name in ("tcpconnect", "tcpaccept"):
        pathlib.Path("/usr/bin", name).write_text(STUB)
    events = stub_rows("tcpconnect -l", "tcpaccept")
    counts = stub_rows("tcpconnect -c -i 60", "tcpaccept -c -i 60")

    def sent():
        texts = [one.partition("FORMAT JSONEachRow\n")[2] for one in Database.inserts]
        return "".join(texts).splitlines()

    def wait_for(rows):
        until(f"{len(rows)} rows", lambda: len(sent()) >= len(rows))
        assert sorted(sent()) == sorted(rows)

    with database() as port, systemd() as run:
        set_up_shipper(f"http://127.0.0.1:{port}")
        run("systemctl", "enable", "--now", *EVENTS, SHIPPER)
        wait_for(events)
        said = run("journalctl", "--output=cat", f"--unit={SHIPPER}")
        for status in (404, 503):
            assert f"ClickHouse answered {status}: Code: 81. DB::Exception" in said
        assert Database.logins == {"Basic dGNwdG9vbHM6UEFTU1dPUkQ="}

        run("systemctl", "start", *COUNTS)
        wait_for(events | counts)
        assert running(run) == sorted((*COUNTS, SHIPPER))
        run("systemctl", "start", *EVENTS)
        assert running(run) == sorted((*EVENTS, SHIPPER))

        shipper = Unit(run, SHIPPER)
        before = shipper.pid()
        run("dpkg", "--install", package)
        assert shipper.pid() not in ("0", before)
        run("dpkg", "--remove", "tcptools")
        assert running(run) == []
