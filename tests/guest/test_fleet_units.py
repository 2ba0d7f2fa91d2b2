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
from traffic import connect_refused, run_mixed_traffic

FLEET = TOP / "examples/fleet"
SHIPPER = "ship-tcptools"
COMMON = "tcptools-.service.d"
UNITS = ("tcptools-connect", "tcptools-failed", "tcptools-accept")
PARANOID = pathlib.Path("/proc/sys/kernel/perf_event_paranoid")
CAP_DAC_READ_SEARCH, CAP_PERFMON, CAP_BPF = 2, 38, 39
IMMEDIATE = 10  # failures, in the noise of mixed traffic
PROBE = """\
[Service]
ExecStart=/bin/bash -c 'while sleep 1; do true </dev/tcp/127.0.0.1/9; done'
"""


@pytest.fixture
def installed():
    """The tools and the units, as the README there says, and an empty journal."""
    before = PARANOID.read_text()
    for file in (TOP / "tcpconnect", TOP / "tcpaccept", FLEET / SHIPPER):
        shutil.copy(file, "/usr/local/sbin")
    units = pathlib.Path("/etc/systemd/system")
    for unit in (*UNITS, SHIPPER):
        shutil.copy(FLEET / f"{unit}.service", units)
    shutil.copytree(FLEET / COMMON, units / COMMON, dirs_exist_ok=True)
    (units / "probe.service").write_text(PROBE)
    shutil.copy(FLEET / "journald@tcptools.conf", "/etc/systemd")
    settings = shutil.copy(FLEET / "tcptools-sysctl.conf", "/etc/sysctl.d")
    subprocess.run(["sysctl", "--quiet", f"--load={settings}"], check=True)
    shutil.rmtree("/var/log/journal", ignore_errors=True)
    pathlib.Path("/var/log/journal").mkdir()
    command = ["systemd-tmpfiles", "--create", "--prefix=/var/log/journal"]
    subprocess.run(command, check=True)
    yield
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


def columns(rows):
    """Of objects: what a table has of them."""
    keys = ("pid", "comm", "ip", "saddr", "daddr", "dport")
    return [[str(row[key]) for key in keys] for row in rows]


def check_rows(connecting, failing, accepting):
    """Of traffic that is known."""
    connects, accepts = run_mixed_traffic()
    port = connect_refused("127.0.0.1")
    *connected, _ = connecting.wait_for_rows(len(connects) + 1)
    assert columns(connected) == [row.split() for row in connects]
    accepted = accepting.wait_for_rows(len(accepts))
    assert columns(accepted) == [row.split() for row in accepts]
    *immediate, later = [
        (row["event"], row["comm"], row["dport"], row["error"])
        for row in failing.wait_for_rows(IMMEDIATE + 1)
    ]
    assert immediate == [("connect_failed", "noise", 9, "ENETUNREACH")] * IMMEDIATE
    assert later == ("connect_failed", "python3", port, "ECONNREFUSED")


@only_on("sid")
@pytest.mark.timeout(3 * DEADLINE)
@pytest.mark.usefixtures("installed")
def test_units():
    """They trace, as nobody with three capabilities; their rows are in a journal; and a
    killed one comes back.
    """
    with systemd() as run:
        units = [Unit(run, name) for name in UNITS]
        # Which prints when tracing is on
        run("systemctl", "set-environment", "TCPTOOLS_DEBUG=1")
        run("systemctl", "start", *UNITS)
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
        run("systemctl", "stop", *UNITS)
        assert run("systemctl", "list-units", "--failed", "--no-legend") == ""


# In the tools' place: starts faster, and what it prints is known
STUB = """#!/bin/bash
for n in {1..15}; do echo "{\\"row\\": \\"$0 $* $n\\"}"; done
echo "$0: lost 5 events" >&2
exec sleep infinity
"""


def install_shipper(url):
    """As the README says, but with small inserts, so that there are some, and with all
    of the CPU, which is slow enough here.
    """
    config = pathlib.Path("/etc/ship-tcptools.conf")
    text = (FLEET / config.name).read_text()
    config.write_text(text.replace("https://clickhouse.example.com:8443", url))
    config.chmod(0o600)
    changes = pathlib.Path(f"/etc/systemd/system/{SHIPPER}.service.d/test.conf")
    changes.parent.mkdir(exist_ok=True)
    start = f"ExecStart=\nExecStart=/usr/local/sbin/{SHIPPER} 1 20\n"
    changes.write_text(f"[Service]\n{start}RestartSec=1\nCPUQuota=\n")


@only_on("bullseye", "trixie")
@pytest.mark.usefixtures("installed")
def test_shipper():
    """The rows of the units' journal arrive, each once, after inserts were refused."""
    for name in ("tcpconnect", "tcpaccept"):
        pathlib.Path("/usr/local/sbin", name).write_text(STUB)
    rows = {
        f'{{"row": "/usr/local/sbin/{command} {n}"}}'
        for command in ("tcpconnect --json", "tcpconnect -x --json", "tcpaccept --json")
        for n in range(1, 16)
    }

    def sent():
        texts = [one.partition("FORMAT JSONEachRow\n")[2] for one in Database.inserts]
        return "".join(texts).splitlines()

    with database() as port:
        install_shipper(f"http://127.0.0.1:{port}")
        with systemd() as run:
            run("systemctl", "start", *UNITS, SHIPPER)
            until("all rows", lambda: len(sent()) >= len(rows))
            said = run("journalctl", "--output=cat", f"--unit={SHIPPER}")
            run("systemctl", "stop", SHIPPER)
    assert set(sent()) == rows
    assert len(sent()) == len(rows)
    for status in (404, 503):
        assert f"ClickHouse answered {status}: Code: 81. DB::Exception" in said
    assert Database.logins == {"Basic dGNwdG9vbHM6UEFTU1dPUkQ="}  # tcptools:PASSWORD
