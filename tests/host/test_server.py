"""examples/fleet on a cluster of three ClickHouse servers, for users who have the
rights that the README names.
"""

import datetime
import json
import random

import clickhouse
import pytest
from test_fleet import (
    BEGIN,
    EXTERNAL,
    FLEET,
    HOUR,
    accept,
    connect,
    database,
    event,
    lost,
    servicemap,
    text,
)

QUERIES = ("servicemap", "failures", "unknown", "lost")
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
    top = tmp_path_factory.mktemp("cluster")
    with clickhouse.servers(clickhouse_library, top, 3) as servers:
        yield servers


@pytest.fixture
def cluster(running):
    """Three servers, set up as the README says. Without ON CLUSTER, which the library
    does not have, each gets what it would send to all.
    """
    distributed = (FLEET / "cluster.sql").read_text()
    for server in running:
        for name in ("fleet", "fleet_local"):
            server.query(f"DROP DATABASE IF EXISTS {name} SYNC")
        server.query("CREATE DATABASE fleet_local")
        server.run((FLEET / "schema.sql").read_text(), database="fleet_local")
    for server in running:
        server.run(distributed.replace(" ON CLUSTER '{cluster}'", ""))
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
    last three hours. Some are missing, or failed, or on loopback.
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
        if client and choose.random() < 0.1:
            error = choose.choice(("ECONNREFUSED", "ETIMEDOUT"))
            yield event("connect_failed", at, f"h{client}", comm, error=error, **flow)
            continue
        if client and choose.random() < 0.9:
            yield connect(at, comm, f"h{client}", **flow)
        if server and choose.random() < 0.9:
            yield accept(at + choose.randrange(500_000), "httpd", f"h{server}", **flow)
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


def answers(server, since, until):
    return {query: ask(server, query, since, until) for query in QUERIES}


def expected(events, since, until):
    """The same answers from chdb, without a server."""
    with database(*events) as session:
        session.query(f"SET param_since = '{since}', param_until = '{until}'")
        return {
            query: servicemap.ask(session, (FLEET / f"{query}.sql").read_text())
            for query in QUERIES
        }


def test_queries(cluster):
    """Rows come in through any server, are spread over all, and any is asked."""
    events = list(traffic(900))
    for n, server in enumerate(cluster):
        server.query(text(events[n::3]), **INSERT)
    for server in cluster:
        assert server.query("SELECT count() > 99 FROM fleet_local.tcp_events") == "1\n"
    whole = expected(events, *ALL)
    assert answers(cluster[0], *ALL) == whole
    for server in cluster[1:]:
        assert ask(server, "servicemap", *ALL) == whole["servicemap"]
    hour = begin_of_hour(2)[1], begin_of_hour(1)[1]
    part = expected(events, *hour)
    assert answers(cluster[0], *hour) == part
    assert all(part[query] and part[query] != whole[query] for query in QUERIES)


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
    assert answers(cluster[1], *ALL) == expected(events, *ALL)
