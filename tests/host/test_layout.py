"""What the tools ask of a kernel, and the C program that they make of it.

The struct layout comes from BTF: crafted here, byte by byte as linux/btf.h describes
it, and this machine's own.
"""

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
    "enum": 6,
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
        """Where it is in the strings, of which no two are the same."""
        wanted = b"\0%b\0" % text.encode()
        if text and wanted not in self.strings:
            self.strings += wanted[1:]
        return self.strings.index(wanted) + 1 if text else 0

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
    "tcp_conn_request": 4,
    "tcp_v4_syn_recv_sock": 6,
    "tcp_v6_syn_recv_sock": 7,
}
HELPER = "BPF_FUNC_get_current_task_btf"  # of enum bpf_func_id


def kernel_btf(
    change=lambda members: None,
    functions=FUNCTIONS,
    tramp_image=True,
    netns=True,
    helper=HELPER,
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
    btf.add("enum", "bpf_func_id", 4, btf.name(helper), 158, vlen=1)
    for function, arguments in functions.items():
        btf.func(function, arguments, u32)
    return btf


def read(tool, crafted=None):
    """A crafted BTF as the tool reads it."""
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


def offsets(btf, name):
    return {member: at for member, (at, _) in btf.members(name).items()}


def test_offsets(shared):
    """In structs and unions without a name, too; a bitfield has no offset in bytes."""
    btf = read(shared)
    assert offsets(btf, "sock_common") == SOCK_COMMON
    assert offsets(btf, "sock") == {
        "__sk_common": 0,
        "sk_err": 76,
        "sk_err_soft": 80,
        "sk_protocol": 102,
    }
    assert offsets(btf, "inet_sock") == {"sk": 0, "inet_sport": 130}
    assert offsets(btf, "pt_regs") == {"regs": 0, "di": 24, "flags": 32, "ax": 40}
    assert offsets(btf, "no_such") == {}


def test_sizes(shared):
    """Behind typedefs and qualifiers, of arrays and pointers, and of nothing."""
    btf = read(shared)
    for name, member, offset, size in (
        ("sock_common", "skc_daddr", 12, 4),
        ("sock_common", "skc_v6_daddr", 40, 16),
        ("sock_common", "skc_net", 56, 8),
        ("net", "ns", 24, 16),
        ("pt_regs", "regs", 0, 24),
        ("possible_net", "net", 0, 0),
        ("sock", "sk_dontcopy", 0, 0),
    ):
        assert btf.offset_and_size(name, member) == (offset, size)
    crafted = Btf()
    pair = crafted.array(crafted.array(crafted.int("int", 4), 3), 5)
    crafted.struct("s", 60, [("matrix", pair, 0)])
    assert read(shared, crafted).offset_and_size("s", "matrix") == (0, 60)


def test_types_by_name_and_kind(shared):
    """Also where the bytes of the name's offset are something else's, too."""
    crafted = kernel_btf()
    name_off = crafted.name("net")
    crafted.array(name_off, name_off)
    crafted.func("net", 5, 1)
    crafted.func("last", 2, 1)
    btf = read(shared, crafted)
    assert btf.arity("net") == 5 and btf.arity("last") == 2
    assert offsets(btf, "net") == {"ns": 24}
    assert btf.find("no_such") is btf.find("tcp_v4_connect") is None


def test_arity(shared):
    btf = read(shared)
    assert {function: btf.arity(function) for function in FUNCTIONS} == FUNCTIONS
    assert btf.arity("no_such") is btf.arity("sock_common") is None


def test_type_that_is_not_there(shared):
    """Or is a circle, or a struct inside of itself."""
    crafted = Btf()
    circle = crafted.add("typedef", "a", 2)
    crafted.add("typedef", "b", 1)
    crafted.struct("s", 8, [("circle", circle, 0), ("absent", 9999, 4)])
    crafted.struct("nested", 8, [("", 4, 0), ("member", 1, 4)])
    crafted.struct("absent", 8, [("", 9999, 0)])
    btf = read(shared, crafted)
    for member in ("circle", "absent"):
        with pytest.raises(ValueError, match="^the BTF (has|refers to) a type that "):
            btf.offset_and_size("s", member)
    with pytest.raises(ValueError, match="^the BTF refers to a type that "):
        btf.members("absent")
    assert offsets(btf, "nested") == {"member": 4}


def test_what_the_kernel_has(shared):
    for crafted, *has in (
        (kernel_btf(), True, True),
        (kernel_btf(without_ipv6), False, True),
        (kernel_btf(netns=False), True, True),
        (kernel_btf(helper="BPF_FUNC_get_current_task"), True, False),
    ):
        btf = read(shared, crafted)
        assert [shared.has_ipv6(btf), shared.has_mptcp(btf)] == has
        text = shared.c_program(parse(shared), "kprobe", btf)
        names = re.findall(r"^#define (TCP_V6|MPTCP) 1$", text, re.MULTILINE)
        assert names == [n for n, there in zip(("TCP_V6", "MPTCP"), has) if there]


def is_kernel(shared, monkeypatch, **names):
    """uname(2) says that of the kernel."""
    uname = SimpleNamespace(**{"machine": "x86_64", "version": "#1 SMP", **names})
    monkeypatch.setattr(shared.os, "uname", lambda: uname)


@pytest.fixture
def on_x86(monkeypatch, shared):
    is_kernel(shared, monkeypatch)


@pytest.fixture
def methods(shared, on_x86, monkeypatch):
    """methods(crafted BTF, only=None, preemptible=False) gives the methods to try."""

    def find(crafted, only=None, preemptible=False):
        monkeypatch.setattr(shared, "is_preemptible", lambda: preemptible)
        monkeypatch.delenv("TCPTOOLS_METHOD", raising=False)
        if only:
            monkeypatch.setenv("TCPTOOLS_METHOD", only)
        btf = crafted and read(shared, crafted)
        args = parse(shared)
        if only:
            monkeypatch.setenv("TCPTOOLS_METHOD", only)
        return shared.attach_methods(args, btf)

    return find


def test_methods_best_first(methods):
    assert methods(None) == ["headers"]
    assert methods(kernel_btf()) == ["fexit", "kprobe"]
    assert methods(kernel_btf(), preemptible=True) == ["kprobe", "fexit"]


def test_one_method_only(methods):
    for only in ("fexit", "kprobe"):
        assert methods(kernel_btf(), only) == [only]
    assert methods(None, "headers") == ["headers"]
    assert methods(None, "kprobe") == []


def test_no_fexit_where_detaching_is_not_safe(shared, methods, monkeypatch):
    assert methods(kernel_btf(tramp_image=False)) == ["kprobe"]
    is_kernel(shared, monkeypatch, machine="aarch64")
    assert methods(kernel_btf()) == ["kprobe"]


def test_no_fexit_for_functions_that_are_not_there(methods):
    functions = {**FUNCTIONS, "tcp_v4_connect": 4}
    assert methods(kernel_btf(functions=functions)) == ["kprobe"]


@pytest.mark.parametrize("arguments", [2, 4])
def test_arguments_of_accept(arguments):
    tool = load("tcpaccept")
    functions = {**FUNCTIONS, "inet_csk_accept": arguments}
    btf = read(tool, kernel_btf(functions=functions))
    others = "".join(f", void *arg{i}" for i in range(1, arguments))
    text = tool.c_program(parse(tool), "fexit", btf)
    assert f"#define INET_CSK_ACCEPT_ARGS struct sock *listener{others}\n" in text


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
        "-x": ["tcp_conn_request", "tcp_v4_syn_recv_sock", "tcp_v6_syn_recv_sock"],
        "-x -4": ["tcp_conn_request", "tcp_v4_syn_recv_sock"],
    },
}


