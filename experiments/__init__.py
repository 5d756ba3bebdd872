"""Grid files, benchmarks and notes; see LOG.md."""
