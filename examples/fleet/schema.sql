-- schema.sql  The events of both tools, and who talks to whom.
--
-- For a ClickHouse server (24.10 or newer), for chdb, and for each server of a cluster,
-- which cluster.sql puts together.

-- A row is a line of tcpconnect --json (as it is, with -l, -x or -c) or of tcpaccept
-- --json (as it is, or with -c), inserted with FORMAT JSONEachRow. The client's side
-- comes first in all of them. An IPv4 address is kept as ::ffff:192.0.2.7.
--
-- A shipper that tries again may insert a line twice. Rows with the same sorting key
-- are one: for queries by FINAL, on disk when ReplacingMergeTree merges them. The hour
-- comes first in the key, so that a query about some hours reads only these.
CREATE TABLE IF NOT EXISTS tcp_events
(
    ts      DateTime64(6, 'UTC') CODEC(Delta, ZSTD),
    host    LowCardinality(String),
    event   LowCardinality(String),     -- connect; connected, connect_failed (-l, -x);
                                        -- accept; connects, accepts (-c); lost
    pid     UInt32 CODEC(ZSTD),
    tid     UInt32 CODEC(ZSTD),
    uid     UInt32 CODEC(ZSTD),
    comm    LowCardinality(String),     -- of the thread
    process LowCardinality(String),     -- of its process
    saddr   IPv6 CODEC(ZSTD),
    sport   UInt16 CODEC(ZSTD),
    daddr   IPv6 CODEC(ZSTD),
    dport   UInt16 CODEC(ZSTD),
    netns   UInt32 CODEC(ZSTD),
    cgroup  UInt64 CODEC(ZSTD),
    cgroup_path LowCardinality(String),
    error   LowCardinality(String),     -- of connect_failed: errno's name, closed or ''
    latency_us UInt64 CODEC(ZSTD),      -- so long before ts the first packet left
    query   LowCardinality(String),     -- with -d: the name that was looked up
    count   UInt64 CODEC(ZSTD),         -- of connects, accepts and lost
    interval_s UInt32 CODEC(ZSTD),      -- of connects and accepts: it ended at ts
    reason  LowCardinality(String),     -- of lost
    -- The systemd unit or container, as --unit names it: the outermost of the path.
    -- Empty for what is made for one login or one run: there the process says more.
    unit_path LowCardinality(String) ALIAS coalesce(
        nullIf(
            extract(
                toString(cgroup_path),
                '^((?:/[^/]+\\.slice)*/[^/]+\\.(?:service|scope))(?:/|$)'
            ), ''
        ),
        nullIf(
            extract(
                toString(cgroup_path),
                concat(
                    '^((?:/[^/]+)*?/(?:',
                    '(?:docker-|libpod-(?:payload-)?|cri-containerd-|crio-)?',
                    '[0-9a-f]{64}(?:\\.scope)?',
                    '|lxc\\.payload\\.[^/]+|lxc(?:\\.payload)?/[^/]+',
                    '|machine\\.slice/(?:[^/]+\\.slice/)*[^/]+\\.(?:service|scope)',
                    '))(?:/|$)'
                )
            ), ''
        ),
        toString(cgroup_path)
    ),
    unit LowCardinality(String) MATERIALIZED multiIf(
        match(unit_path, '^(?:/[^/]+\\.slice)*/(?:session-|run-)[^/]*$'), '',
        match(
            unit_path,
            concat(
                '(?:^|/)(?:docker-|libpod-(?:payload-)?|cri-containerd-|crio-)?',
                '[0-9a-f]{64}(?:\\.scope)?$'
            )
        ), extract(unit_path, '([^/]*[0-9a-f]{12})[0-9a-f]{52}(?:\\.scope)?$'),
        match(unit_path, '^(?:/[^/]+\\.slice)*/[^/]+\\.(?:service|scope)$'),
            extract(unit_path, '[^/]*$'),
        substring(unit_path, 2)
    ),
    name LowCardinality(String) ALIAS if(process = '', comm, process),
    -- When the first packet left, or the interval began
    at DateTime64(6, 'UTC')
        ALIAS ts - toIntervalMicrosecond(latency_us) - toIntervalSecond(interval_s),
    is_loopback Bool ALIAS
        saddr = toIPv6('::1')
        OR saddr BETWEEN toIPv6('127.0.0.0') AND toIPv6('127.255.255.255')
        OR daddr = toIPv6('::1')
        OR daddr BETWEEN toIPv6('127.0.0.0') AND toIPv6('127.255.255.255'),
    loopback UInt64 MATERIALIZED if(is_loopback, cityHash64(host, netns), 0)
        CODEC(ZSTD),
    node UInt64 MATERIALIZED cityHash64(host, unit, name) CODEC(ZSTD)
)
ENGINE = ReplacingMergeTree
PARTITION BY toDate(ts)
ORDER BY (
    toStartOfHour(ts), daddr, dport, saddr, sport, ts, event, host, process, cgroup,
    netns, pid, tid, reason
)
TTL toDateTime(ts) + INTERVAL 7 DAY
SETTINGS ttl_only_drop_parts = 1;

