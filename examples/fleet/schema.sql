-- schema.sql  The events of both tools, and the connections that they add up to.
--
-- For one ClickHouse server, for chdb, and for each server of a cluster; there,
-- cluster.sql puts them together.

-- A row is a line of tcpconnect --json, with or without -x or -l, or tcpaccept --json,
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
    event   LowCardinality(String),     -- connect, connected (with -l), accept,
                                        -- connect_failed or lost
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
    error   LowCardinality(String),     -- of connect_failed: the errno's name, closed
                                        -- or ''
    latency_us UInt32 CODEC(ZSTD),      -- of connected and connect_failed: so long
                                        -- before ts the first packet left
    query   LowCardinality(String),     -- with -d: the name that was looked up
    count   UInt64 CODEC(ZSTD),         -- of lost: how many events
    reason  LowCardinality(String),     -- of lost: buffer_full, cpu_offline,
                                        -- table_full or skipped
    is_loopback Bool ALIAS
        saddr = toIPv6('::1')
        OR saddr BETWEEN toIPv6('127.0.0.0') AND toIPv6('127.255.255.255')
        OR daddr = toIPv6('::1')
        OR daddr BETWEEN toIPv6('127.0.0.0') AND toIPv6('127.255.255.255')
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
-- Both have the same addresses and ports; ports are reused, so they are matched by
-- time. Of the events with the same four (a flow), in order of time, a connect and an
-- accept that are neighbours may belong together: an accept comes up to 60 s after its
-- connect (so long may it wait in the accept queue), or up to 1 s before it (so much
-- may the clocks of two hosts differ). Neighbours that may belong together are a run,
-- and in a run they are paired two by two from its first on: connect and accept, or
-- accept and connect where a clock is behind. A connect that is followed by its failure
-- (tcpconnect -x) is no connection.
--
-- The connections are those from `since` on and before `until`, by the connect's time
-- where it is known. Events 10 minutes before and after take part, so that no pair is
-- cut: an accept may be 60 s later, and a failure some minutes.
--
-- Each network namespace of each host has a loopback of its own: there, both ends are
-- in it.
CREATE OR REPLACE VIEW tcp_connections AS
WITH
    toInt64(60000000) AS longest_wait,      -- microseconds, like all times here
    toInt64(1000000) AS clock_difference,
    greatest(                               -- toStartOfHour knows nothing before 1970
        {since:DateTime64(6, 'UTC')} - INTERVAL 10 MINUTE, toDateTime64(0, 6, 'UTC')
    ) AS first_ts,
    {until:DateTime64(6, 'UTC')} + INTERVAL 10 MINUTE AS end_ts,
    events AS
    (
        SELECT
            -- connected is a connect, and has the time at which that succeeded
            tcp_events.event = 'connected' AS is_late,
            ts - toIntervalMicrosecond(if(is_late, latency_us, 0)) AS event_ts,
            toUnixTimestamp64Micro(event_ts) AS time,
            if(is_late, 'connect', tcp_events.event) AS event,
            host, pid, comm, saddr, sport, daddr, dport, is_loopback,
            sipHash128(
                saddr, sport, daddr, dport,
                if(is_loopback, host, ''), if(is_loopback, netns, 0)
            ) AS flow
        FROM tcp_events FINAL
        WHERE
            tcp_events.event != 'lost' AND ts >= first_ts AND ts < end_ts
            -- The hours too: the table's key has these
            AND toStartOfHour(ts) >= toStartOfHour(first_ts)
            AND toStartOfHour(ts) <= toStartOfHour(end_ts)
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
            leadInFrame(event_ts) OVER w AS next_ts,
            leadInFrame(host) OVER w AS next_host,
            leadInFrame(pid) OVER w AS next_pid,
            leadInFrame(comm) OVER w AS next_comm,
            -- Here and not where they are used: so the next sort need not carry what
            -- they are made of.
            (
                last_event = 'connect' AND event = 'accept'
                AND time - last_time <= longest_wait
            ) OR (
                last_event = 'accept' AND event = 'connect'
                AND time - last_time <= clock_difference
            ) AS may_belong_to_last,
            (
                event = 'connect' AND next_event = 'accept'
                AND next_time - time <= longest_wait
            ) OR (
                event = 'accept' AND next_event = 'connect'
                AND next_time - time <= clock_difference
            ) AS may_be_first,
            if(may_belong_to_last, 0, number) AS begin_of_run,      -- 0 inside of a run
            event = 'connect' AND next_event = 'connect_failed' AS has_failed
        FROM events
        WINDOW w AS (
            PARTITION BY flow ORDER BY event_ts, event
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
            PARTITION BY flow ORDER BY event_ts, event
            ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
        )
    )
SELECT
    -- The connect's time, where it is known
    if(event = 'accept' AND is_first_of_pair, next_ts, event_ts) AS ts,
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
WHERE
    event != 'connect_failed' AND NOT is_second_of_pair AND NOT has_failed
    AND ts >= {since:DateTime64(6, 'UTC')} AND ts < {until:DateTime64(6, 'UTC')};

-- The connections between the same two, counted. Where an end is not known, there are
-- its address and the hour, which tell whose it may be, and the observer: the host of
-- the other end.
CREATE OR REPLACE VIEW tcp_edges AS
SELECT
    is_client_known, client_host, client_comm,
    is_server_known, server_host, server_comm,
    dport, is_loopback,
    is_client_known AND is_server_known AS is_matched,
    multiIf(is_matched, '', is_client_known, client_host, server_host) AS observer,
    multiIf(is_matched, toIPv6('::'), is_client_known, daddr, saddr) AS other,
    if(is_matched, toDateTime(0, 'UTC'), toStartOfHour(ts)) AS hour,
    count() AS connections, min(ts) AS first_seen, max(ts) AS last_seen
FROM tcp_connections(
    since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
)
GROUP BY ALL;

-- Which hosts had which addresses, by the hour, as their own rows show. Many have the
-- same, as Docker's 172.17.0.1, and addresses move.
CREATE OR REPLACE VIEW tcp_addresses AS
SELECT
    toStartOfHour(ts) AS hour,
    if(event = 'accept', daddr, saddr) AS address,
    host
FROM tcp_events
WHERE
    event IN ('connect', 'connected', 'accept') AND NOT is_loopback
    AND hour >= toStartOfHour({since:DateTime64(6, 'UTC')})
    AND hour <= toStartOfHour({until:DateTime64(6, 'UTC')})
GROUP BY hour, address, host;
