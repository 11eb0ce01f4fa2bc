"""``python -m experiments`` is ``hts`` without its commands for clusters, also under ``torchrun``."""

from experiments.cli.app import main

if __name__ == "__main__":
    main()
