"""What turns the sans-IO core into a running rank: the driver thread, the posting queue, metrics."""
