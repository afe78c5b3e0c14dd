"""What the router's policies are worth: cache hits, throughput and skew of each, in front of the same servers."""
