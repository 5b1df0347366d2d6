"""The launcher with a fault in it: the last rank gets another plan than the one its planner sent.

torchrun --nproc-per-node 4 tests/multiprocess/run_diverged.py --cpu SCRIPT FLAGS
"""

import os
import sys

from regate_megatron.method.plan import StepPlan

received = StepPlan.unpack


def unpack(flat):
    plan = received(flat)
    if plan.is_sparse:
        plan.microbatches[-1].keep_idx_BK[-1, -1] += 1
    return plan


if __name__ == "__main__":
    if os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        StepPlan.unpack = unpack
    from regate_megatron.__main__ import main

    main(sys.argv[1:])
