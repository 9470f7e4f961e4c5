"""The reference implementations: one builder for each source, and what they answer.

`build(case)` gives a module whose every parameter comes from the recipe; `answers(...)` runs it.
Import this only where torch is installed; each builder imports its own library.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from swincupy import SwinConfig
from tests.parity import recipe
from tests.parity.cases import Case

Answers = dict[str, np.ndarray]


class Layout(Protocol):
    """How a source's file differs from the module that stands in for it."""

    def shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]: ...

    def array(self, name: str, file: dict[str, np.ndarray]) -> np.ndarray: ...


class Missing(Exception):
    """A reference that is not on this machine; the message is the reason to skip."""


class Reference:
    """A built reference: its module, its state dict in its own layout, and a function to its outputs.

    Weights come from the recipe by their names in files. ``rename`` takes a name in memory to that
    name; ``layout`` is given where arrays differ as well.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        case: Case,
        outputs: Callable[[torch.Tensor], dict[str, torch.Tensor]],
        *,
        rename: Callable[[str], str] = str,
        layout: Layout | None = None,
    ) -> None:
        self.module, self.case, self.outputs = module.eval(), case, outputs
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.shapes = layout.shapes(shapes) if layout else {rename(name): s for name, s in shapes.items()}
        self.parameters = recipe.state_dict(self.shapes, case.seed)
        self.buffers = {} if layout else {
            rename(name): t.numpy().copy() for name, t in module.state_dict().items() if name not in shapes
        }  # fmt: skip
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(
                    torch.from_numpy(layout.array(name, self.parameters) if layout else self.parameters[rename(name)])
                )

    def state_dict(self) -> dict[str, np.ndarray]:
        """What the source would save: parameters and persistent buffers, under the names that files have."""
        return self.parameters | self.buffers

    @torch.inference_mode()
    def answers(self, x: np.ndarray) -> Answers:
        """Outputs for [B, Cin, H, W], in the input's dtype: ``logits``, ``embed``, ``stage{i}``, ``norm{i}``."""
        self.module.to(torch.float64 if x.dtype == np.float64 else torch.float32)
        if x.dtype == np.float64:
            _exact_constants(self.module)
        outputs = self.outputs(torch.from_numpy(x))
        return {name: np.ascontiguousarray(t.numpy()) for name, t in outputs.items()}


def build(case: Case, microsoft: Path | None = None) -> Reference:
    """The reference of a case; `Missing` where its library or checkout is not here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.source == "microsoft":
            return _microsoft(case, microsoft)
        return {
            "timm": _timm,
            "huggingface": _huggingface,
            "huggingface-backbone": _backbone,
            "torchvision": _torchvision,
            "openmmlab": _openmmlab,
            "detection": _detection,
        }[case.source](case)


def version(source: str, microsoft: Path | None = None) -> str:
    """Name and version of the code behind a source."""
    if source == "microsoft":
        return f"microsoft/Swin-Transformer {commit(microsoft)}"
    library = {"timm": "timm", "torchvision": "torchvision"}.get(source, "transformers")
    return f"{library} {_library(library).__version__}"


def commit(checkout: Path | None) -> str:
    import subprocess

    out = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return out.stdout.strip() or "commit unknown"


def _library(name: str) -> ModuleType:
    """Import timm, torchvision or transformers; torchvision's compiled operators are not needed here."""
    if importlib.util.find_spec(name) is None:
        raise Missing(f"{name} is not installed")
    with contextlib.ExitStack() as stack:
        if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is not None:
            stack.enter_context(_torchvision_operators())
            importlib.import_module("torchvision")
        return importlib.import_module(name)


def _torchvision_binary_loads() -> bool:
    """Whether it does; it is loaded then. What it defines must not be defined a second time."""
    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec is not None else None
    for binary in sorted(Path((folders or ["."])[0]).glob("_C*.so")):
        with contextlib.suppress(OSError):
            torch.ops.load_library(str(binary))
    return hasattr(torch.ops.torchvision, "nms")


@contextlib.contextmanager
def _torchvision_operators() -> Iterator[None]:
    """Declare the operators that torchvision describes at import, where its binary does not match torch's.

    Nothing here calls them; without them ``import torchvision`` and whatever imports it fail.
    """
    if not _torchvision_binary_loads():
        _torchvision_operators.library = library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[attr-defined]
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield


def _exact_constants(module: torch.nn.Module) -> None:
    """Double precision for two constants of V2 that the libraries keep in float32 in a double model.

    They are the table of relative coordinates, a buffer, and microsoft's ln 100, here applied before it.
    """
    for m in module.modules():
        if hasattr(m, "relative_coords_table"):
            windows = zip(m.window_size, getattr(m, "pretrained_window_size", (0, 0)), strict=True)
            axes = [torch.arange(1.0 - w, w, dtype=torch.float64) * 8 / max((p or w) - 1, 1) for w, p in windows]
            t = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]
            m.relative_coords_table.copy_(t.sign() * (t.abs() + 1).log2() / 3)
            m.logit_scale.clamp_(max=math.log(100.0))


def _windows(config: SwinConfig) -> Any:
    return config.window_size if isinstance(config.window_size, int) else list(config.windows)


def _nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


# microsoft ---------------------------------------------------------------------------------------


def _microsoft(case: Case, checkout: Path | None) -> Reference:
    if checkout is None:
        raise Missing("no checkout of microsoft/Swin-Transformer given (--microsoft DIR)")
    c = case.config
    _library("timm")  # their code takes DropPath and the like from it
    file = {1: "swin_transformer", 2: "swin_transformer_v2"}[c.version]
    spec = importlib.util.spec_from_file_location(f"microsoft_{file}", checkout / "models" / f"{file}.py")
    if spec is None or spec.loader is None or not (checkout / "models").is_dir():
        raise Missing(f"{checkout} holds no models/{file}.py")
    code = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(sys.stderr):
        spec.loader.exec_module(code)
    more: dict[str, Any] = {}
    if c.version == 2:
        more["pretrained_window_sizes"] = [p[0] for p in c.pretrained_windows]
    model = {1: "SwinTransformer", 2: "SwinTransformerV2"}[c.version]
    module = getattr(code, model)(
        img_size=c.img_size, patch_size=c.patch_size, in_chans=c.in_chans, num_classes=c.num_classes,
        embed_dim=c.embed_dim, depths=list(c.depths), num_heads=list(c.num_heads), window_size=c.window_size,
        mlp_ratio=c.mlp_ratio, qkv_bias=c.qkv_bias, ape=c.ape, patch_norm=c.patch_norm, **more, **case.options,
    )  # fmt: skip

    def outputs(x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = {"logits": module(x), "embed": module.forward_features(x)}
        z = module.patch_embed(x)
        if c.ape:
            z = z + module.absolute_pos_embed
        for i, layer in enumerate(module.layers):
            for block in layer.blocks:
                z = block(z)
            out[f"stage{i}"] = z.transpose(1, 2).unflatten(2, layer.input_resolution)
            if layer.downsample is not None:
                z = layer.downsample(z)
        return out

    return Reference(module, case, outputs)


# timm --------------------------------------------------------------------------------------------


def _timm(case: Case) -> Reference:
    c = case.config
    timm = _library("timm")
    more: dict[str, Any] = {}
    if c.version == 2:
        more["pretrained_window_sizes"] = list(c.pretrained_windows)
    model = {1: "SwinTransformer", 2: "SwinTransformerV2"}[c.version]
    module = getattr(timm.models, {1: "swin_transformer", 2: "swin_transformer_v2"}[c.version]).__dict__[model](
        img_size=c.img_size, patch_size=c.patch_size, in_chans=c.in_chans, num_classes=c.num_classes,
        embed_dim=c.embed_dim, depths=c.depths, num_heads=c.num_heads, window_size=_windows(c),
        mlp_ratio=c.mlp_ratio, qkv_bias=c.qkv_bias, **more, **case.options,
    )  # fmt: skip

    def outputs(x: torch.Tensor) -> dict[str, torch.Tensor]:
        last = module.forward_features(x)
        stages = module.forward_intermediates(x, intermediates_only=True)
        out = {"logits": module(x), "embed": module.forward_head(last, pre_logits=True)}
        return out | {f"stage{i}": z for i, z in enumerate(stages)}

    return Reference(module, case, outputs)


# Hugging Face ------------------------------------------------------------------------------------


def _hf_config(case: Case, **more: Any) -> Any:
    c = case.config
    transformers = _library("transformers")
    if c.version == 2:
        more["pretrained_window_sizes"] = [p[0] for p in c.pretrained_windows]
    return getattr(transformers, {1: "SwinConfig", 2: "Swinv2Config"}[c.version])(
        image_size=c.img_size, patch_size=c.patch_size, num_channels=c.in_chans, num_labels=c.num_classes or 2,
        embed_dim=c.embed_dim, depths=list(c.depths), num_heads=list(c.num_heads), window_size=c.window_size,
        mlp_ratio=c.mlp_ratio, qkv_bias=c.qkv_bias, use_absolute_embeddings=c.ape, layer_norm_eps=c.norm_eps,
        **more, **{k: v for k, v in case.options.items() if k != "head"},
    )  # fmt: skip


def mask_once(module: torch.nn.Module) -> None:
    """Make Hugging Face's V2 add its shift mask once, as the paper's code does, by handing it half of it.

    It adds the mask twice. Where logits are large that shows: -200 hides what -100 lets through.
    """
    for layer in module.modules():
        if type(layer).__name__ == "Swinv2Layer":
            original = layer.get_attn_mask

            def half(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                mask = original(*args, **kwargs)
                return None if mask is None else mask / 2

            layer.get_attn_mask = half


def _huggingface(case: Case) -> Reference:
    transformers = _library("transformers")
    name = {1: "SwinForImageClassification", 2: "Swinv2ForImageClassification"}[case.config.version]
    module = getattr(transformers, name)(_hf_config(case))
    mask_once(module)
    base = module.swin if case.config.version == 1 else module.swinv2

    def outputs(x: torch.Tensor) -> dict[str, torch.Tensor]:
        # One forward pass: V1's layers shrink their windows for good at the first small input.
        kept: dict[str, torch.Tensor] = {}
        z, grid = base.embeddings(x)
        for i, stage in enumerate(base.encoder.layers):
            for block in stage.blocks:
                z = block(z, grid)[0]
            kept[f"stage{i}"] = z.transpose(1, 2).unflatten(2, grid)
            if stage.downsample is not None:
                z = stage.downsample(z, grid)
                grid = tuple((g + 1) // 2 for g in grid)
        return {"logits": module(x).logits, "embed": base(x).pooler_output, **kept}

    return Reference(module, case, outputs, rename=_hf_v4)


def _backbone(case: Case) -> Reference:
    transformers = _library("transformers")
    c = case.config
    name = {1: "SwinBackbone", 2: "Swinv2Backbone"}[c.version]
    names = [f"stage{i + 1}" for i in range(c.num_stages)]
    module = getattr(transformers, name)(_hf_config(case, out_features=names))
    mask_once(module)

    def outputs(x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = module(x, output_hidden_states=True)
        if c.version == 2:  # it has no norms
            return {f"stage{i}": z for i, z in enumerate(out.feature_maps)}
        stages = {f"stage{i}": z for i, z in enumerate(out.hidden_states[1:])}
        return stages | {f"norm{i}": z for i, z in enumerate(out.feature_maps)}

    return Reference(module, case, outputs, rename=_hf_v4)


_V4 = (  # names in memory (V1, since transformers 5) -> names in files
    (r"attention\.([qkv])_proj\.", lambda m: f"attention.self.{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"attention\.relative_position_bias\.", "attention.self."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def _hf_v4(name: str) -> str:
    for pattern, new in _V4:
        name = re.sub(pattern, new, name)
    return name


# torchvision -------------------------------------------------------------------------------------


def _torchvision(case: Case) -> Reference:
    c = case.config
    swin = _library("torchvision").models.swin_transformer
    more: dict[str, Any] = {}
    if c.version == 2:
        more = dict(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)
    module = swin.SwinTransformer(
        patch_size=list(c.patch), embed_dim=c.embed_dim, depths=list(c.depths), num_heads=list(c.num_heads),
        window_size=list(c.windows[0]), mlp_ratio=c.mlp_ratio, num_classes=c.num_classes, **more, **case.options,
    )  # fmt: skip

    def outputs(x: torch.Tensor) -> dict[str, torch.Tensor]:
        out = {"logits": module(x)}
        z = module.features[0](x)
        for i in range(c.num_stages):
            z = module.features[2 * i + 1](z)
            out[f"stage{i}"] = _nchw(z)
            if i + 1 < c.num_stages:
                z = module.features[2 * i + 2](z)
        out["embed"] = module.norm(z).mean((1, 2))
        return out

    return Reference(module, case, outputs)


# OpenMMLab ---------------------------------------------------------------------------------------


def _openmmlab(case: Case) -> Reference:
    """OpenMMLab's libraries are not needed: Hugging Face's V1 computes the same functions.

    Backbones (mmdet, mmseg) pad, roll, and never shrink a window, as `SwinBackbone` does. Classifiers
    (mmpretrain, ``head``) do not shift where one window covers the shorter side. Only names and the
    channel order of patch merging differ, and those are translated.
    """
    last = case.config.num_stages - 1
    reference = _huggingface(case) if case.options.get("head") else _backbone(case)
    if not case.options.get("head"):
        reference.module.swin.layernorm = torch.nn.Identity()  # in memory only, and not used
    return Reference(reference.module, case, reference.outputs, layout=OpenMMLab(last))


def _detection(case: Case) -> Reference:
    """The official detection code, and detectron2's: microsoft's names, OpenMMLab's function."""
    reference = _backbone(case)
    reference.module.swin.layernorm = torch.nn.Identity()
    return Reference(reference.module, case, reference.outputs, layout=Detection(case.config.num_stages - 1))


class OpenMMLab:
    """Names and arrays of OpenMMLab's files, for a module in Hugging Face's names."""

    NAMES = (
        (r"^classifier\.", "head.fc."),
        (r"^swin\.layernorm\.", "norm{last}."),
        (r"^(?:swin\.)?(?!head\.)", "backbone."),
        (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.projection."),
        (r"embeddings\.norm\.", "patch_embed.norm."),
        (r"encoder\.layers\.", "stages."),
        (r"layernorm_before\.", "norm1."),
        (r"layernorm_after\.", "norm2."),
        (r"attention\.[qkv]_proj\.", "attn.w_msa.qkv."),
        (r"attention\.relative_position_bias\.", "attn.w_msa."),
        (r"attention\.o_proj\.", "attn.w_msa.proj."),
        (r"mlp\.fc1\.", "ffn.layers.0.0."),
        (r"mlp\.fc2\.", "ffn.layers.1."),
        (r"hidden_states_norms\.stage(\d)\.", lambda m: f"norm{int(m[1]) - 1}."),
    )

    unfolds = True

    def __init__(self, last: int) -> None:
        self.last = last

    def rename(self, name: str) -> str:
        for pattern, new in self.NAMES:
            name = re.sub(pattern, new, name)  # type: ignore[arg-type]
        return name.replace("{last}", str(self.last))

    def shapes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes in the file: q, k and v are one array."""
        out = {}
        for name, shape in shapes.items():
            qkv = re.search(r"attention\.[qkv]_proj\.", name)
            out[self.rename(name)] = (3 * shape[0], *shape[1:]) if qkv else shape
        return out

    def array(self, name: str, file: dict[str, np.ndarray]) -> np.ndarray:
        """A module's parameter from the file's arrays."""
        a = file[self.rename(name)]
        if match := re.search(r"attention\.([qkv])_proj\.", name):
            i, dim = "qkv".index(match[1]), len(a) // 3
            return a[i * dim : (i + 1) * dim]
        if self.unfolds and "downsample." in name:  # [..., (channel, row, column)] -> [..., (column, row, channel)]
            grid = a.reshape(*a.shape[:-1], -1, 2, 2)
            return np.ascontiguousarray(np.moveaxis(grid, (-1, -2, -3), (-3, -2, -1)).reshape(a.shape))
        return a


class Detection(OpenMMLab):
    """Microsoft's names behind ``backbone.``, and a norm for each stage."""

    NAMES = (
        (r"^(?:swin\.)?", "backbone."),
        (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"embeddings\.norm\.", "patch_embed.norm."),
        (r"encoder\.layers\.", "layers."),
        (r"layernorm_before\.", "norm1."),
        (r"layernorm_after\.", "norm2."),
        (r"attention\.[qkv]_proj\.", "attn.qkv."),
        (r"attention\.relative_position_bias\.", "attn."),
        (r"attention\.o_proj\.", "attn.proj."),
        (r"hidden_states_norms\.stage(\d)\.", lambda m: f"norm{int(m[1]) - 1}."),
    )
    unfolds = False
