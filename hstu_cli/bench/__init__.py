"""What the commands measure: replays and, one file each, the benchmarks."""
