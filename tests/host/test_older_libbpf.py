"""BTF made known to libbpf before 1.0: crafted, and this machine's own."""

import itertools
import pathlib
import re
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HEADER = struct.Struct("=HBBIIIII")
BTF = pathlib.Path("/sys/kernel/btf/vmlinux")
CODE = {
    "INT": 1,
    "PTR": 2,
    "ARRAY": 3,
    "STRUCT": 4,
    "UNION": 5,
    "ENUM": 6,
    "FWD": 7,
    "TYPEDEF": 8,
    "VOLATILE": 9,
    "CONST": 10,
    "RESTRICT": 11,
    "FUNC": 12,
    "FUNC_PROTO": 13,
    "VAR": 14,
    "DATASEC": 15,
    "FLOAT": 16,
    "DECL_TAG": 17,
    "TYPE_TAG": 18,
    "ENUM64": 19,
}
KINDS = {code: kind for kind, code in CODE.items()}
AFTER = {  # 4-byte words behind a struct btf_type: always, for each of its vlen
    "INT": (1, 0),
    "ARRAY": (3, 0),
    "STRUCT": (0, 3),
    "UNION": (0, 3),
    "ENUM": (0, 2),
    "FUNC_PROTO": (0, 2),
    "VAR": (1, 0),
    "DATASEC": (0, 3),
    "DECL_TAG": (1, 0),
    "ENUM64": (0, 3),
}
NEWER = ("FLOAT", "DECL_TAG", "TYPE_TAG", "ENUM64")

# kind, name, kind_flag, vlen, size or type, words behind it
EVERY_KIND = [
    ("FLOAT", "float", 0, 0, 4),
    ("ENUM64", "wide", 0, 2, 8, ("A", 1, 2), ("B", 3, 4)),
    ("INT", "int", 0, 0, 4, (1 << 24 | 32,)),
    ("INT", "long", 0, 0, 8, (64,)),
    ("PTR", "", 0, 0, 8),
    ("ARRAY", "", 0, 0, 0, (3, 3, 7)),
    ("STRUCT", "s", 0, 2, 16, ("x", 2, 0), ("p", 5, 64)),
    ("STRUCT", "bits", 1, 1, 8, ("b", 4, 5 << 24)),
    ("UNION", "u", 0, 1, 8, ("x", 4, 0)),
    ("ENUM", "e", 0, 2, 4, ("C", 5), ("D", 6)),
    ("FWD", "later", 1, 0, 0),
    ("TYPEDEF", "t", 0, 0, 13),
    ("VOLATILE", "", 0, 0, 4),
    ("CONST", "", 0, 0, 7),
    ("RESTRICT", "", 0, 0, 5),
    ("FUNC_PROTO", "", 0, 2, 3, ("a", 4), ("b", 2)),
    ("FUNC", "f", 0, 1, 16),
    ("VAR", "v", 0, 0, 3, (1,)),
    ("DATASEC", ".data", 0, 1, 4, (18, 0, 4)),
    ("DECL_TAG", "kfunc", 0, 0, 17, (2**32 - 1,)),
    ("DECL_TAG", "attribute", 1, 0, 7, (1,)),
    ("TYPE_TAG", "rcu", 1, 0, 7),
    ("ENUM64", "", 1, 1, 8, ("E", 7, 8)),
    ("ENUM64", "empty", 0, 0, 8),
    ("STRUCT", "last", 0, 1, 8, ("next", 5, 0)),
]


def crafted(types, header_len=HEADER.size, gap=b""):
    """A BTF of such types, with a gap before the types and one before the strings."""
    strings, body = b"\0", b""

    def word(value):
        nonlocal strings
        if isinstance(value, int):
            return value
        strings += value.encode() + b"\0"
        return len(strings) - len(value) - 1 if value else 0

    for kind, name, flag, vlen, size_or_type, *after in types:
        info = flag << 31 | CODE[kind] << 24 | vlen
        words = [word(name), info, size_or_type]
        words += [word(value) for value in itertools.chain(*after)]
        body += struct.pack(f"={len(words)}I", *words)
    sizes = len(gap), len(body), 2 * len(gap) + len(body), len(strings)
    header = HEADER.pack(0xEB9F, 1, 0, header_len, *sizes).ljust(header_len, b"\xff")
    return header + gap + body + gap + strings


