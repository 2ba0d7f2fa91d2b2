"""The service map and the other queries of examples/fleet, on events of which it is
known what they add up to.
"""

import datetime
import pathlib
import random
import re

import pytest

from .events import (
    BEGIN,
    DB2,
    EXTERNAL,
    HOUR,
    SECOND,
    TABLES,
    WEB1,
    Cases,
    accept,
    connect,
    connected,
    counted,
    edge,
    edges_of,
    failed,
    load,
    lost,
    moment,
    pair,
    servicemap,
    timestamp,
)

TOOL = load(pathlib.Path(__file__).parents[2] / "tcpconnect")

DOCKER = "172.17.0.2"
CLIENT_ONLY = edge(server=f"? {DB2}")
SERVER_ONLY = edge(client=f"? {WEB1}")

CASES = Cases()


@CASES()
def connect_and_accept_are_one_edge():
    ask = yield [
        connect(0),
        accept(250),
        connect(10, sport=40001),
        accept(9_999_999, sport=40001),
    ]
    assert ask() == [
        {
            "client_host": "web1",
            "client_unit": "",
            "client_comm": "curl",
            "client_address": "",
            "server_host": "db2",
            "server_unit": "",
            "server_comm": "nginx",
            "server_address": "",
            "port": 80,
            "known": "both",
            "connections": 2,
            "failures": 0,
            "latency_us_p50": None,
            "latency_us_p99": None,
            "first_seen": "2026-11-24T10:00:00.000000Z",
            "last_seen": "2026-11-24T10:00:00.000010Z",
        }
    ]


IPV4, MAPPED = (WEB1, DB2), (f"::ffff:{WEB1}", f"::ffff:{DB2}")
IPV6 = "2001:db8::1", "2001:db8::2"


@CASES("IPv6", "mapped client", "mapped server")
def the_same_addresses(case):
    """IPv6, and IPv4 through an IPv6 socket, at either end."""
    client, server = {
        "IPv6": (IPV6, IPV6),
        "mapped client": (MAPPED, IPV4),
        "mapped server": (IPV4, MAPPED),
    }[case]
    ask = yield [
        connect(0, saddr=client[0], daddr=client[1]),
        accept(9, saddr=server[0], daddr=server[1]),
    ]
    assert edges_of(ask()) == {edge(): 1}


@CASES()
def no_accept():
    ask = yield [connect(0)]
    assert edges_of(ask()) == {CLIENT_ONLY: 1}


@CASES()
def no_connect():
    ask = yield [accept(0)]
    assert edges_of(ask()) == {SERVER_ONLY: 1}


SSH = [
    connect(0, "ssh", "db2", saddr=DB2, daddr=WEB1, dport=22),
    accept(9, "sshd", "web1", saddr=DB2, daddr=WEB1, dport=22),
]


@CASES()
def a_server_that_is_not_known_has_its_hosts_name_where_the_fleet_has_its_address():
    ask = yield [*SSH, connect(0)]
    expected = edge(server=f"db2 ? {DB2}")
    assert edges_of(ask()) == {edge("db2 ssh", "web1 sshd", 22): 1, expected: 1}


@CASES()
def a_client_that_is_not_known_has_its_hosts_name_where_the_fleet_has_its_address():
    ask = yield [*SSH, accept(0)]
    expected = edge(client=f"web1 ? {WEB1}")
    assert edges_of(ask()) == {edge("db2 ssh", "web1 sshd", 22): 1, expected: 1}


def in_hour(hour, host, saddr):
    """A matched connection of this host, which then had this address."""
    sport = 50000 + 1000 * hour + ord(host[-1])
    return [
        connect(hour * HOUR, "cron", host, saddr=saddr, sport=sport, dport=25),
        accept(hour * HOUR + 1, "mail", "mx", saddr=saddr, sport=sport, dport=25),
    ]


def server_hosts(rows):
    """{(client host, server address): server host}, of ends that are not known."""
    return {
        (row["client_host"], row["server_address"]): row["server_host"]
        for row in rows
        if row["server_address"]
    }


# An event for the query, whose server is not known.
UNMATCHED = {"servicemap": connect, "failures": failed}


