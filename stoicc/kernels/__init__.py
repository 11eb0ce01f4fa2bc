"""The kernels, one file per instruction family."""
