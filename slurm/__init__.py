"""Sweeps: a study as jobs on a Slurm cluster, on this machine, or in this process.

`cluster` says where and with which resources, `plan` what is to be done in which order, `batches` what was submitted,
`queue` what Slurm says about it, `submit` puts a plan into jobs, `task` is what a job does, `status` tells how far a
study is.
"""