@CASES(*UNMATCHED)
def an_address_of_several_hosts_is_the_observers_or_nobodys(query):
    make = UNMATCHED[query]
    ask = yield [
        *in_hour(0, "docker1", DOCKER),
        *in_hour(0, "docker2", DOCKER),
        *(make(9, host=host, daddr=DOCKER) for host in ("web1", "docker1", "docker2")),
    ]
    assert server_hosts(ask(query)) == {
        ("web1", DOCKER): "",
        ("docker1", DOCKER): "docker1",
        ("docker2", DOCKER): "docker2",
    }


@CASES(*UNMATCHED)
def an_address_that_moved_is_its_hosts_of_that_hour(query):
    make = UNMATCHED[query]
    events = [*in_hour(0, "old", DOCKER), *in_hour(2, "new", DOCKER)]
    events += [
        make(hour * HOUR + 9, host=f"at{hour}", daddr=DOCKER, sport=41000)
        for hour in range(4)
    ]
    ask = yield events
    assert server_hosts(ask(query)) == {
        ("at0", DOCKER): "old",
        ("at1", DOCKER): "",
        ("at2", DOCKER): "new",
        ("at3", DOCKER): "",
    }
    assert ask("unknown") == []  # it is of the fleet


@CASES()
def an_edge_of_several_hours_is_one_row():
    events = [*in_hour(0, "db", DOCKER), *in_hour(1, "db", DOCKER)]
    events += [
        connect(hour * HOUR + at, daddr=DOCKER, sport=41000 + at)
        for hour in range(2)
        for at in range(3)
    ]
    ask = yield events
    [row] = [row for row in ask() if row["client_host"] == "web1"]
    assert (row["server_host"], row["server_address"]) == ("db", DOCKER)
    assert row["connections"] == 6
    assert row["first_seen"] == "2026-11-24T10:00:00.000000Z"
    assert row["last_seen"] == "2026-11-24T11:00:00.000002Z"


@CASES()
def a_connect_that_failed_is_no_edge():
    no_address = {"saddr": "0.0.0.0", "sport": 0, "daddr": EXTERNAL, "dport": 443}
    ask = yield [
        connect(0),
        failed(800),
        failed(800),
        connect(2 * SECOND),
        accept(2 * SECOND + 100),
        failed(9, error="ENETUNREACH", **no_address),
    ]
    assert edges_of(ask()) == {edge(): 1}
    rows = ask("failures")
    assert [tuple(row.values())[2:8] for row in rows] == [
        ("curl", "db2", DB2, 80, "ECONNREFUSED", 1),
        ("curl", "", EXTERNAL, 443, "ENETUNREACH", 1),
    ]
    assert rows[0]["first_seen"] == rows[0]["last_seen"]
    assert rows[0]["last_seen"] == "2026-11-24T10:00:00.000800Z"


@CASES()
def the_threads_of_a_process_are_one_node():
    """Where the lines tell the process: those of before 2026-11-28 do not."""
    events = [connect(0), accept(9)]
    for port in range(3):
        flow = {"sport": 41000 + port}
        events.append(connect(port, f"Thread-{port}", process="java", **flow))
        events.append(accept(port + 9, f"io-{port}", process="nginx", **flow))
        more = {"error": "closed", "process": "java", "dport": 81}
        events.append(failed(port, f"Thread-{port}", **more))
    ask = yield events
    assert edges_of(ask()) == {edge(): 1, edge(client="web1 java"): 3}
    rows = ask("failures")
    assert [(row["client_comm"], row["failures"]) for row in rows] == [("java", 3)]


@CASES()
def a_connect_that_was_given_up():
    ask = yield [failed(9, error="closed", latency_us=SECOND)]
    assert ask() == []
    [row] = ask("failures")
    assert (row["error"], row["failures"]) == ("closed", 1)


LOOPBACK = ("127.0.0.1", "127.5.5.5", "::1")


@CASES(*LOOPBACK)
def every_host_and_namespace_has_a_loopback_of_its_own(address):
    here = {"saddr": address, "daddr": address}
    events = [
        one
        for host, netns in (("web1", 1), ("db2", 1), ("db2", 2))
        for one in (
            {**connect(0, f"curl{netns}", host, **here), "netns": netns, "pid": netns},
            {**accept(1, f"nginx{netns}", host, **here), "netns": netns, "pid": netns},
        )
    ]
    random.Random(6).shuffle(events)
    ask = yield events
    assert edges_of(ask()) == {
        edge("web1 curl1", "web1 nginx1"): 1,
        edge("db2 curl1", "db2 nginx1"): 1,
        edge("db2 curl2", "db2 nginx2"): 1,
    }


