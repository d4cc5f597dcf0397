"""compress, decompress and attend on tensors, as the README shows them."""

import pytest
import torch

import kvcomp
from calibrating import calibrated, like_keys
from kvcomp.codec.quantise import error_bound
from kvcomp.store.tensors import as_array


def tensors(tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens)
    k, v = torch.randn(2, 2, 3, tokens, 64).to(dtype)
    return k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decompress_is_within_the_bound_and_keeps_the_type(dtype: torch.dtype) -> None:
    k, v = tensors(192, dtype)
    spec = kvcomp.PRESETS["kvcomp"]
    back_k, back_v = kvcomp.compress(k, v).decompress()
    assert back_k.dtype == back_v.dtype == dtype
    for row in range(2):
        for x, back, of in ((k, back_k, spec.key), (v, back_v, spec.value)):
            bound = torch.from_numpy(error_bound(as_array(x[row]), of.unit, of.scale))
            error = (back[row].double() - x[row].double()).abs().unflatten(1, (-1, 64)).swapaxes(0, 1)
            assert bool((error <= bound).all())
            assert bool((error > 0).any())


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_attend_reads_the_compressed_bits_as_attention_reads_what_decompress_gives(tokens: int) -> None:
    k, v = tensors(tokens, torch.float32)
    packed = kvcomp.compress(k, v)
    q = torch.randn(2, 12, 1, 64)
    back_k, back_v = packed.decompress()
    expected = torch.nn.functional.scaled_dot_product_attention(q, back_k, back_v, enable_gqa=True)
    torch.testing.assert_close(packed.attend(q), expected, rtol=1e-4, atol=1e-5)


def test_whole_pages_are_compressed_and_counted() -> None:
    k, v = tensors(256)
    memory = kvcomp.compress(k, v).memory()
    assert memory.sealed_values == memory.values == k.numel() + v.numel()
    assert memory.dense == 2 * memory.values
    assert 2 < memory.coded_bits < memory.total_bits < 6


def test_a_spec_of_many_layers_and_bad_tensors_are_refused() -> None:
    k, v = tensors(64)
    spec = kvcomp.CodecSpec(kvcomp.TensorSpec("block", (0.1, 0.2)), kvcomp.TensorSpec("token", 0.1))
    with pytest.raises(kvcomp.InvalidInput, match="each layer"):
        kvcomp.compress(k, v, spec)
    with pytest.raises(kvcomp.InvalidInput, match="head_dim must be a multiple of 8"):
        kvcomp.compress(k[..., :20], v[..., :20])
    with pytest.raises(kvcomp.InvalidInput, match="at least one token"):
        kvcomp.compress(k[:, :, :0], v[:, :, :0])
    with pytest.raises(kvcomp.BackendUnavailable, match="no backend 'tpu'"):
        kvcomp.compress(k, v, backend="tpu")
    with pytest.raises(kvcomp.BackendUnavailable, match="move them to the CPU"):
        kvcomp.compress(k.to("meta"), v.to("meta"))


def test_certificates_hold_for_what_was_compressed() -> None:
    made = calibrated(1, 2, 32)
    k, v = like_keys(1, 2, 320, 32, 0), like_keys(1, 2, 320, 32, 1)
    compressed = kvcomp.compress(k, v, "kvcomp-klt:balanced", calibration=made)
    bounds = compressed.value_bound()
    for x, back, bound in zip((k, v), compressed.decompress(), bounds, strict=True):
        assert ((back - x).abs() <= bound).all()
        assert ((back - x).abs() > bound / 50).any()  # and it is not idle
    q = torch.randn(1, 4, 3, 32)
    exact, ours = (0.3 * q @ x.repeat_interleave(2, 1).mT for x in (k, compressed.decompress()[0]))
    assert ((ours - exact).abs() <= compressed.logit_bound(q, 0.3)).all()
    with pytest.raises(kvcomp.InvalidInput, match="a multiple of 2"):
        compressed.logit_bound(q[:, :3])
    with pytest.raises(kvcomp.InvalidInput, match="kvcomp-klt"):
        kvcomp.compress(k, v).logit_bound(q)
