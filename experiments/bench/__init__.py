"""What is timed: kernels, whole models, soft masks, learning."""
