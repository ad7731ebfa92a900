"""Numbers and values drawn from distributions that prompts name: exact and sampled metrics."""
