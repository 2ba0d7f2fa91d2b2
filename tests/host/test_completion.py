"""Completion at the prompt: a real shell in a terminal, and a key pressed that inserts
all that it offers. The values are tcpconnect's: each file is for both tools.
"""

import contextlib
import os
import pathlib
import pty
import pwd
import select
import subprocess

import pytest
from conftest import TOOLS, TOP, option_names

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
SCRIPTS = {
    **dict.fromkeys((*TOOLS, "sudo"), COMMAND),
    # The real one, with another table of mounts
    "findmnt": '#!/bin/sh\nexec /usr/bin/findmnt --tab-file ~/mounts "$@"\n',
    # As systemctl list-units OPTION... PATTERN
    "systemctl": """\
#!/bin/sh
for pattern; do :; done
for unit in web.service web@2.service; do
    case $unit in $pattern) echo "$unit loaded active running Some title" ;; esac
done
""",
}


class Shell:
    """At its prompt, in a directory that is its home, and the first in its PATH."""

    def __init__(self, setup, home):
        self.setup, self.home = setup, home
        for name, text in SCRIPTS.items():
            (home / name).write_text(text)
            (home / name).chmod(0o755)
        for name in (".bashrc", ".zshrc"):
            (home / name).write_text(f"PS1='prompt: '\n{SETUPS[setup]}\n")
        directory = home / ".local/share/bash-completion/completions"
        directory.mkdir(parents=True)
        (directory / "tcpconnect").symlink_to(BASH_FILE)
        (directory / "tcpaccept").symlink_to("tcpconnect")
        self.terminal, end = pty.openpty()
        command = ["zsh", "-d"] if setup == "zsh" else ["bash", "--noprofile"]
        environment = {"HOME": str(home), "TERM": "dumb", "INPUTRC": "/dev/null"}
        environment["PATH"] = f"{home}:/usr/sbin:/usr/bin:/sbin:/bin"
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            cwd=home,
            env=environment,
            **dict.fromkeys(("stdin", "stdout", "stderr"), end),
        )
        os.close(end)

    def wait_for(self, *markers):
        """Read on until each of them has come, in this order."""
        seen = b""
        for marker in map(str.encode, markers):
            while marker not in seen:
                assert select.select([self.terminal], [], [], GUARD)[0], seen
                seen += os.read(self.terminal, 4096)
            seen = seen.partition(marker)[2]

    def offers(self, line):
        """What it offers for the last word of a line, if only empty."""
        key = "\t" if self.setup == "zsh" else "\033*"
        os.write(self.terminal, f"{line}{key}\n".encode())
        self.wait_for("finished: ", "prompt: ")
        arguments = (self.home / "arguments").read_text().split("\0")[:-1]
        (self.home / "arguments").unlink()
        typed = line.split(" ")[1:-1]
        assert arguments[: len(typed)] == typed
        # zsh writes = behind an option that takes a value.
        return sorted(word.rstrip("=") for word in arguments[len(typed) :])


@pytest.fixture(scope="module", params=SETUPS)
def shell(request, tmp_path_factory):
    shell = Shell(request.param, tmp_path_factory.mktemp(request.param))
    try:
        shell.wait_for("prompt: ")
        yield shell
    finally:
        shell.process.kill()
        shell.process.wait()
        os.close(shell.terminal)


def all_options(tool):
    return sorted(name for names in option_names(tool) for name in names)


def test_options(name, tool, shell):
    assert shell.offers(f"{name} -") == all_options(tool)
    wanted = [option for option in all_options(tool) if option.startswith("--")]
    for prefix in PREFIXES[shell.setup]:
        assert shell.offers(f"{prefix}{name} --") == wanted


@pytest.mark.parametrize("shell", ["zsh"], indirect=True)
def test_one_ip_version_only(tool, shell):
    others = sorted({*all_options(tool)} - {"-4", "--ipv4", "-6", "--ipv6"})
    for version in ("-4", "--ipv6"):
        assert shell.offers(f"{tool.NAME} {version} -") == others


def test_users(shell):
    users = [user.pw_name for user in pwd.getpwall()]
    assert shell.offers("tcpconnect -u ") == sorted(users)
    ours = sorted(f"root,{user}" for user in users if user.startswith("n"))
    assert shell.offers("tcpconnect -t -u root,n") == ours
    assert shell.offers("tcpconnect --uid=root,nobod") == ["--uid=root,nobody"]


