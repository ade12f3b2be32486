"""Programs that `benchmarks.worker` starts, which import nothing of pgjax: `python -m benchmarks.peers.NAME`."""
