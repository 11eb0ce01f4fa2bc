"""The ``hts`` command: one module for each group of commands."""
