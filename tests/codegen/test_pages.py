"""Memory in huge pages: contents, alignment, and that it lives as long as it is used."""

import gc
import platform
from pathlib import Path

import pytest
import torch
from skimp.codegen.cpp import pages

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


@pytest.mark.skipif(platform.system() != "Linux", reason="asks the kernel of Linux")
def test_huge_pages_are_asked_for():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has none")
    made = pages.empty([16 << 20], torch.float32)
    flags, mapped = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = line.split()[0].split("-")
        if len(bounds) == 2:
            mapped = int(bounds[0], 16) <= made.data_ptr() < int(bounds[1], 16)
        elif mapped and line.startswith("VmFlags"):
            flags = line
    assert "hg" in flags.split()
