"""Names, the manifest, and getting files; the network is a stand-in."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import re
from pathlib import Path

import pytest

from swincupy import labels, registry, resources
from swincupy.errors import CheckpointError, DownloadError, SwincupyError
from swincupy.parameters import parameter_shapes

PUBLISHED = registry.names()[1:]
# Numbers of trained parameters as published.
PARAMETERS = {
    "swin_tiny_patch4_window7_224": 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window7_224": 196_532_476,
    "swin_large_patch4_window12_384": 196_735_516,
    "swin_tiny_c24_patch4_window8_256": 28_306_432,
    "swinv2_tiny_window8_256": 28_347_154,
    "swinv2_tiny_window16_256": 28_347_154,
    "swinv2_small_window16_256": 49_728_418,
    "swinv2_base_window12to16_192to256": 87_918_816,
    "swinv2_large_window12to24_192to384": 196_739_932,
}


def count(config) -> int:
    total = 0
    for shape in parameter_shapes(config).values():
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


@pytest.mark.parametrize("name", PARAMETERS)
def test_architectures_have_the_published_sizes(name):
    assert count(registry.CONFIGS[name]) == PARAMETERS[name]


def test_22k_heads():
    assert count(registry.config_for("swin_tiny_patch4_window7_224.ms_in22k")) == 44_315_083
    assert count(registry.config_for("swinv2_large_window12_192.ms_in22k")) == 228_772_549


def test_every_architecture_is_a_config_named_alike():
    for name, config in registry.CONFIGS.items():
        assert config.version == (2 if name.startswith("swinv2") else 1)
        assert re.search(rf"(^|_|to){config.img_size}$", name)
        if window := re.search(r"window(?:\d+to)?(\d+)", name):
            assert config.window_size == int(window[1])
        assert (config.pretrained_window_sizes == (12, 12, 12, 6)) == ("window12to" in name)
    assert len(registry.CONFIGS) == len(set(registry.CONFIGS))


def test_manifest_is_complete_and_consistent():
    assert registry.names()[0] == "demo"
    assert {registry.entry(n).architecture for n in PUBLISHED} <= set(registry.CONFIGS)
    for name in PUBLISHED:
        e = registry.entry(name)
        assert e.name == name and registry.config_for(name).num_classes == e.num_classes
        assert e.num_classes == (21841 if name.endswith("in22k") else 1000)
        assert (e.top1 is None) == (e.top1_source is None) == (e.num_classes == 21841)
        assert (e.license is None) == (e.license_source is None)
        assert e.repo in (None, f"timm/{name}")
        assert e.release
    assert sum(registry.entry(n).repo is not None for n in PUBLISHED) == 31


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("swin_tiny", "swin_tiny_patch4_window7_224.ms_in1k"),
        ("swin_t", "swin_tiny_patch4_window7_224.ms_in1k"),
        ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224.ms_in1k"),
        ("swin-tiny-patch4-window7-224", "swin_tiny_patch4_window7_224.ms_in1k"),
        ("swin_base", "swin_base_patch4_window7_224.ms_in22k_ft_in1k"),
        ("swin_base_patch4_window7_224_22k", "swin_base_patch4_window7_224.ms_in22k"),
        ("swin_v2_t", "swinv2_tiny_window8_256.ms_in1k"),
        ("swinv2_tiny_patch4_window16_256", "swinv2_tiny_window16_256.ms_in1k"),
        ("swinv2_large", "swinv2_large_window12to16_192to256.ms_in22k_ft_in1k"),
        ("swin_s3_tiny", "swin_s3_tiny_224.ms_in1k"),
        ("swin_t.tv_in1k", "swin_t.tv_in1k"),
    ],
)
def test_aliases(alias, name):
    assert registry.entry(alias).name == name


def test_short_names_lead_to_architectures():
    assert set(registry._SHORT.values()) <= set(registry.CONFIGS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tny", "did you mean 'swin_tiny'"),
        ("swinv2_base_window8_265", "did you mean 'swinv2_base_window8_256'"),
        ("demmo", "did you mean 'demo'"),
        ("zzzz", "got 'zzzz'; `swincupy models` lists"),
        ("models/swin_tiny_patch4_window7_224", "there is no such file"),
        ("swin_tiny_patch4_window7_225.pth", "there is no such file"),
    ],
)
def test_unknown_names_get_advice(name, message):
    with pytest.raises(CheckpointError, match=message):
        registry.entry(name)


@pytest.mark.parametrize(
    ("name", "classes", "windows"),
    [
        ("microsoft/swinv2-base-patch4-window12to16-192to256-22kto1k-ft", 1000, 16),
        ("swin_large_patch4_window12_384_22k.pth", 21841, 12),
        ("swin_small", 1000, 7),
        ("swin_s3_base_224.ms_in1k", 1000, (7, 7, 14, 7)),
    ],
)
def test_named_config_understands_every_spelling(name, classes, windows):
    config = registry.named_config(name)
    assert (config.num_classes, config.window_size) == (classes, windows)


def test_named_config_unknown():
    with pytest.raises(CheckpointError, match="did you mean"):
        registry.named_config("swinv3_tiny")


def test_labels_of_imagenet():
    names = registry.labels_for("swin_tiny")
    assert names is labels.imagenet1k() and len(names) == 1000
    assert (names[0], names[999]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")
    assert names[281] == "tabby, tabby cat" and names[207] == "golden retriever"
    assert registry.labels_for("swin_tiny_patch4_window7_224.ms_in22k") is None
    assert registry.labels_for("demo") is None


@pytest.mark.parametrize(
    ("path", "classes", "named"),
    [
        ("folder/swin_tiny_patch4_window7_224.pth", 1000, True),
        ("swin_base_patch4_window12_384_22kto1k.pth", 1000, True),
        ("microsoft/swin-tiny-patch4-window7-224/", 1000, True),
        ("swin_tiny_patch4_window7_224.pth", 10, False),  # trained on something else since
        ("swin_base_patch4_window12_384_22k.pth", 21841, False),
        ("model.safetensors", 1000, False),
    ],
)
def test_labels_of_files_called_as_published(path, classes, named):
    assert registry.labels_of_file(path, classes) == (labels.imagenet1k() if named else None)


def test_demo_is_the_shipped_file():
    path = registry.fetch("demo")
    assert path == resources.resource_dir("weights") / "swin_digits.safetensors"
    assert registry.entry("demo").sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert registry.config_for("demo").num_classes == registry.entry("demo").num_classes


def test_changed_file_is_refused(monkeypatch):
    changed = dataclasses.replace(registry.entry("demo"), sha256="0" * 64)
    monkeypatch.setattr(registry, "_manifest", lambda: {"demo": changed})
    with pytest.raises(CheckpointError, match="must have the SHA-256 0000"):
        registry.fetch("demo")


def test_checkpoint_without_a_hub_says_where_it_is():
    with pytest.raises(DownloadError, match=r"swin_v2_b-781e5279\.pth from download\.pytorch\.org"):
        registry.fetch("swin_v2_b.tv_in1k")


class Hub:
    """Stands in for huggingface_hub's two functions."""

    def __init__(self, monkeypatch, cached=None, answer=None):
        import huggingface_hub

        self.asked = []
        self.answer = answer
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, file: cached)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def download(self, repo, file):
        self.asked.append((repo, file))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_cached_file_needs_no_network(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, cached=str(tmp_path / "model.safetensors"))
    monkeypatch.setattr(registry, "_reachable", lambda url: pytest.fail("asked the network"))
    assert registry.fetch("swin_tiny") == tmp_path / "model.safetensors"
    assert hub.asked == []