def test_functions_that_fexit_needs(name, tool, monkeypatch):
    """It fits as long as they are there, and take as many arguments."""
    is_kernel(tool, monkeypatch)
    for options, needed in FITS_WITH[name].items():
        args = parse(tool, *options.split())
        here = {function: FUNCTIONS[function] for function in needed}
        assert tool.can_fexit(args, read(tool, kernel_btf(functions=here)))
        for function in needed:
            fewer = {other: here[other] for other in here if other != function}
            assert not tool.can_fexit(args, read(tool, kernel_btf(functions=fewer)))
            changed = {**here, function: 1}
            assert not tool.can_fexit(args, read(tool, kernel_btf(functions=changed)))


def test_fexit_without_ipv6(shared, on_x86):
    btf = read(shared, kernel_btf(without_ipv6, functions={"tcp_v4_connect": 3}))
    assert shared.can_fexit(parse(shared), btf)


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
def test_btf_that_makes_no_sense(shared, tmp_path, monkeypatch, capfd, why):
    path = tmp_path / "btf"
    monkeypatch.setattr(shared, "BTF", str(path))
    monkeypatch.delenv("TCPTOOLS_DEBUG", raising=False)
    path.write_bytes(WHOLE)
    assert offsets(shared.read_btf(), "sock_common") == SOCK_COMMON
    with monkeypatch.context() as environment:
        environment.setenv("TCPTOOLS_METHOD", "headers")
        assert shared.read_btf() is None
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


