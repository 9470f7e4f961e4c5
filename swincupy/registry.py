"""Published architectures and checkpoints by name: what they are, and how to get their files."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from swincupy.config import SwinConfig
from swincupy.errors import CheckpointError, DownloadError
from swincupy.labels import imagenet1k
from swincupy.resources import resource_dir

_FAMILIES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
    "tiny_c24": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(4, 8, 16, 32)),
    "s3_base": dict(embed_dim=96, depths=(2, 2, 30, 2), num_heads=(3, 6, 12, 24)),
}
_PRETRAINED_12 = (12, 12, 12, 6)  # the windows of the 192-pixel models that larger ones were fine-tuned from

#: name: (version, family, img_size, window_size, pretrained_window_sizes). All have 3 input channels, patches of
#: 4, an MLP ratio of 4, and 1000 classes unless the checkpoint says otherwise. The one table of architectures.
_TABLE: dict[str, tuple[int, str, int, Any, Any]] = {
    "swin_tiny_patch4_window7_224": (1, "tiny", 224, 7, 0),
    "swin_small_patch4_window7_224": (1, "small", 224, 7, 0),
    "swin_base_patch4_window7_224": (1, "base", 224, 7, 0),
    "swin_base_patch4_window12_384": (1, "base", 384, 12, 0),
    "swin_large_patch4_window7_224": (1, "large", 224, 7, 0),
    "swin_large_patch4_window12_384": (1, "large", 384, 12, 0),
    "swin_tiny_c24_patch4_window8_256": (1, "tiny_c24", 256, 8, 0),
    "swin_base_patch4_window6_192": (1, "base", 192, 6, 0),  # SimMIM pre-training
    "swin_s3_tiny_224": (1, "tiny", 224, (7, 7, 14, 7), 0),
    "swin_s3_small_224": (1, "small", 224, (14, 14, 14, 7), 0),
    "swin_s3_base_224": (1, "s3_base", 224, (7, 7, 14, 7), 0),
    "swinv2_tiny_window8_256": (2, "tiny", 256, 8, 0),
    "swinv2_tiny_window16_256": (2, "tiny", 256, 16, 0),
    "swinv2_small_window8_256": (2, "small", 256, 8, 0),
    "swinv2_small_window16_256": (2, "small", 256, 16, 0),
    "swinv2_base_window8_256": (2, "base", 256, 8, 0),
    "swinv2_base_window16_256": (2, "base", 256, 16, 0),
    "swinv2_base_window12_192": (2, "base", 192, 12, 0),
    "swinv2_base_window12to14_192to224": (2, "base", 224, 14, _PRETRAINED_12),  # SimMIM fine-tuning
    "swinv2_base_window12to16_192to256": (2, "base", 256, 16, _PRETRAINED_12),
    "swinv2_base_window12to24_192to384": (2, "base", 384, 24, _PRETRAINED_12),
    "swinv2_large_window12_192": (2, "large", 192, 12, 0),
    "swinv2_large_window12to16_192to256": (2, "large", 256, 16, _PRETRAINED_12),
    "swinv2_large_window12to24_192to384": (2, "large", 384, 24, _PRETRAINED_12),
}

#: What people call a family when they mean its usual architecture.
_SHORT = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "swin_large": "swin_large_patch4_window7_224",
    "swin_s3_tiny": "swin_s3_tiny_224",
    "swin_s3_small": "swin_s3_small_224",
    "swin_s3_base": "swin_s3_base_224",
    "swinv2_tiny": "swinv2_tiny_window8_256",
    "swinv2_small": "swinv2_small_window8_256",
    "swinv2_base": "swinv2_base_window8_256",
    "swinv2_large": "swinv2_large_window12to16_192to256",
}


class _Configs(Mapping[str, SwinConfig]):
    """The table as `SwinConfig` objects, each built when it is asked for."""

    def __getitem__(self, name: str) -> SwinConfig:
        version, family, img_size, window, pretrained = _TABLE[name]
        return SwinConfig(
            version=version,
            img_size=img_size,
            window_size=window,
            pretrained_window_sizes=pretrained,
            **_FAMILIES[family],
        )

    def __iter__(self) -> Iterator[str]:
        return iter(_TABLE)

    def __len__(self) -> int:
        return len(_TABLE)


#: Every published architecture: name -> `SwinConfig` with 1000 classes.
CONFIGS: Mapping[str, SwinConfig] = _Configs()


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published checkpoint, as ``weights/manifest.json`` describes it; None where something is not known.

    Attributes
    ----------
    name : str
        Architecture and tag of training, in timm's names.
    architecture : str or None
        A key of `CONFIGS`; None for the demo model, whose file tells its configuration.
    num_classes : int
    layout : str
        Names and order of the arrays in the file, see `swincupy.config.Layout`.
    file : str
        Name of the file in the repository, or in ``weights/`` where there is none.
    repo : str or None
        Repository on the Hugging Face hub.
    sha256 : str or None
        Of the file.
    license, license_source : str or None
        SPDX name, and what says so.
    top1, top1_source : float or None, str or None
        Accuracy in per cent, on ImageNet-1k unless the source says otherwise.
    release : str or None
        The original file: project, release and asset.
    """

    name: str
    architecture: str | None
    num_classes: int
    layout: str
    file: str
    repo: str | None = None
    sha256: str | None = None
    license: str | None = None
    license_source: str | None = None
    top1: float | None = None
    top1_source: str | None = None
    release: str | None = None


