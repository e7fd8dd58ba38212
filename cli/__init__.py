"""The command `hogstream`: one file a command, and what commands share."""
