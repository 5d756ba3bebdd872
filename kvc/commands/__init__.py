"""Commands without a Trainer."""
