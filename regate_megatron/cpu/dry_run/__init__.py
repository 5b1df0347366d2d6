"""Run a cluster's launch line for a few steps on this machine's CPU, before the cluster is booked.

    python -m regate_megatron dry-run torchrun --nnodes 4 --nproc-per-node 8 -m regate_megatron SCRIPT <flags>
    python -m regate_megatron dry-run python -m torch.distributed.run … -m regate_megatron SCRIPT <flags>
    python -m regate_megatron dry-run --nproc 32 SCRIPT <flags>    for srun, mpirun and other launchers

Options, before the line: ``--nproc`` ranks of the cluster, where the line does not say; ``--max-ranks`` to start here;
``--timeout`` in seconds, 900.

Two checks. First, the line as it is: Megatron's own validation at the cluster's number of ranks, the model's settings,
ReGATE's refusals with the flags as given, the teacher's folder where this machine has it; all that is wrong is said
together. Then the same layout (tensor, pipeline, virtual pipeline, context, expert) runs on gloo ranks: a warm-up step,
a dense step, two sparse steps, an evaluation and a checkpoint, with a model shrunk where no layout decision depends on
it (:mod:`.shrink`) and without what needs a GPU (``emulation.arguments``). Where the layout is too large for this
machine, the largest of the same kinds runs. The expected time is said first; all that is written goes to a temporary
folder.

It ends with a summary of what was checked, what was shrunk or taken out and what no CPU can tell. A failure is one line
per reason and exit code 1.
"""

from regate_megatron.cpu.dry_run.command import main

__all__ = ["main"]
