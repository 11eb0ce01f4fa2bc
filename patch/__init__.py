"""Learning and pruning hybrid tile masks: PATCH, MaskLLM, and the one-shot baselines."""
