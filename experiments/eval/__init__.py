"""Perplexity and tasks."""
