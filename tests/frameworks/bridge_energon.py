"""Rows of the Qwen-VL tests by way of Megatron-energon, in Bridge's own data module, batch by batch or packed.

None of Bridge's task encoders packs samples: energon wants ``select_samples_to_pack`` and ``pack_selected_samples`` of
one before it takes ``packing_buffer_size``. The encoder here is Bridge's, with these two.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.data.base import DatasetProvider
from megatron.bridge.data.energon.base_energon_datamodule import EnergonMultiModalDataModule
from megatron.bridge.data.energon.hf_task_encoder import HFEnergonSample, HFTaskEncoder
from megatron.bridge.data.energon.nemotron_omni_task_encoder import NemotronOmniTaskEncoder
from megatron.bridge.models.qwen_vl.data.energon import QwenVLTaskEncoder
from megatron.energon import TextSample
from megatron.energon.flavors import BaseWebdatasetFactory
from megatron.energon.task_encoder.base import stateless

from tests.frameworks import bridge_models

COUNT, BUFFER = 24, 8


class Encoder(HFTaskEncoder):
    """A sample is the number of a row; batches are what the rows' own collators make."""

    def __init__(self, rows: type[bridge_models.PictureRows]) -> None:
        super().__init__(processor=None, seq_length=bridge_models.TEXT, collate_fn=self.collated)
        self.rows = rows

    def collated(self, examples: list[dict[str, Any]], *_: Any, **__: Any) -> dict[str, Any]:
        rows = self.rows(COUNT)
        return self.rows.collate_fn([rows[number] for one in examples for number in one["rows"]])

    @stateless
    def encode_sample(self, sample: TextSample) -> HFEnergonSample:
        return HFEnergonSample(sample.__key__, sample.__subflavors__, {"rows": [int(sample.text)]})


class PackingEncoder(Encoder):
    """Two samples become one."""

    def select_samples_to_pack(self, samples: list[HFEnergonSample]) -> list[list[HFEnergonSample]]:
        return [samples[start : start + 2] for start in range(0, len(samples), 2)]

    @stateless
    def pack_selected_samples(self, samples: list[HFEnergonSample]) -> HFEnergonSample:
        rows = [number for one in samples for number in one.example["rows"]]
        return HFEnergonSample(",".join(one.__key__ for one in samples), samples[0].__subflavors__, {"rows": rows})


@dataclass(kw_only=True)
class EnergonData(DatasetProvider):
    """Bridge's contract for a dataset of one's own, with iterators that give batches."""

    folder: str
    rows: type[bridge_models.PictureRows]
    packing_buffer_size: int | None = None
    micro_batch_size: int = 2
    seq_length: int = bridge_models.TEXT
    skip_getting_attention_mask_from_dataset: bool = True

    def build_datasets(self, context: Any) -> tuple[Any, None, None]:
        encoder = PackingEncoder if self.packing_buffer_size else Encoder
        return iter(self.module(encoder(self.rows), context).train_dataloader()), None, None

    def module(self, encoder: Any, context: Any) -> EnergonMultiModalDataModule:
        return EnergonMultiModalDataModule(
            path=self.folder,
            tokenizer=context.tokenizer,
            task_encoder=encoder,
            micro_batch_size=1 if self.packing_buffer_size else self.micro_batch_size,
            num_workers=0,
            shuffle_buffer_size=None,
            packing_buffer_size=self.packing_buffer_size,
            pg_collection=context.pg_collection,
        )


def write(folder: Path) -> None:
    """A shard of numbers, and energon's metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(COUNT):
            entry = tarfile.TarInfo(f"{number:03d}.txt")
            entry.size = len(content := str(number).encode())
            tar.addfile(entry, io.BytesIO(content))
    BaseWebdatasetFactory.prepare_dataset(folder, ["0.tar"], split_parts_ratio=[("train", 1)], workers=1)
    (folder / ".nv-meta/dataset.yaml").write_text(
        "sample_type: {__module__: megatron.energon, __class__: TextSample}\nfield_map: {text: txt}\n"
    )


def said_of_bridge_s_own() -> dict[str, str]:
    """What energon says to each of Bridge's task encoders that is to pack."""
    said = {}
    for kind in (HFTaskEncoder, QwenVLTaskEncoder, NemotronOmniTaskEncoder):
        encoder = object.__new__(kind)
        try:
            encoder.build_batch(None, batch_size=1, packing_buffer_size=BUFFER, worker_config=None)
            said[kind.__name__] = "nothing"
        except AssertionError as refusal:
            said[kind.__name__] = str(refusal)
    return said
