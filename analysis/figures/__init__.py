"""Figures from rows: each draws one kind; `study` chooses those of a study."""
