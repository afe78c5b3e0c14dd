"""Every family times every topology, proven token for token over real processes."""
