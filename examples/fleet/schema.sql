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
    comm    LowCardinality(String),     -- of the thread
    process LowCardinality(String),     -- its process; '' in lines before 2026-11-28
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
    process_or_comm LowCardinality(String) ALIAS if(process = '', comm, process),
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
-- Clocks that are off by 0.5 s or more are corrected first, for the order only: by how
-- much is computed as in clocks.sql. The times that are shown are the hosts' own.
--
-- Network address translation changes one end's addresses or ports on the way, and the
-- connect and the accept are in different flows. Of what is left alone, two are paired
-- that have the same source port, are at most 1 s apart, and have
--   dnat  the same source address: a published port, a service address;
--   snat  the same destination: masquerading. If the server has accepted anything from
--         the address that the client connects from, that is not translated, and the
--         accept has been lost.
-- No other that is left alone, and could be paired with either, may be within 1 s.
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
    toInt64(1000000) AS translation_time,
    toInt64(4000000000000000000) AS never,
    greatest(                               -- toStartOfHour knows nothing before 1970
        {since:DateTime64(6, 'UTC')} - INTERVAL 10 MINUTE, toDateTime64(0, 6, 'UTC')
    ) AS first_ts,
    {until:DateTime64(6, 'UTC')} + INTERVAL 10 MINUTE AS end_ts,
    -- Clocks, the same text as in clocks.sql. The difference between an accept and its
    -- connect is that of two hosts' clocks, and the time that the connection took.
    toInt64(500000) AS least_offset,
    toInt64(60000000) AS largest_offset,
    toInt64(1000000) AS widest_spread,      -- of the middle half of two hosts' flows
    5 AS least_flows,                       -- of two hosts
    500000 AS most_rows,
    (
        SELECT intDiv(count(), most_rows) + 1
        FROM tcp_events
        WHERE
            ts >= first_ts AND ts < end_ts
            AND toStartOfHour(ts) >= toStartOfHour(first_ts)
            AND toStartOfHour(ts) <= toStartOfHour(end_ts)
    ) AS ports,                             -- of so many source ports, one is a
                                            -- large enough sample
    clock_events AS
    (
        SELECT
            host, event = 'accept' AS is_accept,
            toUnixTimestamp64Micro(ts) - latency_us AS time,
            sipHash64(saddr, sport, daddr, dport, toStartOfTenMinutes(ts)) AS flow
        FROM tcp_events
        WHERE
            event IN ('connect', 'connected', 'accept') AND NOT is_loopback
            AND intHash32(sport) % ports = 0
            AND ts >= first_ts AND ts < end_ts
            AND toStartOfHour(ts) >= toStartOfHour(first_ts)
            AND toStartOfHour(ts) <= toStartOfHour(end_ts)
    ),
    -- Flows with one connect and one accept in ten minutes: these belong together. A
    -- line that is there twice is one.
    single_flows AS
    (
        SELECT
            toString(anyIf(host, NOT is_accept)) AS client_host,
            toString(anyIf(host, is_accept)) AS server_host,
            minIf(time, NOT is_accept) AS connect_time,
            minIf(time, is_accept) AS accept_time,
            accept_time - connect_time AS difference
        FROM clock_events
        GROUP BY flow
        HAVING
            client_host != '' AND server_host != '' AND client_host != server_host
            AND connect_time = maxIf(time, NOT is_accept)
            AND accept_time = maxIf(time, is_accept)
            AND abs(difference) <= largest_offset
    ),
    host_pairs AS
    (
        SELECT
            client_host, server_host,
            quantilesExact(0.25, 0.5, 0.75)(difference) AS quartiles,
            count() AS flows
        FROM single_flows
        GROUP BY client_host, server_host
        HAVING flows >= least_flows AND quartiles[3] - quartiles[1] <= widest_spread
    ),
    -- Empty where all clocks are right
    (
        SELECT if(
            max(abs(quartiles[2])) < least_offset, [],
            groupArray((client_host, server_host, quartiles[2], flows))
        )
        FROM host_pairs
    ) AS differences,
    -- By how much the clock of host is ahead of peer's. Each host is also its own peer.
    links AS
    (
        SELECT link.1 AS host, link.2 AS peer, link.3 AS difference, link.4 AS flows
        FROM
        (
            SELECT
                arrayJoin(differences) AS pair,
                arrayJoin([
                    (pair.1, pair.2, -pair.3, pair.4),
                    (pair.2, pair.1, pair.3, pair.4),
                    (pair.1, pair.1, toInt64(0), toUInt64(-1)),
                    (pair.2, pair.2, toInt64(0), toUInt64(-1))
                ]) AS link
        )
    ),
    -- A breadth-first search: by how much each host is ahead of the root, which is the
    -- host with the most links. Each round takes the root to hosts that are one link
    -- further away. Of peers with the same root, the one with the most flows counts.
    round0 AS
    (
        SELECT host, ((count(), host), toInt64(0)) AS seen FROM links GROUP BY host
    ),
    round1 AS
    (
        SELECT
            links.host AS host,
            argMax((last.seen.1, last.seen.2 + difference), (last.seen.1, flows))
                AS seen
        FROM links INNER JOIN round0 AS last ON last.host = links.peer
        GROUP BY links.host
    ),
    round2 AS
    (
        SELECT
            links.host AS host,
            argMax((last.seen.1, last.seen.2 + difference), (last.seen.1, flows))
                AS seen
        FROM links INNER JOIN round1 AS last ON last.host = links.peer
        GROUP BY links.host
    ),
    round3 AS
    (
        SELECT
            links.host AS host,
            argMax((last.seen.1, last.seen.2 + difference), (last.seen.1, flows))
                AS seen
        FROM links INNER JOIN round2 AS last ON last.host = links.peer
        GROUP BY links.host
    ),
    round4 AS
    (
        SELECT
            links.host AS host,
            argMax((last.seen.1, last.seen.2 + difference), (last.seen.1, flows))
                AS seen
        FROM links INNER JOIN round3 AS last ON last.host = links.peer
        GROUP BY links.host
    ),
    -- The median of those with the same root is right: most clocks are.
    offsets AS
    (
        SELECT
            host,
            seen.2 - quantileExact(0.5)(seen.2) OVER (PARTITION BY seen.1) AS offset_us
        FROM round4
    ),
    clocks AS (SELECT * FROM offsets WHERE abs(offset_us) >= least_offset),
    -- Clocks end.
    (SELECT (groupArray(host), groupArray(offset_us)) FROM clocks) AS corrections,
    events AS
    (
        SELECT
            -- connected is a connect, and has the time at which that succeeded
            tcp_events.event = 'connected' AS is_late,
            ts - toIntervalMicrosecond(if(is_late, latency_us, 0)) AS event_ts,
            toUnixTimestamp64Micro(event_ts) - transform(
                toString(host), corrections.1, corrections.2, toInt64(0)
            ) AS time,
            if(is_late, 'connect', tcp_events.event) AS event,
            host, pid, process_or_comm AS comm,
            saddr, sport, daddr, dport, is_loopback,
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
            PARTITION BY flow ORDER BY time, event
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
            PARTITION BY flow ORDER BY time, event
            ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW
        )
    ),
    untranslated AS
    (
        SELECT
            -- The connect's time, where it is known
            if(event = 'accept' AND is_first_of_pair, next_ts, event_ts) AS ts,
            time, flow, saddr, sport, daddr, dport, is_loopback,
            is_first_of_pair AS is_pair, NOT is_pair AND NOT is_loopback AS is_alone,
            if(is_alone, sipHash128(saddr, sport), flow) AS end,
            event, host, pid, comm,
            if(is_first_of_pair, next_host, '') AS other_host,
            if(is_first_of_pair, next_pid, 0) AS other_pid,
            if(is_first_of_pair, next_comm, '') AS other_comm,
            '' AS nat
        FROM pairs
        WHERE event != 'connect_failed' AND NOT is_second_of_pair AND NOT has_failed
    ),
    -- From which addresses a server has accepted: a client there is not translated.
    reached AS
    (
        SELECT saddr, daddr
        FROM tcp_events
        WHERE
            event = 'accept' AND ts >= first_ts AND ts < end_ts
            AND toStartOfHour(ts) >= toStartOfHour(first_ts)
            AND toStartOfHour(ts) <= toStartOfHour(end_ts)
            -- Few, where most clients are outside the fleet
            AND saddr IN (
                SELECT saddr
                FROM tcp_events
                WHERE
                    event IN ('connect', 'connected') AND ts >= first_ts AND ts < end_ts
                    AND toStartOfHour(ts) >= toStartOfHour(first_ts)
                    AND toStartOfHour(ts) <= toStartOfHour(end_ts)
            )
    ),
    -- What is alone, by its source port and address, in order of time
    dnat_neighbours AS
    (
        SELECT
            *,
            lagInFrame(time, 2, -never) OVER w AS time_before_last,
            lagInFrame(time, 1, -never) OVER w AS last_time,
            lagInFrame(event) OVER w AS last_event,
            leadInFrame(time, 1, never) OVER w AS next_time,
            leadInFrame(time, 2, never) OVER w AS time_after_next,
            leadInFrame(event) OVER w AS next_event,
            leadInFrame(ts) OVER w AS next_ts,
            leadInFrame(saddr) OVER w AS next_saddr,
            leadInFrame(daddr) OVER w AS next_daddr,
            leadInFrame(dport) OVER w AS next_dport,
            leadInFrame(host) OVER w AS next_host,
            leadInFrame(pid) OVER w AS next_pid,
            leadInFrame(comm) OVER w AS next_comm,
            is_alone AND event != next_event AND next_time - time <= translation_time
                AND time - last_time > translation_time
                AND time_after_next - next_time > translation_time AS is_first,
            is_alone AND event != last_event AND time - last_time <= translation_time
                AND next_time - time > translation_time
                AND last_time - time_before_last > translation_time AS is_second
        FROM untranslated
        WINDOW w AS (
            PARTITION BY end ORDER BY time, event
            ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
        )
    ),
    dnat AS
    (
        SELECT
            is_first AND event = 'accept' AS takes_next,
            if(takes_next, n.next_ts, n.ts) AS ts,
            time, flow, sport,
            if(takes_next, n.next_saddr, n.saddr) AS saddr,
            if(takes_next, n.next_daddr, n.daddr) AS daddr,
            if(takes_next, n.next_dport, n.dport) AS dport,
            is_loopback, n.is_pair OR is_first AS is_pair,
            n.is_alone AND NOT is_first
                AND NOT (event = 'connect' AND (n.saddr, n.daddr) IN reached)
                AS is_alone,
            if(is_alone, sipHash128(sport, n.daddr, n.dport), flow) AS end,
            event, host, pid, comm,
            if(is_first, next_host, n.other_host) AS other_host,
            if(is_first, next_pid, n.other_pid) AS other_pid,
            if(is_first, next_comm, n.other_comm) AS other_comm,
            if(is_first, 'dnat', n.nat) AS nat
        FROM dnat_neighbours AS n
        WHERE NOT is_second
    ),
    -- What still is, by its source port and destination
    snat_neighbours AS
    (
        SELECT
            *,
            lagInFrame(time, 2, -never) OVER w AS time_before_last,
            lagInFrame(time, 1, -never) OVER w AS last_time,
            lagInFrame(event) OVER w AS last_event,
            leadInFrame(time, 1, never) OVER w AS next_time,
            leadInFrame(time, 2, never) OVER w AS time_after_next,
            leadInFrame(event) OVER w AS next_event,
            leadInFrame(ts) OVER w AS next_ts,
            leadInFrame(saddr) OVER w AS next_saddr,
            leadInFrame(daddr) OVER w AS next_daddr,
            leadInFrame(dport) OVER w AS next_dport,
            leadInFrame(host) OVER w AS next_host,
            leadInFrame(pid) OVER w AS next_pid,
            leadInFrame(comm) OVER w AS next_comm,
            is_alone AND event != next_event AND next_time - time <= translation_time
                AND time - last_time > translation_time
                AND time_after_next - next_time > translation_time AS is_first,
            is_alone AND event != last_event AND time - last_time <= translation_time
                AND next_time - time > translation_time
                AND last_time - time_before_last > translation_time AS is_second
        FROM dnat
        WINDOW w AS (
            PARTITION BY end ORDER BY time, event
            ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING
        )
    ),
    snat AS
    (
        SELECT
            is_first AND event = 'accept' AS takes_next,
            if(takes_next, n.next_ts, n.ts) AS ts,
            time, flow, sport,
            if(takes_next, n.next_saddr, n.saddr) AS saddr,
            if(takes_next, n.next_daddr, n.daddr) AS daddr,
            if(takes_next, n.next_dport, n.dport) AS dport,
            is_loopback, n.is_pair OR is_first AS is_pair,
            event, host, pid, comm,
            if(is_first, next_host, n.other_host) AS other_host,
            if(is_first, next_pid, n.other_pid) AS other_pid,
            if(is_first, next_comm, n.other_comm) AS other_comm,
            if(is_first, 'snat', n.nat) AS nat
        FROM snat_neighbours AS n
        WHERE NOT is_second
    )
