"""Models and texts, from the hub, a data directory or this package."""
