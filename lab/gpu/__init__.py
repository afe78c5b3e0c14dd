"""What only a GPU shows: memory of a device over NIXL, its kernels, its engine, its fences that raise."""
