"""What holds for the files as they are."""

import ast
import itertools
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import TOOLS, TOP, load, option_names

SHELL = (
    "tests/run",
    "tests/soak",
    "tests/vm",
    "tests/install",
    ".ci/run",
    ".packaging/deb",
    "examples/demo",
    "examples/fleet/ship-tcptools",
)
# Python without .py, which ruff does not find by itself.
PYTHON = (*TOOLS, "examples/fleet/servicemap", "tests/bench", "tests/share")


def test_shared_block_is_the_same():
    share = load("tests/share")
    source, target = ((TOP / name).read_text() for name in TOOLS)
    assert target == share.shared(source, target), "run tests/share"


@pytest.mark.parametrize("name", TOOLS)
def test_shared_block_is_all_from_its_marker_to_the_end(name):
    share = load("tests/share")
    text = (TOP / name).read_text()
    assert text.count("# ---- Shared: ") == 1
    before, block, behind = share.split(text)
    assert before + block + behind == text
    assert before.endswith("\n\n")
    assert block.startswith("\n# ---- Shared: ")
    assert behind == '\n\nif __name__ == "__main__":\n    run(main)\n'


def test_share_copies_the_block_only():
    share = load("tests/share")
    end = '\n\nif __name__ == "__main__":\n    main()\n'
    source = f"ours\n\n# ---- Shared: new ----\n\na = 1\n{end}"
    target = f"theirs\n\n# ---- Shared: old ----\n\nb = 2\n{end}# more\n"
    new = f"theirs\n\n# ---- Shared: new ----\n\na = 1\n{end}# more\n"
    assert share.shared(source, target) == new
    assert share.shared(source, new) == new


def check(*command):
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, done.stdout)
    return done.stdout


def test_ruff():
    ruff = pathlib.Path(sys.prefix) / "bin/ruff"
    check(ruff, "check", "--no-cache", *PYTHON, "tests")
    check(ruff, "format", "--check", "--no-cache", *PYTHON, "tests")