SELECT
    ts, saddr, sport, daddr, dport, is_loopback,
    event = 'connect' OR is_pair AS is_client_known,
    multiIf(event = 'connect', host, is_pair, other_host, '') AS client_host,
    multiIf(event = 'connect', pid, is_pair, other_pid, 0) AS client_pid,
    multiIf(event = 'connect', comm, is_pair, other_comm, '') AS client_comm,
    event = 'accept' OR is_pair AS is_server_known,
    multiIf(event = 'accept', host, is_pair, other_host, '') AS server_host,
    multiIf(event = 'accept', pid, is_pair, other_pid, 0) AS server_pid,
    multiIf(event = 'accept', comm, is_pair, other_comm, '') AS server_comm,
    nat
FROM snat
WHERE ts >= {since:DateTime64(6, 'UTC')} AND ts < {until:DateTime64(6, 'UTC')};

-- The connections between the same two, counted. Where an end is not known, there are
-- its address and the hour, which tell whose it may be, and the observer: the host of
-- the other end.
CREATE OR REPLACE VIEW tcp_counts AS
SELECT
    is_client_known, client_host, client_comm,
    is_server_known, server_host, server_comm,
    dport, is_loopback,
    is_client_known AND is_server_known AS is_matched,
    multiIf(is_matched, '', is_client_known, client_host, server_host) AS observer,
    multiIf(is_matched, toIPv6('::'), is_client_known, daddr, saddr) AS other,
    if(is_matched, toDateTime(0, 'UTC'), toStartOfHour(ts)) AS hour,
    nat, count() AS connections, min(ts) AS first_seen, max(ts) AS last_seen
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

