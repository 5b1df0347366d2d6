"""What the command lines of the checkpoint tools share."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable

import torch
from tqdm import tqdm

from regate_megatron.checkpoints.arguments import DEFAULT_DIVISOR
from regate_megatron.checkpoints.families import allowed_families
from regate_megatron.checkpoints.to_huggingface import ToHuggingFace
from regate_megatron.checkpoints.to_megatron import ToMegatron
from regate_megatron.checkpoints.writing import Plan, check_target
from regate_megatron.checkpoints.writing import write as write_folder
from regate_megatron.errors import ReGateError, refuse

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parser(description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with ``--target``, ``--overwrite`` and ``--dry-run``."""
    made = argparse.ArgumentParser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--target", required=True, metavar="DIR", help="folder to write")
    made.add_argument("--overwrite", action="store_true", help="replace a checkpoint at the target")
    made.add_argument("--dry-run", action="store_true", help="check everything and say what would be written")
    return made


def add_megatron_options(made: argparse.ArgumentParser) -> None:
    """Options of conversions to Megatron."""
    group = made.add_argument_group("to Megatron")
    group.add_argument(
        "--tensor-model-parallel-size",
        type=positive,
        default=1,
        metavar="N",
        help="of the runs that will load it: only the padding of the vocabulary depends on it (default 1)",
    )
    group.add_argument(
        "--make-vocab-size-divisible-by",
        type=positive,
        default=DEFAULT_DIVISOR,
        metavar="N",
        help=f"of these runs; 1 pads least (default {DEFAULT_DIVISOR}, as Megatron)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="convert the weights to this type (default: as they are)")


def add_huggingface_options(made: argparse.ArgumentParser) -> None:
    """Options of conversions to Hugging Face."""
    group = made.add_argument_group("to Hugging Face")
    group.add_argument("--like", metavar="HF_DIR", help="Hugging Face folder whose config and tokenizer are right")
    group.add_argument(
        "--family", help=f"model_type to name where the config is made from Megatron's arguments: {allowed_families()}"
    )
    group.add_argument("--vocab-size", type=positive, metavar="N", help="rows of the embedding to keep")


MEGATRON_OPTIONS = ("tensor_model_parallel_size", "make_vocab_size_divisible_by", "dtype")
HUGGINGFACE_OPTIONS = ("like", "family", "vocab_size")


def refuse_options(options: argparse.Namespace, names: Iterable[str], *, where: str) -> None:
    """Refuse options that would have no effect.

    Args:
        names: of the options, as argparse stores them.
        where: in what they have none.

    Raises:
        ReGateError: one of them was given.
    """
    for name in names:
        if name in options.changed:
            form = {"allowed": "nothing there", "change": "the command: remove it"}
            raise refuse("--" + name.replace("_", "-"), given=f"{getattr(options, name)} {where}", **form)


def run(made: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Parse and work; a refusal is one line on standard error and exit code 1."""
    options = made.parse_args(argv)
    options.changed = [name for name, value in vars(options).items() if value != made.get_default(name)]
    try:
        with warnings.catch_warnings():
            # what Megatron says of a machine without GPU, where it is asked for the classes of its arguments
            warnings.filterwarnings("ignore", module=r"megatron\.")
            work(options)
    except ReGateError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("regate: interrupted; nothing was written", file=sys.stderr)
        return 130
    except MemoryError:
        print(
            refuse("memory", given="too little", allowed="room for one output shard", change="the machine"),
            file=sys.stderr,
        )
        return 1
    return 0


def write(plan: Plan, options: argparse.Namespace, about: str, what: str) -> bool:
    """Check the target, say what is written and write it under a progress bar of bytes (on terminals only).

    Args:
        about: what is written, in a line for people.
        what: the bar's label.

    Returns:
        whether it was; False in a dry run.

    Raises:
        ReGateError: see ``writing.write``.
    """
    check_target(plan, options.target, overwrite=options.overwrite)
    print(about)
    if options.dry_run:
        print(f"dry run: nothing written to {options.target}")
        return False
    with tqdm(total=plan.num_bytes, unit="B", unit_scale=True, desc=what, disable=None) as bar:
        write_folder(plan, options.target, overwrite=options.overwrite, progress=bar.update)
    return True


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def write_megatron(plan: ToMegatron, options: argparse.Namespace, flag: str = "--regate-teacher-load") -> None:
    """Say what is converted, write it unless this is a dry run, and print Megatron's flags for it.

    Args:
        flag: what loads the result.
    """
    model, arguments = plan.model, plan.arguments
    about = (
        f"{model.architecture.family.name} in {plan.source}: {plan.num_parameters:,} parameters, "
        f"{plan.num_bytes / 1e6:,.1f} MB; vocabulary {arguments.padded_vocab_size}"
    )
    if plan.padding:
        about += f" ({plan.padding} rows of zeros added; --make-vocab-size-divisible-by 1 adds least)"
    if model.architecture.max_positions < model.config.get("max_position_embeddings", 0):
        about += f"\nits window: equal to the original for sequences up to {model.architecture.max_positions}"
    if write(plan, options, about, "converting"):
        target = shlex.quote(options.target)
        way = "in Megatron-LM with" if flag == "--load" else f"with {flag} {target}, or in Megatron-LM with"
        print(f"wrote {options.target}; use it {way}")
        print(f"  --load {target} --ckpt-format torch_dist --finetune")
    print("its flags:")
    print(f"  {shlex.join(plan.flags)} --tokenizer-type HuggingFaceTokenizer --tokenizer-model {options.target}")


def write_huggingface(plan: ToHuggingFace, options: argparse.Namespace) -> None:
    """Say what is exported, and write it unless this is a dry run."""
    tokenizer = any(file.name.startswith(("tokenizer", "vocab")) or file.suffix == ".model" for file in plan.companions)
    about = (
        f"{plan.source} as {plan.config['architectures'][0]}: {len(plan.sizes)} tensors, "
        f"{plan.num_bytes / 1e6:,.1f} MB; vocabulary: {plan.architecture.vocab_size} of "
        f"{plan.language_model.vocab_size} rows; tokenizer: {'copied' if tokenizer else 'none found, copy it yourself'}"
    )
    if write(plan, options, about, "converting"):
        print(f"wrote {options.target}")
