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


@pytest.fixture
def at_fault(tmp_path):
    """at_fault(line, status): whether that is its kernel's fault, or the emulator's."""
    source = (TOP / "tests/vm").read_text()
    functions = re.findall(r"(?ms)^\w+_at_fault\(\) \{.*?^\}", source)

    def run(line, status, what="kernel", accelerator="tcg"):
        (tmp_path / "console").write_text(f"{NOISE}[   62.000001] {line}\r\n{NOISE}")
        script = f"console=$1 accelerator={accelerator}\n"
        script += "\n".join([*functions, f"{what}_at_fault {status}"])
        done = subprocess.run(
            ["bash", "-uc", script, "bash", tmp_path / "console"], check=False
        )
        assert done.returncode in (0, 1)
        return done.returncode == 0

    return run


@pytest.mark.parametrize("status", [0, 1, 255])
def test_kernel_at_fault(at_fault, status):
    assert not at_fault("reboot: Power down", status)
    assert [line for line in FAULTS if not at_fault(line, status)] == []


def test_lockup(at_fault):
    """It is what emulation looks like on a busy host, unless the guest died of it."""
    assert [line for line in LOCKUPS if at_fault(line, 0) or at_fault(line, 1)] == []
    assert [line for line in LOCKUPS if not at_fault(line, 255)] == []


def test_emulator_at_fault(at_fault):
    """The kernel's first Oops is for an int3, and the guest ended of it."""
    for line in (
        "Oops: int3: 0000 [#1] SMP NOPTI",
        "int3: 0000 [#1] PREEMPT SMP NOPTI",
    ):
        assert at_fault(line, 255, "emulator")
        assert not at_fault(line, 0, "emulator")
        assert not at_fault(line, 255, "emulator", "kvm")
        assert at_fault(line, 0) and at_fault(line, 255)
    others = ["Oops: int3: 0000 [#2] SMP NOPTI", *FAULTS, *LOCKUPS]
    assert [line for line in others if at_fault(line, 255, "emulator")] == []


