-- unknown.sql  Connections with peers outside the fleet, from `since` on and before
-- `until`: accepts whose client is no host of it, and connects whose server is none.
--
-- An address is of the fleet if a host has it as its own in any of the hours. So these
-- are external hosts, or hosts whose rows are missing.
SELECT edges.* EXCEPT other
FROM
(
    SELECT
        if(known = 'client', 'connect', 'accept') AS event,
        if(known = 'client', client_host, server_host) AS host,
        if(known = 'client', client_unit, server_unit) AS unit,
        if(known = 'client', client_comm, server_comm) AS comm,
        if(known = 'client', server_address, client_address) AS address,
        toIPv6(address) AS other,
        port, connections, first_seen, last_seen
    FROM tcp_map(
        since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
    )
    WHERE known != 'both' AND (client_host = '' OR server_host = '')
) AS edges
LEFT ANTI JOIN tcp_hosts(
    since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')}
) AS own ON own.address = edges.other
ORDER BY ALL;
