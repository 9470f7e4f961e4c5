"""The UCI handwritten digits of scikit-learn as pictures, and the demo model's split, packing and measurement.

    python weights/digits.py samples examples/digits     writes the sample pictures
    python weights/digits.py pack trained.safetensors    timm's names -> weights/swin_digits.safetensors
    python weights/digits.py measure                     held-out accuracy and confusions

Shared by the training script and the tests; needs numpy, pillow and scikit-learn, no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "weights" / "swin_digits.safetensors"

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 128  # pixels of a picture: large enough to look at

#: The digits come from 14 filled-in forms, one after the other: the order of the classes starts anew with each.
#: The ninth form ends at SPLIT, so no form is on both sides. Trained on: [0, SPLIT); held out: [SPLIT, 1797).
SPLIT = 1157
#: Choices (width, augmentation, epochs) are made by training on [0, TUNE) and measuring on forms 8 and 9,
#: [TUNE, SPLIT); the held-out forms are for the final measurement only.
TUNE = 906

#: The network, in the names that timm and `swincupy.SwinConfig` share: 16 x 16, 8 x 8 and 4 x 4 tokens, so the
#: odd blocks of the first two stages shift their windows.
MODEL: dict[str, Any] = dict(
    img_size=32,
    patch_size=2,
    in_chans=3,
    num_classes=10,
    embed_dim=32,
    depths=(2, 2, 2),
    num_heads=(2, 4, 8),
    window_size=4,
)
MEAN = STD = 0.5  # of each channel, applied to 0..1


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1797 digits as ink [1797, 8, 8] in 0..16 and their classes [1797], in the order of the data set."""
    data = load_digits()
    return data.images.astype(np.uint8), data.target.astype(np.int64)


def picture(ink: NDArray[np.uint8]) -> Image.Image:
    """A digit [8, 8] of 0..16 as a grayscale picture [SIDE, SIDE]: black strokes on white paper, bicubic.

    One pixel of paper is put around it first, so that the strokes do not touch the border.
    """
    small = np.rint(255 * (1 - np.pad(ink, 1) / 16.0)).astype(np.uint8)
    return Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def resize(image: Image.Image, side: int) -> Image.Image:
    """The preprocessing that the checkpoint states, "squash": both sides to ``side``, bicubic, antialiased."""
    return image.resize((side, side), Image.Resampling.BICUBIC)


def samples() -> dict[str, Image.Image]:
    """One held-out picture of each class by file name, ``digit-<class>-<index in the data set>.png``.

    Class k is taken k tenths of the way through its held-out digits: every form is seen, and nothing was
    chosen by what the model says.
    """
    ink, target = digits()
    chosen = {}
    for k in range(10):
        held_out = np.flatnonzero(target[SPLIT:] == k) + SPLIT
        index = int(held_out[k * len(held_out) // 10])
        chosen[f"digit-{k}-{index:04d}.png"] = picture(ink[index])
    return chosen


def write_samples(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in samples().items():
        image.save(folder / name, optimize=True)


def pack(trained: Path, path: Path = WEIGHTS) -> None:
    """The file of the training script as a canonical checkpoint with labels and preprocessing."""
    from swincupy import SwinConfig
    from swincupy.checkpoint import read_checkpoint, save_checkpoint
    from swincupy.preprocess import Preprocess

    side = MODEL["img_size"]
    preprocess = Preprocess((side, side), resize="squash", mean=(MEAN,) * 3, std=(STD,) * 3)
    read = read_checkpoint(trained, config=SwinConfig(**MODEL))
    save_checkpoint(path, read.params, read.config, labels=LABELS, preprocess=preprocess.to_dict())


def confusion(model: Callable[[list[Image.Image]], NDArray[np.floating[Any]]]) -> NDArray[np.int64]:
    """Counts [10, 10] over the held-out digits: row is the true class, column the model's."""
    ink, target = digits()
    found = model([picture(i) for i in ink[SPLIT:]]).argmax(axis=1)
    counts = np.zeros((10, 10), np.int64)
    np.add.at(counts, (target[SPLIT:], found), 1)
    return counts


def measure(path: Path = WEIGHTS) -> None:
    import swincupy

    counts = confusion(swincupy.load(path, device="cpu"))
    right, total = int(counts.trace()), int(counts.sum())
    print(f"held-out accuracy {100 * right / total:.2f} % ({right} of {total})")
    for true, said in np.argwhere(counts - np.diag(counts.diagonal())):
        print(f"  {LABELS[true]} taken for {LABELS[said]}: {counts[true, said]}")


if __name__ == "__main__":
    commands = {"samples": write_samples, "pack": pack, "measure": measure}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    sys.path.insert(0, str(ROOT))  # this checkout's swincupy
    commands[sys.argv[1]](*map(Path, sys.argv[2:]))
