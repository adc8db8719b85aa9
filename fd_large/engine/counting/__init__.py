"""Costs of a task before it trains: counts on shapes, times on one device, and its micro batch."""
