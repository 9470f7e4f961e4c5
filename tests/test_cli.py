"""The command line as people and scripts meet it, with the demo model."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import swincupy
from swincupy import cli, registry
from swincupy.journal import Journal
from swincupy.parameters import parameter_shapes

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def run(capsys):
    """Run a command; its exit code, standard output and standard error."""

    def run(*args) -> tuple[int, str, str]:
        try:
            code = cli.main([str(a) for a in args])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.fixture
def folder(tmp_path, digits) -> Path:
    """Ten images, and what a folder of images also has: notes, hidden files, another folder."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for path in digits[:8]:
        shutil.copy(path, folder)
    for path in digits[8:]:
        shutil.copy(path, folder / "more")
    (folder / "notes.md").write_text("no picture")
    (folder / "._hidden.png").write_text("no picture")
    return folder


@pytest.fixture
def bad(tmp_path) -> Path:
    path = tmp_path / "bad.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return path


def one_line(err: str) -> str:
    lines = err.splitlines()
    assert len(lines) == 1, err
    return lines[0]


# ------------------------------------------------------------------ classify


def test_classify_names_the_digits(run, digits):
    code, out, err = run("classify", *digits, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert [f["image"] for f in found] == [str(p) for p in digits]
    for path, image in zip(digits, found, strict=True):
        best = image["predictions"][0]
        assert set(best) == {"label", "score", "index"} and len(image["predictions"]) == 5
        assert best["label"] == LABELS[int(path.name.split("-")[1])]


def test_classify_text_is_names_and_percent(run, digits):
    code, out, err = run("classify", digits[3], "--topk", 2)
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 3)
    assert lines[0] == str(digits[3])
    assert lines[1].endswith(" %  three") and 50 < float(lines[1].split()[0]) <= 100


def test_classify_reports_bad_images_and_goes_on(run, digits, bad, tmp_path):
    missing = tmp_path / "missing.png"
    args = ("classify", bad, digits[1], missing, digits[2], "--topk", 1, "--batch-size", 1)
    code, out, err = run(*args)
    assert code == 1
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [str(digits[1]), str(digits[2])]
    assert [str(p) in line for p, line in zip((bad, missing), err.splitlines(), strict=True)] == [True, True]
    code, out, _ = run(*args, "--json")
    found = json.loads(out)
    assert code == 1
    assert ["error" in f for f in found] == [True, False, True, False]
    assert found[3]["predictions"][0]["label"] == "two"


def test_classify_folders_and_patterns(run, folder):
    def images(*args) -> list[str]:
        code, out, _ = run("classify", *args, "--json", "--topk", 1)
        assert code == 0
        return [Path(f["image"]).name for f in json.loads(out)]

    assert len(images(folder)) == 8
    assert len(images(folder, "--recursive")) == 10
    assert [name[:7] for name in images(folder / "digit-[35]*.png")] == ["digit-3", "digit-5"]


def test_classify_with_another_preset_and_model_without_labels(run, digits, tmp_path):
    model = random_model(tmp_path / "model.safetensors", num_classes=4)
    code, out, err = run("classify", digits[0], "--model", model, "--preset", "hf", "--json")
    assert (code, err) == (0, "")
    labels = [p["label"] for p in json.loads(out)[0]["predictions"]]
    assert sorted(labels) == ["class 0", "class 1", "class 2", "class 3"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x.png", "--model", "swin_tny"], "did you mean 'swin_tiny'"),
        (["x.png", "--model", "nowhere/x.pth"], "no such file"),
        (["*.nothing"], r"the pattern *.nothing must match files"),
        (["x.png", "--precision", "fp3"], "precision must be"),
        (["x.png", "--device", "tpu"], "device must be"),
    ],
)
def test_errors_are_one_line(run, args, message):
    code, out, err = run("classify", *args)
    assert (code, out) == (1, "")
    assert one_line(err).startswith("swincupy: error: ") and message in err


def test_empty_folder(run, tmp_path):
    (tmp_path / "in").mkdir()
    code, _, err = run("classify", tmp_path / "in")
    assert code == 1 and "must hold images, found none; --recursive" in one_line(err)


def test_debug_shows_the_traceback():
    with pytest.raises(swincupy.CheckpointError):
        cli.main(["classify", "x.png", "--model", "swin_tny", "--debug"])


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["nonsense"],
        ["classify"],
        ["classify", "x.png", "--topk", "0"],
        ["embed", "x.png"],
        ["embed", "x.png", "-o", "a.npy", "--batch-size", "many"],
        ["convert", "a", "b.safetensors", "--name", "swin_tiny", "--config", "c.json"],
    ],
)
def test_wrong_usage_is_2(run, args):
    code, out, err = run(*args)
    assert (code, out) == (2, "") and "usage: swincupy" in err