def test_no_ipv6_in_the_kernel(shared, capfd):
    btf = read(shared, kernel_btf(without_ipv6))
    shared.require_kernel(parse(shared), btf)
    assert capfd.readouterr() == (
        "",
        "tcpconnect: this kernel has no IPv6: tracing IPv4 only\n",
    )
    shared.require_kernel(parse(shared, "-4"), btf)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(SystemExit) as end:
        shared.require_kernel(parse(shared, "-6"), btf)
    assert end.value.code == 1
    assert capfd.readouterr() == (
        "",
        "tcpconnect: error: this kernel has no IPv6\n",
    )


def test_ipv6_in_the_kernel(shared, capfd):
    for options in ([], ["-4"], ["-6"]):
        shared.require_kernel(parse(shared, *options), read(shared))
        shared.require_kernel(parse(shared, *options), None)  # the headers know
    assert capfd.readouterr() == ("", "")


def test_mntnsmap_needs_btf(shared, tmp_path, capfd):
    (tmp_path / "map").write_text("")
    args = parse(shared, "--mntnsmap", str(tmp_path / "map"))
    shared.require_kernel(args, read(shared))
    with pytest.raises(SystemExit) as end:
        shared.require_kernel(args, None)
    assert end.value.code == 1
    assert capfd.readouterr().err == (
        "tcpconnect: error: --mntnsmap needs the kernel's BTF "
        "(/sys/kernel/btf/vmlinux)\n"
    )


def test_layout_of_what_is_read(shared):
    """The members that READ(), GET() and OFFSET() name, nested ones, too."""
    text = (
        "READ(a, b + OFFSET(sock, sk_err), inet_sock,\n     inet_sport);"
        "f(OFFSET(net, ns), x, y); GET(u16, g(x, y), sock_common, skc_num)"
    )
    assert shared.layout(text, read(shared)) == (
        "#define OFFSET_inet_sock_inet_sport 130\n"
        "#define SIZE_inet_sock_inet_sport 2\n"
        "#define OFFSET_net_ns 24\n"
        "#define SIZE_net_ns 16\n"
        "#define OFFSET_sock_sk_err 76\n"
        "#define SIZE_sock_sk_err 4\n"
        "#define OFFSET_sock_common_skc_num 16\n"
        "#define SIZE_sock_common_skc_num 2\n"
    )


