"""Side by side with the peers: speed, size and quality. Run `python -m benchmarks minilm --data DIR`."""
