"""From rows to tables and figures. Reads rows and nothing else, so every number shown can be traced; no torch."""
