"""Programs that `benchmarks.worker` starts, each with what it needs and nothing of pgjax: `python -m benchmarks.peers.NAME`."""