def names() -> tuple[str, ...]:
    """Names of all checkpoints in the manifest, the demo model first."""
    return tuple(_manifest())


def entry(name: str) -> Entry:
    """The checkpoint called ``name``.

    Accepted besides the full name: the architecture (``"swin_tiny_patch4_window7_224"``) or its family
    (``"swin_tiny"``, ``"swin_t"``, ``"swin_v2_t"``), which mean the first checkpoint of that architecture in
    the manifest, timm's default; and the stem of microsoft's file (``"swin_tiny_patch4_window7_224_22k"``).

    Raises
    ------
    CheckpointError
        No checkpoint has that name.
    """
    manifest = _manifest()
    if (found := _exact(name)) is not None:
        return found
    architecture = _architecture(name)
    for candidate in manifest.values():
        if architecture is not None and candidate.architecture == architecture:
            return candidate
    if re.search(r"[/\\]|\.(safetensors|pth|pt|bin|ckpt)$", name):
        raise CheckpointError(f"load: source must be a file or a published name, got {name!r}; there is no such file")
    raise CheckpointError(f"load: source must be a file or a published name, got {name!r}; {_advice(name, manifest)}")


def named_config(name: str) -> SwinConfig:
    """The configuration of an architecture, with 1000 classes, or of a checkpoint, with its classes.

    Architectures are understood in the spellings of timm, microsoft, Hugging Face and torchvision.

    Raises
    ------
    CheckpointError
        No published architecture has that name.
    """
    stem = name.rpartition("/")[2].removesuffix(".pth").removesuffix(".safetensors")
    if _exact(stem) is not None:
        return config_for(stem)
    stem = stem.partition(".")[0].lower().replace("-", "_")
    architecture = _architecture(re.sub(r"(_22k|_22kto1k)?(_finetune|_ft)?$", "", stem))
    if architecture is None:
        raise CheckpointError(f"named_config: name must be a published one, got {name!r}; {_advice(name, CONFIGS)}")
    return CONFIGS[architecture]


def config_for(name: str) -> SwinConfig:
    """The configuration of the checkpoint called ``name``, see `entry`."""
    found = entry(name)
    if found.architecture is not None:
        return CONFIGS[found.architecture].replace(num_classes=found.num_classes)
    from swincupy.checkpoint import inspect_checkpoint

    return SwinConfig.from_dict(inspect_checkpoint(fetch(name))["config"])


def labels_for(name: str) -> tuple[str, ...] | None:
    """Names of the classes of the checkpoint called ``name`` where the head is ImageNet-1k's, else None.

    The 21841 classes of ImageNet-22k have no names here; the demo model's are in its file.
    """
    found = entry(name)
    return imagenet1k() if found.architecture is not None and found.num_classes == 1000 else None


def labels_of_file(path: str, num_classes: int) -> tuple[str, ...] | None:
    """Names of the classes of a file called as a published checkpoint is, if it has as many, else None."""
    stem = os.path.basename(os.path.normpath(path))
    for suffix in (".safetensors", ".pth", ".pt", ".bin"):
        stem = stem.removesuffix(suffix)
    try:
        labels = labels_for(stem)
    except CheckpointError:  # called otherwise
        return None
    return labels if labels is not None and len(labels) == num_classes else None


