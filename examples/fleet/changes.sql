-- changes.sql  What is new: the edges of the service map that begin from `since` on and
-- before `until`. The columns are those of servicemap.sql, and count from there on.
--
-- What was before is known from tcp_edges (edges.sql), up to 90 days back, and from the
-- events for the hours that are not stored there. What is in neither is new. Rows that
-- arrive after their hour was stored are not seen here.
--
-- An edge of which one end is not known is not new, if an edge from before may be the
-- same: it has the same process at the known end, the same port, and at the other end
-- the same host, or the same address where no host is named. An edge of which both ends
-- are known is not new, if its client's process connected to that host and port before,
-- and it was not known to which process.
WITH
    least(
        -- 1970 if there is none
        (SELECT max(hour + INTERVAL 1 HOUR) FROM tcp_edges WHERE known = ''),
        toStartOfHour({until:DateTime64(6, 'UTC')})
    ) AS stored_until,
    toDateTime64('2200-01-01 00:00:00', 6, 'UTC') AS never,
    edges AS
    (
        SELECT
            client_host, client_comm, client_address,
            server_host, server_comm, server_address, port, known,
            sum(maps.connections) AS connections,
            min(maps.first_seen) AS first_seen, max(maps.last_seen) AS last_seen,
            nat
        FROM
        (
            SELECT * EXCEPT hour
            FROM tcp_edges FINAL
            WHERE hour < stored_until AND known != ''
            UNION ALL
            SELECT *
            FROM tcp_map(since = stored_until, until = {until:DateTime64(6, 'UTC')})
        ) AS maps
        GROUP BY ALL
    ),
    edges_with_begin AS
    (
        SELECT
            *,
            if(client_host = '', client_address, client_host) AS client_place,
            if(server_host = '', server_address, server_host) AS server_place,
            multiIf(
                known = 'server', min(first_seen) OVER same_server,
                known = 'client', min(first_seen) OVER same_client,
                least(
                    min(first_seen) OVER same_processes,
                    min(if(known = 'client', first_seen, never)) OVER same_client
                )
            ) AS begin
        FROM edges
        WINDOW
            same_client AS (
                PARTITION BY
                    client_host, client_comm, client_address, server_place, port
            ),
            same_processes AS (     -- begins as same_client, which saves a sort
                PARTITION BY
                    client_host, client_comm, client_address, server_place, port,
                    known, server_comm
            ),
            same_server AS (
                PARTITION BY
                    client_place, server_host, server_comm, server_address, port
            )
    )
SELECT * EXCEPT (client_place, server_place, begin)
FROM edges_with_begin
WHERE begin >= {since:DateTime64(6, 'UTC')}
ORDER BY
    client_host, client_comm, client_address,
    server_host, server_comm, server_address, port, nat;
