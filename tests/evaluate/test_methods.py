"""Every method holds a cache: what it gives back, what it counts, and how a file of the user's becomes one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from kvcomp.errors import InvalidInput
from kvcomp.evaluate.methods import BASELINES, KVComp, Method, baseline
from kvcomp.evaluate.methods.baseline import BaselineLayer
from kvcomp.evaluate.methods.bits import pack, unpack
from kvcomp.evaluate.methods.kivi import Kivi
from kvcomp.evaluate.methods.turboquant import levels, rotation

CONFIG = LlamaConfig(
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=256, head_dim=64, vocab_size=64
)
SIZES = "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim"
OWN = """
from kvcomp.evaluate.methods import Baseline
import torch

class Halves(Baseline):
    name = "halves"

    def coded(self, tokens, kind):
        return tokens // 64 * 64

    def encode(self, x, kind):
        return {"codes": x.to(torch.float8_e5m2)}

    def decode(self, parts, kind):
        return parts["codes"].float()
"""


BITS = {f"kivi-{bits}{raw}": bits + 1.0 for bits in (2, 3, 4) for raw in ("", "-same-raw")}
BITS |= {f"turboquant-{bits}": bits + 0.25 for bits in (2, 3, 4)}
LOST = {"-2": 0.5, "-3": 0.25, "-4": 0.13}  # of a Gaussian's size, by bits


def made(name: str) -> Method:
    """The method of this name; a package that is not installed skips the test, saying which."""
    if name in ("kvcomp", "packed"):
        return KVComp(name)
    try:
        return baseline(name)
    except InvalidInput as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def kv() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return [tuple(torch.randn(2, 1, 2, 320, 64, dtype=torch.bfloat16)) for _ in range(2)]  # type: ignore[misc]


@pytest.mark.parametrize("name", ["kvcomp", "packed", *(name for name in BASELINES if "quanto" not in name)])
def test_a_method_gives_back_what_went_in_and_counts_what_it_holds(
    name: str, kv: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    _check(made(name), kv)


@pytest.mark.slow  # compiles an extension on its first use
@pytest.mark.parametrize("name", [name for name in BASELINES if "quanto" in name])
def test_quanto_gives_back_what_went_in(name: str, kv: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    _check(made(name), kv)


def _check(method: Method, kv: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    cache = method.cache(CONFIG)
    for layer, (k, v) in enumerate(kv):
        cache.update(k[:, :, :300], v[:, :, :300], layer)
    memory = method.memory(cache)
    assert memory.values == 2 * 2 * 2 * 300 * 64
    assert memory.dense == 2 * memory.values
    if method.name == "uncompressed":
        assert memory.total == memory.dense
    else:
        assert 0 < memory.sealed_values <= memory.values
        assert memory.total < memory.dense
        assert memory.coded_bits == pytest.approx(BITS[method.name]) if method.name in BITS else memory.coded_bits < 9
    for back, given_ in zip(method.values(cache), kv, strict=True):
        for x, y in zip(back, given_, strict=True):
            y = y[:, :, :300].float()
            assert x.shape == y.shape
            assert float((x.float() - y).norm() / y.norm()) < next((LOST[b] for b in LOST if b in method.name), 0.25)
    room = method.room(cache)
    assert room >= 1
    before = [x.clone() for x, _ in method.values(cache)]
    new = min(room, 20) - 1  # not enough for anything to be coded
    if new:
        for layer, (k, v) in enumerate(kv):
            cache.update(k[:, :, 300 : 300 + new], v[:, :, 300 : 300 + new], layer)
        for x, (y, _) in zip(before, method.values(cache), strict=True):
            assert torch.equal(x, y[:, :, :300])


@pytest.mark.parametrize("name", ["kvcomp", "fp8", "uncompressed"])
def test_a_sliding_window_counts_as_what_it_keeps_allocated(
    name: str, kv: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    config = MistralConfig(**{key: getattr(CONFIG, key) for key in SIZES}, sliding_window=64)
    method = made(name)
    cache = method.cache(config)
    for layer, (k, v) in enumerate(kv):
        cache.update(k, v, layer)
    memory, held = method.memory(cache), 2 * 2 * 2 * 63 * 64
    assert memory.values == held
    assert memory.dense == 2 * held
    assert memory.other == 2 * 2 * 2 * 2 * 320 * 64  # a view of all the tokens of the prompt


@pytest.mark.parametrize("name", ["kivi-4", "kivi-2", "kivi-3-same-raw", "turboquant-3", "fp8"])
def test_tokens_one_by_one_are_coded_as_in_one_go(name: str, kv: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    method = baseline(name)
    at_once, one_by_one = method.cache(CONFIG), method.cache(CONFIG)
    for layer, (k, v) in enumerate(kv):
        at_once.update(k, v, layer)
        for token in range(k.shape[2]):
            one_by_one.update(k[:, :, token : token + 1], v[:, :, token : token + 1], layer)
    assert method.memory(at_once) == method.memory(one_by_one)
    for first, second in zip(method.values(at_once), method.values(one_by_one), strict=True):
        for x, y in zip(first, second, strict=True):
            if name.startswith("turboquant"):  # sums of its rotation may differ in the last place
                torch.testing.assert_close(x.float(), y.float(), atol=5e-3, rtol=0)
            else:
                assert torch.equal(x, y)


def test_kivi_counts_scales_and_keeps_its_residual(kv: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    method = baseline("kivi-2")
    cache = method.cache(CONFIG)
    for layer, (k, v) in enumerate(kv):
        cache.update(k[:, :, :300], v[:, :, :300], layer)
    memory = method.memory(cache)
    assert memory.coded_bits == 3.0  # 2 bits and two float16 for 32 values
    assert memory.window == 2 * (2 * 64) * ((300 - 256) + 128) * 2  # layers, values a token, tokens, bytes


def test_kivi_can_leave_the_tokens_raw_that_kvcomp_leaves(kv: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    ours, theirs = KVComp("kvcomp"), baseline("kivi-2-same-raw")
    of_ours, of_theirs = ours.cache(CONFIG), theirs.cache(CONFIG)
    for layer, (k, v) in enumerate(kv):
        for cache in of_ours, of_theirs:
            cache.update(k[:, :, :300], v[:, :, :300], layer)
    memory, same = theirs.memory(of_theirs), ours.memory(of_ours)
    assert (memory.sealed_values, memory.values) == (same.sealed_values, same.values)
    assert memory.coded_bits == 3.0
    assert memory.sinks == 2 * 2 * (2 * 64) * 4 * 2  # layers, K and V, values a token, tokens, bytes
    for (k, v), (x, y) in zip(kv, theirs.values(of_theirs), strict=True):
        for raw in np.s_[:, :, :4], np.s_[:, :, 260:300]:
            assert torch.equal(x[raw], k[raw])
            assert torch.equal(y[raw], v[raw])
        assert not torch.equal(x[:, :, 4:196], k[:, :, 4:196])


@pytest.mark.parametrize("group", [32, 16])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_kivi_rounds_each_group_to_steps_from_its_least_to_its_largest_value(bits: int, group: int) -> None:
    """The table of methods and the levels of a calibration both use these values."""
    x = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(bits)) * 3 + 1
    x[0, 0, :32, :16] = 0.7  # a group whose values are all alike
    method, per_channel, per_token = Kivi(bits, group), torch.empty_like(x), torch.empty_like(x)
    for head, channel, begin in np.ndindex(2, 64, 2):
        along = np.s_[0, head, 32 * begin : 32 * begin + 32, channel]
        per_channel[along] = stepped(x[along], bits)
    for head, token, begin in np.ndindex(2, 64, 64 // group):
        along = np.s_[0, head, token, group * begin : group * begin + group]
        per_token[along] = stepped(x[along], bits)
    assert torch.equal(method.decode(method.encode(x, "K"), "K"), per_channel)
    assert torch.equal(method.decode(method.encode(x, "V"), "V"), per_token)


def stepped(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Asymmetric rounding to nearest (KIVI, arXiv 2402.02750), with a zero and a step in float16."""
    zero = values.min().half().float()
    step = ((values.max() - zero) / (2**bits - 1)).half().float()
    return zero + step * ((values - zero) / (step if step else 1)).round().clamp(0, 2**bits - 1)


