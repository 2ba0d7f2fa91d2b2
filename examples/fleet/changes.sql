-- changes.sql  What is new: the edges of the service map that begin from `since` on and
-- before `until`. The columns are those of servicemap.sql, and count from there on.
--
-- Clients and servers are compared by their service: a unit, or else the process; a
-- container without its ID, and the process. What was before is known from tcp_edges
-- (edges.sql), up to 90 days back, and from the events for later hours. What is in
-- neither is new. Rows that arrive after their hour was stored are not seen here.
--
-- An edge of which one end is not known is not new, if an edge from before may be the
-- same: it has the same service at the known end, the same port, and at the other end
-- the same host, or the same address where no host is named. An edge of which both ends
-- are known is not new, if its client connected to that host and port before, and it
-- was not known to which service.
WITH
    toDateTime64('2200-01-01 00:00:00', 6, 'UTC') AS never,
    (unit, comm) -> multiIf(
        unit = '', comm,
        match(unit, '(^|-)[0-9a-f]{12}$'), concat(substring(unit, 1, -12), ' ', comm),
        unit
    ) AS service,
    edges AS
    (
        SELECT
            * EXCEPT latency,
            service(client_unit, client_comm) AS client,
            service(server_unit, server_comm) AS server,
            if(client_host = '', client_address, client_host) AS client_place,
            if(server_host = '', server_address, server_host) AS server_place
        FROM tcp_map(
            since = '1970-01-01 00:00:00', until = {until:DateTime64(6, 'UTC')}
        )
    ),
    edges_with_begin AS
    (
        SELECT
            *,
            multiIf(
                known = 'server', min(first_seen) OVER same_server,
                known = 'client', min(first_seen) OVER same_client,
                least(
                    min(first_seen) OVER same_services,
                    min(if(known = 'client', first_seen, never)) OVER same_client
                )
            ) AS begin
        FROM edges
        WINDOW
            same_client AS (
                PARTITION BY client_place, client, server_place, port
            ),
            same_services AS (      -- begins as same_client, which saves a sort
                PARTITION BY client_place, client, server_place, port, known, server
            ),
            same_server AS (PARTITION BY client_place, server_place, server, port)
    )
SELECT * EXCEPT (client, server, client_place, server_place, begin)
FROM edges_with_begin
WHERE begin >= {since:DateTime64(6, 'UTC')}
ORDER BY ALL;
