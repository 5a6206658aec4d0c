"""Stock engines against the same with memory: one runner for the engines' own benchmark tools. See ``app``."""
