-- lost.sql  Events that the tools reported as lost, from `since` on and before `until`:
-- for these hosts, the other results are incomplete.
SELECT host, reason, sum(count) AS events, min(ts) AS first_seen, max(ts) AS last_seen
FROM tcp_events FINAL
WHERE
    event = 'lost'
    AND ts >= {since:DateTime64(6, 'UTC')} AND ts < {until:DateTime64(6, 'UTC')}
    AND toStartOfHour(ts) >= toStartOfHour({since:DateTime64(6, 'UTC')})
    AND toStartOfHour(ts) <= toStartOfHour({until:DateTime64(6, 'UTC')})
GROUP BY host, reason
ORDER BY events DESC, host, reason;
