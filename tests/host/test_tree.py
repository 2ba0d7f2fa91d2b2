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


SECTIONS = (  # in the order in which a reader needs them
    "NAME SYNOPSIS DESCRIPTION OPTIONS EXAMPLES FIELDS OVERHEAD CAVEATS NOTES BUGS "
    "COPYRIGHT SEE_ALSO"
)
SHARED = (
    "NAME DESCRIPTION JSON EXIT_STATUS DIAGNOSTICS ENVIRONMENT FILES REQUIREMENTS "
    "OVERHEAD NOTES BUGS SEE_ALSO"
)
PAGES = {  # its sections, and the most words that it may have when rendered
    "man8/tcpconnect.8": (SECTIONS, 2000),
    "man8/tcpaccept.8": (SECTIONS, 1600),
    "man7/tcptools.7": (SHARED, 2600),
}


def page_of(path):
    return (TOP / "man" / path).read_text().replace("\\-", "-")


@pytest.mark.parametrize("path", PAGES)
def test_man_page(path):
    page, (wanted, words) = f"man/{path}", PAGES[path]
    assert check("mandoc", "-T", "lint", "-W", "warning", page) == ""
    sections = re.findall(r'^\.SH "?(.*?)"?$', page_of(path), re.MULTILINE)
    assert [title.replace(" ", "_") for title in sections] == wanted.split()
    rendered = check("mandoc", "-T", "ascii", "-O", "width=80", page)
    rendered = re.sub(".\b", "", rendered)  # overstrikes: bold and underlined
    assert [line for line in rendered.splitlines() if len(line) > 80] == []
    assert len(rendered.split()) <= words


@pytest.mark.parametrize("name", TOOLS)
def test_man_page_has_each_option(name):
    """And one that is for developers, and not in the help; all are in SYNOPSIS."""
    page = page_of(f"man8/{name}.8")
    options = page.partition("\n.SH OPTIONS\n")[2].partition("\n.SH ")[0]
    titles = re.findall(r"^\.TP\n(.*)", options, re.MULTILINE)
    titles = [one for title in titles for one in title.split("; ")]
    listed = [re.findall(r"\\fB(-.*?)\\fR", title) for title in titles]
    names = option_names(load(name))
    assert sorted(listed) == sorted([*names, ["--ebpf"]])
    synopsis = page.partition("\n.SH SYNOPSIS\n")[2].partition("\n.SH ")[0]
    shown = set(re.findall(r"(?:\\fB| )(--?\w[\w-]*)", synopsis))
    assert {first for first, *_ in names} <= shown


def test_version_is_the_same():
    """In scripts, pages, examples, and as the newest of the CHANGELOG."""
    version = load("tcpconnect").VERSION
    assert re.fullmatch(r"20\d\d\.\d\d\.\d\d", version)
    for name in TOOLS:
        assert load(name).VERSION == version
        text = (TOP / f"examples/{name}_example.txt").read_text()
        assert f"\n# ./{name} -V\n{name} {version}\n" in text
    for path in PAGES:
        (first, _), (name, section) = page_of(path).split("\n", 1), path[5:].split(".")
        title = rf'\.TH {name} {section} "\d{{4}}-\d\d-\d\d" "tcptools {version}" ".*"'
        assert re.fullmatch(title, first)
    changes = (TOP / ".github/CHANGELOG.md").read_text()
    assert re.findall(r"^## (\d.*)", changes, re.MULTILINE)[0] == version


def test_readme_is_short_and_narrow():
    lines = (TOP / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert [x for x in lines if len(x) > 88 and not x.startswith("|")] == []


def test_readme_installs_each_page():
    text = (TOP / "README.md").read_text()
    for page in PAGES:
        section = page.partition("/")[0]
        assert re.search(rf"install .*/man/{section} .*\bman/{page}", text)


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
def test_man_pages_have_the_sections_that_messages_name(name):
    source = (TOP / name).read_text()
    found = set(re.findall(r"\b(tcptools|\{NAME\})\((\d)\), (\w[\w ]*)", source))
    wanted = {"DIAGNOSTICS", "Lost events", "Permission"}
    assert {section for page, _, section in found if page == "tcptools"} == wanted
    for page, number, section in found:
        text = page_of(f"man{number}/{page.replace('{NAME}', name)}.{number}")
        assert section in re.findall(r"^\.S[HS] (.*)", text, re.MULTILINE)


def text_of(node):
    """A literal, with \0 for what varies; None of what is no literal."""
    if type(node) is ast.JoinedStr:
        return "".join(
            part.value if type(part) is ast.Constant else "\0" for part in node.values
        )
    return node.value if type(node) is ast.Constant else None


def messages(source):
    """Each warning and error of a tool but usage errors: what warn() and fail() are
    given, what functions for them return, and why events are lost.
    """
    for node in ast.walk(ast.parse(source)):
        if type(node) is ast.Call and getattr(node.func, "id", "") in ("warn", "fail"):
            yield text_of(node.args[0])
        elif type(node) is ast.FunctionDef and node.name in ("explain", "attach_v6"):
            for one in ast.walk(node):
                value = one.value if type(one) is ast.Return else None
                yield text_of(value.elts[0] if getattr(value, "elts", None) else value)
        elif type(node) is ast.Assign and ast.unparse(node.targets[0]) == "LOSSES":
            for value in node.value.values:
                yield f"lost \0 events: {text_of(value)}"


# These only pass on what other calls have
PASSED_ON = {None, "error: \0", "lost \0 events: \0"}


def test_diagnostics_have_each_message():
    """Whole, from its first word to its last, and no other."""
    page = page_of("man7/tcptools.7").partition(".SH DIAGNOSTICS\n")[2]
    page = page.partition("\n.SH ")[0]
    heads = re.findall(r'^(?:\.IP "(.*)"|\.TQ\n(.*))$', page, re.MULTILINE)
    heads = [first or second for first, second in heads]
    assert len(heads) > 30
    found = {"needs Python 3.9 or newer: this is \0"}  # before there is fail()
    for name in TOOLS:
        source = (TOP / name).read_text().replace("{NAME}", name)
        assert "needs Python 3.9 or newer: this is {" in source
        found |= {*messages(source)} - PASSED_ON
    found = {text.removeprefix("error: ") for text in found}
    patterns = {}
    for head in heads:
        # Italics vary; all else is literal
        parts = re.split(r"\\fI(.*?)(?=\\f[BR]|$)", head)
        literal = [re.sub(r"\\f[BR]", "", part) for part in parts[::2]]
        assert max(len(part.split()) for part in literal) >= 2, head
        patterns[head] = ".+".join(map(re.escape, literal))
    for head, pattern in patterns.items():
        assert any(re.fullmatch(pattern, text) for text in found), head
    for text in found:
        assert sum(bool(re.fullmatch(x, text)) for x in patterns.values()) == 1, text


def test_modes_and_top_level():
    for script in (*PYTHON, *SHELL):
        assert (TOP / script).stat().st_mode & 0o111 == 0o111
    listed = check("git", "-c", "safe.directory=*", "ls-files").splitlines()
    visible = {path.split("/")[0] for path in listed if not path.startswith(".")}
    assert visible == {*TOOLS, "man", "examples", "tests", "README.md", "LICENSE"}