-- The service map: a row for each client, server and port. A client or server is a
-- process name on a host: client_comm and server_comm are names of processes, not of
-- their threads.
--
-- known: "both"; "client" where the accept is missing, "server" where the connect is.
-- nat: "dnat" or "snat" where both ends were matched across address translation, as
-- above; else empty. The port is the one that the client connected to.
--
-- Of an end that is not known there is the address. Its host is named if exactly one
-- host had the address in that hour, else the observer if it had it. A loopback address
-- is the observer's.
CREATE OR REPLACE VIEW tcp_map AS
WITH
    single_hosts AS
    (
        SELECT hour, address, any(host) AS host
        FROM tcp_addresses(
            since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
        )
        GROUP BY hour, address
        HAVING count() = 1
    ),
    edges AS
    (
        SELECT
            *,
            multiIf(
                is_matched, '',
                is_loopback, observer,
                single_hosts.host != '', single_hosts.host,
                (hour, other, observer) IN (
                    SELECT hour, address, host
                    FROM tcp_addresses(
                        since = {since:DateTime64(6, 'UTC')},
                        until = {until:DateTime64(6, 'UTC')}
                    )
                ), observer,
                ''
            ) AS other_host,
            replaceRegexpOne(toString(other), '^::ffff:([0-9]+[.])', '\\1')
                AS other_address
        FROM tcp_counts(
            since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
        ) AS edges
        LEFT JOIN single_hosts
            ON single_hosts.hour = edges.hour AND single_hosts.address = edges.other
    )
