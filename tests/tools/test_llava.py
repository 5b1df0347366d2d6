"""tools/import_student.py and export_student.py on a whole LLaVA: Megatron's computes what Hugging Face's does,
and what Megatron saves of it comes back bit for bit; where there is no such model, the tools say why."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch.distributed import checkpoint

from regate_megatron.checkpoints.torch_dist import TorchDistReader
from tests.launch import succeed
from tests.tools.helpers import SMALL, assert_same_bits, edit_config, fill, refusal, run, tensors, tool

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
QUICK = {"text": "llama", "vision_feature_layer": -2}
PLAIN = {"text": "qwen2", "vision_feature_layer": 3, "hidden_act": "gelu", "tie_word_embeddings": True}
PLAIN |= {"vision_feature_select_strategy": "full", "multimodal_projector_bias": False, "layer_norm_eps": 1e-3}
MODELS = {"llama-quick-gelu-no-class-token": QUICK, "qwen2-tied-gelu-class-token-no-bias": PLAIN}
_UNUSED = ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm.")


def write_llava(folder, *, text, hidden_act="quick_gelu", layer_norm_eps=1e-5, tie_word_embeddings=False, **options):
    import transformers

    vision = VISION | {"hidden_act": hidden_act, "layer_norm_eps": layer_norm_eps}
    words = SMALL | {"model_type": text, "tie_word_embeddings": tie_word_embeddings}
    more = {"image_token_index": 59, "tie_word_embeddings": tie_word_embeddings, **options}
    config = transformers.LlavaConfig(vision_config=vision, text_config=words, **more)
    fill(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """NAME/hf, NAME/megatron as imported, NAME/saved by Megatron; results.json."""
    root = tmp_path_factory.mktemp("llava")
    cases = []
    for name, options in MODELS.items():
        (root / name).mkdir()
        hf = write_llava(root / name / "hf", **options)
        target = ["--target", root / name / "megatron", "--transformer-impl", "local"]
        run(tool("import_student"), "--source", hf, *target, "--tensor-model-parallel-size", 2)
        cases.append({"hf": str(hf), "megatron": str(root / name / "megatron"), "save": str(root / name / "saved")})
    (root / "cases.json").write_text(json.dumps(cases))
    succeed(2, ["tests/tools/run_llava.py", root / "cases.json", root / "results.json"])
    return root


@pytest.fixture(scope="module")
def export():
    return tool("export_student")


def _exported(root, name, tmp_path, *more):
    run(tool("export_student"), "--source", root / name / "saved", "--target", tmp_path / "again", *more)
    return tmp_path / "again"


@pytest.mark.parametrize("name", MODELS)
def test_logits_on_an_image_and_text_equal_those_of_transformers(root, name):
    result = json.loads((root / "results.json").read_text())[[*MODELS].index(name)]
    assert result["scale"] > 0.5 and result["of_the_image"] > 0.1, "weights too small to tell"
    assert result["difference"] < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_what_megatron_saved_comes_back_bit_for_bit_and_computes_the_same(root, name, tmp_path):
    import transformers

    again = _exported(root, name, tmp_path, "--like", root / name / "hf", "--part", "all")
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    (before, _), (after, info) = (
        load(folder, dtype=torch.float32, output_loading_info=True) for folder in (root / name / "hf", again)
    )
    assert not any(info.values()), info
    found, want = after.state_dict(), before.state_dict()
    unused = {key for key in want if key not in found or "post_layernorm" in key}
    assert unused == {key for key in want if key.removeprefix("model.").startswith(_UNUSED[name.startswith("qwen2") :])}
    assert_same_bits({k: v for k, v in found.items() if k not in unused}, {k: want[k] for k in want.keys() - unused})
    images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[5, *[59] * after.config.image_seq_length, 7, 8]])
    with torch.no_grad():
        assert torch.equal(before(ids, images).logits, after(ids, images).logits)
    assert (again / "preprocessor_config.json").is_file()


def test_language_model_alone_on_demand_and_where_nothing_says_what_the_tower_was(root, export, tmp_path, capsys):
    name, *_ = MODELS
    language = {k: v for k, v in tensors(root / name / "hf").items() if k.startswith("language_model.")}
    language = {k.removeprefix("language_model."): v for k, v in language.items()}
    for number, more in enumerate((["--like", root / name / "hf", "--part", "language-model"], ["--vocab-size", 60])):
        capsys.readouterr()
        target = tmp_path / str(number)
        run(export, "--source", root / name / "saved", "--target", target, *more)
        assert_same_bits(tensors(target), language)
    assert "the language model only" in (said := capsys.readouterr().out) and "without --like" in said
    options = ["--source", root / name / "saved", "--target", tmp_path / "new", "--part", "all", "--vocab-size", 60]
    assert "without --like" in refusal(export, capsys, *options)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"lose": "vision_model.class_token"}, "it has no vision_model.class_token"),
        ({"lose": "vision_model.ln_pre.bias"}, "it has no vision_model.ln_pre.bias"),
        ({"add": "vision_model.conv1.bias"}, "it has vision_model.conv1.bias"),
        ({"add": "vision_projection.encoder.linear_fc1.layer_norm_weight"}, "linear_fc1.layer_norm_weight"),
        ({"resize": "vision_projection.encoder.linear_fc1.weight"}, "whose projector is 64 wide"),
        ({"resize": "vision_model.decoder.layers.mlp.linear_fc1.weight"}, "gated"),
        ({"pixel_shuffle": True}, "--pixel-shuffle"),
        ({"vision_model_type": "siglip"}, "--vision-model-type siglip"),
        ({"img_h": 14}, "not square"),
    ],
)
def test_a_model_that_hugging_face_has_not_gives_its_language_model_and_the_reason(
    root, export, tmp_path, capsys, change, why
):
    name, *_ = MODELS
    source = _altered(root / name / "saved", tmp_path / "altered", **change)
    options = ["--source", source, "--target", tmp_path / "new", "--like", root / name / "hf"]
    run(export, *options, "--dry-run")
    assert why in capsys.readouterr().out
    line = refusal(export, capsys, *options, "--part", "all")
    assert why in line and "language-model" in line


def _altered(source, target, *, lose=None, add=None, resize=None, **arguments):
    """A checkpoint with a tensor less, more, or doubled, or with other arguments."""
    reader = TorchDistReader(source)
    state = {name: reader.read(name) for name in reader.shapes if name != lose}
    if add:
        state[add] = torch.zeros(32)
    if resize:
        axis = state[resize].dim() - 2
        state[resize] = torch.cat([state[resize]] * 2, dim=axis)
    checkpoint.save(state, checkpoint_id=str(target), no_dist=True)
    saved = reader.arguments()
    vars(saved).update(arguments)
    torch.save({"args": saved}, target / "common.pt")
    (target / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return target


@pytest.mark.parametrize(
    "values, named",
    [
        ({"model_type": "llava_next"}, "'llava_next'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer [-2, -1]"),
        ({"vision_feature_layer": 9}, "vision_feature_layer 9"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
        ({"vision_config": VISION | {"hidden_act": "silu"}}, "hidden_act 'silu'"),
        ({"vision_config": VISION | {"hidden_size": 64}}, "of shape"),
        ({"multimodal_projector_bias": False}, "multi_modal_projector.linear_1.bias"),
    ],
)
def test_import_refuses_other_towers_and_projectors(root, tmp_path, capsys, values, named):
    name, *_ = MODELS
    source = shutil.copytree(root / name / "hf", tmp_path / "hf")
    edit_config(source, **values)
    assert named in refusal(tool("import_student"), capsys, "--source", source, "--target", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_export_refuses_a_llava_that_is_not_like_the_student(root, export, tmp_path, capsys):
    name, *_ = MODELS
    like = shutil.copytree(root / name / "hf", tmp_path / "like")
    options = ["--source", root / name / "saved", "--target", tmp_path / "new", "--like", like]
    edit_config(like, vision_config=VISION | {"intermediate_size": 64})
    assert "the LLaVA the student was made from" in refusal(export, capsys, *options)
    edit_config(like, vision_config=VISION, image_token_index=60)
    assert "image_token_index 60" in refusal(export, capsys, *options)


def test_a_megatron_llava_made_here_gives_its_teacher_too(root, tmp_path):
    name, *_ = MODELS
    run(tool("extract_teacher"), "--source", root / name / "megatron", "--target", tmp_path / "teacher")
    assert not any("vision" in key for key in TorchDistReader(tmp_path / "teacher").shapes)
