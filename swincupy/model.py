"""`load` and `SwinTransformer`, the object that people hold."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from swincupy import forward
from swincupy.backend import backend, host, is_byte_array, is_float_array
from swincupy.config import SwinConfig
from swincupy.errors import ConfigError, InputError
from swincupy.ops import reference

if TYPE_CHECKING:
    from swincupy.preprocess import Preprocess

Array = Any
Images = Any  # an array, an image (path, file, PIL), or a sequence of images


class Prediction(NamedTuple):
    """One class of a picture: its name, its probability, its index in the logits."""

    label: str
    score: float
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


def load(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    device: str | int | None = None,
    precision: str | None = None,
    config: SwinConfig | None = None,
    pad_mode: Literal["pad_roll", "roll_pad"] | None = None,
    preset: Literal["timm", "ms", "hf", "torchvision"] | None = None,
    graphs: bool = True,
) -> SwinTransformer:
    """Load a Swin Transformer from a checkpoint of any known layout.

    Parameters
    ----------
    source : path, name or mapping
        A file (.safetensors, .pth, .bin), a folder of the Hugging Face kind, the name of a published
        checkpoint (`swincupy models` lists them; "demo" ships with the package), or the arrays
        themselves by name.
    device : "cpu", "cuda", "cuda:N" or N, optional
        Where the model runs. None is a GPU where one can be used, else the CPU, and the CPU for "fp64";
        `swincupy doctor` says which, and why.
    precision : {"fp32", "fp64", "tf32", "fp16", "bf16"}, optional
        None is "fp32" everywhere. The CPU has "fp32" and "fp64", which is for reference results; a GPU all but
        "fp64". Results are float32 (float64 for "fp64") whatever computes them.
    config : SwinConfig, optional
        Needed only for what the arrays and the files beside them do not tell. It must not contradict them.
    pad_mode : {"pad_roll", "roll_pad"}, optional
        See `SwinConfig`; None is what the checkpoint's source does.
    preset : {"timm", "ms", "hf", "torchvision"}, optional
        Preprocessing of images; None is that of the checkpoint's source.
    graphs : bool
        On a GPU, replay CUDA graphs; False runs operation by operation, for debugging.

    Returns
    -------
    SwinTransformer

    Raises
    ------
    CheckpointError
        The checkpoint cannot be read, is incomplete, or its name is unknown.
    ConfigError
        The configuration contradicts the arrays.
    DeviceError
        The device or precision cannot be had.
    DownloadError
        A published checkpoint could not be downloaded.
    """
    from swincupy import registry
    from swincupy.checkpoint import read_checkpoint
    from swincupy.preprocess import for_checkpoint

    backend(device, precision)  # says no before anything is read
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
    if name is not None and not os.path.exists(name):
        source, config = registry.fetch(name), config or registry.config_for(name)
    checkpoint = read_checkpoint(source, config=config)
    labels = checkpoint.labels
    if labels is None and name is not None:
        labels = registry.labels_of_file(name, checkpoint.config.num_classes)
    config = checkpoint.config if pad_mode is None else checkpoint.config.replace(pad_mode=pad_mode)
    return SwinTransformer(
        checkpoint.params,
        config,
        layout=checkpoint.layout,
        labels=labels,
        preprocess=for_checkpoint(checkpoint.preprocess, checkpoint.layout, config, preset=preset),
        device=device,
        precision=precision,
        graphs=graphs,
    )


class SwinTransformer:
    """A Swin Transformer ready to run; made by `load`.

    Float arrays are taken as normalised pixels [B, C, H, W] of any size. Everything else is taken as
    images and goes through `preprocess`: uint8 arrays [B, H, W, C] or [H, W, C], PIL images, paths,
    open files, and sequences of those. With ``resize=False`` uint8 arrays [B, H, W, C] are taken as the
    pixels that they are, at any size: normalised, but neither resized nor cropped. On a GPU it is bytes that
    are uploaded and normalised there; arrays that are there already stay there.
    Arrays come back in the library of the array that went in, NumPy for images. Calls from several threads
    are safe.

    Attributes
    ----------
    config : SwinConfig
    layout : str
        Layout of the checkpoint that the weights came from.
    labels : tuple of str or None
        Names of the classes.
    preprocess : Preprocess
        From images to normalised pixels; callable.
    device, precision : str
    """

    def __init__(
        self,
        params: Mapping[str, np.ndarray],
        config: SwinConfig,
        *,
        layout: str = "swincupy",
        labels: Sequence[str] | None = None,
        preprocess: Preprocess | None = None,
        device: str | int | None = None,
        precision: str | None = None,
        graphs: bool = True,
    ) -> None:
        from swincupy.preprocess import for_checkpoint

        self._backend, self._graphs = backend(device, precision, graphs=graphs), graphs
        self._asked_device, self.device, self.precision = device, self._backend.device, self._backend.precision
        self.config = config.with_conventions("microsoft")
        self.layout = layout
        self.labels = tuple(labels) if labels is not None else None
        if self.labels is not None and len(self.labels) != config.num_classes:
            raise ConfigError(
                f"SwinTransformer: labels must name the {config.num_classes} classes, got {len(self.labels)} labels"
            )
        self.preprocess = preprocess or for_checkpoint(None, layout, self.config)
        self._params = dict(params)
        self._engine = self._backend.engine(self._params, self.config)

    def __getstate__(self) -> dict[str, Any]:
        """What `__init__` needs: a copy in another process makes its own engine, where that process can."""
        return {
            "params": {name: np.asarray(p) for name, p in self._params.items()},
            "config": self.config,
            "layout": self.layout,
            "labels": self.labels,
            "preprocess": self.preprocess,
            "device": self._asked_device,
            "precision": self.precision,
            "graphs": self._graphs,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        SwinTransformer.__init__(self, state.pop("params"), state.pop("config"), **state)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"SwinTransformer(version={c.version}, img_size={c.img_size}, window_size={c.window_size}, "
            f"embed_dim={c.embed_dim}, depths={c.depths}, num_classes={c.num_classes}, "
            f"parameters={self.num_parameters:,}, device={self.device!r}, precision={self.precision!r})"
        )

    @property
    def num_parameters(self) -> int:
        """Number of trained values."""
        return sum(p.size for p in self._params.values())

    def __call__(self, x: Images, *, resize: bool = True) -> Array:
        """Class scores before the softmax.

        Parameters
        ----------
        x : array [B, C, H, W] of normalised pixels, or images
            See the class.
        resize : bool
            False: x is a uint8 array [B, H, W, C] that is to be normalised only. See the class.

        Returns
        -------
        [B, num_classes]

        Raises
        ------
        InputError
            The model has no head, or x is nothing that it takes.
        """
        self._need_head("model(x)")
        return self._backend.answer(_asked(x, resize), self._run(forward.logits, self._ready(x, resize)))

    def embed(
        self,
        x: Images | Iterable[Any],
        normalize: bool = False,
        batch_size: int = 64,
        progress: bool = False,
        *,
        resize: bool = True,
    ) -> Array:
        """Embeddings: the mean of the normalised tokens of the last stage.

        Parameters
        ----------
        x : array, image, or iterable of images
            An iterable is read as it is needed, ``batch_size`` images at a time.
        normalize : bool
            Divide each embedding by its Euclidean length.
        batch_size : int
        progress : bool
            Show a progress bar on standard error.
        resize
            See `__call__`.

        Returns
        -------
        [B, num_features]

        Raises
        ------
        InputError
            The model has no final norm, or x is nothing that it takes.
        """
        parts = list(self.embed_stream(x, normalize, batch_size, progress, resize=resize))
        if not parts:
            raise InputError("embed: x must hold at least one image, got none")
        with self._backend.active():
            return parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(parts)

    def embed_stream(
        self,
        x: Images | Iterable[Any],
        normalize: bool = False,
        batch_size: int = 64,
        progress: bool = False,
        *,
        resize: bool = True,
    ) -> Iterator[Array]:
        """`embed`, yielding the embeddings of ``batch_size`` images at a time."""
        if self._engine.weights["norm"] is None:
            raise InputError("embed: the checkpoint has no final norm (a detection backbone); use features(norm=True)")
        asked = _asked(x, resize)
        for batch in self._batches(x, batch_size, progress, resize):
            y = self._run(forward.embed, batch)
            if normalize:
                xp = self._backend.xp
                with self._backend.active():
                    y = y / xp.maximum(xp.sqrt(xp.sum(y * y, axis=-1, keepdims=True)), 1e-12)
            yield self._backend.answer(asked, y)

    def features(
        self,
        x: Images,
        out_indices: Sequence[int] | None = None,
        norm: bool = False,
        layout: Literal["NCHW", "NHWC"] = "NCHW",
        *,
        resize: bool = True,
    ) -> list[Array]:
        """Feature maps of the stages, before patch merging.

        Parameters
        ----------
        x : array [B, C, H, W] of normalised pixels, or images
        out_indices : sequence of int, optional
            Which stages, in the order wanted; negative ones count from the last. None is all.
        norm : bool
            Normalise each map with its own LayerNorm where the checkpoint has one (detection and
            segmentation backbones), the last one with the final norm where it has not.
        layout : {"NCHW", "NHWC"}
        resize
            See `__call__`.

        Returns
        -------
        list of arrays
            Stage i: [B, C_i, H_i, W_i], or channels last.

        Raises
        ------
        InputError
            There is no such stage, or x is nothing that the model takes.
        """
        stages = self.config.num_stages
        asked = range(stages) if out_indices is None else out_indices
        ok = isinstance(asked, Sequence) and all(isinstance(i, int) and -stages <= i < stages for i in asked)
        if not ok or not asked:
            raise InputError(f"features: out_indices must be stages from 0 to {stages - 1}, got {out_indices!r}")
        if layout not in ("NCHW", "NHWC"):
            raise InputError(f"features: layout must be 'NCHW' or 'NHWC', got {layout!r}")
        wanted = tuple(i % stages for i in asked)
        maps = self._run(forward.features, self._ready(x, resize), wanted=wanted, norm=norm)
        if layout == "NCHW":
            maps = [self._backend.xp.moveaxis(z, -1, 1) for z in maps]
        return [self._backend.answer(_asked(x, resize), z) for z in maps]

    def classify(
        self,
        images: Images | Iterable[Any],
        topk: int = 5,
        batch_size: int = 64,
        progress: bool = False,
        *,
        resize: bool = True,
    ) -> list[list[Prediction]]:
        """The most likely classes of each image, best first.

        Parameters
        ----------
        images : image, iterable of images, or array
        topk : int
            Classes for each image; more than there are gives all.
        batch_size, progress, resize
            See `embed`.

        Returns
        -------
        list (one for each image) of lists of Prediction(label, score, index)
            Scores are softmax probabilities; a class without a name is called ``class <index>``.

        Raises
        ------
        InputError
            The model has no head, or the images are none that it takes.
        """
        self._need_head("classify")
        if topk < 1:
            raise InputError(f"classify: topk must be at least 1, got {topk}")
        found = []
        for batch in self._batches(images, batch_size, progress, resize):
            for row in reference.softmax(host(self._run(forward.logits, batch))):
                best = np.argsort(-row, kind="stable")[:topk]
                found.append([Prediction(self._label(i), float(row[i]), int(i)) for i in best])
        if not found:
            raise InputError("classify: images must hold at least one image, got none")
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration, labels and preprocessing as one safetensors file, all or nothing.

        Raises
        ------
        CheckpointError
            ``path`` does not end in .safetensors, or cannot be written.
        """
        from swincupy.checkpoint import save_checkpoint

        save_checkpoint(path, self._params, self.config, labels=self.labels, preprocess=self.preprocess.to_dict())

    def _label(self, index: int) -> str:
        return f"class {index}" if self.labels is None else self.labels[index]

    def _need_head(self, what: str) -> None:
        if self._engine.weights["head"] is None or self._engine.weights["norm"] is None:
            raise InputError(f"{what}: the checkpoint has no classification head; use embed or features")

    def _batches(self, x: Any, batch_size: int, progress: bool, resize: bool) -> Iterator[Any]:
        """What `_run` takes, in batches: arrays in slices, images decoded and cropped as they are needed."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if self._is_ready(x, resize):
            self._check(x)
            total: int | None = x.shape[0]
            ends = ((i, min(i + batch_size, x.shape[0])) for i in range(0, x.shape[0], batch_size))
            batches: Iterable[Any] = (x[first:end, ...] for first, end in ends)
        else:
            from swincupy.preprocess import stream

            x = host(x) if hasattr(x, "dtype") else x
            batches = stream(x, self.preprocess, batch_size, normalise=not self._uploads_bytes())
            one = isinstance(x, (str, bytes)) or getattr(x, "ndim", 4) != 4
            total = 1 if one else len(x) if hasattr(x, "__len__") else None
        if not progress:
            yield from batches
            return
        from tqdm import tqdm

        with tqdm(total=total, unit="image") as bar:
            for batch in batches:
                yield batch
                bar.update(batch.shape[0])

    def _ready(self, x: Images, resize: bool) -> Array:
        """What `_run` takes: an array as it is, images decoded and cropped."""
        if self._is_ready(x, resize):
            return x
        x = host(x) if hasattr(x, "dtype") else x
        return self.preprocess.crops(x) if self._uploads_bytes() else self.preprocess(x)

    def _is_ready(self, x: Images, resize: bool) -> bool:
        """Whether nothing is to be done to x but to normalise it, where it holds bytes."""
        if is_float_array(x):
            return True
        if not resize:
            if not is_byte_array(x):
                got = getattr(x, "dtype", type(x).__name__)
                raise InputError(f"model: x must be a uint8 array [B, H, W, C] where resize is False, got {got}")
            return True
        if not is_byte_array(x) or len(x.shape) != 4 or not self._in_two_steps():
            return False
        batch, height, width, channels = x.shape
        return batch > 0 and channels == self.preprocess.channels and self.preprocess.keeps(height, width)

    def _uploads_bytes(self) -> bool:
        return self._backend.takes_bytes and self._in_two_steps()

    def _in_two_steps(self) -> bool:
        """Whether ``preprocess`` normalises what it crops; a class derived from it may do anything."""
        from swincupy.preprocess import Preprocess

        return type(self.preprocess) is Preprocess

    def _run(self, what: Any, x: Array, **options: Any) -> Any:
        """``what`` of `forward` for floats [B, C, H, W] or bytes [B, H, W, C], in the backend's library."""
        self._check(x)
        if is_byte_array(x):
            if self._backend.takes_bytes:
                options["normalise"] = (tuple(self.preprocess.mean), tuple(self.preprocess.std))
            else:
                x = self.preprocess.normalise(host(x))
        with self._backend.active(f"model: x of shape {tuple(x.shape)}"):
            return self._engine.run(what, self._backend.pixels(x), **options)

    def _check(self, x: Array) -> None:
        shape, channels = tuple(x.shape), self.config.in_chans
        if is_byte_array(x):
            if len(shape) != 4 or shape[3] != channels:
                hint = "; add a batch axis: x[None]" if len(shape) == 3 and shape[2] == channels else ""
                if len(shape) == 4 and shape[1] == channels:
                    hint = "; uint8 arrays have channels last: x.transpose(0, 2, 3, 1)"
                raise InputError(f"model: x must be uint8 [B, H, W, {channels}], got shape {shape}{hint}")
        elif len(shape) != 4 or shape[1] != channels:
            hint = "; add a batch axis: x[None]" if len(shape) == 3 and shape[0] == channels else ""
            if len(shape) == 4 and shape[3] == channels:
                hint = "; float arrays have channels second: x.transpose(0, 3, 1, 2)"
            raise InputError(f"model: x must be [B, {channels}, H, W], got shape {shape}{hint}")
        if 0 in shape:
            raise InputError(f"model: x must hold at least one image and one pixel, got shape {shape}")


def _asked(x: Any, resize: bool) -> Any:
    """The array whose library the results come back in; None for images."""
    return x if is_float_array(x) or not resize else None
