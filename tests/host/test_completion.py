"""Completion at the prompt: real shells in a terminal, and a key pressed that inserts
all that they offer.
"""

import contextlib
import os
import pathlib
import pty
import pwd
import re
import select
import subprocess

import pytest
from conftest import TOOLS, TOP, help_of, load

BASH_FILE = TOP / "examples/completion.bash"
GUARD = 120  # seconds without output

# What each shell reads when it starts. In the second, the package finds the file where
# it is installed.
SETUPS = {
    "bash": f"source '{BASH_FILE}'",
    "bash-completion": "source /usr/share/bash-completion/bash_completion",
    "zsh": f"""
        fpath=('{TOP}/examples' $fpath)
        autoload -U compinit
        compinit -D -u
        bindkey -e
        zstyle ':completion:*' completer _all_matches _complete
        zstyle ':completion:*' insert true
    """,
}
# How else a tool is named. bash alone does not complete behind sudo; the package needs
# two Tabs for ./ alone.
PREFIXES = {
    "bash": ["./"],
    "bash-completion": ["sudo ", "sudo ./"],
    "zsh": ["./", "sudo ", "sudo ./"],
}
# Stands for both tools and for sudo. It adds to the file, so a completion that ran the
# tool shows.
COMMAND = """\
#!/bin/sh
printf '%s\\0' "$@" >>~/arguments
echo "finished: $0"
"""
# The real findmnt, with another table of mounts.
FINDMNT = """\
#!/bin/sh
exec /usr/bin/findmnt --tab-file ~/mounts "$@"
"""
# Stands for systemctl list-units OPTION... PATTERN.
SYSTEMCTL = """\
#!/bin/sh
for pattern; do :; done
for unit in web.service web@2.service; do
    case $unit in $pattern) echo "$unit loaded active running Some title" ;; esac
done
"""


@pytest.fixture(params=SETUPS)
def setup(request):
    return request.param


