-- servicemap.sql  Service map: a row for each client, server and port, from `since` on
-- and before `until`. What the columns are is in schema.sql, at tcp_map.
SELECT *
FROM tcp_map(since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')})
ORDER BY
    client_host, client_comm, client_address,
    server_host, server_comm, server_address, port, nat;
