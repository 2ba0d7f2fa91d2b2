"""examples/fleet on a cluster of three ClickHouse servers, for users who have the
rights that the README names.
"""

import datetime
import json
import random
import re

import pytest

from . import clickhouse
from .events import (
    BEGIN,
    EXTERNAL,
    FLEET,
    HOUR,
    SECOND,
    TABLES,
    accept,
    connect,
    edge,
    edges_of,
    failed,
    lost,
    pair,
    text,
)

QUERIES = ("servicemap", "changes", "failures", "unknown", "lost")
ALL = ("2000-01-01 00:00:00", "2100-01-01 00:00:00")
INSERT = {
    "user": "tcptools",
    "password": "secret",
    "database": "fleet",
    "query": "INSERT INTO tcp_events FORMAT JSONEachRow",
    "date_time_input_format": "best_effort",
    "input_format_skip_unknown_fields": 1,
    "distributed_foreground_insert": 1,
}


@pytest.fixture(scope="module")
def running(clickhouse_library, tmp_path_factory):
    """Three servers, set up as the README says. Without ON CLUSTER, which the library
    does not have, each gets what it would send to all.
    """
    top = tmp_path_factory.mktemp("cluster")
    schema = (FLEET / "schema.sql").read_text()
    distributed = (FLEET / "cluster.sql").read_text()
    views = re.findall(
        r"^CREATE OR REPLACE VIEW .*?;$", schema, re.DOTALL | re.MULTILINE
    )
    with clickhouse.servers(clickhouse_library, top, 3) as servers:
        for server in servers:
            server.query("CREATE DATABASE fleet_local")
            server.run(schema, database="fleet_local")
        for server in servers:
            server.run(distributed.replace(" ON CLUSTER '{cluster}'", ""))
            server.run("".join(views), database="fleet")
        yield servers


@pytest.fixture
def cluster(running):
    """The servers, empty."""
    for server in running:
        server.query("DROP TABLE IF EXISTS fleet.tcp_edges_refresh SYNC")
    for table in TABLES:
        everywhere(running, f"TRUNCATE TABLE tcp_{table}")
    return running


def begin_of_hour(ago):
    """So many hours ago: in µs since BEGIN, and as the queries take it."""
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    hour = now.replace(minute=0, second=0, microsecond=0)
    hour -= datetime.timedelta(hours=ago)
    return (hour - BEGIN) // datetime.timedelta(microseconds=1), str(hour)


def address(host):
    return f"10.0.0.{host}" if host else EXTERNAL


def traffic(count, seed=7):
    """The events of so many connections between five hosts and an external one, in the
    last three hours. Some are missing, or failed, or on loopback. The clock of h3 is
    4 s ahead.
    """
    choose = random.Random(seed)
    begin, _ = begin_of_hour(3)
    for _ in range(count):
        at = begin + choose.randrange(3 * HOUR)
        client, server = choose.sample(range(6), 2)
        flow = {
            "saddr": address(client),
            "daddr": address(server),
            "sport": choose.randrange(32768, 32868),
            "dport": choose.choice((80, 443, 5432)),
        }
        if choose.random() < 0.1:
            server = client = client or server
            flow.update(saddr="127.0.0.1", daddr="127.0.0.1")
        comm = choose.choice(("curl", "nginx", "gunicorn"))
        offsets = {3: 4 * SECOND}
        at_server = at + choose.randrange(1, 5_000) + offsets.get(server, 0)
        at += offsets.get(client, 0)
        if client and choose.random() < 0.1:
            error = choose.choice(("ECONNREFUSED", "ETIMEDOUT"))
            yield failed(at, comm, f"h{client}", error, **flow)
            continue
        if client and choose.random() < 0.9:
            yield connect(at, comm, f"h{client}", **flow)
        if server and choose.random() < 0.9:
            yield accept(at_server, "httpd", f"h{server}", **flow)
    for hour in range(3):
        yield {**lost("h1", 13), "ts": connect(begin + hour * HOUR)["ts"]}


