"""A task counted on shapes, timed on one device, and its micro batch chosen, before it trains."""
