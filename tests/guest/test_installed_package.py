"""The Debian package, as it is built, installed and removed here.

tests/host/test_package.py has what is in it, and man(1), which guests have not.
"""

import gzip
import os
import pathlib
import runpy
import shutil
import subprocess

import pytest
from conftest import TOOLS, TOP, only_on
from traffic import run_mixed_traffic

PAGES = {  # by their sources
    page: pathlib.Path(f"/usr/share/{page.relative_to(TOP)}.gz")
    for page in TOP.glob("man/*/*")
}


def output(*command):
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.rstrip("\n")


@pytest.fixture
def package(tmp_path):
    """Installed, with its man pages, which the guest's dpkg would leave out."""
    package = output(TOP / ".packaging/deb", tmp_path)
    output("dpkg", "--path-include=/usr/share/man/*", "--install", package)
    yield package
    output("dpkg", "--purge", "tcptools")


@only_on("bookworm")
def test_package(package, start):
    """Beside bcc's tools of these names, where the guest has them."""
    version = runpy.run_path(str(TOP / "tcpconnect"))["VERSION"]
    status = "${db:Status-Status} ${Version}"
    shown = output("dpkg-query", "--show", f"--showformat={status}", "tcptools")
    assert shown == f"installed {version}"
    commands = [f"/usr/bin/{name}" for name in TOOLS]
    # A PATH may have /bin, which is the same, in front
    assert [os.path.realpath(shutil.which(name)) for name in TOOLS] == commands
    for name, command in zip(TOOLS, commands):
        assert output(command, "-V") == f"{name} {version}"
    assert len(PAGES) == 3
    for source, page in PAGES.items():
        assert gzip.decompress(page.read_bytes()) == source.read_bytes()
    tools = start(*commands)
    known = run_mixed_traffic()
    assert [tool.stop() for tool in tools] == list(known)
    assert [tool.complaints() for tool in tools] == [[], []]
    output("dpkg", "--remove", "tcptools")
    paths = [*map(pathlib.Path, commands), *PAGES.values()]
    assert not any(path.exists() for path in paths)
