"""The tools as modules, and as commands."""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader

import pytest

TOP = pathlib.Path(__file__).parents[2]
TOOLS = ("tcpconnect", "tcpaccept")


@pytest.fixture(params=TOOLS)
def name(request):
    return request.param


@pytest.fixture
def tool(name):
    """The script, loaded as a module of its own: for what each tool has of its own."""
    return load(name)


@pytest.fixture(scope="session")
def shared():
    """tcpconnect as a module: for the code that both tools share.

    One for all tests: what a test changes in it, it changes with monkeypatch.
    """
    return load("tcpconnect")


class Loader(SourceFileLoader):
    """Compiles a script once, however often it is loaded."""

    get_code = functools.cache(SourceFileLoader.get_code)


def load(name):
    loader = Loader(name, str(TOP / name))
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(name, loader)
    )
    loader.exec_module(module)
    return module


def option_names(tool):
    """All options in the help, each as a list of its names: -p, --pid. Not --."""
    lines = re.findall(r"^  (-.?\w.*?)(?:  |$)", help_of(tool), re.MULTILINE)
    return [re.findall(r"(?<!\S)--?\w[\w-]*", line) for line in lines]


def parse(tool, *arguments):
    """What parse_args() of a tool's module makes of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [tool.NAME, *arguments])
        patch.delenv("TCPTOOLS_METHOD", raising=False)
        return tool.parse_args()


def help_of(tool):
    """What -h prints on a screen of 80 columns."""
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setattr(tool, "write", written.append)
        with pytest.raises(SystemExit):
            parse(tool, "-h")
    return "".join(written)


def run(name, *args, **options):
    """A finished run of the tool by the system's python3."""
    return subprocess.run(
        ["/usr/bin/python3", TOP / name, *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def write_script(path, text):
    """A command, often a stand-in for one, in a directory "bin"."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def with_stand_ins(directory, **environment):
    """An environment in which the commands of directory/bin come before all others."""
    path = f"{directory}/bin:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **environment}
