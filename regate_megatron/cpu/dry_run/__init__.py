"""Run a cluster's launch line for a few steps on this machine's CPU, before the cluster is booked.

    python -m regate_megatron dry-run torchrun --nnodes 4 --nproc-per-node 8 -m regate_megatron SCRIPT <flags>
    python -m regate_megatron dry-run --nproc 32 SCRIPT <flags>

Options, before the line: ``--nproc`` ranks of the cluster, where the line does not say; ``--max-ranks`` to start here;
``--timeout`` in seconds, 900.

Two checks. First, the line as it is: Megatron's own validation at the cluster's number of ranks, the model's settings,
ReGATE's refusals, the teacher's folder. Then the same layout (tensor, pipeline, virtual pipeline, context, expert) runs
on gloo ranks: a warm-up step, a dense step, two sparse steps, an evaluation and a checkpoint, with a model shrunk where
no layout decision depends on it (:mod:`.shrink`). What the run writes goes to a temporary folder.

It ends with a summary of what was checked, what was shrunk and what no CPU can tell. A failure is one line and exit
code 1.
"""

from regate_megatron.cpu.dry_run.command import main

__all__ = ["main"]
