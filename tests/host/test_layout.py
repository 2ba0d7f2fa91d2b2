"""What the tools ask of a kernel, and the C program that they make of it.

The struct layout comes from BTF: crafted here, byte by byte as linux/btf.h describes
it, and this machine's own.
"""

import functools
import json
import os
import random
import re
import shutil
import struct
import subprocess
from types import SimpleNamespace

import pytest
from conftest import load, parse

KIND = {
    "int": 1,
    "ptr": 2,
    "array": 3,
    "struct": 4,
    "union": 5,
    "typedef": 8,
    "volatile": 9,
    "const": 10,
    "func": 12,
    "proto": 13,
}


class Btf:
    """Collects types; each method returns the new type's ID."""

    def __init__(self):
        self.types, self.strings, self.count = b"", b"\0", 0

    def name(self, text):
        if not text:
            return 0
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text) - 1

    def add(self, kind, name, size_or_type, *after, vlen=0, flag=0):
        info = flag << 31 | KIND[kind] << 24 | vlen
        self.types += struct.pack(
            f"=III{len(after)}I", self.name(name), info, size_or_type, *after
        )
        self.count += 1
        return self.count

    def int(self, name, size):
        return self.add("int", name, size, size * 8)

    def array(self, element, count):
        return self.add("array", "", 0, element, element, count)

    def struct(self, name, size, members, kind="struct"):
        """members: (name, type, offset in bytes).

        Where they have a fourth, the width of a bitfield, offsets are in bits.
        """
        flag = int(any(len(member) == 4 for member in members))
        words = []
        for member, type_id, at, *width in members:
            words += [
                self.name(member),
                type_id,
                width[0] << 24 | at if width else at * 8,
            ]
        return self.add(kind, name, size, *words, vlen=len(members), flag=flag)

    def func(self, name, arguments, result):
        words = [0, result] * arguments
        proto = self.add("proto", "", result, *words, vlen=arguments)
        return self.add("func", name, proto, vlen=1)

    def data(self, magic=0xEB9F, version=1):
        lengths = len(self.types), len(self.types), len(self.strings)
        header = struct.pack("=HBBIIIII", magic, version, 0, 24, 0, *lengths)
        return header + self.types + self.strings


FUNCTIONS = {  # and how many arguments they take
    "tcp_v4_connect": 3,
    "tcp_v6_connect": 3,
    "tcp_disconnect": 2,
    "skb_consume_udp": 3,
    "inet_csk_accept": 4,
    "security_sock_graft": 2,
    "bpf_get_current_task_btf": 0,
}


def kernel_btf(
    change=lambda members: None, functions=FUNCTIONS, tramp_image=True, netns=True
):
    """A small kernel's BTF. Its offsets are unlike any real kernel's.

    change() may alter sock_common's members.
    """
    btf = Btf()
    names = ("unsigned char", "short unsigned int", "unsigned int")
    u8, u16, u32 = (btf.int(name, 1 << log) for log, name in enumerate(names))
    u64 = btf.int("long long unsigned int", 8)
    be16 = btf.add("typedef", "__be16", u16)
    be32 = btf.add("const", "", btf.add("typedef", "__be32", u32))
    in6 = btf.struct("in6_addr", 16, [("u6_addr8", btf.array(u8, 16), 0)])
    pair = btf.struct("", 8, [("skc_rcv_saddr", be32, 0), ("skc_daddr", be32, 4)])
    both = [("skc_addrpair", u64, 0), ("", pair, 0)]
    ports = btf.struct("", 4, [("skc_num", u16, 0), ("skc_dport", be16, 2)])
    ns_common = btf.struct("ns_common", 16, [("inum", u32, 12)])
    net = btf.add("ptr", "", btf.struct("net", 64, [("ns", ns_common, 24)]))
    possible_net = btf.struct("", 8 * netns, [("net", net, 0)] * netns)
    members = {
        "skc_hash": ("skc_hash", u32, 0),
        "pair": ("", btf.struct("", 8, both, kind="union"), 8),
        "ports": ("", ports, 16),
        "skc_family": ("skc_family", u16, 22),
        "skc_v6_rcv_saddr": ("skc_v6_rcv_saddr", in6, 24),
        "skc_v6_daddr": ("skc_v6_daddr", in6, 40),
        "skc_net": ("skc_net", btf.add("typedef", "possible_net_t", possible_net), 56),
        "skc_cookie": ("skc_cookie", u64, 64),
    }
    change(members)
    common = btf.struct("sock_common", 72, list(members.values()))
    errors = btf.struct("", 8, [("sk_err", u32, 0), ("sk_err_soft", u32, 4)])
    bits = [
        *(("__sk_common", common, 0, 0), ("sk_dontcopy", u32, 576, 3)),
        *(("", errors, 608, 0), ("sk_protocol", u16, 816, 0)),
    ]
    sock = btf.struct("sock", 128, bits)
    btf.struct("inet_sock", 160, [("sk", sock, 0), ("inet_sport", be16, 130)])
    btf.struct("tcp_sock", 200, [("sk", sock, 0), ("is_mptcp", u8, 161)])
    btf.struct("task_struct", 48, [("flags", u32, 44)])
    flags = [("di", u64, 24), ("flags", u32, 32), ("ax", u64, 40)]
    btf.struct("pt_regs", 48, [("regs", btf.array(u64, 3), 0), *flags])
    btf.struct("user_regs_struct", 16, [("orig_ax", u64, 8)])
    if tramp_image:
        btf.struct("bpf_tramp_image", 8, [("image", u64, 0)])
    for function, arguments in functions.items():
        btf.func(function, arguments, u32)
    return btf