-- Four sets, by the hour, which are kept up to date as rows are inserted. A row that is
-- inserted twice does not change a set.

-- Clients and servers: a process name in a unit or container of a host.
CREATE TABLE IF NOT EXISTS tcp_nodes
(
    hour DateTime('UTC') CODEC(Delta, ZSTD),
    node UInt64,
    host LowCardinality(String),
    unit LowCardinality(String),
    name LowCardinality(String)
)
ENGINE = ReplacingMergeTree
PARTITION BY toDate(hour)
ORDER BY (hour, node)
TTL hour + INTERVAL 7 DAY;

CREATE MATERIALIZED VIEW IF NOT EXISTS tcp_nodes_of_events TO tcp_nodes
DEFINER = CURRENT_USER SQL SECURITY DEFINER AS
SELECT DISTINCT toStartOfHour(at) AS hour, node, host, unit, name
FROM tcp_events
WHERE event != 'lost';

-- Who accepted on an address and port.
CREATE TABLE IF NOT EXISTS tcp_listeners
(
    hour     DateTime('UTC') CODEC(Delta, ZSTD),
    daddr    IPv6 CODEC(ZSTD),
    dport    UInt16 CODEC(ZSTD),
    node     UInt64 CODEC(ZSTD),
    host     LowCardinality(String),
    loopback UInt64 CODEC(ZSTD)
)
ENGINE = ReplacingMergeTree
PARTITION BY toDate(hour)
ORDER BY (hour, daddr, dport, node, loopback)
TTL hour + INTERVAL 7 DAY;

CREATE MATERIALIZED VIEW IF NOT EXISTS tcp_listeners_of_events TO tcp_listeners
DEFINER = CURRENT_USER SQL SECURITY DEFINER AS
SELECT DISTINCT toStartOfHour(at) AS hour, daddr, dport, node, host, loopback
FROM tcp_events
WHERE event IN ('accept', 'accepts');

-- Which host connected from where to which address and port. One within 60 s of an
-- hour's end is in the next one, too, and the reverse: clocks differ, and an accept may
-- wait.
CREATE TABLE IF NOT EXISTS tcp_destinations
(
    hour     DateTime('UTC') CODEC(Delta, ZSTD),
    daddr    IPv6 CODEC(ZSTD),
    dport    UInt16 CODEC(ZSTD),
    saddr    IPv6 CODEC(ZSTD),
    host     LowCardinality(String),
    netns    UInt32 CODEC(ZSTD),
    loopback UInt64 CODEC(ZSTD)
)
ENGINE = ReplacingMergeTree
PARTITION BY toDate(hour)
ORDER BY (hour, daddr, dport, saddr, host, netns)
TTL hour + INTERVAL 7 DAY;

CREATE MATERIALIZED VIEW IF NOT EXISTS tcp_destinations_of_events TO tcp_destinations
DEFINER = CURRENT_USER SQL SECURITY DEFINER AS
SELECT DISTINCT
    arrayJoin(arrayDistinct([
        toStartOfHour(at - INTERVAL 60 SECOND), toStartOfHour(at + INTERVAL 60 SECOND)
    ])) AS hour,
    daddr, dport, saddr, host, netns, loopback
FROM tcp_events
WHERE event IN ('connect', 'connected', 'connects');

