"""Give a vision tower a start: from each picture tell which words that need it are in its caption.

Real vision-language models start from a tower that has seen captions (CLIP); a tower from the seed would spend most of
a small run on finding out what the drawings are. After Joulin et al. 2016 (arXiv 1511.02251): one linear layer on the
tower's mean output, one logistic loss per word.

How long that takes depends on the seed and on the machine's rounding, so it is judged and not counted: the tower learns
until it can name the wanted words of pictures that it never saw.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from dataset import Captions

WARMUP = 40  # steps


class NotLearned(RuntimeError):
    """A start did not come to what was asked of it; one line with what was given, what is allowed, what to change."""


def teach(
    tower: torch.nn.Module,
    folder: Path,
    *,
    until: float,
    most: int,
    kind: int | None,
    seed: int,
    batch: int = 64,
    every: int = 25,
    lr: float = 1e-3,
) -> tuple[int, float]:
    """Train `tower` in place until its recall on `heldout.npz` is `until`; returns the steps it took and the recall.

    Recall: of the n words of a caption, the share that is among the n best logits. `kind` is the value of
    `needs_image` of the words that are judged, which compete with each other only; none: every word that needs the
    picture. Every rank of a data-parallel group does the same; the tower must not be cut (no tensor parallelism).

    Raises:
        NotLearned: after `most` steps the recall is still lower.
    """
    entries = Captions(folder / "train.npz", most * batch, with_image=True, shuffle=True, seed=seed)
    heldout = Captions(folder / "heldout.npz", 0, with_image=True)
    num_words = int(entries.arrays["tokens"].max()) + 1
    words_NV = words_of(entries, num_words)
    judged_V = words_of(entries, num_words, kind).any(dim=0)
    dtype, device = tower.config.params_dtype, next(tower.parameters()).device
    tower.to(dtype)  # all of it, as Megatron does before it trains
    head = torch.nn.Linear(tower.config.hidden_size, num_words).to(device)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
        head.bias.fill_(-3.0)  # few words are in a caption
    weights = [*tower.parameters(), *head.parameters()]  # of any precision; they learn in float32, as in Megatron
    masters = [torch.nn.Parameter(weight.detach().float().clone()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    unseen_BCHW = torch.stack([_picture(heldout[i]) for i in range(len(heldout.arrays["tokens"]))]).to(device, dtype)
    wanted_BV = (words_of(heldout, num_words, kind) * judged_V).to(device)
    recall = 0.0
    for step in range(1, most + 1):
        indices = range((step - 1) * batch, step * batch)
        pictures = torch.stack([_picture(entries[i]) for i in indices]).to(device, dtype)
        there = words_NV[[entries.row(i) for i in indices]].to(device)
        found = head(tower(pictures).float().mean(dim=1))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(found, there, reduction="sum") / batch
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        if step % every == 0 or step == most:
            with torch.no_grad():
                logits_BV = head(tower(unseen_BCHW).float().mean(dim=1))
            recall = recall_of(logits_BV.masked_fill(~judged_V.to(device), -torch.inf), wanted_BV)
            print(f"vision tower: step {step}, loss {loss:.3f}, recall {recall:.1%} of {until:.1%}", flush=True)
            if recall >= until:
                break
    if recall < until:
        raise NotLearned(
            f"vision tower: given {recall:.1%} of the held-out words named after {most} steps with seed {seed}; "
            f"allowed {until:.1%} or more; change --vision-steps, --vision-until or the seed"
        )
    return step, recall


def _picture(sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """A sample's picture, or the last frame of its clip; [C, H, W]."""
    return sample["image"] if sample["image"].ndim == 3 else sample["image"][-1]


def words_of(captions: Captions, num_words: int, kind: int | None = None) -> torch.Tensor:
    """1.0 where a word of `kind` (none: any that needs the picture) is in a caption, [N, num_words]."""
    tokens, needs = (torch.from_numpy(captions.arrays[name].astype(np.int64)) for name in ("tokens", "needs_image"))
    is_wanted = needs > 0 if kind is None else needs == kind
    words = torch.zeros(len(tokens), num_words)
    words.scatter_(1, tokens[:, 1:] * is_wanted, 1.0)
    words[:, 0] = 0.0  # where nothing is wanted
    return words


def recall_of(logits_BV: torch.Tensor, wanted_BV: torch.Tensor) -> float:
    """Of each row's n wanted words, the share among its n best logits; over all rows together."""
    place = logits_BV.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return float(((place < wanted_BV.sum(dim=1, keepdim=True)) * wanted_BV).sum() / wanted_BV.sum())
