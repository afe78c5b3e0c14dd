"""Measurements of the data plane against baselines in the same run: memcpy, raw NIXL, the leanest NIXL loop."""