@given(st.integers(1, 7), st.integers(1, 9), st.data())
def test_packed_codes_come_back(bits: int, octets: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=8 * octets, max_size=8 * octets))
    packed = pack(torch.tensor(codes), bits)
    assert packed.numel() == bits * octets
    assert unpack(packed, bits).tolist() == codes


def test_codes_that_fill_no_whole_byte_are_refused() -> None:
    with pytest.raises(InvalidInput, match="whole bytes"):
        pack(torch.zeros(3, dtype=torch.uint8), 3)


def test_levels_are_those_of_a_gaussian_and_the_rotation_is_one() -> None:
    assert levels(2).tolist() == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=1e-3)  # Lloyd 1982, Max 1960
    q = rotation(64)
    assert torch.allclose(q @ q.T, torch.eye(64), atol=1e-5)


def test_a_file_of_the_user_is_a_baseline(tmp_path: Path, kv: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN, encoding="utf-8")
    method = baseline(str(path))
    assert method.name == "halves"
    _check(method, kv)
    assert baseline(f"{path}:Halves").name == "halves"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not run"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "0 subclasses"),
        (OWN + "\nclass Other(Halves):\n    name = 'other'\n", "2 subclasses"),
        (OWN.replace("encode", "encoder"), "cannot be made"),
        (OWN.replace('    name = "halves"\n', ""), "needs a name"),
    ],
)
def test_a_file_that_is_no_baseline_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInput, match=message):
        baseline(str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tokens // 64 * 64", "tokens + 1", "must lie between"),
        ('{"codes"', '{"bytes"', "name the parts"),
        ("float()", "float()[:, :, 1:]", "decode gave"),
    ],
)
def test_a_baseline_that_breaks_its_contract_is_told(
    tmp_path: Path, kv: list[tuple[torch.Tensor, torch.Tensor]], old: str, new: str, message: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN.replace(old, new), encoding="utf-8")
    method = baseline(str(path))
    cache = method.cache(CONFIG)
    cache.update(*kv[0], 0)
    with pytest.raises(InvalidInput, match=message):
        method.memory(cache)


