"""examples/fleet's units under a real systemd, one of its own in a PID namespace."""

import contextlib
import json
import pathlib
import shutil
import subprocess

import pytest
from conftest import TOP, only_on, until
from traffic import connect_refused, run_mixed_traffic

FLEET = TOP / "examples/fleet"
COMMON = "tcptools-.service.d"
UNITS = ("tcptools-connect", "tcptools-failed", "tcptools-accept")
PARANOID = pathlib.Path("/proc/sys/kernel/perf_event_paranoid")
CAP_PERFMON, CAP_BPF = 38, 39
IMMEDIATE = 10  # failures, in the noise of mixed traffic
# Connects again and again: a new cgroup's path is looked for once per second
PROBE = """\
[Service]
ExecStart=sh -c 'while :; do python3 -c "import socket; socket.socket().connect_ex(\
(\\"127.0.0.1\\", 9))"; done'
"""


@pytest.fixture
def installed():
    """The tools and the units, as the README there says, and an empty journal."""
    before = PARANOID.read_text()
    for name in ("tcpconnect", "tcpaccept"):
        shutil.copy(TOP / name, "/usr/local/sbin")
    units = pathlib.Path("/etc/systemd/system")
    for unit in UNITS:
        shutil.copy(FLEET / f"{unit}.service", units)
    shutil.copytree(FLEET / COMMON, units / COMMON, dirs_exist_ok=True)
    (units / "probe.service").write_text(PROBE)
    shutil.copy(FLEET / "journald@tcptools.conf", "/etc/systemd")
    settings = shutil.copy(FLEET / "tcptools-sysctl.conf", "/etc/sysctl.d")
    subprocess.run(["sysctl", "--quiet", f"--load={settings}"], check=True)
    shutil.rmtree("/var/log/journal", ignore_errors=True)
    yield
    PARANOID.write_text(before)


# systemd as the first process of a container: with a /run and a /tmp of its own, and
# without what would touch the guest's devices or, in bullseye, cannot write where
# virtme-ng has mounted a file.
START = """
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
    with subprocess.Popen([*alone, "sh", "-c", START]) as process:
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
        enter = (
            "nsenter",
            f"--target={until(children.read_text).strip()}",
            *namespaces,
        )

        def run(*command):
            command = [*enter, *command]
            return subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=False
            ).stdout

        try:
            until(lambda: run("systemctl", "is-system-running") == "running\n")
            yield run
        except BaseException:
            print(run("journalctl", "--namespace=*", "--boot", "--no-hostname"))
            raise
        finally:
            process.kill()


def status_of(text):
    return dict(line.split(":\t", 1) for line in text.splitlines())


@only_on("sid")
@pytest.mark.usefixtures("installed")
def test_units():
    """They trace, as nobody with two capabilities; their rows are in a journal; and a
    killed one comes back.
    """
    with systemd() as run:

        def lines(unit):
            text = run(
                "journalctl", "--namespace=tcptools", "--output=cat", f"--unit={unit}"
            )
            return text.splitlines()

        def rows(unit):
            return [json.loads(line) for line in lines(unit) if line.startswith("{")]

        def starts(unit):
            return sum(line.endswith(": tracing") for line in lines(unit))

        def pid_of(unit):
            return run(
                "systemctl", "show", "--value", "--property=MainPID", unit
            ).strip()

        # Which prints when tracing is on
        run("systemctl", "set-environment", "TCPTOOLS_DEBUG=1")
        run("systemctl", "start", *UNITS)
        for unit in UNITS:
            until(lambda unit=unit: starts(unit) == 1)
            status = status_of(run("cat", f"/proc/{pid_of(unit)}/status"))
            for which in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
                assert int(status[which], 16) == 1 << CAP_PERFMON | 1 << CAP_BPF
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
            assert "0" not in status["Uid"].split()

        connects, accepts = run_mixed_traffic()
        port = connect_refused("127.0.0.1")
        until(lambda: len(rows("tcptools-connect")) == len(connects) + 1)
        until(lambda: len(rows("tcptools-accept")) == len(accepts))
        until(lambda: len(rows("tcptools-failed")) == IMMEDIATE + 1)
        *immediate, later = [
            (row["event"], row["comm"], row["dport"], row["error"])
            for row in rows("tcptools-failed")
        ]
        assert immediate == [("connect_failed", "noise", 9, "ENETUNREACH")] * IMMEDIATE
        assert later == ("connect_failed", "python3", port, "ECONNREFUSED")
        shown = [row.split() for row in connects]
        seen = rows("tcptools-connect")[:-1]
        assert [
            [str(row[key]) for key in ("pid", "comm", "ip", "saddr", "daddr", "dport")]
            for row in seen
        ] == shown
        shown = [row.split() for row in accepts]
        seen = rows("tcptools-accept")
        assert [
            [str(row[key]) for key in ("pid", "comm", "ip", "saddr", "daddr", "dport")]
            for row in seen
        ] == shown

        # Without the right to open a cgroup by its number
        run("systemctl", "start", "probe")
        path = "/system.slice/probe.service"
        until(lambda: path in {row.get("cgroup_path") for row in rows(UNITS[0])})
        run("systemctl", "stop", "probe")

        run("kill", "-9", pid_of(UNITS[0]))
        until(lambda: starts(UNITS[0]) == 2)
        run("systemctl", "stop", *UNITS)
        assert run("systemctl", "list-units", "--failed", "--no-legend") == ""
