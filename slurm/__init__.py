"""Sweeps on a Slurm cluster through submitit. The launcher is yet to come; `hts run` shares a study between jobs."""
