"""Finds a task's costs before it trains: operations, times on one device, largest micro batch."""
