"""Recovery: training what a mask keeps, with the mask as it is, towards the dense model."""