-- From which addresses a host connected, or on which it accepted.
CREATE TABLE IF NOT EXISTS tcp_addresses
(
    hour    DateTime('UTC') CODEC(Delta, ZSTD),
    address IPv6 CODEC(ZSTD),
    host    LowCardinality(String),
    netns   UInt32 CODEC(ZSTD),
    is_source Bool CODEC(ZSTD)
)
ENGINE = ReplacingMergeTree
PARTITION BY toDate(hour)
ORDER BY (hour, address, host, netns, is_source)
TTL hour + INTERVAL 7 DAY;

CREATE MATERIALIZED VIEW IF NOT EXISTS tcp_addresses_of_events TO tcp_addresses
DEFINER = CURRENT_USER SQL SECURITY DEFINER AS
SELECT DISTINCT
    toStartOfHour(at) AS hour, event NOT IN ('accept', 'accepts') AS is_source,
    if(is_source, saddr, daddr) AS address, host, netns
FROM tcp_events
WHERE event NOT IN ('connect_failed', 'lost') AND NOT is_loopback;

-- Whose an address was, by the hour. Many hosts may have the same, as Docker's
-- 172.17.0.1, and addresses move. A transparent proxy accepts on addresses that are not
-- its own, and connects to them from others, which no host does with one of its own.
CREATE OR REPLACE VIEW tcp_hosts AS
SELECT hour, address, groupUniqArray(toString(host)) AS hosts
FROM tcp_addresses
WHERE
    hour >= toStartOfHour({since:DateTime64(6, 'UTC')})
    AND hour <= toStartOfHour({until:DateTime64(6, 'UTC')})
    AND (is_source OR cityHash64(hour, address, host, netns) GLOBAL NOT IN (
        SELECT cityHash64(hour, daddr, host, netns)
        FROM tcp_destinations
        WHERE
            hour >= toStartOfHour({since:DateTime64(6, 'UTC')})
            AND hour <= toStartOfHour({until:DateTime64(6, 'UTC')})
            AND daddr != saddr
            AND cityHash64(hour, daddr, host, netns) GLOBAL IN (
                SELECT cityHash64(hour, address, host, netns)
                FROM tcp_addresses
                WHERE
                    hour >= toStartOfHour({since:DateTime64(6, 'UTC')})
                    AND hour <= toStartOfHour({until:DateTime64(6, 'UTC')})
            )
    ))
GROUP BY hour, address;

-- The map of each hour, as edges.sql stores it, for longer than the events are kept.
-- Empty without it. An hour that is stored twice, from the same events, counts once, by
-- FINAL.
CREATE TABLE IF NOT EXISTS tcp_edges
(
    hour           DateTime('UTC') CODEC(Delta, ZSTD),  -- its begin
    client_host    LowCardinality(String),              -- columns of tcp_map
    client_unit    LowCardinality(String),
    client_comm    LowCardinality(String),
    client_address String CODEC(ZSTD),
    server_host    LowCardinality(String),
    server_unit    LowCardinality(String),
    server_comm    LowCardinality(String),
    server_address String CODEC(ZSTD),
    port           UInt16 CODEC(ZSTD),
    known          LowCardinality(String),  -- '' in the row that says that all other
                                            -- rows of the hour are there
    connections    Int64 CODEC(ZSTD),
    failures       UInt64 CODEC(ZSTD),
    latency        Map(UInt8, UInt64) CODEC(ZSTD),
    first_seen     DateTime64(6, 'UTC') CODEC(ZSTD),
    last_seen      DateTime64(6, 'UTC') CODEC(ZSTD)
)
ENGINE = ReplacingMergeTree
PARTITION BY toMonday(hour)
ORDER BY (
    hour, client_host, client_unit, client_comm, client_address,
    server_host, server_unit, server_comm, server_address, port, known
)
TTL hour + INTERVAL 90 DAY;

