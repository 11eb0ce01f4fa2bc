"""Tables from points and rows, and how they are written."""
