"""What examples/multimodal/train.py reads: a data set in energon's format, a tokenizer, and flags of a small model.

python tests/scripts/multimodal.py FOLDER
"""

from __future__ import annotations

import io
import runpy
import sys
import tarfile
from pathlib import Path

WORDS = (
    "red green blue grey small large round square cat dog tree house car boat left right above below near far".split()
)
SAMPLES = 8
ANSWER = 15  # words, and an end
TARGETS_PER_STEP = 2 * (ANSWER + 1)


def write_tokenizer(folder: Path) -> None:
    """A Hugging Face tokenizer of whole words, with the special tokens of the mistral format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=special[3:], **names)
    fast.save_pretrained(folder)


def write_dataset(folder: Path) -> None:
    """Captioned pictures in two shards, and energon's metadata."""
    import numpy as np
    from megatron.energon.flavors import BaseWebdatasetFactory
    from PIL import Image

    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(SAMPLES // 2):
                picture, png = Image.fromarray(generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)), io.BytesIO()
                picture.save(png, "png")
                caption = " ".join(generator.choice(WORDS, ANSWER))
                for name, content in (("png", png.getvalue()), ("txt", caption.encode())):
                    entry = tarfile.TarInfo(f"{shard}{index:03d}.{name}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    ratios = [("train", 1), ("val", 1)]
    BaseWebdatasetFactory.prepare_dataset(folder, ["0.tar", "1.tar"], split_parts_ratio=ratios, workers=1)
    (folder / ".nv-meta/dataset.yaml").write_text(
        "sample_type: {__module__: megatron.energon, __class__: CaptioningSample}\n"
        "field_map: {image: png, caption: txt}\n"
    )


def flags(folder: Path, checkout: Path) -> list[str]:
    """A command line of the script, without iterations.

    Its language models bring their own MLP sizes. No evaluation: upstream's on a test set ends in a traceback.
    """
    return f"""--language-model-type mistral_7b --vision-model-type clip --disable-vision-class-token --freeze-ViT
 --img-h 28 --img-w 28 --patch-dim 14 --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 4
 --ffn-hidden-size 14336 --decoder-seq-length 64 --max-position-embeddings 64 --dataloader-seq-length 40
 --normalization LayerNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
 --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
 --tokenizer-type MultimodalTokenizer --tokenizer-model {folder / "tokenizer"} --tokenizer-prompt-format mistral
 --data-path {folder / "captions"} --prompt-path {checkout / "examples/multimodal/manual_prompts.json"}
 --dataloader-type external --num-workers 0 --bf16 --micro-batch-size 2 --global-batch-size 2 --lr 1e-3 --split 100,0,0
 --eval-iters 0 --eval-interval 100 --log-interval 1 --ckpt-format torch --make-vocab-size-divisible-by 16
 --calculate-per-token-loss""".split()


def run(script: str) -> None:
    """Run train.py with its tokenizer's path mended."""
    from megatron.core.tokenizers import MegatronTokenizer

    original = MegatronTokenizer.from_pretrained

    def from_pretrained(tokenizer_path: str | None = None, **options: object) -> object:
        return original(tokenizer_path or sys.argv[sys.argv.index("--tokenizer-model") + 1], **options)

    MegatronTokenizer.from_pretrained = staticmethod(from_pretrained)
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    run(sys.argv.pop(1))
