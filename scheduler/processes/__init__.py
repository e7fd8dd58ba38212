"""Workers as processes, over shared memory."""