@pytest.mark.parametrize("member", ["skc_v6_daddr", "skc_v6_rcv_saddr", "skc_net"])
def test_members_that_may_be_absent(shared, member):
    text = f"GET(x, y, sock_common, {member})"
    assert f"SIZE_sock_common_{member} 0\n" in shared.layout(
        text, read(shared, kernel_btf(without(member)))
    )


def test_member_that_the_kernel_does_not_have(shared):
    btf = read(shared, kernel_btf(without("skc_family")))
    with pytest.raises(ValueError, match="^the BTF has no sock_common.skc_family$"):
        shared.c_program(parse(shared), "kprobe", btf)


def test_registers(shared):
    """Each at its offset, by whatever names a machine has."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("NOT TESTED: no gcc and no clang, which would compile the struct")
    source = shared.registers(read(shared))
    for name, offset, size in (("di", 24, 8), ("ax", 40, 8), ("regs", 0, 24)):
        source += f"_Static_assert(__builtin_offsetof(struct pt_regs, {name}) == "
        source += f'{offset} && sizeof(((struct pt_regs *)0)->{name}) == {size}, "");\n'
    flags = ("-std=gnu11", "-w", "-fsyntax-only", "-x", "c", "-")
    done = subprocess.run(
        [compiler, *flags], input=source, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("refused", "done"),
    [
        (None, ["unshare", "mount /", "mount /proc/kallsyms"]),
        ("unshare", ["unshare"]),
        ("mount /", ["unshare", "mount /"]),  # in a chroot that is no mount point
    ],
)
def test_few_symbols(shared, monkeypatch, tmp_path, refused, done):
    """Nothing is mounted where others would see it."""
    calls = []

    def result(call):
        calls.append(call)
        return -1 if call == refused else 0

    libc = SimpleNamespace(
        unshare=lambda _flags: result("unshare"),
        mount=lambda _source, target, *_: result(f"mount {target.decode()}"),
    )
    monkeypatch.setattr(shared.ctypes, "CDLL", lambda _name: libc)
    shared.few_symbols(str(tmp_path))
    assert calls == done


def test_text_that_ifdef_selects(shared):
    text = "a\n#ifdef X\nb\n#ifndef Y\nc\n#else\nd\n#endif\n#else\ne\n#endif\nf\n"
    for macros, kept in (("", "aef"), ("X", "abcf"), ("XY", "abdf"), ("Y", "aef")):
        assert shared.selected(text, set(macros)) == "".join(f"{c}\n" for c in kept)


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
        "int kprobe__tcp_connect(": {"fexit": "", "kprobe": "- -c -x -d -xd -U"},
        "int kretprobe__tcp_v4_connect(": {"fexit": "", "kprobe": "-x -xd"},
        "int kprobe__tcp_disconnect(": {"fexit": "", "kprobe": "-x -xd"},
        "int kprobe__skb_consume_udp(": {"fexit": "", "kprobe": "-d -xd"},
        "int trace_state(": {"fexit": "-x -xd", "kprobe": "-x -xd"},
        "int trace_state_in_softirq(": {"fexit": "-x -xd", "kprobe": "-x -xd"},
    },
    "tcpaccept": {
        "BPF_HASH(flows,": {"fexit": "-c", "kprobe": "-c"},
        "fill(struct": {"fexit": "- -q -x -U", "kprobe": "- -q -x -U"},
        "event->qlen = ": {"fexit": "-q -x", "kprobe": "-q -x"},
        "TRACE(tcp_conn_request,": {"fexit": "-x", "kprobe": "-x"},
        "TRACE(tcp_v6_syn_recv_sock,": {"fexit": "-x", "kprobe": "-x"},
        "int kprobe__##function(": {"fexit": "", "kprobe": "-x"},
        "event->uid = ": {"fexit": "-U", "kprobe": "-U"},
        "KRETFUNC_PROBE(inet_csk_accept,": {"fexit": "- -c -q -U", "kprobe": ""},
        "KFUNC_PROBE(security_sock_graft,": {"fexit": "- -c -q -U", "kprobe": ""},
        "int kprobe__security_sock_graft(": {"fexit": "", "kprobe": "- -c -q -U"},
        "int kprobe__inet_csk_accept(": {"fexit": "", "kprobe": "-q"},
        'BPF_TABLE("lru_hash", u64, u64, listening,': {"fexit": "", "kprobe": "-q"},
    },
}
PARTS_OPTIONS = {"tcpconnect": "- -c -x -d -xd -U", "tcpaccept": "- -c -q -x -U"}


@pytest.mark.parametrize("method", ["fexit", "kprobe"])
def test_parts_of_the_program(name, tool, method):
    """Each option compiles its own code only; - means none."""
    texts = {
        option: tool.c_program(parse(tool, *[option] * (option != "-")), method, None)
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
    """But for the layout, which the kernel's headers have."""
    args = parse(tool)
    text = tool.c_program(args, "headers", None)
    assert text == tool.c_program(args, "kprobe", None)
    assert text.startswith(tool.KERNEL_HEADERS)