def read(tool, crafted=None):
    """A crafted BTF as the tool reads it."""
    tool.import_bcc()
    return tool.Btf((crafted or kernel_btf()).data())


def without(*names):
    def change(members):
        for name in names:
            del members[name]

    return change


without_ipv6 = without("skc_v6_daddr", "skc_v6_rcv_saddr")


SOCK_COMMON = {
    "skc_hash": 0,
    "skc_addrpair": 8,
    "skc_rcv_saddr": 8,
    "skc_daddr": 12,
    "skc_num": 16,
    "skc_dport": 18,
    "skc_family": 22,
    "skc_v6_rcv_saddr": 24,
    "skc_v6_daddr": 40,
    "skc_net": 56,
    "skc_cookie": 64,
}


def test_offsets(shared):
    """In structs and unions without a name, too; a bitfield has no offset in bytes."""
    btf = read(shared)
    assert btf.offsets("sock_common") == SOCK_COMMON
    assert btf.offsets("sock") == {
        "__sk_common": 0,
        "sk_err": 76,
        "sk_err_soft": 80,
        "sk_protocol": 102,
    }
    assert btf.offsets("inet_sock") == {"sk": 0, "inet_sport": 130}
    assert btf.offsets("pt_regs") == {"regs": 0, "di": 24, "flags": 32, "ax": 40}
    assert btf.offsets("no_such") == {}


def test_types_by_name_and_kind(shared):
    crafted = kernel_btf()
    function = crafted.func("net", 5, 1)
    btf = read(shared, crafted)
    assert btf.find("net", 12) == function != btf.find("net") > 0
    assert btf.find("no_such") == btf.find("tcp_v4_connect") == 0
    assert btf.arity("net") == 5


def test_arity(shared):
    btf = read(shared)
    assert {function: btf.arity(function) for function in FUNCTIONS} == FUNCTIONS
    assert btf.arity("no_such") is btf.arity("sock_common") is None


def test_type_behind_typedefs_and_qualifiers(shared):
    crafted = Btf()
    type_id = crafted.int("int", 4)
    for kind, name in (("const", ""), ("typedef", "a"), ("volatile", "")):
        type_id = crafted.add(kind, name, type_id)
    kind, info, size, _ = read(shared, crafted).type(type_id)
    assert (kind, info, size) == (1, 1 << 24, 4)


def test_type_that_is_not_there(shared):
    """Or is a circle."""
    crafted = Btf()
    crafted.add("typedef", "a", 2)
    crafted.add("typedef", "b", 1)
    for type_id in (1, 2, 9999):
        with pytest.raises(ValueError):
            read(shared, crafted).type(type_id)


