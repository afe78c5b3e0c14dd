"""Real vLLM processes with kvbaton's connector: tokens against one plain instance, and failures."""
