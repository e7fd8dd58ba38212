"""Lanes: in-order queues of updates that run beside each other."""