def test_a_name_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidInput, match="kivi-4"):
        baseline("kivi")


@pytest.mark.parametrize("name", ["kivi-4", "kivi-4-same-raw", "fp8"])
@pytest.mark.parametrize("first", [700, 300])
def test_a_baseline_codes_the_windows_that_kvcomp_codes(name: str, first: int) -> None:
    """The window holds what the last tokens of a layer of all tokens hold, and what it has left is dropped."""
    window = 512
    sliding = MistralConfig(**{key: getattr(CONFIG, key) for key in SIZES}, sliding_window=window)
    method = baseline(name)
    (one, *_), (other, *_) = method.cache(sliding).layers, method.cache(CONFIG).layers
    assert isinstance(one, BaselineLayer)
    assert one.is_sliding
    generator = torch.Generator().manual_seed(0)
    for new in (first, 1, 250, *([1] * 70)):
        assert one.get_mask_sizes(new) == (min(one.tokens, window - 1) + new, max(0, one.tokens + 1 - window))
        k, v = torch.randn((2, 1, 2, new, 32), generator=generator)
        for mine, theirs in zip(one.update(k, v), other.update(k, v), strict=True):
            assert mine.shape[2] == min(one.tokens - new, window - 1) + new
            assert torch.equal(mine, theirs[:, :, -mine.shape[2] :])
    memory = one.memory()
    assert memory.values == 2 * 2 * (window - 1) * 32
    assert memory.dense == 4 * memory.values
    assert memory.total < other.memory().total
    assert one.decoded["K"].shape[2] + one.tail["K"].shape[2] < window + 128


def test_a_piece_leaves_a_window_with_the_last_token_that_sees_it() -> None:
    window = 512
    layer = BaselineLayer(baseline("kivi-4-same-raw"), window)
    k, v = torch.randn(2, 1, 2, window, 32)
    layer.update(k, v)
    layer.settle()
    first = layer.sizes["K"][0]
    while layer.tokens < window - 1 + first:
        layer.update(k[:, :, :1], v[:, :, :1])
    layer.settle()
    assert layer.tokens - layer.tail["K"].shape[2] - layer.decoded["K"].shape[2] == first