@pytest.mark.parametrize("path", [*TOOLS, "examples/fleet/servicemap"])
def test_python_3_8(path):
    """One line. So nothing that is newer comes before the check, or parses as such."""
    statements = ast.parse((TOP / path).read_text(), feature_version=(3, 6)).body
    before = itertools.takewhile(lambda one: type(one) is not ast.If, statements)
    kinds = [type(statement) for statement in before]
    assert set(kinds[:-1]) == {ast.Import} and kinds[-1] is ast.Assign  # NAME
    older = "sys.version_info = (3, 8, 18, 'final', 0)"
    run = "runpy.run_path(sys.argv[1], run_name='__main__')"
    code = f"import runpy, sys; {older}; {run}"
    command = [sys.executable, "-c", code, TOP / path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    name = path.rpartition("/")[2]
    line = f"{name}: error: needs Python 3.9 or newer: this is 3.8\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


def test_shellcheck():
    assert check("shellcheck", *SHELL, "examples/completion.bash") == ""


def test_spelling():
    """Of all files; "bu" is the bullet of the man pages."""
    codespell = pathlib.Path(sys.prefix) / "bin/codespell"
    files = check("git", "-c", "safe.directory=*", "ls-files").splitlines()
    assert check(codespell, "--check-hidden", "-L", "bu", *files) == ""


@pytest.mark.parametrize("name", TOOLS)
def test_man_page(name):
    page = f"man/man8/{name}.8"
    assert check("mandoc", "-T", "lint", "-W", "warning", page) == ""
    text = (TOP / page).read_text()
    sections = re.findall(r'^\.SH "?(.*?)"?$', text, re.MULTILINE)
    wanted = (  # in the order of man-pages(7)
        "NAME SYNOPSIS DESCRIPTION OPTIONS FIELDS JSON EXIT_STATUS DIAGNOSTICS "
        "ENVIRONMENT FILES REQUIREMENTS OVERHEAD CAVEATS NOTES EXAMPLES COPYRIGHT "
        "SEE_ALSO"
    )
    assert [title.replace(" ", "_") for title in sections] == wanted.split()
    rendered = check("mandoc", "-T", "ascii", "-O", "width=80", page)
    rendered = re.sub(".\b", "", rendered)  # overstrikes: bold and underlined
    assert [line for line in rendered.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", TOOLS)
def test_man_page_has_each_option(name):
    """And one that is for developers, and not in the help."""
    text = (TOP / f"man/man8/{name}.8").read_text().replace("\\-", "-")
    options = text.partition("\n.SH OPTIONS\n")[2].partition("\n.SH ")[0]
    titles = re.findall(r"^\.TP\n(.*)", options, re.MULTILINE)
    listed = [re.findall(r"\\fB(-.*?)\\fR", title) for title in titles]
    assert sorted(listed) == sorted([*option_names(load(name)), ["--ebpf"]])


def test_version_is_the_same():
    """In scripts, pages, examples, and as the newest of the CHANGELOG."""
    version = load("tcpconnect").VERSION
    assert re.fullmatch(r"20\d\d\.\d\d\.\d\d", version)
    for name in TOOLS:
        assert load(name).VERSION == version
        first, *_ = (TOP / f"man/man8/{name}.8").read_text().splitlines()
        footer = f'"tcptools {version}" "System Manager\'s Manual"'
        assert re.fullmatch(rf'\.TH {name} 8 "\d{{4}}-\d\d-\d\d" {footer}', first)
        text = (TOP / f"examples/{name}_example.txt").read_text()
        assert f"\n# ./{name} -V\n{name} {version}\n" in text
    changes = (TOP / ".github/CHANGELOG.md").read_text()
    assert re.findall(r"^## (\d.*)", changes, re.MULTILINE)[0] == version


def test_readme_is_short_and_narrow():
    lines = (TOP / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert [x for x in lines if len(x) > 88 and not x.startswith("|")] == []


def test_readmes_links():
    """To its own sections, and to files of the repository."""
    text = (TOP / "README.md").read_text()
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    sections = {"#" + title.lower().replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {"#demo", "tests/benchmarks.svg"} <= set(links)
    for link in links:
        assert link in sections or (TOP / link).exists(), link


@pytest.mark.parametrize("name", TOOLS)
def test_man_page_has_what_messages_refer_to(name):
    text = (TOP / f"man/man8/{name}.8").read_text()
    source = (TOP / name).read_text()
    sections = set(re.findall(r"\{NAME\}\(8\), (\w[\w ]*)", source))
    assert {"DIAGNOSTICS", "Lost events", "Permission"} <= sections
    assert sections <= set(re.findall(r"^\.S[HS] (.*)", text, re.MULTILINE))
    tool = load(name)
    assert f"see {name}(8), Lost events" in tool.LOSSES["skipped"]
    for hint in tool.LOSSES.values():
        assert f"events: {hint}".replace("-", "\\-") in text


def clauses(text):
    """The parts of a message of two words or more, without what varies."""
    varies = r"[:;,()]|\b(?:was killed .*|exited .*|tcp_v6_connect)"
    parts = re.split(varies, text)
    return [part.strip() for part in parts if " " in part.strip()]


@pytest.mark.parametrize("name", TOOLS)
def test_man_page_has_each_message(name):
    """DIAGNOSTICS has each warning and error but usage errors, and no other."""
    page = (TOP / f"man/man8/{name}.8").read_text().replace("\\-", "-")
    page = page.partition(".SH DIAGNOSTICS\n")[2].partition("\n.SH ")[0]
    source = (TOP / name).read_text()
    printed = re.sub(r'"\n\s*f?"', "", source).replace("{NAME}", name)
    for message in re.findall(r"\\fB(\w.*?)\\f[IR]", page):
        for clause in clauses(message):
            assert clause in printed
    calls = [node for node in ast.walk(ast.parse(source)) if type(node) is ast.Call]
    calls = [node for node in calls if getattr(node.func, "id", "") in ("warn", "fail")]
    texts = [
        [str(part.value) for part in ast.walk(call) if type(part) is ast.Constant]
        for call in calls
    ]
    for text in filter(None, texts):
        found = [clause for part in text for clause in clauses(part)]
        assert found == [] or any(clause in page for clause in found), found
    assert len(texts) > 20


def test_modes_and_top_level():
    for script in (*PYTHON, *SHELL):
        assert (TOP / script).stat().st_mode & 0o111 == 0o111
    listed = check("git", "-c", "safe.directory=*", "ls-files").splitlines()
    visible = {path.split("/")[0] for path in listed if not path.startswith(".")}
    assert visible == {*TOOLS, "man", "examples", "tests", "README.md", "LICENSE"}