@CASES(*LOOPBACK)
def the_other_end_on_loopback_is_the_observers(address):
    ask = yield [connect(0, saddr=address, daddr=address)]
    assert edges_of(ask()) == {edge(server=f"web1 ? {address}"): 1}
    assert ask("unknown") == []


@CASES(*LOOPBACK)
def a_failure_on_loopback_is_the_observers(address):
    here = {"saddr": address, "daddr": address}
    ask = yield [
        failed(0, **here),
        connect(9, host="db2", **here),  # has the newest row
        accept(10, host="db2", **here),
    ]
    [row] = ask("failures")
    assert (row["client_host"], row["server_host"]) == ("web1", "web1")
    assert row["server_address"] == address


@CASES()
def unknown():
    ask = yield [
        *(connect(0), accept(1)),
        *(connect(n, sport=40007 + n, daddr=EXTERNAL, dport=443) for n in range(3)),
        *(accept(n, sport=50000 + n, saddr=EXTERNAL) for n in range(5)),
        connect(7, sport=40003, dport=81),  # db2 has not reported it
    ]
    assert [tuple(row.values())[:7] for row in ask("unknown")] == [
        ("accept", "db2", "", "nginx", EXTERNAL, 80, 5),
        ("connect", "web1", "", "curl", EXTERNAL, 443, 3),
    ]
    assert edges_of(ask()) == {
        edge(): 1,
        edge(server=f"? {EXTERNAL}", port=443): 3,
        edge(client=f"? {EXTERNAL}"): 5,
        edge(server=f"db2 ? {DB2}", port=81): 1,
    }


@CASES()
def lost_events():
    ask = yield [connect(0), lost("web1", 13), lost("web1", 13), lost("db2", 17)]
    rows = ask("lost")
    assert [(row["host"], row["events"]) for row in rows] == [("db2", 17), ("web1", 13)]


@CASES()
def a_host_without_a_clock():
    begin = -(BEGIN - datetime.datetime(1970, 1, 1)) // datetime.timedelta(
        microseconds=1
    )
    ask = yield [connect(begin + 5), accept(begin + 6)]
    assert edges_of(ask()) == {edge(): 1}


# ---- the time that is asked about

START, MIDDLE, END = HOUR // 4, HOUR // 4 + 3 * HOUR, HOUR // 4 + 6 * HOUR
EARLIER = moment(START), moment(MIDDLE)
LATER = moment(MIDDLE), moment(END)


@CASES()
def the_time_is_exact():
    """It begins with `since`, and ends before `until`."""
    times = list(enumerate([START - 1, START, HOUR, MIDDLE - 1, MIDDLE]))
    events = [connect(at, sport=41000 + n) for n, at in times]
    events += [failed(at, dport=81, sport=42000 + n) for n, at in times]
    events += [{**lost("web1", 1, at), "tid": n} for n, at in times]
    ask = yield events
    for query, count in (
        ("servicemap", "connections"),
        ("failures", "failures"),
        ("unknown", "connections"),
        ("lost", "events"),
    ):
        [row] = ask(query, *EARLIER)
        first, last = timestamp(START), timestamp(MIDDLE - 1)
        assert (row[count], row["first_seen"], row["last_seen"]) == (3, first, last)


def test_a_query_about_some_hours_reads_few_others(database):
    """Of the events, and of the sets."""
    database.load(
        [
            connect(n * HOUR, sport=40000 + m, saddr=f"10.1.{m >> 8}.{m & 255}")
            for n in range(16)
            for m in range(9000)
        ]
    )
    for table in TABLES:
        database.session.query(f"OPTIMIZE TABLE tcp_{table} FINAL")
    hour = "2026-11-24 15:00:00", "2026-11-24 15:30:00"
    [row] = database.ask("servicemap", *hour)
    assert row["connections"] == 9000
    sql = servicemap.sql_file("servicemap")
    plan = database.session.query(f"EXPLAIN indexes = 1 {sql}", "TSVRaw")
    granules = re.findall(r"Parts: .* Granules: (\d+)", plan.bytes().decode())
    assert len(granules) > 5
    assert max(map(int, granules)) < 16 / 2


# ---- listeners


