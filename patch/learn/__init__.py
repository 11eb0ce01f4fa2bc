"""Masks learned with frozen weights: recipes, soft masks, the learner."""
