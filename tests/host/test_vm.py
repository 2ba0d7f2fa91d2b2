"""tests/vm: what becomes of a guest, when KVM is used, and which status says what. No
guests: a stand-in for virtme-ng runs the commands here.
"""

import pathlib
import re
import subprocess
import time

import pytest
from conftest import TOP, with_stand_ins, write_script

DEADLINE = 300  # seconds until what does not come is held to be stuck
# Stands in for virtme-ng: writes down whether it may use KVM, and runs the guest's
# command on the host, unless GUEST says that a guest with KVM, or any, does not boot.
VNG = """#!/bin/bash
accelerator=kvm
[[ " $* " != *" --disable-kvm "* ]] || accelerator=tcg
echo $accelerator >>"$BOOTS"
case $accelerator-$GUEST in
kvm-panics) echo "[ 1.0] Kernel panic" >>"$CONSOLE" && exec sleep 1000 ;;
kvm-ends | *-never) exit 255 ;;
*-hangs) echo $$ >"$BOOTS.pid" && exec sleep 1000 ;;
esac
echo "qemu: a warning" >&2
exec bash -c "${@: -1}"
"""
# What tests/vm makes an image with
MMDEBSTRAP = """#!/bin/bash
mkdir -p "${@: -1}/boot" "${@: -1}/lib/modules/1"
touch "${@: -1}/boot/vmlinuz-1"
"""


