"""From pictures to normalised pixels: decode, resize, crop, scale, normalise.

Every published accuracy belongs to one way of doing this, so each source of checkpoints has its preset.
Resizing is Pillow's own, which filters over the whole footprint of a pixel when it shrinks an image.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from swincupy.config import Pair, SwinConfig, pair
from swincupy.errors import ConfigError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Preset: TypeAlias = Literal["timm", "ms", "hf", "torchvision"]
_T = TypeVar("_T", bound=np.generic)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Layout of a checkpoint -> the preset of the code that published it.
_PRESET_OF = {
    "microsoft": "ms",
    "openmmlab": "ms",
    "swincupy": "ms",
    "timm": "timm",
    "huggingface": "hf",
    "torchvision": "torchvision",
}
#: torchvision's shorter side by (version, img_size, embed_dim, deepest stage).
_TORCHVISION = {
    (1, 224, 96, 6): 232,
    (1, 224, 96, 18): 246,
    (1, 224, 128, 18): 238,
    (2, 256, 96, 6): 260,
    (2, 256, 96, 18): 260,
    (2, 256, 128, 18): 272,
}
#: Image size of the published models by (version, window of stage 0); 224 where there is none.
_USUAL_SIZE = {
    (1, (6, 6)): 192, (1, (8, 8)): 256, (1, (12, 12)): 384,
    (2, (8, 8)): 256, (2, (16, 16)): 256, (2, (12, 12)): 192, (2, (24, 24)): 384,
}  # fmt: skip
_MAX_PIXELS = 1 << 27  # of a resized image: a line of one pixel by 65000 is no reason to fill the memory
_THREADS = min(4, os.cpu_count() or 1)  # decoding releases the interpreter's lock


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How images become the model's input: ``(crop(resize(image)) / 255 - mean) / std``, float32 [B, C, H, W].

    Calling it does all of that; `crops` and `normalise` are its two halves, with bytes between them.

    Parameters
    ----------
    size : (int, int)
        Height and width of what comes out.
    resize : {"shorter", "squash", "none"}
        "shorter": the aspect ratio is kept and the shorter side becomes ``resize_size``; given as a pair,
        the image becomes just large enough to cover it. "squash": height and width become ``resize_size``
        whatever the aspect ratio. "none": the image stays as it is.
    resize_size : int or (int, int)
        Pixels, (height, width) for a pair; None, the default, is ``size``.
    interpolation : {"bicubic", "bilinear", "lanczos", "box", "hamming", "nearest"}
        Pillow's filters.
    mean, std : tuple of float
        One for each channel, on the scale 0..1.
    mode : {"RGB", "L"}
        Colour or grayscale: 3 channels or 1.

    Notes
    -----
    After resizing the centre of ``size`` is cut out; where an image is smaller, black is added around it.
    EXIF orientation is not applied, as in the evaluation loaders behind the published accuracies
    (torchvision's ImageFolder, timm's): rotate such images beforehand (``PIL.ImageOps.exif_transpose``).
    Transparency is dropped, not blended. Rounding follows torchvision (Resize, CenterCrop) and, for pairs,
    timm's ResizeKeepRatio.

    Raises
    ------
    ConfigError
        A field is out of its range.
    """

    size: Pair
    resize: Literal["shorter", "squash", "none"] = "shorter"
    resize_size: int | Pair | None = None
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    mode: Literal["RGB", "L"] = "RGB"

    def __post_init__(self) -> None:
        for name in ("size", "resize_size", "mean", "std"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.resize_size is None:
            object.__setattr__(self, "resize_size", self.size)
        _check(self)

    @property
    def channels(self) -> int:
        return 1 if self.mode == "L" else 3

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`; unknown and missing fields are refused."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(map(str, fields)) - known):
            raise ConfigError(
                f"Preprocess: unknown field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}"
            )
        if "size" not in fields:
            raise ConfigError("Preprocess: size must be given")
        return cls(**fields)

    def __call__(self, images: Any) -> NDArray[np.float32]:
        """Normalised pixels of one image or of several.

        Parameters
        ----------
        images : image, sequence of images, or array
            An image is a path, a PIL image, encoded bytes, an open binary file, or a uint8 array [H, W, C] or
            [H, W]. An array of images is uint8 [B, H, W, C]. Arrays are resized and cropped like any image.

        Returns
        -------
        float32 [B, C, H, W]

        Raises
        ------
        InputError
            Nothing was given, or something that is no image; the message names it.
        """
        return _stacked(self.pixels(image, name) for image, name in _each(images))

    def crops(self, images: Any) -> NDArray[np.uint8]:
        """As `__call__`, without the last step: images resized and cropped, uint8 [B, H, W, C]."""
        return _stacked(self.crop(image, name) for image, name in _each(images))

    def normalise(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The last step: uint8 [B, H, W, C] of any size -> ``(x / 255 - mean) / std``, float32 [B, C, H, W]."""
        if crops.ndim != 4 or crops.shape[3] != self.channels:
            raise InputError(
                f"preprocess: crops must be uint8 [B, H, W, {self.channels}], got shape {tuple(crops.shape)}"
            )
        return _stacked(map(self._normalise, crops))

    def pixels(self, image: Any, name: str = "image") -> NDArray[np.float32]:
        """One image as normalised pixels [C, H, W]; ``name`` stands for it in error messages."""
        return self._normalise(self.crop(image, name))

    def crop(self, image: Any, name: str = "image") -> NDArray[np.uint8]:
        """One image, resized and cropped, as uint8 [H, W, C]; ``name`` stands for it in error messages."""
        loaded = load_image(image, self.mode, name)
        return np.asarray(_crop(self._resized(loaded, name), self.size)).reshape(*self.size, self.channels)

    def keeps(self, height: int, width: int) -> bool:
        """Whether images of this size are neither resized nor cropped."""
        return (height, width) == self.size == self._resized_to(height, width)

    def _resized_to(self, height: int, width: int) -> Pair:
        """The size that an image is resized to before its centre is cut out."""
        to = self.resize_size
        if self.resize == "none":
            return height, width
        if self.resize == "squash":
            return pair(to, "resize_size")  # type: ignore[arg-type]
        if isinstance(to, int):  # torchvision's Resize: the longer side is rounded down
            return (int(to * height / width), to) if width <= height else (to, int(to * width / height))
        ratio = min(height / to[0], width / to[1])  # type: ignore[index]
        return round(height / ratio), round(width / ratio)

    def _resized(self, image: Image, name: str) -> Image:
        from PIL import Image as pil

        width, height = image.size
        h, w = self._resized_to(height, width)
        if (w, h) == image.size:
            return image
        if w * h > _MAX_PIXELS:
            raise InputError(
                f"preprocess: {name} must not become larger than {_MAX_PIXELS} pixels, got {width} x {height}, which "
                f"{self.resize_size} for the shorter side makes {w} x {h}; crop it first"
            )
        return image.resize((w, h), pil.Resampling[self.interpolation.upper()])

    def _normalise(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Uint8 [H, W, C] -> float32 [C, H, W], through a table of the 256 values of each channel."""
        scaled = np.arange(256, dtype=np.float32) / np.float32(255)
        out = np.empty((self.channels, *image.shape[:2]), np.float32)
        for c in range(self.channels):
            table = (scaled - np.float32(self.mean[c])) / np.float32(self.std[c])
            np.take(table, image[..., c], out=out[c], mode="clip")
        return out


def preset(name: Preset, img_size: int | Pair, config: SwinConfig | None = None) -> Preprocess:
    """The preprocessing of a source of checkpoints for images of ``img_size``.

    =========== ==================================================================
    timm        shorter side to size / 0.9 (from 384 on: to size), centre crop
    ms          shorter side to size * 256 / 224, centre crop; from 384 on squash
    hf          squash
    torchvision shorter side by variant, centre crop: 232, 246, 238 for T, S, B at
                224; 260, 260, 272 for V2 at 256; anything else as ms below 384
    =========== ==================================================================

    All are bicubic. Sizes are rounded down. Models of one channel take the image in grayscale with the mean
    of ImageNet's three means and deviations.

    Parameters
    ----------
    name : {"timm", "ms", "hf", "torchvision"}
    img_size : int or (int, int)
    config : SwinConfig, optional
        Tells the number of channels, and torchvision's variant.

    Raises
    ------
    InputError
        There is no such preset.
    """
    size = pair(img_size, "img_size")
    large = min(size) >= 384
    squash = name == "hf" or (name == "ms" and large)
    to: Pair = size
    if name == "timm":
        to = size if large else _each_side(size, lambda side: math.floor(side / 0.9))
    elif name == "torchvision" or (name == "ms" and not large):
        to = _each_side(size, lambda side: int(256 / 224 * side))
    elif name not in ("ms", "hf"):
        raise InputError(f"preset: name must be 'timm', 'ms', 'hf' or 'torchvision', got {name!r}")
    if name == "torchvision" and config is not None and size[0] == size[1]:
        shorter = _TORCHVISION.get((config.version, size[0], config.embed_dim, max(config.depths)))
        to = (shorter, shorter) if shorter else to
    gray = config is not None and config.in_chans == 1
    return Preprocess(
        size=size,
        resize="squash" if squash else "shorter",
        # a square target means torchvision's Resize of the shorter side, any other covers both sides
        resize_size=to if squash or to[0] != to[1] else to[0],
        mean=(round(sum(IMAGENET_MEAN) / 3, 6),) if gray else IMAGENET_MEAN,
        std=(round(sum(IMAGENET_STD) / 3, 6),) if gray else IMAGENET_STD,
        mode="L" if gray else "RGB",
    )


def for_checkpoint(
    stored: Preprocess | Mapping[str, Any] | None, layout: str, config: SwinConfig, preset: Preset | None = None
) -> Preprocess:
    """The preprocessing of a model: the preset asked for, else what its checkpoint says, else its source's preset.

    Where ``config.img_size`` is None, images get the size that published models with the first stage's window have.
    """
    if preset is None and stored is not None:
        return stored if isinstance(stored, Preprocess) else Preprocess.from_dict(stored)
    return _preset(preset or _PRESET_OF.get(layout, "ms"), config.image or _usual_size(config), config)  # type: ignore[arg-type]


def _usual_size(config: SwinConfig) -> Pair:
    return (_USUAL_SIZE.get((config.version, config.windows[0]), 224),) * 2


_preset = preset  # the parameter of `for_checkpoint` hides the name


def load_image(source: Any, mode: Literal["RGB", "L"] = "RGB", name: str | None = None) -> Image:
    """Decode an image and convert it to 8-bit RGB or grayscale.

    Parameters
    ----------
    source : path, PIL image, bytes, binary file, or uint8 array [H, W], [H, W, 1] or [H, W, 3]
    mode : {"RGB", "L"}
    name : str, optional
        What to call the image in errors; a path is called by itself.

    Raises
    ------
    InputError
        Not an image, unreadable, truncated, empty, or larger than Pillow's limit for decompression bombs.
    """
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
    name = name or "image"
    if isinstance(source, pil.Image):
        return _converted(source, mode, name)
    if hasattr(source, "__array__"):
        return _converted(_from_array(source, name), mode, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        if os.path.isdir(source):
            raise InputError(f"load_image: {name} must be an image file, got a folder")
    elif not hasattr(source, "read"):
        raise InputError(
            f"load_image: {name} must be a path, a PIL image, bytes, an open file or a uint8 array, "
            f"got {type(source).__name__}"
        )
    try:
        with pil.open(source) as image:
            return _converted(image, mode, name)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"load_image: {name} must be an existing file, got none of that name") from None
    except UnidentifiedImageError:
        raise InputError(f"load_image: {name} must be an image in a format that Pillow reads") from None
    except Exception as error:  # decoders fail on broken data each in its way: OSError, SyntaxError, struct.error
        raise InputError(f"load_image: {name} cannot be read: {error}") from error


def stream(
    images: Any,
    preprocess: Preprocess,
    batch_size: int,
    *,
    on_error: Callable[[int, InputError], None] | None = None,
    normalise: bool = True,
) -> Iterator[NDArray[Any]]:
    """Normalised pixels in batches [<= batch_size, C, H, W], in order, decoded ahead of their use.

    A few threads decode while the caller computes. At most two batches are held, so an endless iterable
    and one larger than memory are fine.

    Parameters
    ----------
    images : image, array, or any iterable of images
        As in `Preprocess.__call__`; iterators and generators are read as they are needed.
    preprocess : Preprocess
    batch_size : int
    on_error : callable, optional
        Called with the index and the error of an image that cannot be used, which is then left out. Without
        it the error is raised.
    normalise : bool
        False yields bytes [<= batch_size, H, W, C], resized and cropped; see `Preprocess.crops`.

    Raises
    ------
    InputError
        See `Preprocess`.
    """
    if batch_size < 1:
        raise InputError(f"stream: batch_size must be at least 1, got {batch_size}")
    pending: deque[Future[NDArray[Any]]] = deque()
    batch: list[NDArray[Any]] = []
    index = 0
    prepare: Callable[[Any, str], NDArray[Any]] = preprocess.pixels if normalise else preprocess.crop
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="swincupy-decode")
    try:
        todo = _each(images)
        while True:
            while len(pending) < batch_size + _THREADS and (item := next(todo, None)) is not None:
                pending.append(pool.submit(prepare, *item))
            if not pending:
                break
            try:
                batch.append(pending.popleft().result())
            except InputError as error:
                if on_error is None:
                    raise
                on_error(index, error)
            index += 1
            if len(batch) == batch_size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)
    finally:  # also when the caller stops early
        pool.shutdown(wait=True, cancel_futures=True)


def _stacked(batch: Iterable[NDArray[_T]]) -> NDArray[_T]:
    arrays = list(batch)
    if not arrays:
        raise InputError("preprocess: images must hold at least one image, got none")
    return np.stack(arrays)


def _each(images: Any) -> Iterator[tuple[Any, str]]:
    """Every image of what a caller may hand over, with a name for error messages."""
    if _is_one(images):
        yield images, "image"
        return
    if hasattr(images, "__array__"):
        images = np.asarray(images)
        if images.ndim != 4:
            raise InputError(
                f"preprocess: an array must be uint8 [B, H, W, C], [H, W, C] or [H, W], got shape {images.shape}"
            )
        if images.dtype != np.uint8:
            raise InputError(_dtype_advice("images", images))
    elif not isinstance(images, Iterable):
        raise InputError(f"preprocess: images must be an image or an iterable of images, got {type(images).__name__}")
    for i, image in enumerate(images):
        yield image, f"image {i}"


def _is_one(images: Any) -> bool:
    from PIL.Image import Image

    if isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, Image)) or hasattr(images, "read"):
        return True
    return hasattr(images, "__array__") and getattr(images, "ndim", 0) in (2, 3)


def _from_array(source: Any, name: str) -> Image:
    from PIL import Image as pil

    array = np.asarray(source)
    if array.dtype != np.uint8:
        raise InputError(_dtype_advice(name, array))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[2] != 3):
        raise InputError(f"load_image: {name} must be uint8 [H, W], [H, W, 1] or [H, W, 3], got shape {array.shape}")
    if 0 in array.shape:
        raise InputError(f"load_image: {name} must have at least one pixel, got shape {array.shape}")
    return pil.fromarray(np.ascontiguousarray(array))


def _dtype_advice(name: str, array: NDArray[Any]) -> str:
    return (
        f"preprocess: {name} must be uint8 with values 0..255, got {array.dtype} of shape {array.shape}; "
        "normalised float pixels [B, C, H, W] go to the model as they are"
    )


def _converted(image: Image, mode: Literal["RGB", "L"], name: str) -> Image:
    """Any of Pillow's modes as 8-bit ``mode``."""
    from PIL import Image as pil

    if 0 in image.size:
        raise InputError(f"load_image: {name} must have at least one pixel, got {image.size[0]} x {image.size[1]}")
    if image.mode == "F":
        raise InputError(f"load_image: {name} must hold integers, got 32-bit floats, whose range nothing tells")
    try:
        if image.mode.startswith("I"):  # 16 bits in the file; Pillow itself would cut all above 255 to white
            deep = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            image = pil.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
        elif image.mode == "P":
            image = image.convert("RGBA")  # what the palette says, without a warning about its transparency
        return image.convert(mode)  # a copy even where the mode is right: the file is closed after this
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"load_image: {name} cannot be read: {error}") from error


def _crop(image: Image, size: Pair) -> Image:
    """The centre [h, w] of an image, as torchvision's CenterCrop; black where the image is smaller."""
    (h, w), (width, height) = size, image.size
    if (w, h) == (width, height):
        return image
    pad_left, pad_top = max(0, (w - width) // 2), max(0, (h - height) // 2)
    left = -pad_left if w > width else round((width - w) / 2)
    top = -pad_top if h > height else round((height - h) / 2)
    return image.crop((left, top, left + w, top + h))


def _each_side(size: Pair, rule: Callable[[int], int]) -> Pair:
    return rule(size[0]), rule(size[1])


def _check(p: Preprocess) -> None:
    def need(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ConfigError(f"Preprocess: {name} must be {rule}, got {getattr(p, name)!r}")

    def positive(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 15

    def positive_pair(value: Any) -> bool:
        return isinstance(value, tuple) and len(value) == 2 and all(map(positive, value))

    need(positive_pair(p.size), "size", "a pair (height, width) of positive integers")
    need(positive(p.resize_size) or positive_pair(p.resize_size), "resize_size", "a positive integer or a pair of them")
    need(p.resize in ("shorter", "squash", "none"), "resize", "'shorter', 'squash' or 'none'")
    filters = ("bicubic", "bilinear", "lanczos", "box", "hamming", "nearest")
    need(p.interpolation in filters, "interpolation", " or ".join(map(repr, filters)))
    need(p.mode in ("RGB", "L"), "mode", "'RGB' or 'L'")
    for name in ("mean", "std"):
        value = getattr(p, name)
        ok = isinstance(value, tuple) and len(value) == p.channels and all(isinstance(v, (int, float)) for v in value)
        need(ok and all(map(math.isfinite, value)), name, f"a tuple of {p.channels} numbers")
    need(min(p.std) > 0, "std", "above 0")