@pytest.fixture
def home(setup, tmp_path):
    """The shell's home, its working directory, and the first in its PATH."""
    scripts = {**dict.fromkeys(TOOLS, COMMAND), "sudo": COMMAND, "findmnt": FINDMNT}
    for name, text in {**scripts, "systemctl": SYSTEMCTL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    for name in (".bashrc", ".zshrc"):
        (tmp_path / name).write_text(f"PS1='prompt: '\n{SETUPS[setup]}\n")
    directory = tmp_path / ".local/share/bash-completion/completions"
    directory.mkdir(parents=True)
    (directory / "tcpconnect").symlink_to(BASH_FILE)
    (directory / "tcpaccept").symlink_to("tcpconnect")
    return tmp_path


@pytest.fixture
def offers(setup, home):
    """A function: what the shell offers for the last word of a line, if only empty."""

    def inserted(line):
        arguments = type_line(setup, home, line)
        typed = line.split(" ")[1:-1]
        assert arguments[: len(typed)] == typed
        # zsh writes = behind an option that takes a value.
        return sorted(word.rstrip("=") for word in arguments[len(typed) :])

    return inserted


def type_line(setup, home, line):
    """The arguments that the line's command gets after completion."""
    if setup == "zsh":
        command, key = ["zsh", "-d"], "\t"
    else:
        command, key = ["bash", "--noprofile"], "\033*"
    environment = {
        "HOME": str(home),
        "PATH": f"{home}:/usr/sbin:/usr/bin:/sbin:/bin",
        "TERM": "dumb",
        "INPUTRC": "/dev/null",
    }
    terminal, end = pty.openpty()
    with subprocess.Popen(
        ["setsid", "--ctty", *command],
        cwd=home,
        env=environment,
        stdin=end,
        stdout=end,
        stderr=end,
    ) as shell:
        os.close(end)
        try:
            wait_for("prompt: ", terminal)
            os.write(terminal, f"{line}{key}\n".encode())
            wait_for("finished: ", terminal)
        finally:
            shell.kill()
            os.close(terminal)
    text = (home / "arguments").read_text()
    (home / "arguments").unlink()
    return text.split("\0")[:-1]


def wait_for(marker, terminal):
    seen = b""
    while marker.encode() not in seen:
        assert select.select([terminal], [], [], GUARD)[0], seen
        seen += os.read(terminal, 4096)


def help_options(name):
    """All options in the tool's help."""
    lines = re.findall(r"^  (-.+?)(?:  |$)", help_of(load(name)), re.MULTILINE)
    return sorted(part.split()[0] for line in lines for part in line.split(", "))


def test_options(name, offers):
    assert offers(f"{name} -") == help_options(name)
    assert offers(f"{name} --buf") == ["--buffer-pages"]


def test_other_names_of_the_tool(name, setup, offers):
    wanted = [option for option in help_options(name) if option.startswith("--")]
    for prefix in PREFIXES[setup]:
        assert offers(f"{prefix}{name} --") == wanted
        assert len(offers(f"{prefix}{name} --buffer-pages=")) == 15


@pytest.mark.parametrize("setup", ["zsh"])
@pytest.mark.parametrize("version", ["-4", "--ipv4", "-6", "--ipv6"])
def test_one_ip_version_only(name, offers, version):
    both = {"-4", "--ipv4", "-6", "--ipv6"}
    assert offers(f"{name} {version} -") == sorted({*help_options(name)} - both)


def test_users(name, offers):
    users = [user.pw_name for user in pwd.getpwall()]
    assert offers(f"{name} -u ") == sorted(users)
    ours = sorted(f"root,{user}" for user in users if user.startswith("n"))
    assert offers(f"{name} -t -u root,n") == ours
    assert offers(f"{name} --uid=root,nobod") == ["--uid=root,nobody"]


def running():
    return {path.name for path in pathlib.Path("/proc").glob("[0-9]*")}


def test_pids(name, offers):
    with subprocess.Popen(["true"]) as exited:
        pass
    start = str(os.getpid())[:-1]
    before = running()
    alone, listed = offers(f"{name} -p "), offers(f"{name} --pid 1,{start}")
    always = before & running()
    assert always <= set(alone) and str(exited.pid) not in alone
    assert all(pid.isdigit() for pid in alone)
    assert {f"1,{pid}" for pid in always if pid.startswith(start)} <= set(listed)
    assert all(pids.startswith(f"1,{start}") for pids in listed)


def test_names(name, home, offers):
    """Of running processes, each once. They may be anything: no shell runs them."""
    odd, ours = "$(touch ran) 'x", pathlib.Path("/proc/self/comm").read_text()[:-1]
    (home / odd).symlink_to("/bin/sleep")
    commands = [[home / odd, str(GUARD)]] * 2
    with contextlib.ExitStack() as stack:
        for process in [subprocess.Popen(command) for command in commands]:
            stack.enter_context(process)
            stack.callback(process.kill)
        offered = offers(f"{name} -n ")
        assert {odd, ours} <= set(offered)
        assert len(offered) == len(set(offered))
        assert f"--name={ours}" in offers(f"{name} --name={ours[:-1]}")
    assert not (home / "ran").exists()


def test_pages(name, offers):
    powers = sorted(str(1 << n) for n in range(15))
    assert offers(f"{name} -b ") == powers
    ours = [power for power in powers if power.startswith("1")]
    assert offers(f"{name} --buffer-pages 1") == ours
    assert offers(f"{name} --buffer-pages=1638") == ["--buffer-pages=16384"]


def test_ports(name, offers):
    for option in ("-P", "--port", "-a", "--addr", "-i", "--interval"):
        assert offers(f"{name} {option} ") == []
    assert offers(f"{name} -P 80,4") == ["80,4"]


@pytest.mark.parametrize("option", ["--cgroupmap", "--mntnsmap"])
def test_maps(name, home, offers, option):
    (home / "maps").mkdir()
    for file in ("a,b", "a,map of cgroups", "b"):
        (home / "maps" / file).touch()
    assert offers(f"{name} {option} maps/a,") == ["maps/a,b", "maps/a,map of cgroups"]


def test_cgroups(name, home, offers):
    top = home / "mounted"
    (top / "user.slice/user@1000.service/app.slice").mkdir(parents=True)
    (top / "system-a\\x2db.slice").mkdir()
    (top / "cgroup.procs").touch()
    (home / "mounts").write_text(f"proc /proc proc rw\ncgroup2 {top} cgroup2 rw\n")
    units = ["web.service", "web@2.service"]
    both = sorted([*units, "system-a\\x2db.slice/", "user.slice/"])
    assert offers(f"{name} --cgroup ") == both
    assert offers(f"{name} --cgroup we") == units
    inner = "user.slice/user@1000.service/"
    assert offers(f"{name} --cgroup=user.slice/") == [f"--cgroup={inner}"]
    assert offers(f"{name} --cgroup {top}/user.slice/") == [f"{top}/{inner}"]
    # as both shells take it, and bash writes it
    quoted = inner.replace("@", "\\@")
    assert offers(f"{name} --cgroup {quoted}") == [f"{inner}app.slice/"]


def test_units_where_no_cgroups_are_mounted(name, home, offers):
    """And no directories of the working directory."""
    (home / "mounts").write_text("proc /proc proc rw\n")
    (home / "work").mkdir()
    assert offers(f"{name} --cgroup w") == ["web.service", "web@2.service"]


def test_shellcheck():
    subprocess.run(["shellcheck", BASH_FILE], check=True)
