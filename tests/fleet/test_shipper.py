"""examples/fleet/ship-tcptools, from a real journal to a real ClickHouse server, which
is away for a while.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from . import clickhouse
from .events import FLEET, text
from .test_cluster import ALL, ask_all, expected, traffic

JOURNALD = "/lib/systemd/systemd-journald"
DEADLINE = 300  # seconds until what does not come is held to be missing
WRITES = 5  # of the same lines, until journald has all and knows whose they are
SHOWN = 60  # seconds until they are written again

# journald for one namespace, with a /run and a /var/log of its own. It has a cgroup
# namespace, too, where the tests' cgroup is the root: of processes in the root journald
# takes the unit that they name in their header.
START = f"""
mount -t tmpfs none /run
mount -t tmpfs none /var/log
mkdir -p /var/log/journal /run/systemd/journal.tcptools
mkdir /run/systemd/journald@tcptools.conf.d
cp "$0" /run/systemd/journald@tcptools.conf.d
echo 0123456789abcdef0123456789abcdef >/run/machine-id
mount --bind /run/machine-id /etc/machine-id
exec {JOURNALD} tcptools
"""


def until(there_is, what, seconds=DEADLINE):
    deadline = time.monotonic() + seconds
    while not (found := there_is()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return found


# As systemd connects a unit's stdout: a header, then what the process writes. journald
# looks a process's unit up once, so each unit needs a process of its own, and when it
# reads a line: of a process that has exited by then it does not know the unit.
WRITE = """
import signal, socket, sys
path, unit = sys.argv[1:]
with socket.socket(socket.AF_UNIX) as stdout:
    stdout.connect(path)
    stdout.sendall(f"{unit}\\n{unit}.service\\n6\\n0\\n0\\n0\\n0\\n".encode())
    stdout.sendall(sys.stdin.buffer.read())
    print("sent", flush=True)
    signal.pause()
"""


class Journal:
    """The journal of the units' namespace."""

    def __init__(self, process):
        self.enter = ["nsenter", f"--target={process.pid}", "--mount"]
        self.socket = pathlib.Path(
            f"/proc/{process.pid}/root/run/systemd/journal.tcptools/stdout"
        )

    def write(self, unit, lines):
        """Lines (bytes) of a unit. The shipper asks by unit: where journald has not
        found that out, or has not all of them, they are written again.
        """
        for _ in range(WRITES):
            try:
                units = self.written(unit, lines)
            except AssertionError as missing:
                units = missing
            if units == {f"{unit}.service"}:
                return
        raise AssertionError(f"journald does not have them as {unit}'s: {units}")

    def written(self, unit, lines):
        """Which units the lines are of, as journald says."""
        with subprocess.Popen(
            [sys.executable, "-c", WRITE, self.socket, unit],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as writer:
            try:
                writer.stdin.write(lines)
                writer.stdin.close()
                assert writer.stdout.readline() == b"sent\n"
                count = lines.count(b"\n")
                found = functools.partial(self.entries, writer.pid, count)
                return until(found, f"{count} lines of {unit} in the journal", SHOWN)
            finally:
                writer.kill()

    def entries(self, pid, count):
        """The units of a process's entries, once there are so many."""
        command = [*self.enter, "journalctl", "--namespace=tcptools", "--output=json"]
        done = subprocess.run(
            [*command, f"_PID={pid}"], stdout=subprocess.PIPE, check=True
        )
        found = [json.loads(line) for line in done.stdout.splitlines()]
        if len(found) >= count:
            return {entry.get("_SYSTEMD_UNIT") for entry in found}


@pytest.fixture
def journal():
    if not os.path.exists(JOURNALD) or shutil.which("curl") is None:
        pytest.skip("needs systemd's journald, and curl")
    unshare = ["unshare", "--mount", "--cgroup"]
    if subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("may not mount here")
    settings = FLEET / "journald@tcptools.conf"
    with subprocess.Popen([*unshare, "sh", "-e", "-c", START, settings]) as process:
        try:
            made = Journal(process)
            until(
                lambda: made.socket.exists() or process.poll() is not None,
                "journald's socket",
            )
            assert process.poll() is None, "journald does not start"
            yield made
        finally:
            process.kill()


class Shipper:
    """ship-tcptools, which is started again when it exits, as systemd does."""

    def __init__(self, journal, directory, url):
        state, credentials = directory / "state", directory / "credentials"
        state.mkdir()
        credentials.mkdir()
        self.cursor, self.log = state / "cursor", directory / "log"
        self.config = credentials / "clickhouse"
        text = (FLEET / "ship-tcptools.conf").read_text()
        self.config.write_text(text.replace("https://clickhouse.example.com:8443", url))
        self.command = [*journal.enter, FLEET / "ship-tcptools", "0.1", "100"]
        self.environment = {
            **os.environ,
            "STATE_DIRECTORY": str(state),
            "CREDENTIALS_DIRECTORY": str(credentials),
        }
        self.process = None

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stderr=log, env=self.environment
            )

    def stop(self):
        self.process.kill()
        self.process.wait()

    def set_password(self, old, new):
        text = self.config.read_text()
        assert f'tcptools:{old}"' in text
        self.config.write_text(text.replace(f"tcptools:{old}", f"tcptools:{new}"))

    def run_until(self, there_is, what):
        def has_come():
            if self.process.poll() is not None:
                assert self.process.returncode > 0
                self.start()
            return there_is()

        until(has_come, what)

    def run_until_it_says(self, message):
        """On stderr, from now on."""
        said = self.log.stat().st_size
        self.run_until(lambda: message in self.log.read_text()[said:], message)


