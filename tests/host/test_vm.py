"""tests/vm: what on a guest's console is its kernel's fault, when KVM is used, and what
is installed for it. No guests: a stand-in for virtme-ng runs the commands here.
"""

import os
import pathlib
import re
import subprocess
import time

import pytest
from conftest import TOP

DEADLINE = 300  # seconds until what does not come is held to be stuck
NOISE = r"""
[    0.040000] tsc: Unable to calibrate against PIT
[    0.952827] mtrr: your CPUs had inconsistent fixed MTRR settings
[    5.739046] Invalid ELF header magic: != \x7fELF
[    6.098593] Unstable clock detected, switching default tracing clock to "global"
[   46.303087] TSC found unstable after boot, most likely due to broken BIOS.
[   50.102030] rcu: INFO: rcu_preempt self-detected stall on CPU
[   61.234567] Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on
"""
LOCKUPS = (
    "watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [python3:1234]",
    "BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 31s!",
)
FAULTS = (
    "------------[ cut here ]------------",  # of a WARNING or a BUG
    "BUG: kernel NULL pointer dereference, address: 0000000000000008",
    "BUG: scheduling while atomic: python3/1234/0x00000002",
    "general protection fault, probably for non-canonical address: 0000 [#1] SMP PTI",
    "Oops: general protection fault, maybe for address 0x8: 0000 [#2] SMP NOPTI",
    "Kernel panic - not syncing: sysrq triggered crash",
)


def functions(pattern):
    """The functions of tests/vm with such names."""
    source = (TOP / "tests/vm").read_text()
    found = re.findall(rf"(?ms)^{pattern}\(\) \{{.*?^\}}", source)
    assert found
    return "\n".join(found)


@pytest.fixture
def at_fault(tmp_path):
    """at_fault(line, status): whether that is its kernel's fault, or the emulator's."""

    def run(line, status, what="kernel", accelerator="tcg"):
        console = tmp_path / "console"
        console.write_text(f"{NOISE}[   62.000001] {line}\r\n{NOISE}")
        script = f"console={console} accelerator={accelerator}\n"
        script += f"{functions('[a-z]+_at_fault')}\n{what}_at_fault {status}"
        done = subprocess.run(["bash", "-uc", script], check=False)
        assert done.returncode in (0, 1)
        return done.returncode == 0

    return run


@pytest.mark.parametrize("status", [0, 1, 255])
def test_kernel_at_fault(at_fault, status):
    """A lockup is what emulation looks like on a busy host, unless the guest died."""
    assert not at_fault("reboot: Power down", status)
    assert [line for line in FAULTS if not at_fault(line, status)] == []
    locked = [line for line in LOCKUPS if at_fault(line, status)]
    assert locked == (list(LOCKUPS) if status == 255 else [])


def test_emulator_at_fault(at_fault):
    """The kernel's first Oops is for an int3, and the guest ended of it."""
    line = "Oops: int3: 0000 [#1] SMP NOPTI"
    assert at_fault(line, 255, "emulator")
    assert at_fault("int3: 0000 [#1] PREEMPT SMP NOPTI", 255, "emulator")
    assert not at_fault(line, 0, "emulator")
    assert not at_fault(line, 255, "emulator", "kvm")
    others = [line.replace("#1", "#2"), *FAULTS, *LOCKUPS]
    assert [line for line in others if at_fault(line, 255, "emulator")] == []


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
*-slow) sleep 1 ;;
*-int3)
    echo "tests/vm: up"
    echo "[ 1.0] Oops: int3: 0000 [#1] SMP NOPTI" >>"$CONSOLE"
    echo "[ 1.1] Kernel panic - not syncing: Fatal exception" >>"$CONSOLE"
    exit 255
    ;;
