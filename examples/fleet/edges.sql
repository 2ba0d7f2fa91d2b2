-- edges.sql  Fills tcp_edges: stores the map of each hour, so that it outlives the
-- events. On a cluster, for one server, in the database fleet.
--
-- Each refresh stores one hour: the oldest that has events and comes after those that
-- are stored, if it ended two hours ago. So long may rows be on their way. After a
-- pause, the hours that are missing follow every 5 minutes, and none takes more memory
-- than the map of one hour. In the first half hour that the server is up, shippers send
-- what has waited meanwhile.
--
-- The row in which known is '' comes last, and says that the hour is stored. If a
-- server is killed in between, the hour is stored again, and its rows replace those
-- that are there.
CREATE MATERIALIZED VIEW IF NOT EXISTS tcp_edges_refresh
REFRESH EVERY 5 MINUTE APPEND TO tcp_edges AS
WITH
    greatest(
        (SELECT max(hour + INTERVAL 1 HOUR) FROM tcp_edges WHERE known = ''),
        toStartOfHour(now('UTC') - INTERVAL 7 DAY)
    ) AS first_hour,
    (
        SELECT min(hour)    -- 1970 if there is none
        FROM tcp_nodes
        WHERE hour >= first_hour AND hour < toStartOfHour(now('UTC') - INTERVAL 2 HOUR)
    ) AS next_hour
SELECT next_hour AS hour, *
FROM
(
    SELECT * EXCEPT (latency_us_p50, latency_us_p99)
    FROM tcp_map(since = next_hour, until = next_hour + INTERVAL 1 HOUR)
    UNION ALL
    SELECT '', '', '', '', '', '', '', '', 0, '', 0, 0, map(), next_hour, next_hour
)
WHERE next_hour >= first_hour AND uptime() >= 1800
ORDER BY connections DESC, known DESC
SETTINGS distributed_foreground_insert = 1;