def filters(tool, *options):
    """The C expressions of TASK_FILTER and FLOW_FILTER that are not just true."""
    macros = tool.filter_macros(parse(tool, *options))
    names = ("TASK_FILTER", "FLOW_FILTER")
    return [macros[name] for name in names if macros[name] != "true"]


PID = "u32 x = bpf_get_current_pid_tgid() >> 32"
UID = "u32 x = bpf_get_current_uid_gid()"


@pytest.mark.parametrize(
    ("options", "expressions"),
    [
        ("", []),
        ("-p 1,2", [f"({{ {PID}; (x == 1u || x == 2u) && !(0); }})"]),
        ("-u 0", [f"({{ {UID}; (x == 0u) && !(0); }})"]),
        ("-n a -u 7", [f"({{ {UID}; (x == 7u) && !(0); }}) && has_name()"]),
        ("-n !a -p !1", [f"({{ {PID}; (1) && !(x == 1u); }}) && !has_name()"]),
        ("-4", ["ip == 4"]),
        ("-P 5-9,!7", ["({ u32 x = port; (x - 5u <= 4u) && !(x == 7u); })"]),
        ("-6 -P 80", ["ip == 6 && ({ u32 x = port; (x == 80u) && !(0); })"]),
    ],
)
def test_filters(shared, options, expressions):
    assert filters(shared, *options.split()) == expressions


def test_maps_to_filter_by(shared, tmp_path):
    """They are there where options ask for them."""
    (tmp_path / 'a"b').write_text("")
    path = str(tmp_path / 'a"b')
    args = parse(shared, "--mntnsmap", path, "--cgroupmap", path)
    args.cgroup = ["/a", "/b", "/c"]
    text = shared.c_program(args, "kprobe", None)
    assert "#define CGROUPS 3\n" in text
    assert f'#define CGROUPMAP "{args.cgroupmap}"\n' in text
    assert f'#define MNTNSMAP "{args.mntnsmap}"\n' in text
    expression = "is_in_cgroups() && is_in_cgroupmap() && is_in_mntnsmap()"
    assert f"#define TASK_FILTER {expression}\n" in text
    maps = (
        "BPF_CGROUP_ARRAY(cgroups, CGROUPS);",
        'BPF_TABLE_PINNED("hash", u64, u64, cgroupmap, 1024, CGROUPMAP);',
        'BPF_TABLE_PINNED("hash", u64, u32, mntnsmap, 1024, MNTNSMAP);',
    )
    bare = shared.c_program(parse(shared), "kprobe", None)
    assert [line for line in maps if line in text] == [*maps]
    assert [line for line in maps if line in bare] == []
    assert str(tmp_path) not in text
