"""What a machine can do at most: memory, launches, the event loop."""
