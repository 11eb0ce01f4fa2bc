"""Running trials: the pipeline, what it keeps on disk, and how processes share the work."""