def ask(server, query, since, until):
    answer = server.query(
        (FLEET / f"{query}.sql").read_text(),
        user="reader",
        database="fleet",
        param_since=since,
        param_until=until,
        default_format="JSONEachRow",
        date_time_output_format="iso",
    )
    return [json.loads(line) for line in answer.splitlines()]


def ask_all(server, since, until):
    return {query: ask(server, query, since, until) for query in QUERIES}


def expected(database, events, since, until):
    """The same answers without a server."""
    database.load(events)
    return {query: database.ask(query, since, until) for query in QUERIES}


def test_queries(cluster, database):
    """Rows come in through any server, are spread over all, and any is asked. Each has
    enough of each hour to know that a clock is off.
    """
    events = list(traffic(3000))
    for n, server in enumerate(cluster):
        server.query(text(events[n::3]), **INSERT)
    rows = "SELECT count() FROM fleet_local.tcp_events"
    assert sorted(int(server.query(rows)) for server in cluster)[1] > 99
    whole = expected(database, events, *ALL)
    assert ask_all(cluster[0], *ALL) == whole
    for server in cluster[1:]:
        assert ask(server, "servicemap", *ALL) == whole["servicemap"]
    hour = begin_of_hour(2)[1], begin_of_hour(1)[1]
    part = expected(database, events, *hour)
    assert ask_all(cluster[0], *hour) == part
    assert all(part[query] and part[query] != whole[query] for query in QUERIES)


def connections(hour, comm, count, port=1):
    """So many in an hour; port: the first one's source port."""
    begin, _ = begin_of_hour(hour)
    return [
        one
        for n in range(count)
        for one in pair(begin + n * 60_000_000, comm, sport=port + n)
    ]


def store_hours(server):
    """Begin to, without waiting for half an hour first, and when refresh() says so."""
    sql = (FLEET / "edges.sql").read_text()
    for ours, other in (
        (" AND uptime() >= 1800", ""),
        ("EVERY 5 MINUTE", "EVERY 1 YEAR"),
    ):
        assert sql.count(ours) == 1
        sql = sql.replace(ours, other)
    server.run(sql, database="fleet")


def refresh(server, times):
    """Have the hours that are missing stored, as if time went by."""
    for _ in range(times):
        server.query("SYSTEM REFRESH VIEW fleet.tcp_edges_refresh")
        server.query("SYSTEM WAIT VIEW fleet.tcp_edges_refresh")


def stored(server):
    """[(hour, name of the client's process, connections)]; the last two are empty where
    an hour is said to be whole. What is there twice is here twice.
    """
    rows = server.query(
        "SELECT toString(hour), client_comm, toUInt32(connections) FROM tcp_edges "
        "ORDER BY ALL FORMAT JSONCompactEachRow",
        user="reader",
        database="fleet",
    )
    return [tuple(json.loads(line)) for line in rows.splitlines()]


def everywhere(cluster, statement):
    """What ON CLUSTER does."""
    for server in cluster:
        server.query(statement, database="fleet_local")


def test_hours_are_stored(cluster):
    """Each once and whole, by one server, whatever was stored before."""
    hours = [begin_of_hour(hour)[1] for hour in (9, 7, 5)]
    failure = failed(begin_of_hour(7)[0], error="EPERM")
    first, rest = connections(9, "first", 3), connections(5, "later", 7, port=20)
    rest += connections(0, "now", 11, port=30)
    cluster[0].query(text([*first, failure, *rest]), **INSERT)
    store_hours(cluster[1])
    refresh(cluster[1], 3)
    whole = [
        *((hours[0], "", 0), (hours[0], "first", 3)),
        (hours[1], "", 0),  # it has events, and no edges
        *((hours[2], "", 0), (hours[2], "later", 7)),
    ]
    assert stored(cluster[2]) == whole
    # What was late is stored with its hour, as the README says
    cluster[2].query(text(connections(5, "late", 2, port=50)), **INSERT)
    refresh(cluster[1], 1)
    assert stored(cluster[0]) == whole
    cluster[1].query("SYSTEM STOP VIEW fleet.tcp_edges_refresh")
    everywhere(cluster, f"DELETE FROM tcp_edges WHERE hour >= '{hours[1]}'")
    cluster[1].query("SYSTEM START VIEW fleet.tcp_edges_refresh")
    refresh(cluster[1], 2)
    whole.insert(-1, (hours[2], "late", 2))
    assert stored(cluster[0]) == whole
    # A server was killed in the middle
    everywhere(cluster, f"DELETE FROM tcp_edges WHERE hour = '{hours[2]}' AND known=''")
    refresh(cluster[1], 1)
    everywhere(cluster, "OPTIMIZE TABLE tcp_edges FINAL")
    assert stored(cluster[0]) == whole