def test_ipv6_and_network_namespaces(shared):
    for crafted, *has in (
        (kernel_btf(), True, True, True),
        (kernel_btf(without_ipv6), False, True, True),
        (kernel_btf(without("skc_net")), True, False, True),
        (kernel_btf(netns=False), True, False, True),
        (kernel_btf(functions={"tcp_v4_connect": 3}), True, True, False),
    ):
        btf = read(shared, crafted)
        found = shared.has_ipv6(btf), shared.has_netns(btf), shared.has_mptcp(btf)
        assert list(found) == has
        macros = re.findall(
            r"^#define (IPV6|NETNS|MPTCP) 1$",
            shared.c_program(parse(shared), "kprobe", btf),
            re.MULTILINE,
        )
        names = ("IPV6", "NETNS", "MPTCP")
        assert macros == [name for name, there in zip(names, has) if there]


def is_kernel(shared, monkeypatch, **names):
    """uname(2) says that of the kernel."""
    uname = SimpleNamespace(**{"machine": "x86_64", "version": "#1 SMP", **names})
    monkeypatch.setattr(shared.os, "uname", lambda: uname)


@pytest.fixture
def on_x86(monkeypatch, shared):
    is_kernel(shared, monkeypatch)


def test_methods_best_first(shared, on_x86, monkeypatch):
    args = parse(shared)
    monkeypatch.setattr(shared, "is_preemptible", lambda: False)
    assert shared.attach_methods(args, None) == ["headers"]
    btf = read(shared)
    assert shared.attach_methods(args, btf) == ["fexit", "kprobe", "headers"]
    monkeypatch.setattr(shared, "is_preemptible", lambda: True)
    assert shared.attach_methods(args, btf) == ["kprobe", "fexit", "headers"]


def test_no_fexit_where_detaching_is_not_safe(shared, on_x86, monkeypatch):
    args, methods = parse(shared), ["kprobe", "headers"]
    monkeypatch.setattr(shared, "is_preemptible", lambda: False)
    btf = read(shared, kernel_btf(tramp_image=False))
    assert shared.attach_methods(args, btf) == methods
    is_kernel(shared, monkeypatch, machine="aarch64")
    assert shared.attach_methods(args, read(shared)) == methods


def test_no_fexit_for_functions_that_are_not_there(shared, on_x86, monkeypatch):
    monkeypatch.setattr(shared, "is_preemptible", lambda: False)
    functions = {**FUNCTIONS, "tcp_v4_connect": 4}
    btf = read(shared, kernel_btf(functions=functions))
    assert shared.attach_methods(parse(shared), btf) == ["kprobe", "headers"]


@pytest.mark.parametrize("arguments", [2, 4])
def test_arguments_of_accept(arguments):
    tool = load("tcpaccept")
    functions = {**FUNCTIONS, "inet_csk_accept": arguments}
    btf = read(tool, kernel_btf(functions=functions))
    (declared,) = tool.fexit_macros(parse(tool), btf).values()
    others = [f"void *arg{i}" for i in range(1, arguments)]
    assert declared.split(", ") == ["struct sock *listener", *others]
    text = tool.c_program(parse(tool), "fexit", btf)
    assert f"#define INET_CSK_ACCEPT_ARGS {declared}\n" in text
    assert "INET_CSK_ACCEPT_ARGS" not in tool.c_program(parse(tool), "kprobe", btf)


FITS_WITH = {
    "tcpconnect": {
        "": ["tcp_v4_connect", "tcp_v6_connect"],
        "-4": ["tcp_v4_connect"],
        "-6": ["tcp_v6_connect"],
        "-x -4": ["tcp_v4_connect", "tcp_disconnect"],
        "-d -6": ["tcp_v6_connect", "skb_consume_udp"],
    },
    "tcpaccept": {
        "": ["inet_csk_accept", "security_sock_graft"],
        "-4 -q": ["inet_csk_accept", "security_sock_graft"],
    },
}


def test_functions_that_fexit_needs(name, tool):
    """It fits as long as they are there, and take as many arguments."""
    for options, needed in FITS_WITH[name].items():
        args = parse(tool, *options.split())
        here = {function: FUNCTIONS[function] for function in needed}
        btf = read(tool, kernel_btf(functions=here))
        assert tool.fexit_macros(args, btf) is not None
        for function in needed:
            fewer = {other: here[other] for other in here if other != function}
            btf = read(tool, kernel_btf(functions=fewer))
            assert tool.fexit_macros(args, btf) is None
        changed = "security_sock_graft" if name == "tcpaccept" else needed[0]
        btf = read(tool, kernel_btf(functions={**here, changed: 1}))
        assert tool.fexit_macros(args, btf) is None


