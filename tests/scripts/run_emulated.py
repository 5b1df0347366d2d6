"""Run a Megatron-LM script on CPU as plain ``torchrun SCRIPT`` would on a GPU: the emulation, and nothing of ReGATE."""

import runpy
import sys
from pathlib import Path

from regate_megatron.cpu import emulation

if __name__ == "__main__":
    emulation.set_environment()
    script = sys.argv[1]
    sys.path[0] = str(Path(script).parent)
    emulation.install()
    sys.argv = [script, *emulation.adjust_arguments(sys.argv[2:])]
    runpy.run_path(script, run_name="__main__")
    emulation.leave()
