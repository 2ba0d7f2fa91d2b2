-- lost.sql  What the tools have missed and reported: there, the other queries' rows are
-- not complete.
SELECT host, reason, sum(count) AS events, min(ts) AS first_seen, max(ts) AS last_seen
FROM tcp_events FINAL
WHERE event = 'lost'
GROUP BY host, reason
ORDER BY events DESC, host, reason;