class Machine:
    """A machine with stand-ins for what tests/vm runs and looks at."""

    def __init__(self, path):
        self.path = path
        self.kvm, self.console = path / "kvm", path / "console"
        for name in ("kvm", "console", "boots"):
            (path / name).touch()
        (path / "tcptools").mkdir()  # the cache
        self.use()
        write_script(path / "tests/install", f"#!/bin/sh\necho {path}\n")
        (path / "tests/packages").symlink_to(TOP / "tests/packages")
        write_script(path / "bin/vng", VNG)
        write_script(path / "bin/mmdebstrap", MMDEBSTRAP)
        for name in ("apt-get", "mke2fs", "ip"):
            write_script(path / "bin" / name, "#!/bin/sh\n")

    def use(self, cpuinfo="fpu vmx sse", machine="x86_64", seconds=600):
        (self.path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {cpuinfo}\n\n")
        write_script(self.path / "bin/uname", f"#!/bin/sh\necho {machine}\n")
        text = (TOP / "tests/vm").read_text()
        for old, new in (
            ("/proc/cpuinfo", f"{self.path}/cpuinfo"),
            ("/dev/kvm", str(self.kvm)),
            ("([kvm]=60 [tcg]=600)", f"([kvm]={seconds} [tcg]={seconds})"),
        ):
            assert old in text
            text = text.replace(old, new)
        write_script(self.path / "tests/vm", text)

    def start(self, *arguments, **environment):
        """tests/vm with these arguments."""
        defaults = {
            "XDG_CACHE_HOME": str(self.path),
            "BOOTS": str(self.path / "boots"),
            "CONSOLE": str(self.console),
            "GUEST": "boots",
            "TCPTOOLS_ACCEL": "",
        }
        return subprocess.Popen(
            [self.path / "tests/vm", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=with_stand_ins(self.path, **{**defaults, **environment}),
        )

    def run(self, *arguments, **environment):
        """Its (stdout, stderr, exit status)."""
        process = self.start(*arguments, **environment)
        stdout, stderr = process.communicate(timeout=DEADLINE)
        return stdout, stderr, process.returncode

    def guest(self, command, *options, **environment):
        """(stdout, stderr, exit status) of a command in a guest."""
        options = ["--console", self.console, *options]
        return self.run("bookworm", *options, "--", command, **environment)

    def boots(self):
        """What each boot may use: kvm or tcg."""
        return (self.path / "boots").read_text().split()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


NOISE = r"""
[    0.040000] tsc: Unable to calibrate against PIT
[    0.952827] mtrr: your CPUs had inconsistent fixed MTRR settings
[    5.739046] Invalid ELF header magic: != \x7fELF
[   46.303087] TSC found unstable after boot, most likely due to broken BIOS.
[   50.102030] rcu: INFO: rcu_preempt self-detected stall on CPU
[   61.234567] Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on
"""
FAULT = "the guest's kernel reported a fault"
DIED = "the guest ended before its command did"
INT3 = "QEMU issue 4669"
LOCKUP = "watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [python3:1234]"
QUEUE = "BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 31s!"


@pytest.mark.parametrize(
    "line, accelerator, status, said",
    [
        ("reboot: Power down", "tcg", 0, []),
        ("reboot: Power down", "tcg", 255, [DIED]),
        ("------------[ cut here ]------------", "tcg", 0, [FAULT]),
        ("BUG: kernel NULL pointer dereference", "tcg", 0, [FAULT]),
        ("general protection fault: 0000 [#1] SMP PTI", "tcg", 1, [FAULT]),
        ("Kernel panic - not syncing: sysrq triggered crash", "tcg", 255, [FAULT]),
        # What emulation looks like on a busy host, unless the guest died of it
        (LOCKUP, "tcg", 1, []),
        (QUEUE, "tcg", 0, []),
        (QUEUE, "tcg", 255, [FAULT]),
        # The emulator's: the first Oops is for an int3, and the guest ended of it
        ("Oops: int3: 0000 [#1] SMP NOPTI", "tcg", 255, [INT3, DIED]),
        ("Oops: int3: 0000 [#1] SMP NOPTI", "tcg", 0, [FAULT]),
        ("Oops: int3: 0000 [#1] SMP NOPTI", "kvm", 255, [FAULT]),
        ("Oops: int3: 0000 [#2] SMP NOPTI", "tcg", 255, [FAULT]),
    ],
)
def test_console(machine, line, accelerator, status, said):
    """What is its kernel's fault (70), and what is the emulator's or nobody's."""
    text = machine.path / "text"
    text.write_text(f"{NOISE}[   62.000001] {line}\r\n{NOISE}")
    command = f"cat {text} >>{machine.console}; exit {status}"
    _, stderr, found = machine.guest(command, TCPTOOLS_ACCEL=accelerator)
    assert [words for words in (FAULT, INT3, DIED) if words in stderr] == said
    assert found == (70 if said == [FAULT] else status)
    assert machine.boots() == [accelerator]


@pytest.mark.parametrize(
    "cpuinfo, machine_name, wanted, options, accelerator",
    [
        ("fpu vmx sse", "x86_64", "", [], "kvm"),
        ("svm", "x86_64", "", [], "kvm"),
        ("fpu svm_lock vmxnet", "x86_64", "", [], "tcg"),
        ("fpu sse hypervisor", "x86_64", "kvm", [], "kvm"),
        ("vmx", "x86_64", "tcg", [], "tcg"),
        ("vmx", "aarch64", "", [], "tcg"),
        ("vmx", "x86_64", "kvm", ["--icount"], "tcg"),
    ],
)
def test_accelerator(machine, cpuinfo, machine_name, wanted, options, accelerator):
    machine.use(cpuinfo, machine_name, seconds=60)
    done = machine.guest("echo yes", *options, TCPTOOLS_ACCEL=wanted)
    assert (done[::2], machine.boots()) == (("yes\n", 0), [accelerator])
    assert "did not boot with KVM" not in done[1]


def test_no_kvm_device(machine):
    machine.kvm.unlink()
    assert machine.guest("true")[2] == 0
    assert not machine.kvm.exists()
    machine.kvm.mkdir()  # cannot be opened
    stdout, stderr, status = machine.guest("true", TCPTOOLS_ACCEL="kvm")
    assert (stdout, status, machine.boots()) == ("", 0, ["tcg", "tcg"])
    assert f"cannot open {machine.kvm}: using software emulation\n" in stderr


@pytest.mark.parametrize(
    "guest, wanted, boots, stdout, status",
    [
        # It has begun when it is killed, since 3 s are more than that takes
        ("panics", "kvm", ["kvm", "tcg"], "once\n", 3),
        ("ends", "kvm", ["kvm", "tcg"], "once\n", 3),
        ("never", "tcg", ["tcg", "tcg", "tcg"], "", 255),
        ("hangs", "tcg", ["tcg", "tcg", "tcg"], "", 255),
        ("boots", "tcg", ["tcg"], "once\n", 255),
        ("boots", "kvm", ["kvm"], "once\n", 255),
    ],
)
def test_no_command_runs_twice(machine, guest, wanted, boots, stdout, status):
    """A guest that does not come up is booted again, where KVM fails without it."""
    machine.use(seconds=3 if guest in ("panics", "hangs") else 60)
    command = f"echo once; exit {status}"
    found = machine.guest(command, TCPTOOLS_ACCEL=wanted, GUEST=guest)
    assert (found[::2], machine.boots()) == ((stdout, status), boots)
    falls_back = "did not boot with KVM: going on with software emulation"
    assert found[1].count(falls_back) == len(set(boots)) - 1
    assert (DIED in found[1]) == (status == 255)
    # What the first kernel reported is not the second one's fault
    assert machine.console.read_text() == ""


def test_a_command_may_take_longer(tmp_path):
    """The time is for the boot only."""
    source = (TOP / "tests/vm").read_text()
    function = re.search(r"(?ms)^kill_unless_up\(\) \{.*?^\}", source)[0]
    script = f"set -eu; up={tmp_path}\n{function}\nkill_unless_up $1 0"
    with subprocess.Popen(["sleep", "1000"], start_new_session=True) as guest:
        subprocess.run(["bash", "-c", script, "bash", str(guest.pid)], check=True)
        assert guest.poll() is None
        guest.kill()


def test_stdout_is_the_commands(machine):
    stdout, stderr, status = machine.guest("printf 'a\\n b\\\\'; printf c >&2")
    assert (stdout, status) == ("a\n b\\c", 0)
    assert stderr.splitlines()[-1] == "qemu: a warning"


def until(there_is):
    """What there_is() gives, once it gives anything."""
    deadline = time.monotonic() + DEADLINE
    while not (found := there_is()):
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_the_guest_ends_with_us(machine, accelerator):
    wanted = {"TCPTOOLS_ACCEL": accelerator, "GUEST": "hangs"}
    process = machine.start("bookworm", "true", **wanted)
    file = machine.path / "boots.pid"
    pid = until(lambda: file.exists() and file.read_text().strip())
    process.terminate()
    assert process.communicate(timeout=DEADLINE)[0] == ""
    assert process.returncode == 143
    state = pathlib.Path(f"/proc/{pid}/stat")
    until(lambda: not state.exists() or ") Z " in state.read_text())


def test_usage(machine):
    stdout, stderr, status = machine.run("--help")
    assert (stderr, status) == ("", 0) and "\nUSAGE: tests/vm RELEASE" in stdout
    for arguments in (["bookworm"], ["buster", "true"]):
        stdout, stderr, status = machine.run(*arguments)
        assert (stdout, status) == ("", 2)
        assert stderr.startswith("usage: tests/vm RELEASE")
    error = "tests/vm: TCPTOOLS_ACCEL=xen: must be kvm or tcg\n"
    assert machine.guest("true", TCPTOOLS_ACCEL="xen") == ("", error, 2)


@pytest.mark.parametrize(
    "words, status",
    [
        ("E: Failed to fetch http://a/InRelease  Could not resolve 'a'", 75),
        ("E: Unable to locate package telnett", 1),
    ],
)
def test_no_image(machine, words, status):
    """Only what may be there another day is status 75."""
    fails = f'#!/bin/sh\necho "{words}" >&2\nexit 25\n'
    write_script(machine.path / "bin/mmdebstrap", fails)
    stdout, stderr, found = machine.guest("true")
    assert (stdout, found, machine.boots()) == ("", status, [])
    assert words in stderr
    assert ("CANNOT BE DOWNLOADED" in stderr) == (status == 75)
    assert [path.name for path in machine.path.glob("tcptools/*")] == ["bookworm.lock"]