@pytest.mark.parametrize("progress", [True, False])
def test_download(monkeypatch, tmp_path, progress):
    from huggingface_hub.utils import are_progress_bars_disabled

    hub = Hub(monkeypatch, answer=tmp_path / "model.safetensors")
    monkeypatch.setattr(registry, "_reachable", lambda url: True)
    before = are_progress_bars_disabled()
    assert registry.fetch("swin_t", progress=progress) == tmp_path / "model.safetensors"
    assert hub.asked == [("timm/swin_tiny_patch4_window7_224.ms_in1k", "model.safetensors")]
    assert are_progress_bars_disabled() == before


ADVICE = r"download model\.safetensors from the Hugging Face repository timm/swin_tiny.*HF_HOME"


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("odd\nanswer"), RuntimeError()])
def test_failed_download_says_what_to_do(monkeypatch, error):
    Hub(monkeypatch, answer=error)
    monkeypatch.setattr(registry, "_reachable", lambda url: True)
    with pytest.raises(DownloadError, match=ADVICE) as raised:
        registry.fetch("swin_tiny")
    assert "\n" not in str(raised.value)


def test_offline_machine_is_told_at_once(monkeypatch):
    hub = Hub(monkeypatch)
    for variable in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)

    def unresolved(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unresolved)
    with pytest.raises(DownloadError, match="cannot be reached; .*" + ADVICE):
        registry.fetch("swin_tiny")
    assert hub.asked == []


def test_offline_mode_of_the_hub(monkeypatch, tmp_path):
    import huggingface_hub

    Hub(monkeypatch, answer=huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="offline mode is enabled.*" + ADVICE):
        registry.fetch("swin_tiny")


def test_missing_huggingface_hub_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DownloadError, match=r'pip install "swincupy\[hub\]", or .*' + ADVICE):
        registry.fetch("swin_tiny")


def test_resource_dir_of_a_checkout_and_of_an_installation(tmp_path, monkeypatch):
    package = tmp_path / "swincupy"
    package.mkdir()
    monkeypatch.setattr(resources, "_PACKAGE", package)
    (tmp_path / "weights").mkdir()
    with pytest.raises(SwincupyError, match="'weights' must be a folder of the installation"):
        resources.resource_dir("weights")  # a stranger's folder in site-packages
    (tmp_path / "pyproject.toml").touch()
    assert resources.resource_dir("weights") == tmp_path / "weights"
    (package / "weights").mkdir()
    assert resources.resource_dir("weights") == package / "weights"
    assert isinstance(resources.resource_dir("weights"), Path)