esac
echo "qemu: a warning" >&2
exec bash -c "${@: -1}"
"""
# What tests/vm makes an image with
MMDEBSTRAP = '#!/bin/bash\nmkdir -p "${@: -1}/boot" && : >"${@: -1}/boot/vmlinuz-1"\n'
MMDEBSTRAP += 'mkdir -p "${@: -1}/lib/modules/1"\n'
NOTHING = "#!/bin/sh\n"


def write_script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A machine with stand-ins for what tests/vm runs and looks at."""

    def __init__(self, path):
        self.path = path
        self.kvm, self.console = path / "kvm", path / "console"
        for name in ("kvm", "console", "boots"):
            (path / name).touch()
        (path / "tcptools").mkdir()  # the cache
        self.use(cpuinfo="fpu vmx sse", machine="x86_64")
        write_script(path / "tests/install", f"#!/bin/sh\necho {path}\n")
        (path / "tests/packages").symlink_to(TOP / "tests/packages")
        write_script(path / "bin/vng", VNG)
        write_script(path / "bin/mmdebstrap", MMDEBSTRAP)
        for name in ("apt-get", "mke2fs", "ip"):
            write_script(path / "bin" / name, "#!/bin/sh\n")

    def use(self, cpuinfo, machine, kvm_seconds=60):
        (self.path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {cpuinfo}\n\n")
        write_script(self.path / "bin/uname", f"#!/bin/sh\necho {machine}\n")
        text = (TOP / "tests/vm").read_text()
        for old, new in (
            ("/proc/cpuinfo", f"{self.path}/cpuinfo"),
            ("/dev/kvm", str(self.kvm)),
            ("kvm_seconds=60", f"kvm_seconds={kvm_seconds}"),
        ):
            assert old in text
            text = text.replace(old, new)
        write_script(self.path / "tests/vm", text)

    def start(self, *arguments, script="tests/vm", **environment):
        """tests/vm with these arguments."""
        defaults = {
            "PATH": f"{self.path}/bin:{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(self.path),
            "BOOTS": str(self.path / "boots"),
            "CONSOLE": str(self.console),
            "GUEST": "boots",
            "TCPTOOLS_ACCEL": "",
        }
        return subprocess.Popen(
            [self.path / script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **defaults, **environment},
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


@pytest.mark.parametrize(
    "cpuinfo, machine_name, wanted, options, accelerator",
    [
        ("fpu vmx sse", "x86_64", "", [], "kvm"),
        ("svm", "x86_64", "", [], "kvm"),
        ("fpu svm_lock vmxnet", "x86_64", "", [], "tcg"),
        ("fpu sse hypervisor", "x86_64", "", [], "tcg"),
        ("fpu sse hypervisor", "x86_64", "kvm", [], "kvm"),
        ("vmx", "x86_64", "tcg", [], "tcg"),
        ("vmx", "aarch64", "", [], "tcg"),
        ("vmx", "x86_64", "", ["--icount"], "tcg"),
        ("vmx", "x86_64", "kvm", ["--icount"], "tcg"),
    ],
)
def test_accelerator(machine, cpuinfo, machine_name, wanted, options, accelerator):
    machine.use(cpuinfo, machine_name)
    done = machine.guest("echo yes", *options, TCPTOOLS_ACCEL=wanted)
    assert (done[::2], machine.boots()) == (("yes\n", 0), [accelerator])


def test_no_kvm_device(machine):
    machine.kvm.unlink()
    assert machine.guest("true")[2] == 0
    assert not machine.kvm.exists()
    machine.kvm.mkdir()  # cannot be opened
    assert "cannot open" not in machine.guest("true")[1]
    stdout, stderr, status = machine.guest("true", TCPTOOLS_ACCEL="kvm")
    assert (stdout, status) == ("", 0)
    assert f"cannot open {machine.kvm}: using software emulation\n" in stderr
    assert machine.boots() == ["tcg", "tcg", "tcg"]


@pytest.mark.parametrize("guest", ["panics", "ends"])
def test_software_emulation_where_kvm_does_not_boot(machine, guest):
    """What the first kernel reported is not the second one's fault."""
    machine.use("vmx", "x86_64", kvm_seconds=3)  # it must have begun when it is killed
    stdout, stderr, status = machine.guest("echo once; exit 3", GUEST=guest)
    assert (stdout, status) == ("once\n", 3)
    assert machine.boots() == ["kvm", "tcg"]
    assert stderr.count("did not boot with KVM: going on with software emulation") == 1
    assert machine.console.read_text() == ""


def test_emulation_may_take_longer_to_boot(machine):
    machine.use("vmx", "x86_64", kvm_seconds=0)
    done = machine.guest("echo yes", TCPTOOLS_ACCEL="tcg", GUEST="slow")
    assert (done[::2], machine.boots()) == (("yes\n", 0), ["tcg"])


def test_a_command_may_take_longer(tmp_path):
    """The time is for the boot only."""
    guest = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    script = f"set -eu; up={tmp_path} kvm_seconds=0\n{functions('kill_unless_up')}\n"
    subprocess.run(["bash", "-c", f"{script} kill_unless_up {guest.pid}"], check=True)
    assert guest.poll() is None
    guest.kill()
    guest.wait()


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_no_command_runs_twice(machine, accelerator):
    command = "echo once; exit 255"
    done = machine.guest(command, TCPTOOLS_ACCEL=accelerator)
    assert (done[::2], machine.boots()) == (("once\n", 255), [accelerator])
    assert "the guest ended before its command did" in done[1]


def test_a_guest_that_ends_before_it_is_up_is_tried_again(machine):
    assert machine.guest("echo", TCPTOOLS_ACCEL="tcg", GUEST="never")[::2] == ("", 255)
    assert machine.boots() == ["tcg", "tcg", "tcg"]


@pytest.mark.parametrize("accelerator, status", [("tcg", 255), ("kvm", 70)])
def test_a_guest_that_an_int3_ended(machine, accelerator, status):
    """Of the emulator's, it is as one that died without a word from its kernel."""
    done = machine.guest("true", TCPTOOLS_ACCEL=accelerator, GUEST="int3")
    assert (done[2], machine.boots()) == (status, [accelerator])
    assert ("QEMU issue 4669" in done[1]) == (accelerator == "tcg")
    assert ("the guest's kernel reported a fault" in done[1]) == (accelerator == "kvm")


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
    process = machine.start(
        "bookworm", "true", TCPTOOLS_ACCEL=accelerator, GUEST="hangs"
    )
    file = machine.path / "boots.pid"
    pid = until(lambda: file.exists() and file.read_text().strip())
    process.terminate()
    assert process.communicate(timeout=DEADLINE)[0] == ""
    assert process.returncode == 143
    state = pathlib.Path(f"/proc/{pid}/stat")
    until(lambda: not state.exists() or ") Z " in state.read_text())


def test_help_and_usage(machine):
    stdout, stderr, status = machine.run("--help")
    assert (stderr, status) == ("", 0)
    assert "\nUSAGE: tests/vm RELEASE" in stdout and "TCPTOOLS_ACCEL" in stdout
    for arguments in ([], ["bookworm"], ["buster", "true"]):
        stdout, stderr, status = machine.run(*arguments)
        assert (stdout, status) == ("", 2)
        assert stderr.startswith("usage: tests/vm RELEASE")
    stdout, stderr, status = machine.guest("true", TCPTOOLS_ACCEL="xen")
    assert (stdout, status) == ("", 2)
    assert stderr == "tests/vm: TCPTOOLS_ACCEL=xen: must be kvm or tcg\n"
    assert machine.boots() == []


@pytest.mark.parametrize(
    "words, status",
    [
        ("E: Failed to fetch http://a/InRelease  Could not resolve 'a'", 75),
        ("E: Failed to fetch http://a/b.deb  404  Not Found", 75),
        ("E: Unable to locate package telnett", 1),
        ("E: Unable to correct problems, you have held broken packages.", 1),
        ("E: mkdir: No space left on device", 1),
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


# Makes a venv whose pip writes down what it is to install
PYTHON = """#!/bin/bash
mkdir -p "${@: -1}/bin"
printf '%s\\n' '#!/bin/sh' 'echo "$@" >>$XDG_CACHE_HOME/pip' >"${@: -1}/bin/pip"
chmod +x "${@: -1}/bin/pip"
"""


def test_python_packages(machine):
    """Each list is installed once, into one venv, where it is asked for."""
    script, pip = machine.path / "tests/install", machine.path / "pip"
    source = (TOP / "tests/install").read_text()
    assert "/usr/bin/python3" in source
    write_script(script, source.replace("/usr/bin/python3", "python3"))
    (machine.path / "tests/requirements").symlink_to(TOP / "tests/requirements")
    write_script(machine.path / "bin/python3", PYTHON)
    write_script(machine.path / "bin/dpkg-query", "#!/bin/sh\necho installed\n")

    def install(*arguments):
        """(exit status, [(pip's options, list)])"""
        pip.write_text("")
        status = machine.run(*arguments, script="tests/install")[2]
        calls = [line.split() for line in pip.read_text().splitlines()]
        return status, [(call[1:-2], pathlib.Path(call[-1]).name) for call in calls]

    assert install("--for", "vm", "file") == (0, [(["--quiet"], "vm")])
    fleet = (["--quiet", "--no-deps"], "fleet")
    assert install("file") == (0, [(["--quiet"], "host"), fleet])
    for arguments in (["file"], ["--for", "vm"], ["--for", "host"]):
        assert install(*arguments) == (0, [])
    assert install("--for", "nothing") == (1, [])
    assert install("--for") == (1, [])
