"""The Debian package that .packaging/deb builds."""

import gzip
import os
import pathlib
import re
import subprocess

import pytest
from conftest import TOP, load

SHARE = "usr/share"
DOC, COMPLETIONS = f"{SHARE}/doc/tcptools", f"{SHARE}/bash-completion/completions"
LINK = f"{COMPLETIONS}/tcpaccept"
FLEET, UNITS = "examples/fleet", "usr/lib/systemd"
KINDS = ("accept", "accepts", "connect", "connects")
COMMON, SHIPPER = "tcptools-.service.d/common.conf", "usr/lib/tcptools/ship-tcptools"
JOURNAL = f"{UNITS}/journald@tcptools.conf.d/tcptools.conf"
NAMES = ("ship-tcptools", *(f"tcptools-{kind}" for kind in KINDS))
SERVICES = [f"{name}.service" for name in NAMES]
SCRIPTS = {"DEBIAN/postinst", "DEBIAN/prerm"}
PAGES = ("man7/tcptools.7", "man8/tcpaccept.8", "man8/tcpconnect.8")
# Where each file comes from
FILES = {
    "usr/bin/tcpaccept": "tcpaccept",
    "usr/bin/tcpconnect": "tcpconnect",
    LINK: "examples/completion.bash",
    f"{COMPLETIONS}/tcpconnect": "examples/completion.bash",
    f"{DOC}/README.md": "README.md",
    f"{DOC}/changelog.gz": ".github/CHANGELOG.md",
    f"{DOC}/tcpaccept_example.txt": "examples/tcpaccept_example.txt",
    f"{DOC}/tcpconnect_example.txt": "examples/tcpconnect_example.txt",
    **{f"{SHARE}/man/{page}.gz": f"man/{page}" for page in PAGES},
    JOURNAL: f"{FLEET}/journald@tcptools.conf",
    f"{UNITS}/system/{COMMON}": f"{FLEET}/{COMMON}",
    SHIPPER: f"{FLEET}/ship-tcptools",
    **{f"{UNITS}/system/{name}": f"{FLEET}/{name}" for name in SERVICES},
    f"{SHARE}/zsh/vendor-completions/_tcptools": "examples/_tcptools",
}


def build(directory, **options):
    """A finished run of .packaging/deb."""
    return subprocess.run(
        [TOP / ".packaging/deb", directory],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def output(*command, **options):
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, **options
    )
    return done.stdout.rstrip("\n")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    directory = tmp_path_factory.mktemp("package")
    done = build(directory)
    package = directory / f"tcptools_{load('tcpconnect').VERSION}_all.deb"
    assert (done.returncode, done.stdout) == (0, f"{package}\n"), done.stderr
    assert list(directory.iterdir()) == [package]
    return package


@pytest.fixture(scope="module")
def unpacked(package, tmp_path_factory):
    directory = tmp_path_factory.mktemp("unpacked")
    output("dpkg-deb", "--raw-extract", package, directory)
    return directory


def test_files(unpacked):
    """Each has the repository's contents."""
    installed = {*FILES, f"{DOC}/copyright"}
    found = [path for path in unpacked.rglob("*") if not path.is_dir()]
    assert {str(path.relative_to(unpacked)) for path in found} == {
        *(*installed, *SCRIPTS, "DEBIAN/control", "DEBIAN/md5sums"),
    }
    for path, source in FILES.items():
        contents = (unpacked / path).read_bytes()
        if path.endswith(".gz"):
            contents = gzip.decompress(contents)
        assert contents == (TOP / source).read_bytes()
    check = ["md5sum", "--check", "--strict", "--quiet", "DEBIAN/md5sums"]
    output(*check, cwd=unpacked)
    sums = (unpacked / "DEBIAN/md5sums").read_text().splitlines()
    assert {line.split()[1] for line in sums} == installed - {LINK}


def test_modes(package):
    lines = map(str.split, output("dpkg-deb", "--contents", package).splitlines())
    found = {path: (mode, owner) for mode, owner, _, _, _, path, *_ in lines}
    modes = {"drwxr-xr-x", "-rwxr-xr-x", "-rw-r--r--", "lrwxrwxrwx"}
    assert set(found.values()) == {(mode, "root/root") for mode in modes}
    programs = {path for path, (mode, _) in found.items() if mode == "-rwxr-xr-x"}
    assert programs == {"./usr/bin/tcpaccept", "./usr/bin/tcpconnect", f"./{SHIPPER}"}


def test_units_run_what_is_installed(unpacked):
    for name in SERVICES:
        text = (unpacked / UNITS / "system" / name).read_text()
        [program] = re.findall("^ExecStart=/(\\S+)", text, re.MULTILINE)
        assert os.access(unpacked / program, os.X_OK)
    removal = (unpacked / "DEBIAN/prerm").read_text()
    assert removal.endswith(f" {' '.join(SERVICES)}\n")
    for script in SCRIPTS:
        output("shellcheck", unpacked / script)


def test_control(package):
    fields = "Package", "Version", "Architecture", "Depends", "Recommends"
    found = output("dpkg-deb", "--field", package, *fields)
    assert found.splitlines() == [
        "Package: tcptools",
        f"Version: {load('tcpconnect').VERSION}",
        "Architecture: all",
        "Depends: python3 (>= 3.9), python3-bpfcc (>= 0.18)",
        "Recommends: curl",
    ]


@pytest.mark.parametrize("page", PAGES)
def test_man_finds_the_page(page, unpacked):
    name = pathlib.Path(page).stem
    found = output("man", "-M", unpacked / SHARE / "man", "-w", name)
    assert pathlib.Path(found) == unpacked / SHARE / f"man/{page}.gz"


def test_built_again_it_is_the_same(package, tmp_path):
    """From another directory, with another umask, and in another group."""
    options = {"group": 65534} if os.geteuid() == 0 else {}
    done = build(".", cwd=tmp_path, umask=0o077, **options)
    assert done.returncode == 0, done.stderr
    (again,) = tmp_path.iterdir()
    assert done.stdout == f"{again}\n"
    assert again.read_bytes() == package.read_bytes()


def test_no_such_directory(tmp_path):
    done = build(tmp_path / "no")
    assert (done.returncode, done.stdout) == (1, "")
    error = f".packaging/deb: error: no such directory: {tmp_path}/no\n"
    assert done.stderr == error
