"""The report: one HTML page of findings, tables and figures."""
