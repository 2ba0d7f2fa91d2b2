-- servicemap.sql  Service map: a row for each client, server and port, from `since` on
-- and before `until`. What the columns are is in schema.sql, at tcp_map.
SELECT * EXCEPT latency
FROM tcp_map(since = {since:DateTime64(6, 'UTC')}, until = {until:DateTime64(6, 'UTC')})
ORDER BY ALL;
