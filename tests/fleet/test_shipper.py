"""examples/fleet/ship-tcptools, from a real journal to a real ClickHouse server, which
is away for a while.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from . import clickhouse
from .events import FLEET, text
from .test_cluster import ALL, ask_all, expected, traffic

JOURNALD = "/lib/systemd/systemd-journald"
YEAR = 366 * 86_400_000_000  # µs
DEADLINE = 300  # seconds until what does not come is held to be missing
UNITS = ("connect", "connects", "accept", "accepts")

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


def until(there_is, what):
    deadline = time.monotonic() + DEADLINE
    while not (found := there_is()):
        assert time.monotonic() < deadline, f"waited {DEADLINE} s for {what}"
        time.sleep(0.2)
    return found


# As systemd connects a unit's stdout: a header, then what the process writes. journald
# looks a process's unit up once, so each unit needs a process of its own, and when it
# reads a line: of a process that has exited by then it does not know the unit.
#
# The kernel adds the sender's PID to what is sent before journald accepts the
# connection, and after it has set SO_PASSCRED. What is sent between the two, journald
# stores without PID and unit. So the PID is sent explicitly.
WRITE = """
import os, signal, socket, struct, sys
path, unit = sys.argv[1:]
whose = struct.pack("3i", os.getpid(), os.getuid(), os.getgid())
credentials = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, whose)]
header = f"{unit}\\n{unit}.service\\n6\\n0\\n0\\n0\\n0\\n"
text = header.encode() + sys.stdin.buffer.read()
with socket.socket(socket.AF_UNIX) as stdout:
    stdout.connect(path)
    assert stdout.sendmsg([text], credentials) == len(text)
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
        """Lines (bytes) of a unit, until journald has stored them as that."""
        with subprocess.Popen(
            [sys.executable, "-c", WRITE, self.socket, unit],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as writer:
            try:
                writer.stdin.write(lines)
                writer.stdin.close()
                assert writer.stdout.readline() == b"sent\n"
                wanted = [f"{unit}.service"] * lines.count(b"\n")
                until(lambda: self.units_of(writer.pid) == wanted, f"lines of {unit}")
            finally:
                writer.kill()

    def units_of(self, pid):
        """The unit of each of a process's entries."""
        found = self.ctl("--output=json", f"_PID={pid}").splitlines()
        return [json.loads(line).get("_SYSTEMD_UNIT") for line in found]

    def ctl(self, *options):
        """What journalctl prints."""
        command = [*self.enter, "journalctl", "--namespace=tcptools", *options]
        return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout

    def forget(self):
        """All rows are gone."""
        self.ctl("--rotate")
        self.ctl("--vacuum-files=1")


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
        self.config.write_text(f'url = "{url}"\nuser = "tcptools:PASSWORD"\n')
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
                self.command, stderr=log, env=self.environment, start_new_session=True
            )

    def stop(self):
        """With what it runs, as systemd does: no wc complains of a pipe."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def sent(self):
        """The cursor of the row that it sent last, if any."""
        return self.cursor.read_text() if self.cursor.exists() else ""

    def said(self):
        return self.log.read_text().splitlines()

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
    for n, unit in enumerate(UNITS):
        lines = text(events[n :: len(UNITS)])
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


@pytest.fixture
def shipping(server, shipper):
    """A shipper that does not run yet, to a server that has the table."""
    shipper.stop()
    server.query("CREATE DATABASE fleet")
    server.run((FLEET / "schema.sql").read_text(), database="fleet")
    shipper.set_password("PASSWORD", "secret")
    return shipper


def ships(journal, server, shipper, events, *more):
    """Events, and other lines among them: the shipper sends the events, and stops."""
    before, cursor = times(server), shipper.sent()
    wanted = sorted([*before, *(event["ts"] for event in events)])
    middle = len(events) // 2
    lines = [text(events[:middle]), *more, text(events[middle:])]
    journal.write("tcptools-accept", b"".join(lines))
    shipper.start()
    shipper.run_until(lambda: shipper.sent() not in (cursor, ""), "a cursor")
    shipper.stop()
    assert times(server) == wanted


def test_lines_that_are_no_rows(journal, server, shipping):
    """Others in the same insert are stored, and the reason is printed, once."""
    lines = b'{"ts": "noon"}\n', b'{"event": "accept, "host": "h1"}\n'
    ships(journal, server, shipping, list(traffic(20)), *lines)
    [said] = shipping.said()
    assert said.startswith("ClickHouse stored all but rows like this: Code: ")


def test_many_lines_that_are_no_rows(journal, shipping):
    """Not a stray one, but tools and a table that do not fit: they wait."""
    journal.write("tcptools-accept", 11 * b'{"ts": "noon"}\n')
    shipping.start()
    shipping.run_until_it_says("ClickHouse answered 400: Code: ")
    assert shipping.sent() == ""


GONE = "the row sent last is not in the journal: sending all that is there"


def test_rows_of_the_journal_are_gone(journal, server, shipping):
    """With the one that was sent last: the first of what is new is not skipped."""
    events = list(traffic(40))
    ships(journal, server, shipping, events[:20])
    journal.forget()
    ships(journal, server, shipping, events[20:])
    assert shipping.said() == [GONE]


def test_the_cursor_is_in_the_future(journal, server, shipping):
    """And of another journal, as after one was deleted and the clock was set back."""
    events = list(traffic(40))
    ships(journal, server, shipping, events[:20])
    fields = dict(field.split("=") for field in shipping.sent().split(";"))
    for name in "sb":
        fields[name] = fields[name][::-1]
    fields["t"] = f"{int(fields['t'], 16) + YEAR:x}"
    shipping.cursor.write_text(";".join(map("=".join, fields.items())))
    ships(journal, server, shipping, events[20:])
    assert shipping.said() == [GONE]
