"""Running hybrid weights on sparse tensor cores. The packed format and the kernels are yet to come."""