@pytest.fixture
def shipper(journal, server, tmp_path):
    made = Shipper(journal, tmp_path, server.url)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def server(clickhouse_library, tmp_path):
    with clickhouse.servers(clickhouse_library, tmp_path) as [server]:
        yield server


def times(server):
    """The times of all rows, each once."""
    with contextlib.suppress(OSError, clickhouse.Refused):
        rows = server.query(
            "SELECT ts FROM fleet.tcp_events FINAL ORDER BY ts",
            date_time_output_format="iso",
        )
        return rows.splitlines()


def write(journal, events):
    """The tools' lines, with messages between them, and a tool that was killed."""
    for n, unit in enumerate(("connect", "failed", "accept")):
        lines = text(events[n::3])
        message = f"tcp{unit}: lost 5 events\n".encode()
        journal.write(f"tcptools-{unit}", message + lines + lines[:99])
    other_host = text(events).replace(b'"host": "h', b'"host": "other')
    assert other_host != text(events)
    journal.write("tcptools-other", other_host)


def inserted(server):
    """How many rows it has taken since its start."""
    sql = "SELECT sum(value) FROM system.events WHERE event = 'InsertedRows'"
    return int(server.query(sql))


def test_nothing_is_lost(journal, server, shipper, database):
    """The server is not up, does not know the password, has no table, and is killed
    between inserts and while it gets them: in the end it has all rows, each once.
    """
    events = list(traffic(900))
    assert len({event["ts"] for event in events}) == len(events)

    def write_rows(begin, end):
        write(journal, events[begin:end])

    def has(count):
        wanted = sorted(row["ts"] for row in events[:count])
        return (lambda: times(server) == wanted), f"{count} rows"

    server.kill()
    write_rows(0, 300)
    shipper.run_until_it_says("curl: (7)")
    server.start()
    shipper.run_until_it_says("ClickHouse answered 403: Code: 516.")
    shipper.set_password("PASSWORD", "secret")
    shipper.run_until_it_says("ClickHouse answered 404: Code: 81.")
    server.query("CREATE DATABASE fleet")
    server.run((FLEET / "schema.sql").read_text(), database="fleet")
    shipper.run_until(*has(300))

    write_rows(300, 1000)
    shipper.run_until(lambda: len(times(server)) > 300, "more rows")
    server.kill()
    write_rows(1000, len(events))
    shipper.run_until_it_says("curl: (7)")
    server.start()
    shipper.run_until(*has(len(events)))

    before = inserted(server)
    shipper.stop()
    shipper.cursor.unlink()
    shipper.start()
    again = before + len(events)
    shipper.run_until(lambda: inserted(server) >= again, "all rows once more")
    assert has(len(events))[0]()
    assert ask_all(server, *ALL) == expected(database, events, *ALL)
