"""Trains the demo model on the UCI handwritten digits: ``python weights/train_digits.py --out timm.safetensors``.

Needs torch, timm and scikit-learn. The network is timm's SwinTransformer, so the file written here has timm's
names; ``python weights/digits.py pack timm.safetensors`` makes ``swin_digits.safetensors`` of it. A run is seeded
and repeats up to the order in which a GPU adds.
"""

from __future__ import annotations

import argparse
import copy
import math
import time

import digits
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn


def inputs(ink: np.ndarray) -> Tensor:
    """Ink [N, 8, 8] -> the pictures as the model sees them, [N, 1, 32, 32] in 0 (paper) .. 1 (ink)."""
    side = digits.MODEL["img_size"]
    pictures = [digits.resize(digits.picture(i), side) for i in ink]
    return 1 - torch.from_numpy(np.stack(pictures)).float()[:, None] / 255


def normalise(ink: Tensor) -> Tensor:
    """Ink [N, 1, H, W] -> RGB [N, 3, H, W] with the mean and deviation that the checkpoint states."""
    return ((1 - ink - digits.MEAN) / digits.STD).expand(-1, 3, -1, -1)


def augment(ink: Tensor, strength: float) -> Tensor:
    """Rotated, scaled, slanted, shifted, and gently bent at random; what moves in is paper."""
    n, device = len(ink), ink.device

    def uniform(limit: float, *shape: int) -> Tensor:
        return (torch.rand(n, *shape, device=device) * 2 - 1) * limit * strength

    angle, slant = uniform(0.26), uniform(0.25)
    sx, sy = 1 + uniform(0.18), 1 + uniform(0.18)
    cos, sin = torch.cos(angle), torch.sin(angle)
    row_x = torch.stack([sx * cos, -sy * sin + slant, uniform(0.15)], 1)
    row_y = torch.stack([sx * sin, sy * cos, uniform(0.12)], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(ink.shape), align_corners=False)
    bend = F.interpolate(uniform(0.12, 2, 4, 4), size=ink.shape[2:], mode="bicubic", align_corners=True)
    grid = grid + bend.permute(0, 2, 3, 1)
    bent = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    thickness = torch.exp(uniform(0.3, 1, 1, 1))
    return bent.clamp(0, 1) ** thickness


@torch.no_grad()
def accuracy(model: nn.Module, ink: Tensor, target: Tensor) -> float:
    model.eval()
    return 100 * (model(normalise(ink)).argmax(1) == target).float().mean().item()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ink, target = digits.digits()
    x, y = inputs(ink).to(device), torch.from_numpy(target).to(device)
    end, measured = (digits.TUNE, digits.SPLIT) if args.tune else (digits.SPLIT, len(y))
    test_x, test_y, x, y = x[end:measured], y[end:measured], x[:end], y[:end]

    model = SwinTransformer(**{**digits.MODEL, "embed_dim": args.embed_dim}, drop_path_rate=args.drop_path).to(device)
    average = copy.deepcopy(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    batch, start, step = 128, time.time(), 0
    steps = args.epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / (0.05 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * min(i / steps, 1)))
    )
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(x), device=device)
        for rows in order[: len(x) // batch * batch].split(batch):
            logits = model(normalise(augment(x[rows], args.augment)))
            loss = F.cross_entropy(logits, y[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            keep = min(0.998, step / (step + 20))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        if epoch % 25 == 24 or epoch == args.epochs - 1:
            # Held-out figures are printed once, at the end: nothing on the way may be chosen by them.
            shown = f", forms 8 and 9 {accuracy(average, test_x, test_y):.2f} %" if args.tune else ""
            print(
                f"epoch {epoch + 1}/{args.epochs}  loss {loss.item():.4f}{shown}  {time.time() - start:.0f} s",
                flush=True,
            )
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{'tuning' if args.tune else 'held-out'} accuracy {accuracy(average, test_x, test_y):.2f} % of {len(test_y)}"
    )
    print(f"{vars(args)}: {size:,} parameters, {time.time() - start:.0f} s on {device}", flush=True)
    if args.out:
        save_file({k: v.contiguous().cpu() for k, v in average.state_dict().items()}, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="safetensors file for the averaged weights, in timm's names")
    parser.add_argument("--tune", action="store_true", help="train on forms 1 to 7 and measure on forms 8 and 9")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--embed-dim", type=int, default=digits.MODEL["embed_dim"])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--augment", type=float, default=1.0, help="strength of the augmentation")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
