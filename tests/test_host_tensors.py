"""torch tensors in host memory as values; skipped where torch is missing."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import afield
from afield.gpu_store import private_views
from tests.helpers import poll

torch = pytest.importorskip("torch")

MIB = 1 << 20


def test_a_tensor_is_a_view_of_the_store(shared_runtime: None) -> None:
    tensor = torch.arange(4 * MIB, dtype=torch.int32)
    before = afield.stats(local=True)["bytes_copied_in"]
    ref = afield.put(tensor)
    assert 16 * MIB <= afield.stats(local=True)["bytes_copied_in"] - before < 17 * MIB
    first, second = afield.get([ref, ref])
    assert first.data_ptr() % 64 == 0 and first.equal(tensor) and first.data_ptr() != second.data_ptr()
    # Neither has copied anything: what a mapping takes of memory is none but what was written.
    private = _private_kib(first.data_ptr())
    assert private == 0
    first[5] = -1
    assert first[5] == -1 and second[5] == 5 and afield.get(ref)[5] == 5
    assert 0 < _private_kib(first.data_ptr()) <= 64


def _private_kib(address: int) -> int:
    """Return how much of the mapping at an address is this process's own."""
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            first = line.split()[0]
            if "-" in first and ":" not in first:
                low, high = (int(bound, 16) for bound in first.split("-"))
                inside = low <= address < high
            elif inside and line.startswith("Private_Dirty:"):
                return int(line.split()[1])
    raise AssertionError(f"nothing is mapped at {address:x}")


def test_mappings_end_with_their_tensors_and_take_no_descriptors(shared_runtime: None) -> None:
    ref = afield.put(torch.zeros(MIB))
    files = len(os.listdir("/proc/self/fd"))
    held = [afield.get(ref) for _ in range(50)]
    addresses = {tensor.data_ptr() for tensor in held}
    assert len(addresses) == 50 and len(os.listdir("/proc/self/fd")) <= files + 2
    part = held[0][10:20]
    del held
    assert part.sum() == 0
    with pytest.raises(AssertionError, match="nothing is mapped"):
        for address in addresses - {part.data_ptr() - 40}:
            _private_kib(address)
    object_id = ref.hex()
    del ref
    assert object_id in {entry.object_id for entry in afield.memory()}, "the last tensor keeps its memory"
    del part
    assert poll(lambda: object_id not in {entry.object_id for entry in afield.memory()}, 10.0)


def test_what_was_written_is_not_there_for_later_values(shared_runtime: None) -> None:
    ref = afield.put(torch.zeros(MIB))
    tensor = afield.get(ref)
    tensor += 7
    del ref, tensor
    refs = [afield.put(np.full(MIB, number, "f4")) for number in range(4)]
    assert [float(afield.get(each).max()) for each in refs] == [0.0, 1.0, 2.0, 3.0]


def test_every_kind_comes_back(shared_runtime: None) -> None:
    large = torch.arange(100_000, dtype=torch.float64)
    values: list[Any] = [
        torch.tensor(3.5),
        torch.zeros(0, 3),
        torch.arange(12).reshape(3, 4).T,
        torch.ones(3, 1).expand(3, 5),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.bfloat16),
        torch.arange(5, dtype=torch.float16),
        torch.view_as_complex(torch.ones(4, 2)),
        torch.view_as_complex(torch.ones(4, 2)).conj(),
        torch.nn.Parameter(torch.ones(3)),
        torch.ones(2, requires_grad=True),
        torch.ones(2, requires_grad=True) * 2,
        torch.eye(3).to_sparse(),
        large[::2],
        large[17:],
    ]
    echo = afield.remote(lambda each: each)
    for value, back in zip(values, afield.get([echo.remote(each) for each in values]), strict=True):
        assert type(back) is type(value) and back.dtype == value.dtype and back.shape == value.shape
        assert back.requires_grad == value.requires_grad and torch.equal(back.to_dense(), value.detach().to_dense())
        if not value.is_sparse:
            assert back.is_conj() == value.is_conj()


def test_tensors_that_share_memory_share_it_again(shared_runtime: None) -> None:
    weight = torch.zeros(200_000)
    module = torch.nn.Linear(300, 400)
    back = afield.get(
        afield.put({"weight": weight, "tied": weight.reshape(2, -1), "tail": weight[100_000:], "m": module})
    )
    back["weight"][150_000] = 1
    assert back["tied"][1, 50_000] == 1 and back["tail"][50_000] == 1 and weight.sum() == 0
    x = torch.ones(300)
    assert torch.equal(back["m"](x), module(x))
    torch.optim.SGD(back["m"].parameters(), 0.1).step()


def test_a_small_part_goes_without_the_rest(shared_runtime: None) -> None:
    rows = list(torch.zeros(64, MIB // 16))
    before = afield.stats(local=True)["bytes_copied_in"]
    ref = afield.put(rows[5])
    assert afield.stats(local=True)["bytes_copied_in"] - before < MIB
    assert afield.get(ref).shape == (MIB // 16,)


def test_where_nothing_can_be_mapped_it_is_copied(shared_runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_views, "_map", lambda buffer, view: None)
    tensor = afield.get(afield.put(torch.arange(MIB)))
    tensor[3] = 9
    assert tensor[3] == 9 and tensor.sum() == (MIB - 1) * MIB // 2 + 6 and tensor.data_ptr() % 64 == 0
