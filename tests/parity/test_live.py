"""Agreement with the reference implementations, run side by side."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the references need torch")

import swincupy  # noqa: E402
from tests.parity import cases, goldens, recipe, references  # noqa: E402
from tests.parity.ask import ask  # noqa: E402
from tests.parity.cases import Case  # noqa: E402
from tests.parity.references import Reference  # noqa: E402

pytestmark = pytest.mark.parity

BY_NAME = {case.name: case for case in cases.CASES}
DOUBLE = 1e-10


@pytest.fixture(autouse=True)
def two_threads() -> Any:
    """Small models run slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def build(request: pytest.FixtureRequest) -> Callable[[Case], Reference]:
    """`references.build`, skipping what is not on this machine."""

    def build(case: Case) -> Reference:
        try:
            return references.build(case, request.config.getoption("--microsoft", default=None))
        except references.Missing as missing:
            pytest.skip(str(missing))

    return build


def agree(case: Case, reference: Reference, *, rounding: bool = False) -> None:
    """Load what the source would save; float32 within the tolerance, float64 within rounding.

    With ``rounding``, where float32 itself loses more than that, the reference's own distance from
    its float64 answer counts, six times: of two roundings one may be several times the other.
    """
    x = recipe.images(case.shape, case.seed)
    exact = reference.answers(x.astype(np.float64))
    model = swincupy.load(reference.state_dict(), config=case.config, precision="fp64")
    goldens.compare(ask(model, x.astype(np.float64), exact), exact, DOUBLE)

    answers = reference.answers(x)
    tolerance = goldens.TOLERANCE
    if rounding:
        own = max(float(np.abs(answers[k] - b).max() / np.abs(b).max()) for k, b in exact.items())
        tolerance = max(tolerance, 6 * own)
    model = swincupy.load(reference.state_dict(), config=case.config)
    ours = ask(model, x, answers)
    assert all(a.dtype == np.float32 for a in ours.values())
    goldens.compare(ours, answers, tolerance)


@pytest.mark.parametrize("name", BY_NAME)
def test_agrees(name: str, build: Callable[[Case], Reference]) -> None:
    agree(BY_NAME[name], build(BY_NAME[name]))


