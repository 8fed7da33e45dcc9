"""Memory in huge pages: contents, alignment, and that it lives as long as it is used."""

import gc
import math
import mmap
from pathlib import Path

import pytest
import torch
from skimp.codegen.cpp import kernels, pages

TYPES = [torch.float32, torch.bfloat16]


def test_copies_side_by_side_and_large_ones_alone():
    g, held = torch.Generator().manual_seed(0), pages.Pages()
    sizes = [3, 1000, 5 << 20, 1, 20 << 20, 7]
    made = [torch.randn(n, generator=g).to(t) for n, t in zip(sizes, 3 * TYPES, strict=True)]
    copies = [held.hold(t) for t in made]
    del held
    gc.collect()
    for copy, want in zip(copies, made, strict=True):
        assert copy.dtype == want.dtype
        assert torch.equal(copy, want)
        assert copy.data_ptr() % 64 == 0
    turned = torch.arange(6).view(2, 3).T
    assert pages.Pages().hold(turned).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize("shape", [(0,), (3, 4), (2, 3, 1 << 20)])
def test_empty_has_its_shape_and_can_be_written(shape):
    made = pages.empty(shape, torch.float32)
    assert made.shape == shape
    assert float(made.fill_(2).sum()) == 2 * made.numel()


def flags_of(tensor):
    """What the kernel notes of the memory that a tensor's middle lies in."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    mapped = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2:
            mapped = int(bounds[0], 16) <= middle < int(bounds[1], 16)
        elif mapped and line.startswith("VmFlags"):
            return line.split()
    raise AssertionError("the memory is not mapped")


def fresh(*shape):
    """Memory that nobody had before, who might have asked for large pages there."""
    size = 4 * math.prod(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32).view(*shape)


large_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has none"
)


@large_pages
def test_huge_pages_are_asked_for():
    assert "hg" in flags_of(pages.empty([16 << 20], torch.float32))


@large_pages
@torch.no_grad()
def test_weights_that_kernels_read_come_into_them():
    g = torch.Generator().manual_seed(0)
    w_in, w_out = (fresh(2048, 512).normal_(generator=g) for _ in range(2))
    x, scores = torch.randn(3, 512, generator=g), torch.rand(3, 256, generator=g)
    assert "hg" not in flags_of(w_in)
    before = w_in.clone()
    args = (x, scores, torch.tensor(0.5), w_in, None, None, None, w_out, None, 8, "relu")
    got = kernels.ops().dynk_ffn(*args)
    assert "hg" in flags_of(w_in)
    assert "hg" in flags_of(w_out)
    assert torch.equal(w_in, before)
    assert torch.equal(kernels.ops().dynk_ffn(*args), got)