SELECT
    if(is_client_known, edges.client_host, other_host) AS client_host,
    edges.client_comm AS client_comm,
    if(is_client_known, '', other_address) AS client_address,
    if(is_server_known, edges.server_host, other_host) AS server_host,
    edges.server_comm AS server_comm,
    if(is_server_known, '', other_address) AS server_address,
    dport AS port,
    multiIf(is_matched, 'both', is_client_known, 'client', 'server') AS known,
    sum(edges.connections) AS connections,
    min(edges.first_seen) AS first_seen,
    max(edges.last_seen) AS last_seen,
    edges.nat AS nat
FROM edges
GROUP BY ALL;

-- The maps of past hours, one by one, as edges.sql stores them, for longer than the
-- events are kept. Empty without it. An hour that is stored twice, from the same
-- events, counts once, by FINAL.
CREATE TABLE IF NOT EXISTS tcp_edges
(
    hour           DateTime('UTC') CODEC(Delta, ZSTD),  -- its begin
    client_host    LowCardinality(String),              -- the columns of tcp_map
    client_comm    LowCardinality(String),
    client_address String CODEC(ZSTD),
    server_host    LowCardinality(String),
    server_comm    LowCardinality(String),
    server_address String CODEC(ZSTD),
    port           UInt16 CODEC(ZSTD),
    known          LowCardinality(String),  -- '' in the row that says that all other
                                            -- rows of the hour are there
    connections    UInt64 CODEC(ZSTD),
    first_seen     DateTime64(6, 'UTC') CODEC(ZSTD),
    last_seen      DateTime64(6, 'UTC') CODEC(ZSTD),
    nat            LowCardinality(String)
)
ENGINE = ReplacingMergeTree
PARTITION BY toMonday(hour)
ORDER BY (
    hour, client_host, client_comm, client_address,
    server_host, server_comm, server_address, port, known, nat
)
TTL hour + INTERVAL 90 DAY;