def parsed(btf):
    """[(kind, name, kind_flag, vlen, size or type, bytes behind it)] of all types."""
    *_, header, type_off, type_len, str_off, str_len = HEADER.unpack_from(btf)
    assert header + str_off + str_len == len(btf)
    at, end, strings = header + type_off, header + type_off + type_len, btf[-str_len:]
    types = []
    while at < end:
        name, info, size_or_type = struct.unpack_from("=III", btf, at)
        kind, vlen = KINDS[info >> 24 & 0x1F], info & 0xFFFF
        always, each = AFTER.get(kind, (0, 0))
        behind, at = at + 12, at + 12 + 4 * (always + each * vlen)
        text = strings[name : strings.index(0, name)].decode()
        types.append((kind, text, info >> 31, vlen, size_or_type, btf[behind:at]))
    assert at == end
    return types


def older(kind, name, size_or_type, long_id):
    """What a type of a newer kind is to become, as parsed() gives it."""
    return {
        "FLOAT": ("STRUCT", "", 0, 0, size_or_type, b""),
        "DECL_TAG": ("INT", "", 0, 0, 4, struct.pack("=I", 32)),
        "TYPE_TAG": ("CONST", "", 0, 0, size_or_type, b""),
        "ENUM64": ("TYPEDEF" if name else "CONST", name, 0, 0, long_id, b""),
    }[kind]


def check(before, after):
    """The BTF `after` is `before` with newer kinds replaced, and all else as it was."""
    old, new = parsed(before), parsed(after)
    longs = {
        number
        for number, (kind, _, _, _, size, _) in enumerate(new, 1)
        if (kind, size) == ("INT", 8)
    }
    assert len(old) == len(new)
    for was, now in zip(old, new):
        if was[0] not in NEWER:
            assert now == was
        else:
            assert now in [older(was[0], was[1], was[4], number) for number in longs]