def test_a_guest_that_the_emulator_ended(machine):
    """Its status is that of one that died without a word from its kernel."""
    _, stderr, status = machine.run("true", TCPTOOLS_ACCEL="tcg", GUEST="int3")
    assert (status, machine.boots()) == (255, ["tcg"])
    assert stderr.splitlines()[-2:] == [
        "tests/vm: QEMU's emulation ran an int3 that was gone (QEMU issue 4669)",
        "tests/vm: the guest ended before its command did",
    ]
    _, stderr, status = machine.run("true", GUEST="int3")
    assert (status, machine.boots()) == (70, ["tcg", "kvm"])
    assert stderr.splitlines()[-1] == "tests/vm: the guest's kernel reported a fault"


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
*-slow) sleep 3 ;;
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
        self.flags("fpu vmx sse")
        self.kvm = path / "kvm"
        self.kvm.touch()
        self.boots_file = path / "boots"
        self.console = path / "console"
        self.console.touch()
        text = (TOP / "tests/vm").read_text()
        for old, new in (
            ("/proc/cpuinfo", f"{path}/cpuinfo"),
            ("/dev/kvm", str(self.kvm)),
            ("kvm_seconds=60", "kvm_seconds=1"),
        ):
            assert old in text
            text = text.replace(old, new)
        write_script(path / "tests/vm", text)
        write_script(path / "tests/install", f"#!/bin/sh\necho {path}\n")
        (path / "tests/packages").symlink_to(TOP / "tests/packages")
        write_script(path / "bin/vng", VNG)
        write_script(path / "bin/mmdebstrap", MMDEBSTRAP)
        for name in ("apt-get", "mke2fs", "ip"):
            write_script(path / "bin" / name, NOTHING)
        self.machine("x86_64")

    def flags(self, flags):
        (self.path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")

    def machine(self, name):
        write_script(self.path / "bin/uname", f"#!/bin/sh\necho {name}\n")

    def start(self, *arguments, **environment):
        """tests/vm with these arguments."""
        inherited = {k: v for k, v in os.environ.items() if k != "TCPTOOLS_ACCEL"}
        return subprocess.Popen(
            [self.path / "tests/vm", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **inherited,
                "XDG_CACHE_HOME": str(self.path),
                "BOOTS": str(self.boots_file),
                "CONSOLE": str(self.console),
                "GUEST": "boots",
                **environment,
            },
        )

    def run(self, command, *options, **environment):
        """(stdout, stderr, exit status) of a command in a guest."""
        process = self.start(
            *("bookworm", "--console", self.console, *options, "--", command),
            **environment,
        )
        stdout, stderr = process.communicate(timeout=60)
        return stdout, stderr, process.returncode

    def boots(self):
        """What each boot may use: kvm or tcg."""
        if not self.boots_file.exists():
            return []
        return self.boots_file.read_text().split()


@pytest.fixture
def machine(tmp_path):
    (tmp_path / "tcptools").mkdir()  # the cache
    return Machine(tmp_path)


@pytest.mark.parametrize(
    "flags, accelerator",
    [
        ("fpu vmx sse", "kvm"),
        ("svm", "kvm"),
        ("fpu svm_lock vmxnet", "tcg"),
        ("fpu sse hypervisor", "tcg"),
    ],
)
def test_flags(machine, flags, accelerator):
    machine.flags(flags)
    assert machine.run("echo yes")[::2] == ("yes\n", 0)
    assert machine.boots() == [accelerator]


def test_no_kvm_device(machine):
    machine.kvm.unlink()
    assert machine.run("true")[2] == 0
    assert machine.boots() == ["tcg"]
    assert not machine.kvm.exists()


def test_kvm_device_that_cannot_be_opened(machine):
    machine.kvm.unlink()
    machine.kvm.mkdir()
    stdout, stderr, status = machine.run("true")
    assert (stdout, status, "cannot open" in stderr) == ("", 0, False)
    stdout, stderr, status = machine.run("true", TCPTOOLS_ACCEL="kvm")
    assert (stdout, status) == ("", 0)
    assert f"cannot open {machine.kvm}: using software emulation\n" in stderr
    assert machine.boots() == ["tcg", "tcg"]


def test_another_architecture(machine):
    machine.machine("aarch64")
    assert machine.run("true")[2] == 0
    assert machine.boots() == ["tcg"]


def test_accelerator_by_hand(machine):
    machine.run("true", TCPTOOLS_ACCEL="tcg")
    machine.run("true", TCPTOOLS_ACCEL="")
    machine.flags("fpu")
    machine.run("true", TCPTOOLS_ACCEL="kvm")
    machine.run("true", TCPTOOLS_ACCEL="")
    assert machine.boots() == ["tcg", "kvm", "kvm", "tcg"]


def test_no_kvm_where_instructions_are_counted(machine):
    machine.run("true", "--icount", TCPTOOLS_ACCEL="kvm")
    machine.run("true", "--icount")
    assert machine.boots() == ["tcg", "tcg"]


def test_accelerator_that_does_not_exist(machine):
    stdout, stderr, status = machine.run("true", TCPTOOLS_ACCEL="xen")
    assert (stdout, status) == ("", 2)
    assert stderr == "tests/vm: TCPTOOLS_ACCEL=xen: must be kvm or tcg\n"
    assert machine.boots() == []


@pytest.mark.parametrize("guest", ["panics", "ends"])
def test_software_emulation_where_kvm_does_not_boot(machine, guest):
    """What the first kernel reported is not the second one's fault."""
    stdout, stderr, status = machine.run("echo once; exit 3", GUEST=guest)
    assert (stdout, status) == ("once\n", 3)
    assert machine.boots() == ["kvm", "tcg"]
    assert stderr.count("did not boot with KVM: going on with software emulation") == 1
    assert machine.console.read_text() == ""


def test_no_command_runs_twice(machine):
    """The time is for the boot only."""
    assert machine.run("sleep 3; echo once; exit 3")[::2] == ("once\n", 3)
    for value in "kvm", "tcg":
        stdout, stderr, status = machine.run("exit 255", TCPTOOLS_ACCEL=value)
        assert (stdout, status) == ("", 255)
        assert "the guest ended before its command did" in stderr
    assert machine.boots() == ["kvm", "kvm", "tcg"]


def test_emulation_may_take_longer_to_boot(machine):
    done = machine.run("echo yes", TCPTOOLS_ACCEL="tcg", GUEST="slow")
    assert done[::2] == ("yes\n", 0)
    assert machine.boots() == ["tcg"]


def test_a_guest_that_ends_before_it_is_up_is_tried_again(machine):
    assert machine.run("echo", TCPTOOLS_ACCEL="tcg", GUEST="never")[::2] == ("", 255)
    assert machine.boots() == ["tcg", "tcg", "tcg"]


def test_stdout_is_the_commands(machine):
    stdout, stderr, status = machine.run("printf 'a\\n b\\\\'; printf c >&2")
    assert (stdout, status) == ("a\n b\\c", 0)
    assert stderr.splitlines()[-1] == "qemu: a warning"


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_the_guest_ends_with_us(machine, accelerator):
    process = machine.start(
        "bookworm", "true", TCPTOOLS_ACCEL=accelerator, GUEST="hangs"
    )
    pid = machine.path / "boots.pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    process.terminate()
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 143
    state = pathlib.Path(f"/proc/{pid.read_text().strip()}/stat")
    assert not state.exists() or ") Z " in state.read_text()


def test_help_and_usage(machine):
    process = machine.start("--help")
    stdout, stderr = process.communicate(timeout=60)
    assert (stderr, process.returncode) == ("", 0)
    assert "\nUSAGE: tests/vm RELEASE" in stdout and "TCPTOOLS_ACCEL" in stdout
    for arguments in ([], ["bookworm"], ["buster", "true"]):
        process = machine.start(*arguments)
        stdout, stderr = process.communicate(timeout=60)
        assert (stdout, process.returncode) == ("", 2)
        assert stderr.startswith("usage: tests/vm RELEASE")
    assert machine.boots() == []


PYTHON = """#!/bin/bash
mkdir -p "${@: -1}/bin"
printf '%s\\n' '#!/bin/sh' "cat >>$XDG_CACHE_HOME/pip" >"${@: -1}/bin/pip"
chmod +x "${@: -1}/bin/pip"
"""


@pytest.fixture
def install(tmp_path):
    """install(arguments): (the venv that it prints, what pip was to install then)."""
    text = (TOP / "tests/install").read_text()
    assert "/usr/bin/python3" in text
    text = text.replace("/usr/bin/python3", f"{tmp_path}/bin/python3")
    write_script(tmp_path / "tests/install", text)
    (tmp_path / "tests/requirements.txt").symlink_to(TOP / "tests/requirements.txt")
    write_script(tmp_path / "bin/python3", PYTHON)
    write_script(tmp_path / "bin/apt-get", NOTHING)
    write_script(tmp_path / "bin/dpkg-query", "#!/bin/sh\necho installed\n")
    pip = tmp_path / "pip"

    def run(*arguments):
        pip.write_text("")
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        done = subprocess.run(
            [tmp_path / "tests/install", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PATH": path},
        )
        return done.stdout.strip() if done.returncode == 0 else None, pip.read_text()

    return run


def test_only_one_python_package(install):
    requirements = (TOP / "tests/requirements.txt").read_text()
    (line,) = re.findall(r"(?m)^virtme-ng==.*\n", requirements)
    one, installed = install("--only", "virtme-ng", "file")
    assert installed == line
    assert install("--only", "virtme-ng", "file") == (one, "")
    everything, installed = install("file")
    assert (everything != one, installed) == (True, requirements)
    assert install("file") == (everything, "")
    assert install("--only", "virtme-ng") == (everything, "")
    assert install("--only", "nothing") == (None, "")
