#!/usr/bin/env python3
"""Fill a reference-loss cache before training: the training command, with this in the place of ``-m regate_megatron``.

    torchrun --nproc-per-node 8 tools/precompute_references.py pretrain_vlm.py <your flags> \\
        --regate --regate-teacher-load TEACHER --regate-reference-cache DIR

It reads as many iterations as the script would train (--train-iters), in the script's own order, and scores what the
cache lacks. Run again after a stop, it goes on where it was. Training with the same --regate-reference-cache then never
builds the teacher. ``--cpu`` before the script runs it without a GPU.
"""

from __future__ import annotations

import sys

from regate_megatron.__main__ import main
from regate_megatron.config import ReGateConfig
from regate_megatron.errors import refuse


def fill_the_cache(config: ReGateConfig) -> None:
    """Replace the training loop."""
    from regate_megatron.integrations import precompute

    precompute.install(config)


if __name__ == "__main__":
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0)
    if "--regate" not in words:
        print(
            refuse("command line", given="no --regate", allowed="the training command", change="it: add --regate"),
            file=sys.stderr,
        )
        sys.exit(1)
    main(words, fill_the_cache)
