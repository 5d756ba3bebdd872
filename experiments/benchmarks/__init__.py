"""Side-by-side timings: `python -m experiments.benchmarks.NAME --out FILE.json`."""