@CASES()
def a_listener_that_is_another_process_within_the_hour():
    """A deployment: the first accept after a connect tells which. Ports of FTP's data
    are used by one process after the other, even more often.
    """
    flow = [("old", 0), ("old", 1), ("new", 2), ("new", 3), ("old", 4)]
    ask = yield [
        one
        for name, n in flow
        for one in pair(n * 60 * SECOND, f"c{n}", name, sport=40000 + n)
    ]
    assert edges_of(ask()) == {edge(f"web1 c{n}", f"db2 {name}"): 1 for name, n in flow}


@CASES()
def a_listener_that_moved_to_another_host_within_the_hour():
    """And a connect whose accept is lost."""
    ask = yield [
        *pair(0, "before", sport=1),
        connect(5 * SECOND, "lost", sport=2),
        *pair(9 * SECOND, "last", sport=3),
        connect(60 * SECOND, "after", sport=4),
        accept(60 * SECOND + 9, "nginx", "db3", sport=4),
        connect(90 * SECOND, "late", sport=5),
    ]
    assert edges_of(ask()) == {
        edge("web1 before"): 1,
        edge("web1 lost"): 1,
        edge("web1 last"): 1,
        edge("web1 after", "db3 nginx"): 1,
        edge("web1 late", "db3 nginx"): 1,
    }


@CASES()
def a_listener_of_the_hour_before_or_after_is_one_of_this_hour():
    ask = yield [
        *(connect(hour * HOUR, sport=hour) for hour in (0, 1, 3)),
        accept(2 * HOUR + 5, sport=1),
    ]
    rows = ask()
    assert edges_of(rows)[edge()] == 2  # of hours 1 and 3; hour 2 has the accept
    assert edges_of(rows)[CLIENT_ONLY] == 1


@CASES()
def an_address_that_two_hosts_have_is_the_clients_own():
    """Docker's: on either, a client and a server in containers."""
    flow = {"saddr": "172.17.0.3", "daddr": DOCKER}
    ask = yield [
        one
        for n, host in enumerate(("docker1", "docker2"))
        for at in (0, 5 * SECOND)
        for one in (
            connect(at + n, "web", host, sport=at + n + 1 & 65535, **flow),
            accept(at + n + 9, f"db{n}", host, sport=at + n + 1 & 65535, **flow),
        )
    ]
    assert edges_of(ask()) == {
        edge(f"docker{n + 1} web", f"docker{n + 1} db{n}"): 2 for n in range(2)
    }


@CASES()
def an_address_that_two_other_hosts_have_is_nobodys():
    """Pods of two clusters: at the same time, from the same address."""
    pod = {"saddr": "10.244.1.5", "daddr": "10.244.2.7"}
    ask = yield [
        one
        for n in range(3)
        for cluster in "ab"
        for one in (
            connect(n * SECOND, "web", f"{cluster}1", sport=n + 1, **pod),
            accept(n * SECOND + 9, "db", f"{cluster}2", sport=n + 1, **pod),
        )
    ]
    assert edges_of(ask()) == {
        edge(f"{cluster}1 web", "? 10.244.2.7"): 3 for cluster in "ab"
    }
    assert ask("unknown") == []


@CASES()
def pods_of_two_clusters_are_told_by_the_clients_address():
    ask = yield [
        one
        for n in range(3)
        for cluster in (1, 2)
        for one in (
            connect(
                *(n * SECOND, "web", f"{cluster}a"),
                saddr=f"10.244.9.{cluster}",
                daddr="10.244.9.7",
                sport=n + 1,
            ),
            accept(
                *(n * SECOND + 9, "db", f"{cluster}b"),
                saddr=f"10.244.9.{cluster}",
                daddr="10.244.9.7",
                sport=n + 1,
            ),
        )
    ]
    assert edges_of(ask()) == {edge(f"{n}a web", f"{n}b db"): 3 for n in (1, 2)}


@CASES()
def two_pods_of_a_host_that_connect_to_themselves():
    """A service mesh: each pod has a proxy on the same port of its loopback."""
    here = {"saddr": "127.0.0.1", "daddr": "127.0.0.1", "dport": 15001}
    ask = yield [
        {**one, "netns": netns}
        for n, netns in enumerate((101, 102))
        for one in (
            connect(0, f"app{n}", sport=1, **here),
            accept(9, f"envoy{n}", "web1", sport=1, **here),
        )
    ]
    assert edges_of(ask()) == {
        edge(f"web1 app{n}", f"web1 envoy{n}", 15001): 1 for n in range(2)
    }