-- The service map from `since` on and before `until`: a row for each client, server and
-- port. A client or server is a systemd unit or container on a host, else a process.
-- Hours that tcp_edges has come from there, if they are asked for as a whole; all else
-- from the events.
--
-- The server of a connect is who listens on that address and port, in that hour or one
-- beside it. On loopback, and where several hosts have the address and the observing
-- host is one of them, only that one counts. If there are several listeners even so, it
-- is the one whose first accept follows, from the client's address, else from any; but
-- it is unknown if several hosts accepted there other than one after the other.
--
-- An accept counts only if its client is unknown: if the host with its source address
-- made no connect to that address and port.
--
-- What is left may have been translated on the way (NAT). Then the source port tells,
-- within 10 s: with the same source address, it is the other end of a connect to where
-- nobody listens (a published port, a service address); to the same address and port,
-- that of a connect from an address that was never seen there (masquerading).
--
-- known: "both"; "client" where no listener is known, "server" where the client is not.
-- Of an end that is not known there is the address, and its host if exactly one host
-- had the address in that hour, else the observer if it had it.
-- comm: of a unit or container, the process with the most connections.
-- latency: of how many connects the logarithm is n, to base 2 (us), rounded up.
CREATE OR REPLACE VIEW tcp_map AS
WITH
    toDateTime64('2200-01-01 00:00:00', 6, 'UTC') AS never,
    {until:DateTime64(6, 'UTC')} + INTERVAL 10 MINUTE AS latest_ts,
    toStartOfHour(greatest(
        {since:DateTime64(6, 'UTC')} - INTERVAL 1 HOUR, toDateTime64(0, 6, 'UTC')
    )) AS hour_before,
    toStartOfHour({until:DateTime64(6, 'UTC')}) + INTERVAL 1 HOUR AS hour_after,
    toStartOfHour({since:DateTime64(6, 'UTC')} + INTERVAL 3599999999 MICROSECOND)
        AS stored_since,
    (
        SELECT least(
            if(count() = 0, stored_since, max(hour) + INTERVAL 1 HOUR),
            toStartOfHour({until:DateTime64(6, 'UTC')})
        )
        FROM tcp_edges
        WHERE known = ''
    ) AS stored_until,
    -- Of the sets
    hour -> (hour >= hour_before AND hour <= hour_after) AS is_near,
    -- Those of ts are for the table's key
    (ts, at) -> (
        at >= {since:DateTime64(6, 'UTC')} AND at < {until:DateTime64(6, 'UTC')}
        AND (at < stored_since OR at >= stored_until)
        AND ts >= {since:DateTime64(6, 'UTC')} AND ts < latest_ts
        AND toStartOfHour(ts) >= toStartOfHour({since:DateTime64(6, 'UTC')})
        AND toStartOfHour(ts) <= toStartOfHour(latest_ts)
        AND (toStartOfHour(ts) <= stored_since OR toStartOfHour(ts) >= stored_until)
    ) AS is_asked,
    owners AS
    (
        SELECT hour, address, groupUniqArray(toString(host)) AS hosts
        FROM tcp_addresses
        WHERE is_near(hour)
        GROUP BY hour, address
    ),
    shared AS
    (
        SELECT cityHash64(hour, address, cityHash64(arrayJoin(hosts))) AS key
        FROM owners
        WHERE length(hosts) > 1
    ),
    -- For a connect that may only be to one host or loopback (scope), and any other
    listeners AS
    (
        SELECT
            cityHash64(
                arrayJoin([hour - INTERVAL 1 HOUR, hour, hour + INTERVAL 1 HOUR]),
                daddr, dport,
                arrayJoin(if(loopback = 0, [0, cityHash64(host)], [loopback]))
            ) AS key,
            groupUniqArray(2)(node) AS servers
        FROM tcp_listeners
        WHERE is_near(hour)
        GROUP BY key
    ),
    contested AS
    (
        SELECT cityHash64(
            arrayJoin([hour - INTERVAL 1 HOUR, hour, hour + INTERVAL 1 HOUR])
                AS near_hour,
            daddr, dport
        )
        FROM tcp_listeners
        WHERE is_near(hour)
        GROUP BY near_hour, daddr, dport
        HAVING uniqExact(node) > 1
    ),
    -- Their accepts in order of time; line: and from where, or from anywhere
    timelines AS
    (
        SELECT line, accept.1 AS at, accept.2 AS server
        FROM
        (
            SELECT
                arrayJoin([
                    toStartOfHour(at) - INTERVAL 1 HOUR, toStartOfHour(at),
                    toStartOfHour(at) + INTERVAL 1 HOUR
                ]) AS hour,
                cityHash64(
                    cityHash64(
                        hour, daddr, dport,
                        arrayJoin(if(loopback = 0, [0, cityHash64(host)], [loopback]))
                    ),
                    arrayJoin([saddr, toIPv6('::')])
                ) AS line,
                arraySort(groupArray((at, node, cityHash64(host)))) AS accepts,
                arrayMap(accept -> accept.3, accepts) AS hosts
            FROM tcp_events
            WHERE
                event IN ('accept', 'accepts')
                AND is_near(toStartOfHour(ts))
                AND cityHash64(toStartOfHour(at), daddr, dport)
                    GLOBAL IN (SELECT * FROM contested)
            GROUP BY hour, line
            HAVING length(arrayCompact(hosts)) = length(arrayDistinct(hosts))
        )
        ARRAY JOIN arrayPushBack(accepts, (never, accepts[-1].2, 0)) AS accept
    ),
    -- Together, but one by one where there are several listeners
    connects AS
    (
        WITH
            toStartOfHour(at) AS event_hour,
            if(
                cityHash64(event_hour, daddr, dport)
                    GLOBAL IN (SELECT * FROM contested),
                (saddr, at), (toIPv6('::'), never)
            ) AS event_start,
            if(event = 'connected', toUInt8(log2(latency_us + 1)) + 1, 0) AS rank
        SELECT
            any(node) AS client, any(cityHash64(host)) AS host, any(event_hour) AS hour,
            any(daddr) AS other, any(dport) AS port, any(loopback) AS local,
            any(event_start) AS start, any(rank) AS bucket,
            toInt64(countIf(event = 'connected') + sumIf(count, event = 'connects'))
                AS made,
            toInt64(countIf(event = 'connect')) AS started,
            countIf(event = 'connect_failed') AS failures,
            toInt64(countIf(event = 'connect_failed' AND sport != 0)) AS ended,
            min(at) AS first_seen, max(at) AS last_seen
        FROM tcp_events FINAL
        WHERE
            event IN ('connect', 'connected', 'connects', 'connect_failed')
            AND is_asked(ts, at)
        GROUP BY cityHash64(node, event_hour, daddr, dport, loopback, event_start, rank)
    ),
    keyed AS
    (
        SELECT
            *,
            cityHash64(hour, other, port, multiIf(
                local != 0, local,
                cityHash64(hour, other, host) IN (SELECT key FROM shared), host,
                0
            )) AS key
        FROM connects
    ),
    looked_up AS
    (
        SELECT
            client,
            multiIf(
                length(servers) = 1, servers[1],
                near.server != 0, near.server,
                far.server
            ) AS server,
            if(server = 0, keyed.hour, toDateTime(0, 'UTC')) AS edge_hour,
            if(server = 0, keyed.other, toIPv6('::')) AS edge_other,
            port, if(server = 0, keyed.local, 0) AS edge_local, bucket, made, started,
            failures, ended, first_seen, last_seen
        FROM keyed
        LEFT JOIN listeners ON listeners.key = keyed.key
        ASOF LEFT JOIN timelines AS near
            ON near.line = cityHash64(keyed.key, start.1) AND near.at >= start.2
        ASOF LEFT JOIN timelines AS far
            ON far.line = cityHash64(keyed.key, toIPv6('::')) AND far.at >= start.2
    ),
    -- Accepts of which the client is unknown
    lone AS
    (
        SELECT DISTINCT
            hour, a.saddr AS saddr, sport, a.daddr AS daddr, a.dport AS dport, time,
            loopback, a.host AS host, node, tid, number
        FROM
        (
            SELECT
                toStartOfHour(at) AS hour, saddr, sport, daddr, dport, at AS time,
                loopback,
                toString(host) AS host, node, tid,
                if(event = 'accepts', count, 1) AS number
            FROM tcp_events
            WHERE
                event IN ('accept', 'accepts') AND is_asked(ts, at)
                AND cityHash64(hour, saddr, daddr, dport, loopback) GLOBAL NOT IN (
                    SELECT cityHash64(hour, saddr, daddr, dport, loopback)
                    FROM tcp_destinations
                    WHERE is_near(hour)
                )
        ) AS a
        LEFT JOIN owners ON owners.hour = a.hour AND owners.address = a.saddr
        WHERE cityHash64(
            hour, if(has(hosts, host), host, if(length(hosts) = 1, hosts[1], '')),
            daddr, dport
        ) NOT IN (
            SELECT cityHash64(hour, toString(host), daddr, dport)
            FROM tcp_destinations
            WHERE is_near(hour)
        )
    ),
    -- Connects to where nobody listens
    astray AS
    (
        SELECT
            toStartOfHour(at) AS hour, node AS client, saddr, sport, daddr, dport,
            at AS time,
            if(event = 'connected', toUInt8(log2(latency_us + 1)) + 1, 0) AS bucket
        FROM tcp_events
        WHERE
            event IN ('connect', 'connected') AND loopback = 0 AND is_asked(ts, at)
            AND (daddr, dport) GLOBAL NOT IN (
                SELECT daddr, dport
                FROM tcp_listeners
                WHERE is_near(hour)
            )
    ),
    -- Their other ends: accepts from there without a connect of the same ports
    dnat AS
    (
        SELECT *
        FROM
        (
            SELECT
                c.hour AS hour, c.client AS client, a.node AS server, c.daddr AS daddr,
                c.dport AS dport, c.time AS time, c.bucket AS bucket,
                cityHash64(a.host, a.saddr, a.sport, a.at) AS id,
                abs(dateDiff('microsecond', c.time, a.at)) AS apart
            FROM tcp_events AS a
            GLOBAL INNER JOIN astray AS c ON c.saddr = a.saddr AND c.sport = a.sport
            WHERE
                a.event = 'accept' AND apart <= 10000000
                AND is_near(toStartOfHour(a.ts))
                AND cityHash64(a.saddr, a.sport, a.daddr, a.dport) GLOBAL NOT IN (
                    SELECT cityHash64(saddr, sport, daddr, dport)
                    FROM tcp_events
                    WHERE
                        event IN ('connect', 'connected')
                        AND is_near(toStartOfHour(ts))
                        AND (saddr, sport) GLOBAL IN (SELECT saddr, sport FROM astray)
                )
            ORDER BY apart
            LIMIT 1 BY client, daddr, dport, time
        )
        ORDER BY apart
        LIMIT 1 BY id
    ),
    -- Lone accepts whose client was masqueraded
    snat AS
    (
        SELECT cityHash64(a.host, a.saddr, a.sport, a.time) AS id
        FROM tcp_events AS c
        GLOBAL INNER JOIN (SELECT * FROM lone WHERE sport != 0) AS a
            ON a.daddr = c.daddr AND a.dport = c.dport AND a.sport = c.sport
        WHERE
            c.event IN ('connect', 'connected') AND is_asked(c.ts, c.at)
            AND abs(dateDiff('microsecond', c.at, a.time)) <= 10000000
            AND cityHash64(c.saddr, c.daddr) GLOBAL NOT IN (
                SELECT cityHash64(saddr, daddr)
                FROM tcp_events
                WHERE
                    event IN ('accept', 'accepts') AND is_asked(ts, at)
                    AND saddr GLOBAL IN (SELECT address FROM owners)
            )
    ),
    -- By their ends; where one is unknown it is 0, and its address and the hour tell
    -- whose it may be
    edges AS
    (
        SELECT
            any(e.client) AS client, any(e.server) AS server, any(edge_hour) AS hour,
            any(edge_other) AS other, any(e.port) AS port, any(edge_local) AS local,
            any(e.bucket) AS bucket, sum(e.made) AS made, sum(e.started) AS started,
            sum(e.failures) AS failures, sum(e.ended) AS ended,
            min(e.first_seen) AS first_seen, max(e.last_seen) AS last_seen
        FROM
        (
            SELECT * FROM looked_up
            UNION ALL
            SELECT
                0, node, hour, saddr, dport, loopback, 0, toInt64(number), 0, 0, 0,
                time, time
            FROM lone
            WHERE cityHash64(host, saddr, sport, time) NOT IN (
                SELECT id FROM dnat UNION ALL SELECT id FROM snat
            )
            UNION ALL
            -- A connect that has a server even so
            SELECT
                client, part.1, part.2, part.3, dport, 0, bucket, part.4, 0, 0, 0,
                time, time
            FROM dnat
            ARRAY JOIN [
                (0, hour, daddr, -1),
                (server, toDateTime(0, 'UTC'), toIPv6('::'), 1)
            ] AS part
        ) AS e
        GROUP BY cityHash64(
            e.client, e.server, edge_hour, edge_other, e.port, edge_local, e.bucket
        )
    ),
    nodes AS
    (
        SELECT
            node, any(toString(host)) AS host, any(toString(unit)) AS unit,
            any(toString(name)) AS name
        FROM tcp_nodes
        WHERE is_near(hour)
        GROUP BY node
    ),
    -- With names, and the latency as it is stored
    named AS
    (
        SELECT
            c.host AS client, c.unit AS client_unit, c.name AS client_comm,
            s.host AS server, s.unit AS server_unit, s.name AS server_comm,
            if(edge.other = toIPv6('::'), '', replaceRegexpOne(
                toString(edge.other), '^::ffff:([0-9]+[.])', '\\1'
            )) AS address,
            multiIf(
                edge.other = toIPv6('::'), '',
                edge.local != 0 OR has(hosts, c.host || s.host), c.host || s.host,
                length(hosts) = 1, hosts[1],
                ''
            ) AS other_host,
            multiIf(edge.server = 0, 'client', edge.client = 0, 'server', 'both')
                AS known,
            edge.port AS port, connections, failures, latency, first_seen, last_seen
        FROM
        (
            SELECT
                client, server, hour, other, port, local,
                sum(made) + greatest(sum(started) - sum(ended), 0) AS connections,
                sum(edges.failures) AS failures,
                mapFromArrays(
                    groupArrayIf(bucket, bucket > 0 AND made > 0),
                    groupArrayIf(toUInt64(made), bucket > 0 AND made > 0)
                ) AS latency,
                min(edges.first_seen) AS first_seen, max(edges.last_seen) AS last_seen
            FROM edges
            GROUP BY client, server, hour, other, port, local
            -- Where nobody listens, an attempt that fails is no edge
            HAVING connections > 0 OR (failures > 0 AND server != 0)
        ) AS edge
        LEFT JOIN nodes AS c ON c.node = edge.client
        LEFT JOIN nodes AS s ON s.node = edge.server
        LEFT JOIN tcp_hosts(since = hour_before, until = hour_after) AS h
            ON h.hour = edge.hour AND h.address = edge.other
    )
