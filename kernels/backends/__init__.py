"""The backends: one file a backend, and how one is chosen."""
