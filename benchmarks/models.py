"""Megatron's own GPTModel and LLaVAModel in a size for one CPU core, batches for them, and their work by formula.

The decoder has SwiGLU, RMSNorm and grouped queries, as the models of today. Megatron is imported inside functions: the
emulation has to come first (:func:`start`).

Shapes: B rows, S positions of the merged row.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported

VOCAB = 8192


@dataclass(frozen=True)
class Size:
    """A model, and the batches it sees.

    Attributes:
        rows, length: B and S.
        image: visual positions of a LLaVA row; 0 for GPT.
        frames: pictures that these are of.
        prompt: text positions without loss.
    """

    rows: int = 2
    length: int = 512
    image: int = 0
    prompt: int = 64
    hidden: int = 512
    layers: int = 8
    heads: int = 4
    vocab: int = VOCAB
    vision_layers: int = 2
    frames: int = 1

    @property
    def kind(self) -> str:
        """The model's class, for a person."""
        return "LLaVA" if self.image else "GPT"

    @property
    def patches(self) -> tuple[int, int]:
        """Height and width of an image in patches."""
        return 8, self.image // self.frames // 8


def start(**layout: int) -> None:
    """Megatron on this CPU, one thread. Once per process, before anything else is imported.

    Args:
        layout: of ``initialize_model_parallel``, for the ranks that the environment tells of; without it one rank.
    """
    _keep_memory()
    from regate_megatron.cpu import emulation

    emulation.set_environment()
    emulation.install()
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    if layout:
        torch.distributed.init_process_group("gloo")
    else:
        torch.distributed.init_process_group(rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel(**layout)
    model_parallel_cuda_manual_seed(1234)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)  # GPTModel is deprecated, says every model


def _keep_memory() -> None:
    """Have freed memory kept for what is allocated next, as a GPU's caching allocator does.

    Else the C library gives every large array back to the system, and a quarter of a step is page faults: more of a
    dense step, whose arrays are larger.
    """
    trim_threshold, most_mmaps = -1, -4  # names of mallopt; a threshold of size for mmap would end at 32 MB
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, -1)  # never
        library.mallopt(most_mmaps, 0)


def build(size: Size) -> Any:
    """A model of this size; language and vision weights are random."""
    from megatron.core.enums import ModelType

    model = _llava(size) if size.image else language_model(size)
    model.model_type = ModelType.encoder_or_decoder  # as megatron.training sets it
    return model


def language_model(size: Size) -> Any:
    """The GPTModel of this size: the model itself, or the language model inside the LLaVAModel (its teacher too)."""
    from megatron.core.models.gpt import GPTModel

    return GPTModel(
        config=transformer_config(size),
        transformer_layer_spec=layer_spec(),
        vocab_size=size.vocab,
        max_sequence_length=size.length,
        position_embedding_type="rope",
    )


def _llava(size: Size) -> Any:
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    patch, (height, width) = 14, size.patches
    vision = transformer_config(size)
    vision.num_layers, vision.vision_model_type = size.vision_layers, "clip"
    return LLaVAModel(
        language_transformer_config=transformer_config(size),
        language_transformer_layer_spec=layer_spec(),
        language_vocab_size=size.vocab,
        language_max_sequence_length=size.length,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=True,
        vision_projection_config=transformer_config(size),
        vision_projection_layer_spec=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        language_position_embedding_type="rope",
        img_h=height * patch,
        img_w=width * patch,
        patch_dim=patch,
    )


def transformer_config(size: Size, **options: Any) -> Any:
    """The decoder's configuration; ``options`` are more fields of it."""
    import torch
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=size.layers,
        hidden_size=size.hidden,
        ffn_hidden_size=4 * size.hidden,
        num_attention_heads=size.heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **options,
    )


def layer_spec() -> Any:
    """Megatron's local layers: those that run on a CPU."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(normalization="RMSNorm")


def decoder_of(model: Any) -> Any:
    """The transformer block of the language model."""
    return getattr(model, "language_model", model).decoder


def forward_step_for(size: Size) -> Callable[..., Any]:
    """The step function that Megatron's schedule calls."""

    def gpt(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses, lambda output: mean_loss(output, batch["loss_mask"])

    def llava(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        losses, loss_mask = model(
            batch["image"], batch["tokens"], batch["position_ids"], None, batch["labels"], batch["loss_mask"]
        )
        return losses, lambda output: mean_loss(output, loss_mask)

    return llava if size.image else gpt


def mean_loss(output: Any, loss_mask: Any) -> tuple[Any, dict[str, Any]]:
    """Mean over the targets in the mask."""
    loss = (output.float() * loss_mask).sum() / loss_mask.sum()
    return loss, {"lm loss": loss.detach()}


def make_batch(size: Size, seed: int) -> dict[str, Any]:
    """Random tokens; a LLaVA row starts with its images, the next ``prompt`` positions have no loss."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    frames = size.frames if size.image else 0
    length = size.length - size.image + frames  # a placeholder is one token
    token_BS = torch.randint(0, size.vocab, (size.rows, length + 1), generator=generator)
    loss_mask_BS = torch.ones(size.rows, length)
    loss_mask_BS[:, : size.prompt + frames] = 0
    batch = {
        "tokens": token_BS[:, :-1].contiguous(),
        "labels": token_BS[:, 1:].contiguous(),
        "loss_mask": loss_mask_BS,
        "position_ids": torch.arange(length).expand(size.rows, -1).contiguous(),
    }
    if size.image:
        from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX

        batch["tokens"][:, :frames] = DEFAULT_IMAGE_TOKEN_INDEX
        height, width = size.patches
        batch["image"] = torch.randn(size.rows * frames, 3, 14 * height, 14 * width, generator=generator)
    return batch
