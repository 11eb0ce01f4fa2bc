"""Rows as they lie on disk, and the points of tables and figures that they are gathered into."""