def dumped(btf, tmp_path):
    """{type ID: (kind, all lines)} as bpftool, with a libbpf of its own, reads it."""
    file = tmp_path / "btf"
    file.write_bytes(btf)
    command = ["bpftool", "btf", "dump", "file", file, "format", "raw"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    types = {}
    for lines in re.split(r"^(?=\[)", text, flags=re.MULTILINE)[1:]:
        number, kind = re.match(r"\[(\d+)\] (\w+) ", lines).groups()
        types[int(number)] = kind, lines
    return types


@pytest.fixture(scope="module")
def known(shared):
    return shared.known_to_older_libbpf


def test_every_kind(known):
    assert {kind for kind, *_ in EVERY_KIND} == set(CODE)
    before = crafted(EVERY_KIND)
    check(before, known(before))


def test_nothing_to_do(known):
    before = crafted([row for row in EVERY_KIND if row[0] not in NEWER])
    assert known(before) == before
    once = known(crafted(EVERY_KIND))
    assert known(once) == once


def test_longer_header_and_gaps(known):
    """As a later kernel may have them; an older libbpf need not."""
    odd = crafted(EVERY_KIND, header_len=32, gap=b"\xff" * 8)
    assert known(odd) == known(crafted(EVERY_KIND))


def test_bpftool_reads_every_kind(known, tmp_path):
    before = crafted(EVERY_KIND)
    old, new = dumped(before, tmp_path), dumped(known(before), tmp_path)
    assert list(old) == list(new) == list(range(1, len(EVERY_KIND) + 1))
    assert [kind for kind, _ in old.values()] == [kind for kind, *_ in EVERY_KIND]
    changed = [number for number in old if old[number] != new[number]]
    assert changed == [
        number for number, row in enumerate(EVERY_KIND, 1) if row[0] in NEWER
    ]
    assert [new[number][1] for number in changed] == [
        "[1] STRUCT '(anon)' size=4 vlen=0\n",
        "[2] TYPEDEF 'wide' type_id=4\n",
        "[20] INT '(anon)' size=4 bits_offset=0 nr_bits=32 encoding=(none)\n",
        "[21] INT '(anon)' size=4 bits_offset=0 nr_bits=32 encoding=(none)\n",
        "[22] CONST '(anon)' type_id=7\n",
        "[23] CONST '(anon)' type_id=4\n",
        "[24] TYPEDEF 'empty' type_id=4\n",
    ]


def test_this_machine(known, tmp_path):
    if not BTF.exists():
        pytest.skip("this machine's kernel has no BTF")
    before = BTF.read_bytes()
    after = known(before)
    check(before, after)
    old, new = dumped(before, tmp_path), dumped(after, tmp_path)
    assert list(old) == list(new)
    assert {kind for kind, _ in new.values()}.isdisjoint(NEWER)
    for was, now in zip(old.values(), new.values()):
        assert was[0] in NEWER or now == was


class Older:
    """A libbpf that lacks what came with 1.0."""

    def __init__(self, handle):
        self.handle, self.given = handle, []

    def __getattr__(self, name):
        if name == "btf__add_enum64":
            raise AttributeError(name)
        return getattr(self.handle, name)

    def btf__new(self, data, length):
        self.given.append(data[:length])
        return self.handle.btf__new(data, length)


def test_only_an_older_libbpf_gets_another_btf(shared, known, monkeypatch):
    shared.import_bcc()
    before, libbpf = crafted(EVERY_KIND), Older(shared.libbpf())
    monkeypatch.setattr(shared, "libbpf", lambda: libbpf)
    assert shared.Btf(before).offsets("s") == {"x": 0, "p": 8}
    libbpf.btf__add_enum64 = None
    assert shared.Btf(before).offsets("s") == {"x": 0, "p": 8}
    assert libbpf.given == [known(before), before]
    assert known(before) != before


def test_offsets_stay(shared, known):
    if not BTF.exists():
        pytest.skip("this machine's kernel has no BTF")
    shared.import_bcc()
    data = BTF.read_bytes()
    before, after = shared.Btf(data), shared.Btf(known(data))
    for name in ("sock_common", "sock", "sk_buff", "task_struct", "net", "pt_regs"):
        assert before.offsets(name) == after.offsets(name) != {}
    for function in ("tcp_v4_connect", "inet_csk_accept"):
        assert before.arity(function) == after.arity(function) > 0


def test_cut_short(known):
    whole = crafted(EVERY_KIND)
    for length in range(len(whole)):
        with pytest.raises(ValueError):
            known(whole[:length])


@pytest.mark.parametrize(
    "info",
    [
        0,
        20 << 24,  # the first kind that linux/btf.h does not have yet
        31 << 24,
        CODE["PTR"] << 24 | 1 << 16,  # a bit that is unused yet
        CODE["PTR"] << 24 | 1 << 29,
    ],
)
def test_unknown_kind(known, info):
    body = struct.pack("=III", 0, info, 0)
    with pytest.raises(ValueError):
        known(HEADER.pack(0xEB9F, 1, 0, HEADER.size, 0, 12, 12, 1) + body + b"\0")


def test_no_64_bit_int(known):
    with pytest.raises(ValueError):
        known(crafted([("INT", "int", 0, 0, 4, (32,)), ("ENUM64", "e", 0, 0, 8)]))


@settings(deadline=None)
@given(st.data())
def test_nonsense(known, data):
    """Bytes changed anywhere: a BTF comes out, or ValueError."""
    btf = bytearray(crafted(EVERY_KIND))
    places = st.integers(0, len(btf) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=8)):
        btf[place] = data.draw(st.integers(0, 255))
    try:
        after = known(bytes(btf))
    except ValueError:
        return
    assert len(after) >= HEADER.size


@settings(deadline=None)
@given(st.binary())
def test_any_types(known, body):
    """Any bytes as types: a BTF comes out that needs nothing further, or ValueError."""
    header = HEADER.pack(0xEB9F, 1, 0, HEADER.size, 0, len(body), len(body), 1)
    try:
        after = known(header + body + b"\0")
    except ValueError:
        return
    assert known(after) == after