def running():
    return {path.name for path in pathlib.Path("/proc").glob("[0-9]*")}


def test_pids(shell):
    with subprocess.Popen(["true"]) as exited:
        pass
    start = str(os.getpid())[:-1]
    before = running()
    alone = shell.offers("tcpconnect -p ")
    listed = shell.offers(f"tcpconnect --pid 1,{start}")
    always = before & running()
    assert always <= set(alone) and str(exited.pid) not in alone
    assert all(pid.isdigit() for pid in alone)
    assert {f"1,{pid}" for pid in always if pid.startswith(start)} <= set(listed)
    assert all(pids.startswith(f"1,{start}") for pids in listed)


def test_names(shell):
    """Of running processes, each once. They may be anything: no shell runs them."""
    odd, ours = "$(touch ran) 'x", pathlib.Path("/proc/self/comm").read_text()[:-1]
    (shell.home / odd).symlink_to("/bin/sleep")
    commands = [[shell.home / odd, str(GUARD)]] * 2
    with contextlib.ExitStack() as stack:
        for process in [subprocess.Popen(command) for command in commands]:
            stack.enter_context(process)
            stack.callback(process.kill)
        offered = shell.offers("tcpconnect -n ")
        assert {odd, ours} <= set(offered)
        assert len(offered) == len(set(offered))
        assert f"--name={ours}" in shell.offers(f"tcpconnect --name={ours[:-1]}")
    assert not (shell.home / "ran").exists()


def test_the_command(shell):
    """Its name, and what it is completed with. bash alone knows files."""
    (shell.home / "a-file").touch()
    for line in ("tcpconnect --", "tcpaccept -t -p 1 --"):
        assert shell.offers(f"{line} tcpacc") == ["tcpaccept"]
        assert shell.offers(f"{line} cat a-f") == ["a-file"]
        if shell.setup != "bash":
            assert shell.offers(f"{line} tcpaccept -b 1638") == ["16384"]


def test_numbers(shell):
    """Of pages, powers of two; of a port, none."""
    powers = sorted(str(1 << n) for n in range(15))
    assert shell.offers("tcpconnect -b ") == powers
    assert shell.offers("tcpconnect --buffer-pages=1638") == ["--buffer-pages=16384"]
    for option in ("-P", "--port", "-a", "-m", "--interval"):
        assert shell.offers(f"tcpconnect {option} ") == []
    assert shell.offers("tcpconnect -P 80,4") == ["80,4"]


def test_maps(shell):
    (shell.home / "maps").mkdir()
    for file in ("a,b", "a,map of cgroups", "b"):
        (shell.home / "maps" / file).touch()
    for option in ("--cgroupmap", "--mntnsmap"):
        found = shell.offers(f"tcpconnect {option} maps/a,")
        assert found == ["maps/a,b", "maps/a,map of cgroups"]


def test_cgroups(shell):
    top = shell.home / "mounted"
    (top / "user.slice/user@1000.service/app.slice").mkdir(parents=True)
    (top / "system-a\\x2db.slice").mkdir()
    (top / "cgroup.procs").touch()
    mounts = f"proc /proc proc rw\ncgroup2 {top} cgroup2 rw\n"
    (shell.home / "mounts").write_text(mounts)
    units = ["web.service", "web@2.service"]
    both = sorted([*units, "system-a\\x2db.slice/", "user.slice/"])
    assert shell.offers("tcpconnect --cgroup ") == both
    assert shell.offers("tcpconnect --cgroup we") == units
    inner = "user.slice/user@1000.service/"
    assert shell.offers("tcpconnect --cgroup=user.slice/") == [f"--cgroup={inner}"]
    assert shell.offers(f"tcpconnect --cgroup {top}/user.slice/") == [f"{top}/{inner}"]
    # as both shells take it, and bash writes it
    quoted = inner.replace("@", "\\@")
    assert shell.offers(f"tcpconnect --cgroup {quoted}") == [f"{inner}app.slice/"]


def test_units_where_no_cgroups_are_mounted(shell):
    """And no directories of the working directory."""
    (shell.home / "mounts").write_text("proc /proc proc rw\n")
    (shell.home / "we").mkdir()
    assert shell.offers("tcpconnect --cgroup w") == ["web.service", "web@2.service"]
