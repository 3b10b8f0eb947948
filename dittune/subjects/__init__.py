"""Several subjects: where each one is, and which rows may see which."""