@CASES(-5, 5)
def a_clock_that_is_off(seconds):
    """Nothing is missing and nothing is wrong, also across the end of an hour."""
    times = [*range(0, HOUR, HOUR // 7), HOUR - 2 * SECOND]
    events = []
    for n, at in enumerate(times):
        late = at + 300 + seconds * SECOND
        events += [connect(at, sport=n + 1), accept(late, sport=n + 1)]
    ask = yield events
    assert edges_of(ask()) == {edge(): len(times)}


@CASES()
def accepts_that_are_late_duplicated_or_lost():
    """No edge depends on any single accept."""
    events = [
        one
        for n in range(13)
        for one in pair(n * SECOND, sport=n + 1)
        if n % 5 or one["event"] == "connect"
    ]
    random.Random(6).shuffle(events)
    ask = yield events * 2
    assert edges_of(ask()) == {edge(): 13}


@CASES()
def an_accept_whose_client_is_known_from_others_is_no_edge():
    """Its own connect is lost."""
    ask = yield [*pair(0), accept(SECOND, sport=2), accept(SECOND, sport=3, dport=81)]
    assert edges_of(ask()) == {edge(): 1, edge(client=f"web1 ? {WEB1}", port=81): 1}


# ---- address translation


@CASES()
def masquerading_from_a_pod_to_another_node():
    """The source port changes, too: the node made a connect there."""
    ask = yield [
        connect(0, "app", saddr="10.244.1.5", sport=1),
        *pair(5, "ssh", "sshd", sport=9, dport=22),
        accept(9, saddr=WEB1, sport=1024),
    ]
    assert edges_of(ask()) == {
        edge("web1 app"): 1,
        edge("web1 ssh", "db2 sshd", 22): 1,
    }
    assert ask("unknown") == []


@CASES(300, -9 * SECOND, 9 * SECOND)
def masquerading_by_a_gateway_that_keeps_the_port(late):
    """It is not traced. An external client has another port."""
    ask = yield [
        connect(0, saddr=DOCKER, sport=7),
        accept(late, saddr=EXTERNAL, sport=7),
        accept(late, saddr=EXTERNAL, sport=8),
    ]
    assert edges_of(ask()) == {edge(): 1, edge(client=f"? {EXTERNAL}"): 1}


@CASES()
def a_gateway_that_changes_the_port_counts_twice():
    ask = yield [connect(0, saddr=DOCKER, sport=7), accept(9, saddr=EXTERNAL, sport=8)]
    assert edges_of(ask()) == {edge(): 1, edge(client=f"? {EXTERNAL}"): 1}


@CASES()
def a_client_whose_address_was_seen_is_not_masqueraded():
    """An external client has the port of a connect whose accept is lost."""
    ask = yield [
        *pair(0, sport=1),
        connect(5 * SECOND, sport=2),
        accept(5 * SECOND + 9, saddr=EXTERNAL, sport=2),
    ]
    assert edges_of(ask()) == {edge(): 2, edge(client=f"? {EXTERNAL}"): 1}


SERVICE = {"daddr": "10.96.0.1", "dport": 443}
BACKENDS = {"daddr": DOCKER, "dport": 8443}, {"daddr": "172.17.0.3", "dport": 8443}


@CASES(300, -9 * SECOND, 9 * SECOND)
def a_service_address(late):
    """With two backends. One accept is lost."""
    ask = yield [
        *(connected(n * 60 * SECOND, sport=n + 1, **SERVICE) for n in range(5)),
        *(
            accept(
                *(n * 60 * SECOND + late, f"pod{n % 2}", f"node{n % 2}"),
                sport=n + 1,
                **BACKENDS[n % 2],
            )
            for n in range(4)
        ),
    ]
    rows = ask()
    assert edges_of(rows) == {
        edge("web1 curl", "node0 pod0", 443): 2,
        edge("web1 curl", "node1 pod1", 443): 2,
        edge("web1 curl", "? 10.96.0.1", 443): 1,
    }
    assert [row["latency_us_p50"] for row in rows] == [90, 90, 90]


@CASES()
def a_service_address_of_a_backend_that_the_client_also_connects_to():
    ask = yield [
        connect(0, "app", sport=1, **SERVICE),
        accept(9, sport=1),
        *pair(SECOND, "curl", sport=2),
        connect(2 * SECOND, "far", sport=2, daddr=EXTERNAL),
    ]
    assert edges_of(ask()) == {
        edge("web1 app", port=443): 1,
        edge(): 1,
        edge("web1 far", f"? {EXTERNAL}"): 1,
    }


@CASES()
def the_nearest_is_the_other_end():
    """A client uses a port again within seconds."""
    ask = yield [
        one
        for n in range(4)
        for one in (
            connect(n * SECOND, f"c{n}", sport=7, **SERVICE),
            accept(n * SECOND + 300, f"s{n}", sport=7, **BACKENDS[0]),
        )
    ]
    assert edges_of(ask()) == {
        edge(f"web1 c{n}", f"db2 s{n}", 443): 1 for n in range(4)
    }


UNRELATED = {
    "another port": {"sport": 40001},
    "both addresses": {"saddr": "198.51.100.8", "daddr": DOCKER},
    "too late": {"at": 11 * SECOND},
}


@CASES(*UNRELATED)
def ends_that_do_not_match(changed):
    more = {"daddr": DOCKER, "at": 9, **UNRELATED[changed]}
    ask = yield [connect(0, **SERVICE), accept(more.pop("at"), **more)]
    assert sorted(row["known"] for row in ask()) == ["client", "server"]


@CASES()
def a_transparent_proxy_has_not_the_addresses_that_it_accepts_for():
    """It has its client's address as source, too. What goes past it is external."""
    far = "93.184.216.34"
    flow = {"saddr": WEB1, "daddr": far}
    ask = yield [
        connect(0, "curl", sport=1, **flow),
        accept(9, "squid", "gw", sport=1, **flow),
        connect(20, "squid", "gw", sport=2, **flow),
        connect(30, "backup", sport=3, dport=443, **flow),
        *pair(40, "ssh", "sshd", sport=4, dport=22),
    ]
    found = edges_of(ask())
    assert found[edge("web1 curl", "gw squid")] == 1
    assert found[edge("web1 backup", f"? {far}", 443)] == 1
    assert [(row["comm"], row["address"]) for row in ask("unknown")] == [
        ("backup", far)
    ]


# ---- units and containers

CONTAINERS = ["a1" * 32, "b2" * 32]


def tools_unit(path):
    """What --unit shows; nothing for what is made for one login or one run."""
    name = TOOL.unit_name(path) if path else ""
    return "" if name == "-" or re.match(r"(session|run)-[^/]*$", name) else name


PATHS = [
    *("", "/", "/init.scope", "/system.slice", "/mygroup", "/mygroup/sub"),
    "/system.slice/nginx.service",
    "/system.slice/system-getty.slice/getty@tty1.service",
    "/system.slice/x.service/inner/y.service",
    "/user.slice/user-0.slice/session-3.scope",
    "/user.slice/user-1000.slice/user@1000.service/app.slice/x.service",
    *("/system.slice/run-u3.service", "/system.slice/run-rd1.scope"),
    *("/lxc.payload.web/system.slice/x.service", "/lxc/web/a", "/lxc.payload/web"),
    "/a/machine.slice/b.service",
    "/machine.slice/machine-web.scope/payload/x.service",
    *(
        path.replace("ID", CONTAINERS[0])
        for path in (
            *("/docker/ID", "/docker/ID/system.slice/nginx.service", "/x/libpod-ID"),
            *("/system.slice/docker-ID.scope", "/system.slice/docker-ID.scope/a.scope"),
            "/machine.slice/libpod-ID.scope/container",
            "/libpod_parent/libpod-payload-ID",
            "/kubepods/burstable/pod1/ID",
            "/kubepods.slice/kubepods-burstable.slice/cri-containerd-ID.scope",
            "/kubepods.slice/kubepods-pod1.slice/crio-ID.scope",
        )
    ),
]


def test_a_unit_is_what_the_tools_call_it(database):
    database.load(
        [connect(n, sport=n + 1, cgroup_path=path) for n, path in enumerate(PATHS)]
    )
    found = servicemap.ask(
        database.session, "SELECT DISTINCT cgroup_path, unit FROM tcp_events"
    )
    assert {row["cgroup_path"]: row["unit"] for row in found} == {
        path: tools_unit(path) for path in PATHS
    }


def units_of(rows):
    """{(client's unit, its process, server's unit, its process): connections}"""
    names = ("client_unit", "client_comm", "server_unit", "server_comm")
    return {tuple(row[name] for name in names): row["connections"] for row in rows}


@CASES()
def two_containers_of_one_program_are_two_nodes():
    paths = [f"/system.slice/docker-{one}.scope" for one in CONTAINERS]
    ask = yield [
        one
        for n, path in enumerate(paths)
        for one in (
            connect(n, "java", sport=n + 1, cgroup_path=path),
            accept(n + 9, sport=n + 1, cgroup_path="/system.slice/nginx.service"),
        )
    ]
    assert units_of(ask()) == {
        (f"docker-{one[:12]}", "java", "nginx.service", "nginx"): 1
        for one in CONTAINERS
    }


@CASES()
def a_unit_is_one_node_and_a_login_is_its_processes():
    unit = {"cgroup_path": "/system.slice/app.service"}
    login = {"cgroup_path": "/user.slice/user-0.slice/session-3.scope"}
    ask = yield [
        *pair(0, "sh", sport=1, **unit),
        *(one for n in range(3) for one in pair(n, "ruby", sport=n + 2, **unit)),
        *pair(0, "ssh", sport=8, dport=81, **login),
        *pair(0, "curl", sport=9, dport=81, **login),
    ]
    found = units_of(ask())
    assert found["app.service", "ruby", "app.service", "nginx"] == 4
    assert found["", "ssh", "", "nginx"] == found["", "curl", "", "nginx"] == 1
    assert len(found) == 3


# ---- how well it goes


@CASES()
def failures_and_latency_of_an_edge():
    """In steps of powers of two: the middle of that which the quantile is in."""
    times = [100] * 97 + [3000] * 2 + [90_000]
    ask = yield [
        accept(5),
        *(connected(n, sport=n + 1, latency_us=us) for n, us in enumerate(times)),
        *(failed(n, sport=n + 200, latency_us=9) for n in range(7)),
        *(failed(n, sport=n + 300, dport=81, latency_us=9) for n in range(5)),
    ]
    [row] = ask()  # where nobody listens there is no edge
    assert (row["connections"], row["failures"]) == (100, 7)
    assert 64 < row["latency_us_p50"] < 128
    assert 2048 < row["latency_us_p99"] < 4096


@CASES()
def a_server_that_is_down():
    """It accepted an hour ago: the edge is there, with failures only."""
    ask = yield [
        *pair(0),
        *(failed(HOUR + n, "wget", sport=n + 1, latency_us=9) for n in range(7)),
    ]
    found = {row["client_comm"]: (row["connections"], row["failures"]) for row in ask()}
    assert found == {"curl": (1, 0), "wget": (0, 7)}


# ---- counts


@CASES()
def counts_beside_events():
    """A host that sends counts, one that sends events, and an external one."""
    nginx = {"cgroup_path": "/system.slice/nginx.service"}
    ask = yield [
        counted("connects", 0, 7, "web1", "curl"),
        counted("connects", 0, 5, "web1", "curl", cgroup=7, **nginx),
        counted("connects", 60 * SECOND, 11, "web1", "curl"),
        counted("accepts", 0, 23, "db2", "nginx"),
        counted("accepts", 0, 13, "db2", "nginx", saddr=EXTERNAL),
        connect(5, "wget", "app3", saddr="10.0.0.3"),
        counted("connects", 0, 3, "web1", "curl", daddr="10.0.0.3"),
        accept(5, "redis", "app3", daddr="10.0.0.3"),
    ]
    rows = ask()
    assert edges_of([row for row in rows if not row["client_unit"]]) == {
        edge(): 18,
        edge(client=f"? {EXTERNAL}"): 13,
        edge("app3 wget"): 1,
        edge(server="app3 redis"): 3,
    }
    assert units_of(rows)["nginx.service", "curl", "", "nginx"] == 5


@CASES("connected", "connect", "connects")
def the_same_edge_from_each_kind_of_row(kind):
    rows = {
        "connected": [connected(n, sport=n + 1) for n in range(3)],
        "connect": [
            *(connect(n, sport=n + 1) for n in range(4)),
            failed(99, sport=4, latency_us=96),
        ],
        "connects": [counted("connects", 0, 3, "web1", "curl")],
    }[kind]
    ask = yield [*rows, accept(9)]
    assert edges_of(ask()) == {edge(): 3}


@pytest.mark.parametrize("name", CASES.tests)
def test_case(name, database):
    CASES.check(name, database)