def fetch(name: str, progress: bool = True) -> Path:
    """The file of the checkpoint called ``name``: shipped, already in the cache, or downloaded into it.

    Files come from the Hugging Face hub through ``huggingface_hub`` into its own cache (``HF_HOME``); a file
    that is there is used without asking the network.

    Parameters
    ----------
    name : str
        See `entry`.
    progress : bool
        Show a progress bar on standard error while downloading.

    Raises
    ------
    CheckpointError
        No checkpoint has that name, or the file is not the one that the manifest describes.
    DownloadError
        The file is not on this machine and cannot be had.
    """
    found = entry(name)
    if found.repo is not None:
        path = _from_hub(found, found.repo, progress)
    elif found.architecture is None:
        path = resource_dir("weights") / found.file
        if not path.is_file():
            raise CheckpointError(f"{found.name}: {found.file} must lie in {path.parent}; install swincupy again")
    else:
        raise DownloadError(
            f"{found.name}: it is on no hub; download {found.file} from {found.release} and pass the path of the file"
        )
    if found.sha256 is not None and (got := _sha256(path)) != found.sha256:
        raise CheckpointError(
            f"{found.name}: {path} must have the SHA-256 {found.sha256}, got {got}; delete the file and fetch it again"
        )
    return path


def _from_hub(found: Entry, repo: str, progress: bool) -> Path:
    advice = (
        f"on a machine that is online download {found.file} from the Hugging Face repository {repo} and pass the "
        "path of that file, or copy its Hugging Face cache here and set HF_HOME to it"
    )
    try:
        import huggingface_hub
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    except ImportError:
        raise DownloadError(
            f"{found.name}: downloading needs huggingface_hub, which is not installed; "
            f'pip install "swincupy[hub]", or {advice}'
        ) from None
    # asked first, because hf_hub_download looks for a newer version on the network even if it has the file
    cached = huggingface_hub.try_to_load_from_cache(repo, found.file)
    if isinstance(cached, str):
        return Path(cached)
    if not huggingface_hub.constants.HF_HUB_OFFLINE and not _reachable(huggingface_hub.constants.ENDPOINT):
        raise DownloadError(f"{found.name}: {huggingface_hub.constants.ENDPOINT} cannot be reached; {advice}")
    quiet = not progress and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        return Path(huggingface_hub.hf_hub_download(repo, found.file))
    except Exception as error:  # its errors, its HTTP library's, the file system's: all mean that there is no file
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DownloadError(f"{found.name}: could not be downloaded ({reason}); {advice}") from error
    finally:
        if quiet:
            enable_progress_bars()


def _reachable(url: str) -> bool:
    """Whether the host of ``url`` has an address; asked first, as the hub's client retries for half a minute."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if getproxies():  # then the proxy resolves the name
        return True
    try:
        socket.getaddrinfo(urlsplit(url).hostname, None)
    except OSError:
        return False
    return True


@lru_cache(maxsize=1)
def _manifest() -> dict[str, Entry]:
    path = resource_dir("weights") / "manifest.json"
    entries = [Entry(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))["checkpoints"]]
    return {e.name: e for e in entries}


def _exact(name: str) -> Entry | None:
    """The checkpoint of that full name, or whose original file is ``<name>.pth``; architectures go first."""
    found = _manifest().get(name)
    if found is None and name not in _TABLE:
        found = next((e for e in _manifest().values() if e.release and e.release.endswith(f" {name}.pth")), None)
    return found


def _architecture(name: str) -> str | None:
    """The key of the table that ``name`` means, in full or short."""
    key = name.lower().replace("-", "_").replace("swin_v2", "swinv2")
    if key.startswith("swinv2"):
        key = key.replace("_patch4", "")  # microsoft and Hugging Face write it, timm does not
    long = {"t": "tiny", "s": "small", "b": "base", "l": "large"}
    key = re.sub(r"^(swin|swinv2)_([tsbl])$", lambda m: f"{m[1]}_{long[m[2]]}", key)
    key = _SHORT.get(key, key)
    return key if key in _TABLE else None


def _advice(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name.lower(), [*known, *_SHORT, *_TABLE], n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return f"{meant}`swincupy models` lists them all"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
