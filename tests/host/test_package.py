"""The Debian package that .packaging/deb builds."""

import gzip
import os
import pathlib
import subprocess

import pytest
from conftest import TOOLS, TOP, load

SHARE = "usr/share"
FILES = {
    "usr/bin/tcpaccept": "-rwxr-xr-x",
    "usr/bin/tcpconnect": "-rwxr-xr-x",
    f"{SHARE}/bash-completion/completions/tcpaccept -> tcpconnect": "lrwxrwxrwx",
    f"{SHARE}/bash-completion/completions/tcpconnect": "-rw-r--r--",
    f"{SHARE}/doc/tcptools/README.md": "-rw-r--r--",
    f"{SHARE}/doc/tcptools/changelog.gz": "-rw-r--r--",
    f"{SHARE}/doc/tcptools/copyright": "-rw-r--r--",
    f"{SHARE}/doc/tcptools/tcpaccept_example.txt": "-rw-r--r--",
    f"{SHARE}/doc/tcptools/tcpconnect_example.txt": "-rw-r--r--",
    f"{SHARE}/man/man8/tcpaccept.8.gz": "-rw-r--r--",
    f"{SHARE}/man/man8/tcpconnect.8.gz": "-rw-r--r--",
    f"{SHARE}/zsh/vendor-completions/_tcptools": "-rw-r--r--",
}
# What Debian's packages install for commands of these names: bpfcc-tools of 12, 13 and
# sid (0.26, 0.31, 0.37), libbpf-tools of 12, and of 13 and sid.
BPFCC_TOOLS = {
    "usr/sbin/tcpaccept-bpfcc",
    "usr/sbin/tcpconnect-bpfcc",
    f"{SHARE}/doc/bpfcc-tools/examples/doc/tcpaccept_example.txt",
    f"{SHARE}/doc/bpfcc-tools/examples/doc/tcpconnect_example.txt",
    f"{SHARE}/man/man8/tcpaccept-bpfcc.8.gz",
    f"{SHARE}/man/man8/tcpconnect-bpfcc.8.gz",
}
LIBBPF_TOOLS = {"usr/sbin/tcpconnect", "usr/sbin/tcpconnect-libbpf"}


def build(directory, **options):
    """A finished run of .packaging/deb."""
    return subprocess.run(
        [TOP / ".packaging/deb", directory],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def dpkg_deb(*arguments):
    done = subprocess.run(
        ["dpkg-deb", *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


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
    dpkg_deb("--extract", package, directory)
    return directory


def listed(package):
    """{path: mode} of its files, all of which are root's; directories are 755."""
    found = {}
    for line in dpkg_deb("--contents", package).splitlines():
        mode, owner, _, _, _, path = line.split(maxsplit=5)
        assert owner == "root/root" and path.startswith("./")
        if mode.startswith("d"):
            assert mode == "drwxr-xr-x"
        else:
            found[path[len("./") :]] = mode
    return found


def test_files(package):
    assert listed(package) == FILES


def test_no_path_is_another_packages(package):
    paths = {path.partition(" -> ")[0] for path in listed(package)}
    assert paths.isdisjoint(BPFCC_TOOLS | LIBBPF_TOOLS)


def test_control(package):
    def field(name):
        return dpkg_deb("--field", package, name).rstrip("\n")

    assert field("Package") == "tcptools"
    assert field("Version") == load("tcpconnect").VERSION
    assert field("Architecture") == "all"
    assert field("Depends") == "python3 (>= 3.9), python3-bpfcc (>= 0.18)"
    for name in ("Recommends", "Conflicts", "Replaces", "Provides"):
        assert field(name) == ""
    synopsis, *description = field("Description").splitlines()
    assert len(synopsis) < 80 and len(description) > 2
    # dpkg -r has nothing to do but to remove the files
    scripts = dpkg_deb("--info", package)
    assert "postinst" not in scripts and "prerm" not in scripts


def test_contents_are_the_repositorys(unpacked):
    for name in TOOLS:
        copy = unpacked / "usr/bin" / name
        assert copy.read_bytes() == (TOP / name).read_bytes()
        page = unpacked / SHARE / f"man/man8/{name}.8.gz"
        source = TOP / f"man/man8/{name}.8"
        assert gzip.decompress(page.read_bytes()) == source.read_bytes()
        completion = unpacked / SHARE / "bash-completion/completions" / name
        source = TOP / "examples/completion.bash"
        assert completion.read_bytes() == source.read_bytes()
    completion = unpacked / SHARE / "zsh/vendor-completions/_tcptools"
    assert completion.read_bytes() == (TOP / "examples/_tcptools").read_bytes()
    changes = unpacked / SHARE / "doc/tcptools/changelog.gz"
    source = TOP / ".github/CHANGELOG.md"
    assert gzip.decompress(changes.read_bytes()) == source.read_bytes()


def test_checksums(package, unpacked, tmp_path):
    dpkg_deb("--control", package, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"control", "md5sums"}
    check = ["md5sum", "--check", "--strict", "--quiet", tmp_path / "md5sums"]
    subprocess.run(check, cwd=unpacked, check=True)
    count = len((tmp_path / "md5sums").read_text().splitlines())
    assert count == sum(path.is_file() for path in unpacked.rglob("*")) - 1  # a link


def test_man_finds_the_page(name, unpacked):
    command = ["man", "-M", unpacked / SHARE / "man", "-w", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    page = unpacked / SHARE / f"man/man8/{name}.8.gz"
    assert pathlib.Path(done.stdout.rstrip("\n")) == page


def test_built_again_it_is_the_same(package, tmp_path):
    """From another directory, with another umask."""
    done = build(".", cwd=tmp_path, preexec_fn=lambda: os.umask(0o077))
    assert done.returncode == 0, done.stderr
    (again,) = tmp_path.iterdir()
    assert done.stdout == f"{again}\n"
    assert again.read_bytes() == package.read_bytes()


def test_no_such_directory(tmp_path):
    done = build(tmp_path / "no")
    assert (done.returncode, done.stdout) == (1, "")
    error = f".packaging/deb: error: no such directory: {tmp_path}/no\n"
    assert done.stderr == error
