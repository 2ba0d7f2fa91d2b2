-- clocks.sql  Hosts whose clock is off by 0.5 s or more, from `since` on and before
-- `until`, and by how much it is ahead of the others' (offset_us, negative if behind).
-- tcp_connections corrects these.
--
-- An offset is one for all of the time asked for, and is found up to 60 s, where there
-- are five connections with another host. Most clocks are taken to be right: of two
-- hosts that only connect to each other it is unknown which one is.
WITH
    greatest(
        {since:DateTime64(6, 'UTC')} - INTERVAL 10 MINUTE, toDateTime64(0, 6, 'UTC')
    ) AS first_ts,
    {until:DateTime64(6, 'UTC')} + INTERVAL 10 MINUTE AS end_ts,
    -- Clocks, the same text as in schema.sql. The difference between an accept and its
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
    clocks AS (SELECT * FROM offsets WHERE abs(offset_us) >= least_offset)
    -- Clocks end.
SELECT host, offset_us
FROM clocks
ORDER BY abs(offset_us) DESC, host;