SELECT
    client_host, client_unit, argMax(maps.client_comm, maps.connections) AS client_comm,
    client_address,
    server_host, server_unit, argMax(maps.server_comm, maps.connections) AS server_comm,
    server_address, port, known,
    sum(maps.connections) AS connections, sum(maps.failures) AS failures,
    sumMap(maps.latency) AS latency,
    if(
        empty(latency), NULL, toUInt64(exp2(arrayReduce(
            'quantileExactWeighted(0.5)', mapKeys(latency), mapValues(latency)
        ) - 0.5))
    ) AS latency_us_p50,
    if(
        empty(latency), NULL, toUInt64(exp2(arrayReduce(
            'quantileExactWeighted(0.99)', mapKeys(latency), mapValues(latency)
        ) - 0.5))
    ) AS latency_us_p99,
    min(maps.first_seen) AS first_seen, max(maps.last_seen) AS last_seen
FROM
(
    SELECT
        if(known = 'server', other_host, client) AS client_host, client_unit,
        client_comm, if(known = 'server', address, '') AS client_address,
        if(known = 'client', other_host, server) AS server_host, server_unit,
        server_comm, if(known = 'client', address, '') AS server_address, port, known,
        connections, failures, latency, first_seen, last_seen
    FROM named
    UNION ALL
    SELECT * EXCEPT hour
    FROM tcp_edges FINAL
    WHERE known != '' AND hour >= stored_since AND hour < stored_until
) AS maps
GROUP BY
    client_host, client_unit, if(client_unit = '', maps.client_comm, ''),
    client_address,
    server_host, server_unit, if(server_unit = '', maps.server_comm, ''),
    server_address, port, known;
