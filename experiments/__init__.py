"""Experiments: definitions, the models and texts they name, the trial pipeline, and the `hts` command."""
