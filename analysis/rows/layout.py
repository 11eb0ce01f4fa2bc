"""Where things lie in a results directory; nowhere else are these names spelled.

::

    trials.jsonl, facts.csv, details/   the rows that were published (`analysis.rows.published`); as good as those below
    rows/<trial>/definition.json        what the trial is
    rows/<trial>/<stage>.jsonl          one measured fact a line; there when the stage is complete, never edited
    rows/<trial>/<stage>.jsonl.damaged  what was found cut off or changed, before it was measured again
    rows/<trial>/failure.jsonl          why the last attempt failed, with its traceback; gone when one succeeds
    bench/<gpu>/...                     rows of benches, published or not
    checkpoints/<pruning>/              the hybrid checkpoint that the trials of this pruning evaluate
    packed/<content>/                   the packed checkpoint of a checkpoint of this content hash
    work/<pruning>/                     learner state of an unfinished pruning, and its TensorBoard log
    tokens/                             tokenised texts that learning draws from
    reports/<study>/                    tables and figures
    sweeps/<study>/                     what was submitted to a cluster (`slurm.batches`), with its logs
    locks/                              leases of running processes (`patch.leases`)
"""

TRIALS, FACTS, DETAILS = "trials.jsonl", "facts.csv", "details"
ROWS, DEFINITION = "rows", "definition.json"
BENCH = "bench"
CHECKPOINTS = "checkpoints"
PACKED = "packed"
WORK = "work"
TOKENS = "tokens"
REPORTS = "reports"
SWEEPS = "sweeps"
LOCKS = "locks"
