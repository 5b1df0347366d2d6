"""A small Megatron script, as a user has it: GPTModel on mock data through ``megatron.training.pretrain``.

It knows nothing of ReGATE and needs no checkout of Megatron-LM. With TEST_SAMPLES=n the training set is n samples over
and over: epochs; with TEST_PROMPTS beside it they begin with prompts of their own length. With TEST_VALIDATE=fatal the
loss is validated as pretrain_gpt.py does, so that errors can be injected.
"""

import os
from functools import partial

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.parallel_state import get_tensor_model_parallel_rank, is_pipeline_first_stage, is_pipeline_last_stage
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tensor_parallel import broadcast_data
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None):
    args = get_args()
    return GPTModel(
        config or core_transformer_config_from_args(args),
        get_gpt_layer_local_spec(),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
    )


class Epochs(torch.utils.data.Dataset):
    """The first samples of a dataset, again and again."""

    def __init__(self, inner, num_samples):
        self.inner, self.num_samples = inner, num_samples

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        sample = self.inner[index % self.num_samples]
        if "TEST_PROMPTS" in os.environ:
            sample = dict(sample, loss_mask=sample["loss_mask"].clone())
            sample["loss_mask"][: index % self.num_samples * 5 % 27] = 0
        return sample


def datasets_provider(num_samples, vp_stage=None):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=None,
        split="90,5,5",
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, valid, test = BlendedMegatronDatasetBuilder(
        MockGPTDataset, num_samples, lambda: get_tensor_model_parallel_rank() == 0, config
    ).build()
    if train is not None and "TEST_SAMPLES" in os.environ:
        train = Epochs(train, int(os.environ["TEST_SAMPLES"]))
    return train, valid, test


def loss_func(loss_mask, losses):
    mask = loss_mask.view(-1).float()
    loss, count = (losses.view(-1).float() * mask).sum(), mask.sum().clone().detach().to(torch.int)
    if "TEST_VALIDATE" in os.environ:
        get_rerun_state_machine().validate_result(
            result=loss,
            rejection_func=torch.isnan,
            message="found NaN in local forward loss calculation",
            tolerance=0.0,
            fatal=os.environ["TEST_VALIDATE"] == "fatal",
        )
    return loss, count, {"lm loss": torch.cat([loss.clone().detach().view(1), count.view(1)])}


def forward_step(data_iterator, model):
    if not (is_pipeline_first_stage() or is_pipeline_last_stage()):
        return model(None, None, None), None
    data = next(data_iterator) if data_iterator is not None else None
    batch = broadcast_data(["tokens", "labels", "position_ids"], data, torch.int64)
    batch |= broadcast_data(["loss_mask"], data, torch.float32)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


if __name__ == "__main__":
    datasets_provider.is_distributed = True
    args = parse_and_validate_args()
    if args.save:
        get_write_results_queue("fork")  # by spawn, each rank would import everything once more
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
    )
