"""Where ranks are found: a prefill server's registry, its client, and which decode rank meets which prefill rank."""
