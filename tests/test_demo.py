"""The demo model is as good as its card says, on digits that it was not trained on."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
from PIL import Image

import swincupy

pytest.importorskip("sklearn", reason="needs scikit-learn, of the test extra: it holds the digits")


@pytest.fixture(scope="module")
def data(root):
    """weights/digits.py."""
    spec = importlib.util.spec_from_file_location("weights_digits", root / "weights" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(data):
    return swincupy.load(data.WEIGHTS)


def test_held_out_accuracy_is_what_the_card_says(root, data, model):
    counts = data.confusion(model)
    assert counts.sum() == 1797 - data.SPLIT
    accuracy = 100 * counts.trace() / counts.sum()
    card = (root / "weights" / "swin_digits.md").read_text(encoding="utf-8")
    stated = re.search(r"[Hh]eld-out accuracy: \*\*(\d+\.\d+) %\*\*", card)
    assert stated, "the card states no held-out accuracy"
    assert accuracy >= 97
    assert accuracy == pytest.approx(float(stated[1]), abs=0.1)


def test_samples_are_held_out_pictures(data, digits):
    """Every sample is the picture of the digit that its name says, and none was trained on."""
    ink, target = data.digits()
    assert len(digits) == 10
    for path in digits:
        true, index = map(int, re.fullmatch(r"digit-(\d)-(\d{4})", path.stem).groups())
        assert index >= data.SPLIT
        assert target[index] == true
        with Image.open(path) as image:
            shown, made = np.asarray(image, dtype=int), np.asarray(data.picture(ink[index]), dtype=int)
        assert shown.shape == made.shape
        assert abs(shown - made).max() <= 1  # another version of Pillow may round otherwise


def test_samples_are_classified_as_named(data, model, digits):
    found = [best[0].label for best in model.classify(digits, topk=1)]
    named = [data.LABELS[int(path.stem.split("-")[1])] for path in digits]
    assert sum(f == n for f, n in zip(found, named, strict=True)) >= 9


def test_split_lies_between_forms(data):
    """The classes of each form come in nearly the same order, so a form's first thirty tell where it begins."""
    _, target = data.digits()
    start = [*range(10)] * 3
    for begin in (0, data.SPLIT):
        assert target[begin : begin + 30].tolist() == start
    assert target[data.TUNE : data.TUNE + 29].tolist() == start[1:]  # this form lacks its first zero


def test_file_states_all_that_the_model_needs(data, model):
    """No name, layout or option beside the file is needed to read it."""
    assert model.labels == data.LABELS
    assert {name: getattr(model.config, name) for name in data.MODEL} == data.MODEL
    assert model.preprocess.resize == "squash"
    assert model.preprocess.size == (32, 32)
    assert model.preprocess.mean == model.preprocess.std == (0.5, 0.5, 0.5)
    assert data.WEIGHTS.stat().st_size < 4e6


def test_demo_is_this_model(model, data):
    image = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), np.uint8)
    np.testing.assert_array_equal(swincupy.load("demo")(image), model(image))
