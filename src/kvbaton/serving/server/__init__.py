"""HTTP: the API servers of prefill and decode, the router in front of them, and what assembles a server."""
