"""What several benchmarks share: servers and their engines, a chat client, statistics, result files."""
