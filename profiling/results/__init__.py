"""Results: their types, their statistics, and two beside each other."""