def test_fexit_without_ipv6(shared):
    here = {"tcp_v4_connect": 3}
    btf = read(shared, kernel_btf(without_ipv6, functions=here))
    assert shared.fexit_macros(parse(shared), btf) == {}


@pytest.mark.parametrize(
    ("models", "version", "preemptible"),
    [
        ("none (voluntary) full \n", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1", False),
        ("(none) voluntary full\n", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1", False),
        ("none voluntary (full)\n", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1", True),
        ("full (lazy) \n", "#1 SMP PREEMPT_DYNAMIC Debian 7.2.13-1", True),
        (None, "#1 SMP PREEMPT_DYNAMIC Debian 6.1.176-1", True),
        (None, "#1 SMP PREEMPT_RT Debian 6.1.176-1", True),
        (None, "#1 SMP Debian 5.10.223-1", False),
    ],
)
def test_preemption_model(shared, tmp_path, monkeypatch, models, version, preemptible):
    """As the four releases' kernels show it, and others."""
    monkeypatch.setattr(shared, "PREEMPTION", str(tmp_path / "preempt"))
    if models:
        (tmp_path / "preempt").write_text(models)
    is_kernel(shared, monkeypatch, version=version)
    assert shared.is_preemptible() == preemptible


WHOLE = kernel_btf().data()
BROKEN = {
    "empty": b"",
    "cut in the header": WHOLE[:10],
    "header only": WHOLE[:24],
    "cut in the types": WHOLE[: len(WHOLE) // 2],
    "cut in the strings": WHOLE[:-40],
    "version 9": kernel_btf().data(version=9),
    "no BTF": kernel_btf().data(magic=0x1234),
    "other byte order": WHOLE[1::-1] + WHOLE[2:],
    "unknown kind": WHOLE[:24] + struct.pack("=III", 0, 25 << 24, 0) + WHOLE[36:],
    "noise": bytes(range(256)),
}


@pytest.mark.parametrize("why", BROKEN)
def test_btf_that_libbpf_cannot_read(shared, tmp_path, monkeypatch, capfd, why):
    path = tmp_path / "btf"
    monkeypatch.setattr(shared, "BTF", str(path))
    monkeypatch.delenv("TCPTOOLS_DEBUG", raising=False)
    shared.import_bcc()
    path.write_bytes(WHOLE)
    assert shared.read_btf().offsets("sock_common") == SOCK_COMMON
    path.write_bytes(BROKEN[why])
    assert shared.read_btf() is None
    assert capfd.readouterr() == ("", "")


def test_no_btf(shared, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(shared, "BTF", str(tmp_path / "absent"))
    monkeypatch.setenv("TCPTOOLS_DEBUG", "1")
    assert shared.read_btf() is None
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"tcpconnect: {tmp_path}/absent: ")
    assert err.endswith("\n") and err.count("\n") == 1


def test_no_ipv6_in_the_kernel(shared, capsys):
    btf = read(shared, kernel_btf(without_ipv6))
    shared.require_kernel(parse(shared), btf)
    assert capsys.readouterr() == (
        "",
        "tcpconnect: this kernel has no IPv6: tracing IPv4 only\n",
    )
    shared.require_kernel(parse(shared, "-4"), btf)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as end:
        shared.require_kernel(parse(shared, "-6"), btf)
    assert end.value.code == 1
    assert capsys.readouterr() == (
        "",
        "tcpconnect: error: this kernel has no IPv6\n",
    )


def test_ipv6_in_the_kernel(shared, capsys):
    for options in ([], ["-4"], ["-6"]):
        shared.require_kernel(parse(shared, *options), read(shared))
        shared.require_kernel(parse(shared, *options), None)  # the headers know
    assert capsys.readouterr() == ("", "")


def test_mntnsmap_needs_btf(shared, tmp_path, capsys):
    (tmp_path / "map").write_text("")
    args = parse(shared, "--mntnsmap", str(tmp_path / "map"))
    shared.require_kernel(args, read(shared))
    with pytest.raises(SystemExit) as end:
        shared.require_kernel(args, None)
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "tcpconnect: error: --mntnsmap needs the kernel's BTF "
        "(/sys/kernel/btf/vmlinux)\n"
    )


def test_reads_become_assertions(shared):
    text = "a\nREADS(sock_common, skc_num,\n      skc_daddr)\nREADS(pt_regs, cx)\nb\n"
    assert shared.checked_reads(text, read(shared)) == (
        "a\n"
        "IS_AT(sock_common, skc_num, 16);\n"
        "IS_AT(sock_common, skc_daddr, 12);\n"
        "IS_AT(pt_regs, cx, -1);\n"
        "b\n"
    )
    assert shared.checked_reads(text, None) == "a\n\n\nb\n"


def reads(tool, text):
    """{struct: members} that a C program reads."""
    found = {}
    for names in re.findall(r"^READS\(([^)]*)\)$", text, re.MULTILINE):
        name, *members = re.split(r",\s*", names)
        found.setdefault(name, set()).update(members)
    return found


def compiled(tool, text, btf):
    """What the compiler says of the types and the assertions of a C program."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("NOT TESTED: no gcc and no clang, which would compile the types")
    types = btf.declarations([*reads(tool, text), "user_regs_struct"])
    program = tool.checked_reads(text, btf)
    assertions = re.findall(r"^IS_AT\(.*\);$", program, re.MULTILINE)
    assert {line.split("(")[1].split(",")[0] for line in assertions} == set(
        reads(tool, text)
    )
    source = [
        tool.KERNEL_TREE["linux/types.h"].replace("KERNEL_TYPES", types),
        *(tool.UAPI, *assertions),
        "struct user_regs_struct registers;",
        "int main(void) { return 0; }\n",
    ]
    flags = ("-std=gnu11", "-fms-extensions", "-w", "-fsyntax-only", "-x", "c", "-")
    return subprocess.run(
        [compiler, *flags],
        input="\n".join(source),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    ).stderr


@pytest.mark.parametrize("method", ["fexit", "kprobe"])
def test_crafted_types_compile(tool, method):
    btf = read(tool)
    text = tool.c_program(parse(tool), method, btf)
    assert compiled(tool, text, btf) == ""


def test_packed_types_compile(shared):
    """A struct whose members are not aligned."""

    def misplaced(members):
        name, type_id, _ = members["skc_family"]
        members["skc_family"] = (name, type_id, 21)

    btf = read(shared, kernel_btf(misplaced))
    assert btf.offsets("sock_common") == {**SOCK_COMMON, "skc_family": 21}
    text = shared.c_program(parse(shared), "kprobe", btf)
    assert compiled(shared, text, btf) == ""


def test_gaps(shared):
    """libbpf fills them with bitfields without a name, aligned by their type.

    Here they are before integers of any size, some of which follow bitfields.
    """
    crafted, choose = kernel_btf(), random.Random(1)
    types = {
        8 * size: crafted.int(name, size)
        for size, name in ((1, "char"), (2, "short"), (4, "int"), (8, "long"))
    }
    reads = ""
    for number in range(307):
        members, at = [], 0
        for member in "abcde":
            bits = choose.choice((8, 16, 32, 64))
            width = choose.choice((0, 0, choose.randint(1, bits)))
            if not width:
                at += choose.choice((0, 0, 8, 72, 400))
            if not width or at % bits + width > bits:
                at = -(-at // bits) * bits
            members.append((member, types[bits], at, width))
            at += width or bits
        crafted.struct(f"odd{number}", (at + 63) // 64 * 8, members)
        named = ", ".join(name for name, *_, width in members if not width)
        reads += f"READS(odd{number}, {named})\n" if named else ""
    assert compiled(shared, reads, read(shared, crafted)) == ""


def test_declarations_that_are_not_what_btf_says(shared, monkeypatch):
    btf = read(shared)
    text = shared.c_program(parse(shared), "kprobe", btf)
    offsets = btf.offsets

    def moved(name):
        return {
            member: offset + 4 * ((name, member) == ("sock_common", "skc_daddr"))
            for member, offset in offsets(name).items()
        }

    monkeypatch.setattr(btf, "offsets", moved)
    errors = re.findall(r"error: (.*)", compiled(shared, text, btf))
    (error,) = errors
    assert "BTF has sock_common.skc_daddr elsewhere" in error


def test_member_that_the_kernel_does_not_have(shared):
    btf = read(shared, kernel_btf(without("skc_family")))
    text = shared.c_program(parse(shared), "kprobe", btf)
    assert "skc_family" in compiled(shared, text, btf)


def test_declarations_of_nothing(shared):
    assert read(shared).declarations(["no_such"]) == ""


OWN_OPTIONS = {
    "tcpconnect": [
        "",
        "-c",
        "-x",
        "-l -m 5",
        "-d -U",
        "-x -d --json --mntnsmap {file}",
    ],
    "tcpaccept": ["", "-c", "-q", "-q --json --mntnsmap {file}"],
}


@functools.lru_cache
def own_btf(tool):
    """This machine's BTF."""
    if not os.path.exists(tool.BTF):
        pytest.skip("NOT TESTED: this machine's kernel has no BTF")
    tool.import_bcc()
    return tool.read_btf()


def own_programs(tool):
    """(options, method, C program) for what this machine's kernel offers."""
    btf = own_btf(tool)
    for options in OWN_OPTIONS[tool.NAME]:
        args = parse(tool, *options.format(file=__file__).split())
        for method in ("fexit", "kprobe"):
            if method == "kprobe" or tool.fexit_macros(args, btf) is not None:
                yield options, method, tool.c_program(args, method, btf)


def test_this_kernels_types_compile(tool):
    for options, method, text in own_programs(tool):
        assert (options, method, compiled(tool, text, own_btf(tool))) == (
            options,
            method,
            "",
        )


def test_this_kernel_has_all_that_is_read(tool):
    for options, method, text in own_programs(tool):
        found = reads(tool, text)
        missing = {
            (name, member)
            for name, members in found.items()
            for member in members - set(own_btf(tool).offsets(name))
        }
        assert (options, method, missing) == (options, method, set())
        assert ("pt_regs" in found) == (method == "kprobe")


def test_offsets_are_what_bpftool_says(tool):
    own_btf(tool)
    command = ["/usr/sbin/bpftool", "-j", "btf", "dump", "file", tool.BTF]
    dump = subprocess.run(command, capture_output=True, check=True).stdout
    types = {entry["id"]: entry for entry in json.loads(dump)["types"]}

    def members(entry, base=0):
        for member in entry["members"]:
            behind, offset = types[member["type_id"]], base + member["bits_offset"]
            if member["name"] != "(anon)" and not member.get("bitfield_size"):
                yield member["name"], offset // 8
            elif member["name"] == "(anon)" and "members" in behind:
                yield from members(behind, offset)

    structs = {
        entry["name"]: entry for entry in types.values() if entry["kind"] == "STRUCT"
    }
    wanted = {name for *_, text in own_programs(tool) for name in reads(tool, text)}
    assert {"sock_common", "sock", "net", "mnt_namespace", "pt_regs"} <= wanted
    for name in wanted:
        offsets = own_btf(tool).offsets(name)
        assert offsets == dict(members(structs[name])) and offsets


# What a part of the program is known by, and the options that choose it with a method.
PARTS = {
    "tcpconnect": {
        "BPF_HASH(flows,": {"fexit": "-c", "kprobe": "-c"},
        "BPF_HASH(pending,": {"fexit": "-x -xd", "kprobe": "-x -xd"},
        "BPF_HASH(calls,": {"fexit": "", "kprobe": "-x -xd"},
        "BPF_PERF_OUTPUT(responses)": {"fexit": "-d -xd", "kprobe": "-d -xd"},
        "fill(struct": {"fexit": "- -x -d -xd -U", "kprobe": "- -x -d -xd -U"},
        "event->uid = ": {"fexit": "-U", "kprobe": "-U"},
        "KRETFUNC_PROBE(tcp_v4_connect,": {"fexit": "- -c -x -d -xd -U", "kprobe": ""},
        "KRETFUNC_PROBE(tcp_v6_connect,": {"fexit": "- -c -x -d -xd -U", "kprobe": ""},
        "KFUNC_PROBE(tcp_disconnect,": {"fexit": "-x -xd", "kprobe": ""},
        "KFUNC_PROBE(skb_consume_udp,": {"fexit": "-d -xd", "kprobe": ""},
        "int trace_connect(": {"fexit": "", "kprobe": "- -c -x -d -xd -U"},
        "int trace_return(": {"fexit": "", "kprobe": "-x -xd"},
        "int trace_disconnect(": {"fexit": "", "kprobe": "-x -xd"},
        "int trace_udp(": {"fexit": "", "kprobe": "-d -xd"},
        "int trace_state(": {"fexit": "-x -xd", "kprobe": "-x -xd"},
        "int trace_state_in_softirq(": {"fexit": "-x -xd", "kprobe": "-x -xd"},
    },
    "tcpaccept": {
        "BPF_HASH(flows,": {"fexit": "-c", "kprobe": "-c"},
        "event.ts = ": {"fexit": "- -q -U", "kprobe": "- -q -U"},
        "event->qlen = ": {"fexit": "-q", "kprobe": "-q"},
        "event->uid = ": {"fexit": "-U", "kprobe": "-U"},
        "KRETFUNC_PROBE(inet_csk_accept,": {"fexit": "- -c -q -U", "kprobe": ""},
        "KFUNC_PROBE(security_sock_graft,": {"fexit": "- -c -q -U", "kprobe": ""},
        "int trace_graft(": {"fexit": "", "kprobe": "- -c -q -U"},
        "int trace_accept_return(": {"fexit": "", "kprobe": "- -c -q -U"},
        "int trace_accept(": {"fexit": "", "kprobe": "-q"},
        'BPF_TABLE("lru_hash", u64, u64, listening,': {"fexit": "", "kprobe": "-q"},
    },
}
PARTS_OPTIONS = {"tcpconnect": "- -c -x -d -xd -U", "tcpaccept": "- -c -q -U"}


@pytest.mark.parametrize("method", ["fexit", "kprobe"])
def test_parts_of_the_program(name, tool, method):
    """Each option compiles its own code only; - means none."""
    texts = {
        option: tool.program(parse(tool, *[option] * (option != "-")), method)
        for option in PARTS_OPTIONS[name].split()
    }
    chosen = {
        part: [option for option, text in texts.items() if part in text]
        for part in PARTS[name]
    }
    assert chosen == {
        part: options[method].split() for part, options in PARTS[name].items()
    }


def test_program_with_headers_is_that_with_kprobes(tool):
    """But for the layout: the kernel's headers have it, and need no assertions."""
    args = parse(tool)
    assert tool.program(args, "headers") == tool.program(args, "kprobe")
    text = tool.checked_reads(tool.c_program(args, "headers", None), None)
    assert text.startswith(tool.KERNEL_HEADERS)
    assert not re.search("READS|IS_AT|pt_regs, |s6_addr32 in6_u", text)


def test_filters_of_the_program(shared, tmp_path):
    """Maps to filter by are there where options ask for them."""
    (tmp_path / 'a"b').write_text("")
    path = str(tmp_path / 'a"b')
    args, btf = parse(shared, "--mntnsmap", path, "--cgroupmap", path), read(shared)
    args.cgroup = ["/a", "/b", "/c"]
    text = shared.c_program(args, "kprobe", btf)
    assert "#define FILTER_CGROUPS 3\n" in text
    assert f'#define CGROUPMAP "{args.cgroupmap}"\n' in text
    assert f'#define MNTNSMAP "{args.mntnsmap}"\n' in text
    maps = (
        "BPF_CGROUP_ARRAY(cgroups, FILTER_CGROUPS);",
        'BPF_TABLE_PINNED("hash", u64, u64, cgroupmap, 1024, CGROUPMAP);',
        'BPF_TABLE_PINNED("hash", u64, u32, mntnsmap, 1024, MNTNSMAP);',
    )
    bare = shared.c_program(parse(shared), "kprobe", btf)
    assert [line for line in maps if line in text] == [*maps]
    assert [line for line in maps if line in bare] == []
    assert str(tmp_path) not in text


def test_versions_of_ip(shared):
    for option, version in (("-4", 4), ("-6", 6)):
        macros = shared.filter_macros(parse(shared, option))
        assert macros == {"FILTER_IP": version}
    assert shared.filter_macros(parse(shared)) == {}
