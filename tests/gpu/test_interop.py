"""Arrays of other libraries on the GPU: taken without a copy, in their stream's order; the same kind comes back."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from tests.gpu.models import distance, images, make, small

cupy = pytest.importorskip("cupy", reason="needs CuPy")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the memory


@pytest.fixture(scope="module")
def model() -> Any:
    return make(small())


def pointer_taken(model: Any, x: Any) -> int:
    with model._backend.active():
        return int(model._backend.pixels(x).data.ptr)


def torch_cuda() -> Any:
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch with CUDA")
    return torch


def test_torch(model: Any) -> None:
    torch, x = torch_cuda(), images(3, 3, 56, 56)
    want = model(x)
    given = torch.from_numpy(x).cuda()
    assert pointer_taken(model, given) == given.data_ptr()
    for tensor in (given, given.clone().requires_grad_(), given.to(memory_format=torch.channels_last)):
        y = model(tensor)
        assert isinstance(y, torch.Tensor) and y.device == given.device and y.dtype == torch.float32
        np.testing.assert_array_equal(y.cpu().numpy(), want)
    for y, on_host in zip(model.features(given), model.features(x), strict=True):
        np.testing.assert_array_equal(y.cpu().numpy(), on_host)
    np.testing.assert_array_equal(model.embed(given, normalize=True).cpu().numpy(), model.embed(x, normalize=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_torch_of_other_types(model: Any, dtype: str) -> None:
    torch = torch_cuda()
    given = torch.from_numpy(images(2, 3, 56, 56)).cuda().to(getattr(torch, dtype))
    y = model(given)
    assert y.dtype == torch.float32
    np.testing.assert_array_equal(y.cpu().numpy(), model(given.float().cpu().numpy()))


def test_torch_on_the_host(model: Any) -> None:
    torch, x = pytest.importorskip("torch", reason="needs PyTorch"), images(2, 3, 56, 56)
    y = model(torch.from_numpy(x))
    assert isinstance(y, torch.Tensor) and y.device.type == "cpu"
    np.testing.assert_array_equal(y.numpy(), model(x))


def test_torch_streams(model: Any) -> None:
    """The input is still being made, on a stream of PyTorch's, when the model is called; the result is used there."""
    torch, x = torch_cuda(), images(8, 3, 56, 56)
    want = model(x)
    pinned = torch.from_numpy(x).pin_memory()
    for _ in range(10):
        with torch.cuda.stream(torch.cuda.Stream()):
            given = torch.zeros(x.shape, device="cuda")
            torch.cuda._sleep(20_000_000)  # clock ticks
            given.copy_(pinned, non_blocking=True)
            doubled = model(given) * 2
            given.zero_()
        torch.cuda.synchronize()
        np.testing.assert_array_equal(doubled.cpu().numpy(), want * 2)


def test_cupy_of_other_types(model: Any) -> None:
    x = images(2, 3, 56, 56)
    for dtype in (np.float64, np.float16):
        y = model(cupy.asarray(x, dtype))
        assert isinstance(y, cupy.ndarray) and y.dtype == np.float32
        np.testing.assert_array_equal(y.get(), model(x.astype(dtype)))
    assert pointer_taken(model, given := cupy.asarray(x)) == given.data.ptr


def test_jax(model: Any) -> None:
    jax = pytest.importorskip("jax", reason="needs JAX")
    try:
        gpu = jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"needs JAX with CUDA: {error}")
    x = images(3, 3, 56, 56)
    given = jax.device_put(x, gpu)
    assert pointer_taken(model, given) == given.unsafe_buffer_pointer()
    y = model(given)
    assert isinstance(y, jax.Array) and y.devices() == {gpu}
    np.testing.assert_array_equal(np.asarray(y), model(x))
    half = given.astype("bfloat16")
    np.testing.assert_array_equal(np.asarray(model(half)), model(np.asarray(half.astype("float32"))))


def test_numba(model: Any) -> None:
    cuda = pytest.importorskip("numba.cuda", reason="needs numba with CUDA")
    if not cuda.is_available():
        pytest.skip("needs numba with CUDA")
    x = images(3, 3, 56, 56)
    given = cuda.to_device(x)
    assert pointer_taken(model, given) == given.device_ctypes_pointer.value
    y = model(given)
    assert cuda.is_cuda_array(y) and hasattr(y, "copy_to_host")
    np.testing.assert_array_equal(y.copy_to_host(), model(x))


def test_uint8_arrays_on_the_gpu_are_images(model: Any) -> None:
    pictures = np.random.default_rng().integers(0, 256, (2, 60, 80, 3), np.uint8)
    np.testing.assert_array_equal(model(cupy.asarray(pictures)), model(pictures))
    assert distance(model(pictures), make(small(), "cpu", "fp64")(pictures)) <= 1e-5