REAL = {
    "timm-v1-swin-tiny": dict(version=1, window_size=7, img_size=224),
    "timm-v2-swin-tiny": dict(version=2, window_size=8, img_size=256),
    "torchvision-v1-swin-tiny": dict(version=1, window_size=7, img_size=None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_size(name: str, build: Callable[[Case], Reference]) -> None:
    config = swincupy.SwinConfig(**REAL[name])
    side = 224 if config.version == 1 else 256
    case = Case(name, name.split("-")[0], config, (2, 3, side, side))
    agree(case, build(case), rounding=config.version == 2)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "source", ["microsoft", "timm", "huggingface", "huggingface-backbone", "torchvision", "openmmlab"]
)
def test_random_configurations(
    source: str, version: int, build: Callable[[Case], Reference], request: pytest.FixtureRequest
) -> None:
    if source in ("openmmlab", "detection") and version == 2:
        pytest.skip("no reference is at hand")
    first = request.config.getoption("--draw-seed", default=None)
    first = random.randrange(10**6) if first is None else first
    for seed in range(first, first + request.config.getoption("--draw", default=2)):
        case = cases.drawn(source, version, seed)
        print(f"--draw-seed {seed} --draw 1: {case}")
        agree(case, build(case), rounding=True)


# Files as the libraries write them -----------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in BY_NAME if n.startswith("huggingface")])
def test_hugging_face_folder(name: str, build: Callable[[Case], Reference], tmp_path: Path) -> None:
    """What ``save_pretrained`` writes, config.json and all, with nothing else told."""
    case = BY_NAME[name]
    reference = build(case)
    reference.module.save_pretrained(tmp_path)
    x = recipe.images(case.shape, case.seed)
    answers = reference.answers(x)
    goldens.compare(ask(swincupy.load(tmp_path), x, answers), answers)


@pytest.mark.parametrize("name", [n for n in BY_NAME if n.startswith("huggingface")])
def test_hugging_face_names_in_memory(name: str, build: Callable[[Case], Reference]) -> None:
    """``module.state_dict()`` itself, whose names are not those of files since transformers 5."""
    case = BY_NAME[name]
    reference = build(case)
    arrays = {k: t.detach().numpy() for k, t in reference.module.state_dict().items()}
    x = recipe.images(case.shape, case.seed)
    answers = reference.answers(x)
    goldens.compare(ask(swincupy.load(arrays, config=case.config), x, answers), answers)


@pytest.mark.parametrize(
    "name", ["microsoft-v1-window7", "microsoft-v2-window8", "timm-v1-square", "torchvision-v2-odd"]
)
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_torch_file(name: str, wrapper: str | None, build: Callable[[Case], Reference], tmp_path: Path) -> None:
    """What ``torch.save`` writes, bare and under the usual keys."""
    case = BY_NAME[name]
    reference = build(case)
    arrays = {k: torch.from_numpy(a) for k, a in reference.state_dict().items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({wrapper: arrays, "epoch": 3} if wrapper else arrays, path)
    x = recipe.images(case.shape, case.seed)
    answers = reference.answers(x)
    goldens.compare(ask(swincupy.load(path, config=case.config), x, answers), answers)


CONVENTIONS = (
    "timm-v1-dynamic", "timm-v2-pretrained-dynamic", "torchvision-v1-odd", "huggingface-v2-built-tall",
    "huggingface-backbone-v2", "openmmlab-v1-small", "openmmlab-v1-classification", "detection-v1-small",
)  # fmt: skip


@pytest.mark.parametrize("name", CONVENTIONS)
def test_saved(name: str, build: Callable[[Case], Reference], tmp_path: Path) -> None:
    """What `SwinTransformer.save` writes keeps to the source's conventions, with nothing told."""
    case = BY_NAME[name]
    reference = build(case)
    swincupy.load(reference.state_dict(), config=case.config).save(tmp_path / "model.safetensors")
    x = recipe.images(case.shape, case.seed)
    answers = reference.answers(x)
    goldens.compare(ask(swincupy.load(tmp_path / "model.safetensors"), x, answers), answers)


# What arrays alone tell ----------------------------------------------------------------------------


BUFFERS_TELL = (
    "microsoft-v2-window16",
    "microsoft-v2-pretrained",
    "torchvision-v2-odd",
    "torchvision-v1-rectangular-window",
)


@pytest.mark.parametrize("name", BUFFERS_TELL)
def test_buffers_stand_in_for_a_config(name: str, build: Callable[[Case], Reference]) -> None:
    """microsoft's and torchvision's files hold tables that show the windows, of V2 and of rectangles."""
    test_v1_needs_no_config(name, build)


@pytest.mark.parametrize("name", ["microsoft-v1-window7", "timm-v1-square", "torchvision-v1-odd", "huggingface-v1-odd"])
def test_v1_needs_no_config(name: str, build: Callable[[Case], Reference]) -> None:
    case = BY_NAME[name]
    reference = build(case)
    x = recipe.images(case.shape, case.seed)
    answers = reference.answers(x)
    goldens.compare(ask(swincupy.load(reference.state_dict()), x, answers), answers)


@pytest.mark.parametrize("name", ["timm-v1-rectangle", "torchvision-v2-odd"])
def test_pad_mode_is_the_sources_own_and_can_be_chosen(name: str, build: Callable[[Case], Reference]) -> None:
    """The two orders differ, so the loader's choice of one is seen."""
    case = BY_NAME[name]
    reference = build(case)
    x = recipe.images(case.shape, case.seed)
    answers = reference.answers(x)
    right, wrong = ("roll_pad", "pad_roll") if case.source == "timm" else ("pad_roll", "roll_pad")
    chosen = swincupy.load(reference.state_dict(), config=case.config, pad_mode=right)
    goldens.compare(ask(chosen, x, answers), answers)
    other = swincupy.load(reference.state_dict(), config=case.config, pad_mode=wrong)
    with pytest.raises(AssertionError, match="off by more"):
        goldens.compare(ask(other, x, answers), answers)


def test_headless(build: Callable[[Case], Reference]) -> None:
    """Without its head a checkpoint still tells its layout, and embeds the same."""
    for name in ("microsoft-v1-window7", "timm-v1-square", "huggingface-v1-odd", "torchvision-v1-odd"):
        case = BY_NAME[name]
        reference = build(case)
        arrays = {k: a for k, a in reference.state_dict().items() if not k.startswith(("head", "classifier"))}
        x = recipe.images(case.shape, case.seed)
        answers = {k: a for k, a in reference.answers(x).items() if k != "logits"}
        config = case.config.replace(num_classes=0)
        goldens.compare(ask(swincupy.load(arrays, config=config), x, answers), answers)


def test_bare_hugging_face_model(build: Callable[[Case], Reference]) -> None:
    """SwinModel's own file: no prefix and no head."""
    for name, prefix in (("huggingface-v1-odd", "swin."), ("huggingface-v2-odd", "swinv2.")):
        case = BY_NAME[name]
        reference = build(case)
        arrays = {k.removeprefix(prefix): a for k, a in reference.state_dict().items() if k.startswith(prefix)}
        x = recipe.images(case.shape, case.seed)
        answers = {k: a for k, a in reference.answers(x).items() if k != "logits"}
        goldens.compare(ask(swincupy.load(arrays, config=case.config.replace(num_classes=0)), x, answers), answers)


def test_backbone_of_transformers_4(build: Callable[[Case], Reference]) -> None:
    """Its names had no prefix, and no norm after the last stage but the stages' own."""
    case = BY_NAME["huggingface-backbone-v1-norms"]
    reference = build(case)
    arrays = {
        k.removeprefix("swin."): a for k, a in reference.state_dict().items() if not k.startswith("swin.layernorm.")
    }
    x = recipe.images(case.shape, case.seed)
    answers = reference.answers(x)
    goldens.compare(ask(swincupy.load(arrays, config=case.config), x, answers), answers)


@pytest.mark.parametrize("size", [(80, 96), (64, 128), (100, 64)])
def test_position_embedding_is_resized(size: tuple[int, int], build: Callable[[Case], Reference]) -> None:
    """As Hugging Face does on request: bicubic, to the grid at hand."""
    case = BY_NAME["huggingface-v1-ape"]
    reference = build(case)
    x = recipe.images((1, 3, *size), 0)
    with torch.inference_mode():
        logits = reference.module(torch.from_numpy(x), interpolate_pos_encoding=True).logits.numpy()
    model = swincupy.load(reference.state_dict(), config=case.config)
    goldens.compare({"logits": model(x)}, {"logits": logits})


# Where sources part ----------------------------------------------------------------------------------


def test_hugging_face_v2_adds_its_mask_twice(build: Callable[[Case], Reference]) -> None:
    """With random weights that is out of sight: a masked logit would have to be 60 above all others.

    Weights made for it, whose keys are minus their queries, show it: a picture of two halves then
    draws every token to the half that it is masked from. Added once, as in microsoft's code and here,
    -100 meets logits of +-100; added twice it wins.
    """
    case = BY_NAME["huggingface-v2-square"]
    reference = build(case)
    x = recipe.images(case.shape, case.seed).astype(np.float64)
    goldens.compare(_as_published(reference, x), reference.answers(x), 1e-14)

    arrays = reference.state_dict()
    for name in arrays:
        if "layers.0." not in name:
            continue
        if ".blocks.0.layernorm" in name or name.endswith("query.bias"):
            arrays[name][:] = 0.0  # the first block is the identity
        elif name.endswith(("query.weight", "key.weight")):
            arrays[name][:] = np.eye(len(arrays[name])) * (1.0 if "query" in name else -1.0)
        elif name.endswith("logit_scale"):
            arrays[name][:] = 5.0
    for name in ("patch_embeddings.projection.bias", "norm.bias"):
        arrays[f"swinv2.embeddings.{name}"][:] = 0.0
    reference.module.load_state_dict({k: torch.from_numpy(a) for k, a in arrays.items()})
    x = np.ones((1, 3, 64, 64)) * np.where(np.arange(64) < 32, 1.0, -1.0)
    once, twice = reference.answers(x), _as_published(reference, x)
    assert np.abs(once["stage0"] - twice["stage0"]).max() > 0.1 * np.abs(once["stage0"]).max()
    model = swincupy.load(arrays, config=case.config, precision="fp64")
    goldens.compare(ask(model, x, once), once, DOUBLE)


def _as_published(reference: Reference, x: np.ndarray) -> dict[str, np.ndarray]:
    """The answers of Hugging Face's V2 without `references.mask_once`."""
    patched = {m: vars(m).pop("get_attn_mask") for m in reference.module.modules() if "get_attn_mask" in vars(m)}
    assert patched
    answers = reference.answers(x)
    for module, method in patched.items():
        module.get_attn_mask = method
    return answers


def test_openmmlab_merging_is_unfold(build: Callable[[Case], Reference]) -> None:
    """The translation of patch merging, against ``nn.Unfold`` itself."""
    layout = references.OpenMMLab(2)
    weight = recipe.normal("w", (6, 12), 0)
    x = torch.from_numpy(recipe.normal("x", (1, 3, 4, 6), 0))
    theirs = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2) @ torch.from_numpy(weight).T
    name = "downsample.reduction.weight"
    ours = torch.from_numpy(layout.array(name, {layout.rename(name): weight}))
    z = x.permute(0, 2, 3, 1)
    merged = torch.cat([z[:, r::2, c::2] for c in range(2) for r in range(2)], -1)  # microsoft's order
    torch.testing.assert_close((merged @ ours.T).flatten(1, 2), theirs)
