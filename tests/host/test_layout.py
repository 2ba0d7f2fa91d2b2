"""The struct layout from BTF: crafted files, byte by byte as linux/btf.h describes them, and this machine's own."""

import argparse
import functools
import os
import re
import struct
import subprocess

import pytest

KIND = {
    "int": 1,
    "ptr": 2,
    "array": 3,
    "struct": 4,
    "union": 5,
    "typedef": 8,
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
        """members: (name, type, offset in bytes), or with a fourth, the width of a bitfield, offsets in bits."""
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

    def write(self, path, magic=0xEB9F, version=1):
        header = struct.pack(
            "=HBBIIIII",
            magic,
            version,
            0,
            24,
            0,
            len(self.types),
            len(self.types),
            len(self.strings),
        )
        path.write_bytes(header + self.types + self.strings)
        return str(path)


def kernel_btf(
    change=lambda members: None, sk_protocol=None, accept_arguments=4, tramp_image=True
):
    """A small kernel's BTF. Its offsets are unlike any real kernel's; change() may alter sock_common's members."""
    btf = Btf()
    u8, u16, u32, u64 = (btf.int(f"u{8 * size}", size) for size in (1, 2, 4, 8))
    be16, be32 = (
        btf.add("typedef", "__be16", u16),
        btf.add("const", "", btf.add("typedef", "__be32", u32)),
    )
    in6 = btf.struct("in6_addr", 16, [("u6_addr8", btf.array(u8, 16), 0)])
    pair = btf.struct("", 8, [("skc_rcv_saddr", be32, 0), ("skc_daddr", be32, 4)])
    ports = btf.struct("", 4, [("skc_num", u16, 0), ("skc_dport", be16, 2)])
    ns_common = btf.struct("ns_common", 16, [("inum", u32, 12)])
    net = btf.add("ptr", "", btf.struct("net", 64, [("ns", ns_common, 24)]))
    possible_net = btf.struct("", 8, [("net", net, 0)])
    members = {
        "skc_hash": ("skc_hash", u32, 0),
        "pair": (
            "",
            btf.struct("", 8, [("skc_addrpair", u64, 0), ("", pair, 0)], kind="union"),
            8,
        ),
        "ports": ("", ports, 16),
        "skc_family": ("skc_family", u16, 22),
        "skc_v6_rcv_saddr": ("skc_v6_rcv_saddr", in6, 24),
        "skc_v6_daddr": ("skc_v6_daddr", in6, 40),
        "skc_net": ("skc_net", btf.add("typedef", "possible_net_t", possible_net), 56),
    }
    change(members)
    common = btf.struct("sock_common", 64, list(members.values()))
    if sk_protocol == "bitfield":
        flags = [("sk_padding", u32, 800, 1), ("sk_protocol", u32, 808, 8)]
        sock = btf.struct("sock", 128, [("__sk_common", common, 0, 0), *flags])
    else:
        sock = btf.struct(
            "sock", 128, [("__sk_common", common, 0), ("sk_protocol", u16, 102)]
        )
    btf.struct("inet_sock", 160, [("sk", sock, 0), ("inet_sport", be16, 130)])
    btf.struct(
        "pt_regs",
        48,
        [
            ("regs", btf.array(u64, 3), 0),
            ("di", u64, 24),
            ("flags", u32, 32),
            ("ax", u64, 40),
        ],
    )
    if tramp_image:
        btf.struct("bpf_tramp_image", 8, [("image", u64, 0)])
    for function, arguments in {
        "tcp_v4_connect": 3,
        "tcp_v6_connect": 3,
        "inet_csk_accept": accept_arguments,
        "security_sock_graft": 2,
    }.items():
        btf.func(function, arguments, u32)
    return btf


def ways(tool, path, preemptible=False, structs=()):
    """{way: the text ahead of the tool's C} that the tool finds in a BTF file, for its STRUCTS and more."""
    tool.BTF = path
    tool.is_preemptible = lambda: preemptible
    tool.import_bcc()
    fexit_defines = tool.fexit_defines
    if tool.NAME == "tcpconnect":
        both = argparse.Namespace(ipv4=False, ipv6=False, dns=False, failed=False)
        fexit_defines = functools.partial(fexit_defines, both)
    wanted = {**tool.STRUCTS, **dict(structs)}
    return dict(tool.ways_to_trace(wanted, fexit_defines, {}))


def offsets(text):
    """{struct: {member: (offset, C type)}} as the generated C declares them."""
    found = {}
    for line in text.splitlines():
        if opening := re.fullmatch(r"struct (\w+) { union {", line):
            found[opening[1]] = here = {}
        elif member := re.fullmatch(
            r"    struct { u8 \w+\[(\d+)\]; (.+) (\S+); };", line
        ):
            here[member[3]] = int(member[1]), member[2]
    return found


def test_crafted_layout(tool, tmp_path):
    found = ways(tool, kernel_btf().write(tmp_path / "btf"))
    assert list(found) == ["fexit", "kprobe", "headers"]
    assert "#define IPV6\n" in found["fexit"] and "#define FEXIT\n" in found["fexit"]
    for way in ("fexit", "kprobe"):
        structs = offsets(found[way])
        common = structs["sock_common"]
        assert common["skc_rcv_saddr"] == (8, "u32")
        assert common["skc_daddr"] == (12, "u32")
        assert common["skc_family"] == (22, "u16")
        assert common["skc_v6_rcv_saddr"] == (24, "struct in6_addr")
        assert common["skc_v6_daddr"] == (40, "struct in6_addr")
        assert common.get("skc_dport", (18, "u16")) == (18, "u16")
        assert common.get("skc_num", (16, "u16")) == (16, "u16")
        assert common["skc_net"] == (56, "possible_net_t")
        assert structs["net"]["ns"] == (24, "struct ns_common")
        assert structs["ns_common"]["inum"] == (12, "u32")
        assert "#define NETNS\n" in found[way]
        assert structs["sock"]["__sk_common"] == (0, "struct sock_common")
        if tool.NAME == "tcpaccept":
            assert structs["sock"]["sk_protocol"] == (102, "u16")
            assert structs["inet_sock"]["inet_sport"] == (130, "u16")
    assert offsets(found["kprobe"])["pt_regs"] == {
        "regs[3]": (0, "u64"),
        "di": (24, "u64"),
        "ax": (40, "u64"),
    }


def test_sk_protocol_as_a_bitfield(tool, tmp_path):
    """Before kernel 5.6: eight bits, 101 bytes in."""
    found = ways(tool, kernel_btf(sk_protocol="bitfield").write(tmp_path / "btf"))
    assert offsets(found["kprobe"])["sock"].get("sk_protocol", (101, "u8")) == (
        101,
        "u8",
    )
    assert ("sk_protocol" in found["kprobe"]) == (tool.NAME == "tcpaccept")


def test_kprobes_first_where_the_kernel_preempts_itself(tool, tmp_path):
    path = kernel_btf().write(tmp_path / "btf")
    assert list(ways(tool, path, preemptible=True)) == ["kprobe", "fexit", "headers"]


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
def test_preemption_model(tool, tmp_path, monkeypatch, models, version, preemptible):
    """As the four releases' kernels show it, and others."""
    tool.PREEMPTION = str(tmp_path / "preempt")
    if models:
        (tmp_path / "preempt").write_text(models)
    monkeypatch.setattr(tool.platform, "version", lambda: version)
    assert tool.is_preemptible() == preemptible


def test_no_ipv6_in_the_kernel(tool, tmp_path, capsys):
    def without_ipv6(members):
        del members["skc_v6_daddr"], members["skc_v6_rcv_saddr"]

    found = ways(tool, kernel_btf(without_ipv6).write(tmp_path / "btf"))
    for way in ("fexit", "kprobe"):
        assert "#define IPV6\n" not in found[way]
        assert "skc_v6_daddr;" not in found[way].partition(tool.BPF_SHARED)[0]
    assert capsys.readouterr().err == (
        f"{tool.NAME}: this kernel has no IPv6: tracing IPv4 only\n"
    )


def test_no_network_namespaces_in_the_kernel(tool, tmp_path):
    def without_namespaces(members):
        del members["skc_net"]

    found = ways(tool, kernel_btf(without_namespaces).write(tmp_path / "btf"))
    assert list(found) == ["fexit", "kprobe", "headers"]
    assert "#define NETNS" not in found["fexit"] + found["kprobe"]


@pytest.mark.parametrize("arguments", [2, 4])
def test_arity_of_accept(tmp_path, arguments):
    from conftest import load

    found = ways(
        load("tcpaccept"),
        kernel_btf(accept_arguments=arguments).write(tmp_path / "btf"),
    )
    declared = re.search("#define INET_CSK_ACCEPT_ARGS (.*)", found["fexit"])[1]
    others = [f"void *arg{i}" for i in range(1, arguments)]
    assert declared.split(", ") == ["struct sock *listener", *others]


def test_no_fexit_where_detaching_is_not_safe(tool, tmp_path):
    found = ways(tool, kernel_btf(tramp_image=False).write(tmp_path / "btf"))
    assert list(found) == ["kprobe", "headers"]


def wrong_size(members):
    members["skc_family"] = ("skc_family", 3, 20)  # a u32


def misplaced(members):
    name, type_id, _ = members["skc_family"]
    members["skc_family"] = (name, type_id, 21)


def far_away(members):
    name, type_id, _ = members["skc_family"]
    members["skc_family"] = (name, type_id, 1 << 16)


def missing(members):
    del members["skc_family"]


def no_such_type(members):
    members["skc_family"] = ("skc_family", 9999, 22)


@pytest.mark.parametrize(
    "lie", [wrong_size, misplaced, far_away, missing, no_such_type]
)
def test_btf_that_makes_no_sense(tool, tmp_path, lie):
    assert list(ways(tool, kernel_btf(lie).write(tmp_path / "btf"))) == ["headers"]


def test_btf_that_libbpf_cannot_read(tool, tmp_path, capfd):
    path = tmp_path / "btf"
    kernel_btf().write(path)
    whole = path.read_bytes()
    broken = [b"", whole[:10], whole[:24], whole[: len(whole) // 2], whole[:-40]]
    for data in broken:
        path.write_bytes(data)
        assert list(ways(tool, str(path))) == ["headers"]
    assert list(ways(tool, kernel_btf().write(path, version=9))) == ["headers"]
    assert list(ways(tool, kernel_btf().write(path, magic=0x1234))) == ["headers"]
    assert list(ways(tool, str(tmp_path / "absent"))) == ["headers"]
    assert capfd.readouterr().out == ""


UNNAMED = ["skc_daddr", "skc_rcv_saddr", "skc_dport", "skc_num", "transport_header"]
OPTIONAL = {
    "tcpconnect": ("STRUCTS_OF_MNTNS", "STRUCTS_OF_FAILED", "STRUCTS_OF_DNS"),
    "tcpaccept": ("STRUCTS_OF_MNTNS", "STRUCTS_OF_QUEUE"),
}


def test_this_kernels_own_btf(tool):
    """What the program and its options read, against what bpftool reads from the same file, where both are there."""
    if not os.path.exists(tool.BTF):
        pytest.skip("this machine's kernel has no BTF")
    structs = {}
    for name in OPTIONAL[tool.NAME]:
        structs.update(getattr(tool, name))
    found = offsets(ways(tool, tool.BTF, structs=structs)["kprobe"])
    dump = subprocess.run(
        ["/usr/sbin/bpftool", "btf", "dump", "file", tool.BTF, "format", "raw"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name, members in {**tool.STRUCTS, **structs}.items():
        assert set(found[name]) == set(members)
        listed = re.search(rf"\n\[\d+\] STRUCT '{name}' .*\n((?:\t.*\n)+)", dump)[1]
        for member, (offset, _) in found[name].items():
            bits = re.search(rf"'{member}' type_id=\d+ bits_offset=(\d+)", listed)
            # What stands in an unnamed struct or union of the kernel's has no line of its own there
            if bits:
                assert offset == int(bits[1]) // 8
            else:
                assert member in UNNAMED
