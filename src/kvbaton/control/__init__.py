"""Control plane: message links between ranks, and the bootstrap registry that lets them find each other."""
