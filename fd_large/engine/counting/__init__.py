"""Finds what a task costs before it trains: operations, times on a device, largest micro batch."""
