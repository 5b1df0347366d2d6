"""Give a vision tower a start: from each picture tell which words that need it are in its caption.

Real vision-language models start from a tower that has seen captions (CLIP); a tower from the seed would spend most of
a small run on finding out what the drawings are. After Joulin et al. 2016 (arXiv 1511.02251): one linear layer on the
tower's mean output, one logistic loss per word.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from dataset import Captions


def teach(tower: torch.nn.Module, folder: Path, *, steps: int, seed: int, batch: int = 64, lr: float = 1e-3) -> float:
    """Train `tower` in place; returns the mean recall of the last steps: of n words, those among the n best logits.

    Every rank of a data-parallel group does the same; the tower must not be cut (no tensor parallelism).
    """
    entries = Captions(folder / "train.npz", steps * batch, with_image=True, shuffle=True, seed=seed)
    tokens, needs = (torch.from_numpy(entries.arrays[name].astype(np.int64)) for name in ("tokens", "needs_image"))
    words = torch.zeros(len(tokens), int(tokens.max()) + 1)
    words.scatter_(1, tokens[:, 1:] * (needs > 0), 1.0)
    words[:, 0] = 0.0  # where nothing needs the picture
    device = next(tower.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(tower.config.hidden_size, words.shape[1]).to(device)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.02)
        head.bias.fill_(-3.0)  # few words are in a caption
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    recalls = []
    for step in range(steps):
        rows = [entries.row(i) for i in range(step * batch, (step + 1) * batch)]
        pictures = torch.stack([entries[i]["image"] for i in range(step * batch, (step + 1) * batch)]).to(device)
        wanted = words[rows].to(device)
        found = head(tower(pictures).float().mean(dim=1))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(found, wanted, reduction="sum") / batch
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        best = found.detach().argsort(dim=1, descending=True).argsort(dim=1) < wanted.sum(dim=1, keepdim=True)
        recalls.append(float((best * wanted).sum() / wanted.sum()))
        if (step + 1) % 50 == 0:
            recall = np.mean(recalls[-50:])
            print(f"vision tower: step {step + 1} of {steps}, loss {loss:.3f}, recall {recall:.1%}", flush=True)
    for parameter in tower.parameters():
        parameter.grad = None
    return float(np.mean(recalls[-50:]))