def test_version(run):
    assert run("--version") == (0, f"swincupy {swincupy.__version__}\n", "")


# --------------------------------------------------------------------- embed


def test_embed_npy(run, folder, tmp_path):
    output = tmp_path / "e.npy"
    code, out, err = run("embed", folder, "-o", output, "--batch-size", 3)
    names = (tmp_path / "e.npy.names.txt").read_text().splitlines()
    rows = np.load(output)
    assert (code, out) == (0, "") and "wrote 8 embeddings of length 128" in one_line(err)
    assert names == sorted(str(p) for p in folder.glob("digit*")) and rows.dtype == np.float32
    np.testing.assert_allclose(rows, swincupy.load("demo").embed(names), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.npy", "e.npy.names.txt", "pictures"]


def test_embed_safetensors_with_lists(run, folder, tmp_path, monkeypatch):
    images = sorted(map(str, folder.rglob("digit*")))
    listing = tmp_path / "list.txt"
    listing.write_text("\n".join(images[:3]) + "\n\n")
    output = tmp_path / "e.safetensors"
    monkeypatch.setattr("sys.stdin", io.StringIO(images[3] + "\n" + images[0] + "\n"))
    code, _, _ = run("embed", listing, "-", "-o", output, "--normalize")
    assert code == 0
    with safe_open(output, "numpy") as file:
        rows, metadata = file.get_tensor("embeddings"), file.metadata()
    assert json.loads(metadata["names"]) == [*images[:4], images[0]]
    assert (metadata["model"], metadata["normalize"]) == ("demo", "true")
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(rows[0], rows[4])


def test_embed_stops_at_a_bad_image_and_keeps_what_is_done(run, digits, bad, tmp_path):
    output = tmp_path / "e.npy"
    images = [*digits[:5], bad, *digits[5:]]
    code, _, err = run("embed", *images, "-o", output, "--batch-size", 2)
    assert code == 1 and not output.exists()
    kept, error = err.splitlines()
    assert "4 finished embeddings are kept in" in kept and "--resume" in kept
    assert error.startswith("swincupy: error: ") and "bad.png" in error and "--skip-bad" in error
    # a second run does not throw the work away unasked
    code, _, err = run("embed", *images, "-o", output)
    assert code == 1 and "continue it with --resume, or delete it" in one_line(err)
    # nor goes on with another question
    code, _, err = run("embed", *images, "-o", output, "--resume", "--normalize")
    assert code == 1 and "must come from the same model and options" in one_line(err.splitlines()[-1])
    code, _, err = run("embed", *images, "-o", output, "--resume", "--skip-bad", "--batch-size", 4)
    assert code == 0 and "skipped: load_image: " in err and "bad.png" in err and "1 left out" in err
    assert (tmp_path / "e.npy.names.txt").read_text().splitlines() == [str(p) for p in digits]
    rows = np.load(output)
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(rows, swincupy.load("demo").embed(digits), atol=1e-5)
    assert not list(tmp_path.glob("*journal*"))


def test_embed_resumes_without_computing_again(run, digits, tmp_path, monkeypatch):
    output, embedded = tmp_path / "e.npy", []
    real = swincupy.SwinTransformer.embed

    def embed(self, x, **options):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(len(x))
        return real(self, x, **options)

    monkeypatch.setattr(swincupy.SwinTransformer, "embed", embed)
    code, _, err = run("embed", *digits, "-o", output, "--batch-size", 3)
    assert code == 130 and err.splitlines()[-1] == "swincupy: interrupted"
    embedded.clear()
    # a crash in the middle of writing a batch leaves half of it
    with open(tmp_path / "e.npy.journal", "ab") as file:
        file.write(json.dumps({"names": [str(digits[9])]}).encode() + b"\n" + b"\x00" * 17)
    code, _, _ = run("embed", *digits, "-o", output, "--batch-size", 3, "--resume")
    assert code == 0 and embedded == [3, 1]
    monkeypatch.undo()
    np.testing.assert_allclose(np.load(output), swincupy.load("demo").embed(digits), atol=1e-5)


def test_embed_a_changed_model_is_not_resumed(run, digits, bad, tmp_path):
    model = random_model(tmp_path / "model.safetensors")
    args = ("embed", *digits[:2], bad, "-o", tmp_path / "e.npy", "--model", model, "--batch-size", 1)
    assert run(*args)[0] == 1
    random_model(model, seed=1)
    os.utime(model, ns=(1, 1))
    code, _, err = run(*args, "--resume", "--skip-bad")
    assert code == 1 and "must come from the same model" in err


def test_embed_with_nothing_but_bad_images(run, bad, tmp_path):
    code, _, err = run("embed", bad, "-o", tmp_path / "e.npy", "--skip-bad")
    assert code == 1 and "got 1 that cannot" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.png"]


@pytest.mark.parametrize(("output", "message"), [("e.csv", "must end in .npy or"), ("no/e.npy", "an existing folder")])
def test_embed_output_is_checked_before_the_work(run, digits, tmp_path, output, message):
    code, _, err = run("embed", digits[0], "-o", tmp_path / output)
    assert code == 1 and message in one_line(err)


def test_embed_shows_a_bar_on_a_terminal_only(run, digits, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert cli.main(["embed", *map(str, digits), "-o", str(tmp_path / "e.npy")]) == 0
    assert "10/10" in terminal.getvalue()


def test_journal_of_another_kind_is_not_taken(tmp_path):
    (tmp_path / "e.npy.journal").write_text("my diary\n")
    with pytest.raises(swincupy.InputError, match="delete it to start anew"):
        Journal(tmp_path / "e.npy", {"a": 1}, 4, resume=True)
    assert (tmp_path / "e.npy.journal").exists()


# ------------------------------------------------------- convert and inspect


def random_model(path: Path, *, seed: int = 0, **fields) -> Path:
    """A small model with random weights, saved."""
    config = swincupy.SwinConfig(
        **dict(img_size=32, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, num_classes=3) | fields
    )
    rng = np.random.default_rng(seed)
    params = {k: rng.standard_normal(s).astype(np.float32) for k, s in parameter_shapes(config).items()}
    swincupy.SwinTransformer(params, config).save(path)
    return path


def test_convert_keeps_the_model(run, digits, tmp_path):
    target = tmp_path / "copy.safetensors"
    code, out, err = run("convert", "demo", target)
    assert (code, out) == (0, "") and "wrote" in one_line(err)
    model, copy = swincupy.load("demo"), swincupy.load(target)
    assert (copy.config, copy.labels, copy.preprocess) == (model.config, model.labels, model.preprocess)
    np.testing.assert_array_equal(copy(digits[:2]), model(digits[:2]))


def test_convert_with_a_config(run, tmp_path):
    source, target, config = tmp_path / "s.safetensors", tmp_path / "t.safetensors", tmp_path / "c.json"
    random_model(source)
    fields = swincupy.load(source).config.to_dict()
    config.write_text(json.dumps(fields))
    assert run("convert", source, target, "--config", config)[0] == 0
    for content in ("[1]", "{", '{"depth": 3}'):
        config.write_text(content)
        code, _, err = run("convert", source, target, "--config", config)
        assert code == 1 and "c.json must hold SwinConfig's fields" in one_line(err)
    code, _, err = run("convert", source, target, "--name", "swin_tiny")
    assert code == 1 and one_line(err)
    code, _, err = run("convert", source, tmp_path / "t.pth")
    assert code == 1 and "must end in .safetensors" in one_line(err)


def test_inspect(run):
    code, out, err = run("inspect", "demo", "--check")
    model = swincupy.load("demo")
    assert (code, err) == (0, "")
    assert f"parameters  {model.num_parameters:,}" in out and "values      all finite" in out
    assert "patch_embed.proj.weight" in out and "32 x 3 x 2 x 2" in out
    code, out, _ = run("inspect", registry.fetch("demo"), "--json")
    found = json.loads(out)
    assert code == 0 and found["parameters"] == model.num_parameters
    assert swincupy.SwinConfig.from_dict(found["config"]) == model.config


def test_inspect_finds_nan_and_infinity(run, tmp_path):
    path = random_model(tmp_path / "m.safetensors")
    model = swincupy.load(path)
    params = {k: v.copy() for k, v in model._params.items()}
    params["norm.bias"][3] = np.nan
    params["head.weight"][1, 2] = -np.inf
    swincupy.SwinTransformer(params, model.config).save(path)
    assert run("inspect", path)[0] == 0
    code, out, err = run("inspect", path, "--check")
    assert code == 1 and "1 NaN, 0 infinite" in out and "0 NaN, 1 infinite" in out
    assert "NaN or infinite values in" in one_line(err) and "norm.bias" in err and "head.weight" in err
    code, out, _ = run("inspect", path, "--check", "--json")
    assert code == 1 and sorted(json.loads(out)["non_finite"]) == ["head.weight", "norm.bias"]


def test_inspect_broken_files(run, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(registry.fetch("demo").read_bytes()[:5000])
    code, out, err = run("inspect", path)
    assert (code, out) == (1, "") and "broken.safetensors" in one_line(err)


# --------------------------------------------------------------------- tune


@pytest.fixture
def tuned(monkeypatch):
    """What `swincupy.tune.main` is asked for."""
    asked = []
    monkeypatch.setattr("swincupy.tune.main", lambda *args: asked.append(args))
    return asked


def test_tune_by_name_and_file(run, tuned):
    assert run("tune")[0] == 0
    args = ("--model", registry.fetch("demo"), "--batch", 32, "--precision", "bf16", "--img-size", "64x48")
    assert run("tune", *args)[0] == 0
    demo = swincupy.load("demo").config
    assert tuned == [(registry.named_config("swin_tiny"), 1, "fp16", None), (demo, 32, "bf16", (64, 48))]


def test_tune_with_the_arguments_of_swin_gemm(run, tuned):
    assert run("tune", 32, 224, 7, 4, 32, 1, 0)[0] == 0
    ((config, batch, precision),) = tuned
    assert (config.embed_dim, config.num_heads, batch, precision) == (128, (4, 8, 16, 32), 32, "fp16")


@pytest.mark.parametrize(
    "args, message",
    [
        ((32, 224, 7, 4, 32, 1), "must be the seven numbers BATCH IMAGE WINDOW HEADS SIZE_PER_HEAD DTYPE INT8, got 6"),
        ((32, 224, 7, 4, 32, 1, 1), "INT8 must be 0, got 1"),
        ((32, 224, 7, 4, 32, "x", 1), "must be the seven integers"),
        ((32, 224, 7, 4, 32, 1, 0, "--batch", 2), "the seven numbers say everything"),
        (("--model", "swin_huge"), "name must be a published one"),
    ],
)
def test_tune_refuses(run, tuned, args, message):
    code, _, err = run("tune", *args)
    assert code == 1 and message in one_line(err) and not tuned


def test_tune_without_a_gpu(run):
    cupy = pytest.importorskip("cupy", reason="needs CuPy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        code, _, err = run("tune")
        assert code == 1 and "a GPU must be usable" in one_line(err)
    else:
        pytest.skip("there is a GPU")


# --------------------------------------------------------- models and doctor


def test_models(run):
    code, out, err = run("models")
    lines = out.splitlines()
    assert (code, err) == (0, "") and len(lines) == 1 + len(registry.names())
    row = next(line for line in lines if line.startswith("swin_tiny_patch4_window7_224.ms_in1k"))
    assert row.split()[1:] == ["224", "1000", "81.39", "MIT"]
    code, out, _ = run("models", "--json")
    assert code == 0 and [e["name"] for e in json.loads(out)] == list(registry.names())


def test_doctor(run):
    code, out, err = run("doctor")
    assert (code, err) == (0, "") and "self-check  ok" in out and "GPU  " in out and "numpy " in out
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and found["self_check"]["ok"] and found["used"] == {"device": "cpu", "precision": "fp32"}
    assert found["packages"]["numpy"] == np.__version__
    assert (found["gpu"]["usable"] == []) == bool(found["gpu"]["reason"])


def test_doctor_says_what_is_broken(run, monkeypatch, tmp_path):
    (tmp_path / "swin_digits.safetensors").write_bytes(b"x")
    manifest = {"demo": registry.entry("demo")}
    monkeypatch.setattr(registry, "_manifest", lambda: manifest)
    monkeypatch.setattr(registry, "resource_dir", lambda name: tmp_path)
    code, out, err = run("doctor")
    assert code == 1 and "self-check failed" in one_line(err) and "self-check" not in out
    assert json.loads(run("doctor", "--json")[1])["self_check"]["ok"] is False


# --------------------------------------------------------------- the process


def process(*args, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swincupy", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def test_module_and_exit_code(root, digits, bad):
    done = process("classify", digits[7], bad, "--topk", 1, cwd=root)
    assert done.returncode == 1
    assert done.stdout.splitlines()[1].split()[-1] == "seven"
    assert done.stderr.startswith("swincupy: error: ")


def test_closed_pipe_is_no_traceback(root):
    command = f"{sys.executable} -u -m swincupy models --json | true"
    done = subprocess.run(["sh", "-c", command], cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows does not allow such names")
def test_names_that_are_no_text(root, digits, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(digits[4], name)
    done = process("classify", tmp_path, "--topk", 1, cwd=root, env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert done.returncode == 0 and "caf\\udce9.png" in done.stdout and "four" in done.stdout
    for output in ("e.npy", "e.safetensors"):
        done = process("embed", tmp_path, "-o", tmp_path / output, cwd=root)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "e.npy.names.txt").read_bytes() == name + b"\n"
    with safe_open(tmp_path / "e.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["names"]) == [os.fsdecode(name)]


def test_images_of_one_pixel_are_fine(run, tmp_path):
    Image.new("1", (1, 1)).save(tmp_path / "dot.png")
    assert run("classify", tmp_path / "dot.png")[0] == 0
