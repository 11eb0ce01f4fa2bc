"""``python -m experiments`` is ``hts``, also under ``torchrun``."""

from experiments.cli.app import main

if __name__ == "__main__":
    main()
