"""What happens around training: results, progress, throughput."""
