"""tests/vm: what on a guest's console is its kernel's fault, and what is not."""

import re
import subprocess

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
    """at_fault(line, status): whether that is its kernel's fault."""
    source = (TOP / "tests/vm").read_text()
    function = re.search(r"(?ms)^kernel_at_fault\(\) \{.*?^\}", source)[0]

    def run(line, status):
        (tmp_path / "console").write_text(f"{NOISE}[   62.000001] {line}\r\n{NOISE}")
        script = f"console=$1\n{function}\nkernel_at_fault {status}"
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