def test_what_is_new(cluster, database):
    """With stored hours the answers are the same, and there are some when the events
    have expired.
    """
    events = connections(9, "first", 3) + connections(8, "second", 5, port=10)
    events += connections(1, "first", 7, port=20) + connections(1, "new", 11, port=30)
    cluster[0].query(text(events), **INSERT)
    store_hours(cluster[0])
    refresh(cluster[0], 2)
    assert len(stored(cluster[0])) == 4
    times = [(begin_of_hour(9)[1], ALL[1]), (begin_of_hour(8)[1], begin_of_hour(1)[1])]
    database.load(events)
    for time in times:
        assert ask(cluster[1], "changes", *time) == database.ask("changes", *time)
    everywhere(cluster, "TRUNCATE TABLE tcp_events")
    cluster[2].query(text(connections(0, "first", 2, port=50)), **INSERT)
    cluster[2].query(text(connections(0, "newest", 13, port=60)), **INSERT)
    found = edges_of(ask(cluster[1], "changes", begin_of_hour(8)[1], ALL[1]))
    assert found == {edge("web1 second"): 5, edge("web1 newest"): 13}


def test_rights(cluster):
    """Who inserts cannot read, and who reads cannot insert."""
    rows = text([connect(begin_of_hour(1)[0])])
    with pytest.raises(clickhouse.Refused, match="necessary to have the grant SELECT"):
        cluster[0].query("SELECT * FROM fleet.tcp_events", "tcptools", "secret")
    with pytest.raises(clickhouse.Refused, match="necessary to have the grant INSERT"):
        cluster[0].query(rows, **{**INSERT, "user": "reader", "password": ""})
    with pytest.raises(clickhouse.Refused, match="Authentication failed"):
        cluster[0].query(rows, **{**INSERT, "password": "wrong"})


@pytest.mark.parametrize("victim", [0, 2], ids=["that takes the insert", "other"])
def test_a_server_is_killed_in_the_middle_of_an_insert(cluster, victim):
    """What was acknowledged is there, and what is sent again is there once."""
    events = list(traffic(600))
    before, during, after = text(events[:300]), text(events[300:600]), events[600:]

    def body():
        yield during[: len(during) // 2]
        cluster[victim].kill()
        yield during[len(during) // 2 :]

    cluster[0].query(before, **INSERT)
    with pytest.raises((clickhouse.Refused, OSError)):
        cluster[0].query(body(), **INSERT)
    cluster[victim].start()
    cluster[victim].wait()
    for rows in (before, during, text(after)):
        cluster[0].query(rows, **INSERT)
    assert stored_events(cluster[1]) == sorted(map(identity, events))


def identity(row):
    """What tells an event from all others."""
    return row["ts"], row["event"], row["host"], row.get("sport", 0)


def stored_events(server):
    rows = server.query(
        "SELECT ts, event, host, sport FROM tcp_events FINAL FORMAT JSONEachRow",
        user="reader",
        database="fleet",
        date_time_output_format="iso",
    )
    found = (json.loads(line) for line in rows.splitlines())
    return sorted(map(identity, found))
