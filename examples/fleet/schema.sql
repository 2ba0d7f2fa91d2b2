-- schema.sql  The events of both tools, and the connections that they add up to.
--
-- For one ClickHouse server, for chdb, and for each server of a cluster; there,
-- cluster.sql puts them together.

-- A row is a line of tcpconnect --json, tcpconnect -x --json or tcpaccept --json,
-- inserted as it is (FORMAT JSONEachRow). The client's side comes first in all of them.
-- An IPv4 address is kept as the IPv6 address that it maps to (::ffff:192.0.2.7).
--
-- A shipper that tries again may insert a line twice. Rows with the same sorting key
-- are one: for queries by FINAL, on disk when ReplacingMergeTree merges them. The hour
-- comes first in the key, so that a query about some hours reads only these; then the
-- connection, so that its rows are neighbours and compress well.
CREATE TABLE IF NOT EXISTS tcp_events
(
    ts      DateTime64(6, 'UTC') CODEC(Delta, ZSTD),
    host    LowCardinality(String),
    event   LowCardinality(String),     -- connect, accept, connect_failed or lost
    pid     UInt32 CODEC(ZSTD),
    tid     UInt32 CODEC(ZSTD),
    uid     UInt32 CODEC(ZSTD),
    comm    LowCardinality(String),
    saddr   IPv6 CODEC(ZSTD),
    sport   UInt16 CODEC(ZSTD),
    daddr   IPv6 CODEC(ZSTD),
    dport   UInt16 CODEC(ZSTD),
    netns   UInt32 CODEC(ZSTD),
    cgroup  UInt64 CODEC(ZSTD),
    error   LowCardinality(String),     -- of connect_failed: the errno's name, or ''
    query   LowCardinality(String),     -- with -d: the name that was looked up
    count   UInt64 CODEC(ZSTD),         -- of lost: how many events
    reason  LowCardinality(String)      -- of lost: buffer_full, table_full or skipped
)
ENGINE = ReplacingMergeTree
PARTITION BY toDate(ts)
ORDER BY (
    toStartOfHour(ts), saddr, daddr, dport, sport, ts, event, host, pid, tid, reason
)
TTL toDateTime(ts) + INTERVAL 7 DAY
SETTINGS ttl_only_drop_parts = 1;

-- A row is a connection: a connect and the accept that belongs to it, or one of them,
-- where the other is missing.
--
-- They have the same two addresses and ports, but ports are used again, so the time
-- decides. Of the events with the same four (a flow), in order of time, a connect and
-- an accept that are neighbours may belong together: an accept comes up to 60 s after
-- its connect (so long may it wait in the accept queue), or up to 1 s before it (so
-- much may the clocks of two hosts differ). Neighbours that may belong together are a
-- run, and in a run they are paired two by two from its first on: connect and accept,
-- or accept and connect where a clock is behind. A connect that is followed by its
-- failure (tcpconnect -x) is no connection.
--
-- Each network namespace of each host has a loopback of its own: there, both ends are
-- in it.
CREATE VIEW IF NOT EXISTS tcp_connections AS
WITH
    toInt64(60000000) AS longest_wait,      -- microseconds, like all times here
    toInt64(1000000) AS clock_difference,
    (event1, time1, event2, time2) ->
        (
            event1 = 'connect' AND event2 = 'accept'
            AND time2 - time1 <= longest_wait
        ) OR (
            event1 = 'accept' AND event2 = 'connect'
            AND time2 - time1 <= clock_difference
        ) AS may_belong,
    events AS
    (
        SELECT
            ts, toUnixTimestamp64Micro(ts) AS time,
            host, event, pid, comm, saddr, sport, daddr, dport,
            saddr = toIPv6('::1')
                OR saddr BETWEEN toIPv6('127.0.0.0') AND toIPv6('127.255.255.255')
                OR daddr = toIPv6('::1')
                OR daddr BETWEEN toIPv6('127.0.0.0') AND toIPv6('127.255.255.255')
                AS is_loopback,
            sipHash128(
                saddr, sport, daddr, dport,
                if(is_loopback, host, ''), if(is_loopback, netns, 0)
            ) AS flow
        FROM tcp_events FINAL
        WHERE event != 'lost'
    ),
    neighbours AS
    (
        SELECT
            *,
            row_number() OVER w AS number,
            lagInFrame(event) OVER w AS last_event,
            lagInFrame(time) OVER w AS last_time,
            leadInFrame(event) OVER w AS next_event,
            leadInFrame(time) OVER w AS next_time,
            leadInFrame(ts) OVER w AS next_ts,
            leadInFrame(host) OVER w AS next_host,
            leadInFrame(pid) OVER w AS next_pid,
            leadInFrame(comm) OVER w AS next_comm,
            -- Here and not where they are used: so the next sort need not carry what
            -- they are made of.
            -- 0 inside of a run
            if(may_belong(last_event, last_time, event, time), 0, number)
                AS begin_of_run,
            may_belong(event, time, next_event, next_time) AS may_be_first,
            event = 'connect' AND next_event = 'connect_failed' AS has_failed
        FROM events
        WINDOW w AS (
            PARTITION BY flow ORDER BY ts, event
            ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
        )
    ),
    pairs AS
    (
        SELECT
            *,
            number - max(begin_of_run) OVER so_far AS place,    -- in its run, from 0
            place % 2 = 0 AND may_be_first AS is_first_of_pair,
            place % 2 = 1 AS is_second_of_pair
        FROM neighbours
        WINDOW so_far AS (
            PARTITION BY flow ORDER BY ts, event
            ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
        )
    )
SELECT
    -- The connect's time, where it is known
    if(event = 'accept' AND is_first_of_pair, next_ts, ts) AS ts,
    saddr, sport, daddr, dport, is_loopback,
    event = 'connect' OR is_first_of_pair AS is_client_known,
    multiIf(event = 'connect', host, is_first_of_pair, next_host, '') AS client_host,
    multiIf(event = 'connect', pid, is_first_of_pair, next_pid, 0) AS client_pid,
    multiIf(event = 'connect', comm, is_first_of_pair, next_comm, '') AS client_comm,
    event = 'accept' OR is_first_of_pair AS is_server_known,
    multiIf(event = 'accept', host, is_first_of_pair, next_host, '') AS server_host,
    multiIf(event = 'accept', pid, is_first_of_pair, next_pid, 0) AS server_pid,
    multiIf(event = 'accept', comm, is_first_of_pair, next_comm, '') AS server_comm
FROM pairs
WHERE event != 'connect_failed' AND NOT is_second_of_pair AND NOT has_failed;

-- The hosts of the fleet, by the addresses that they have in their own rows. The last
-- host, if an address has moved.
CREATE VIEW IF NOT EXISTS tcp_addresses AS
SELECT if(event = 'accept', daddr, saddr) AS address, argMax(host, ts) AS host
FROM tcp_events
WHERE event IN ('connect', 'accept')
GROUP BY address;
