"""Static launch configurations, one table per op, keyed by GPU architecture. Nothing is tuned while serving."""
