"""Real SGLang processes with kvbaton's transfer backend: tokens against one plain instance, and failures."""
