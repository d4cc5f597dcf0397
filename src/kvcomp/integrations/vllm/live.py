"""What an operator asks of the compressed cache, and whether an engine can have it: refused at its start, not later."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvcomp.calibration import Calibration, LayerCalibration, resolve
from kvcomp.codec.block import check_channels
from kvcomp.errors import InvalidInput, UnsupportedModel, UnsupportedVersion
from kvcomp.integrations.transformers.models import fingerprint_of
from kvcomp.spec import PAGE_TOKENS, CodecSpec
from kvcomp.store.tensors import NAMES

OPTION = "kvcomp"  # of vLLM's --additional-config
PARAMETERS = "spec", "calibration", "saving", "reserve"
SAVING = 3.0
MOST_SAVING = 8.0
RESERVE = 0.1
TESTED = (0, 32)  # vLLM's version, major and minor


@dataclass(frozen=True)
class Live:
    """The compressed cache as an operator asks for it."""

    spec: CodecSpec
    calibration: Calibration | None
    saving: float
    """How many times fewer bytes a token takes than vLLM's own cache, as vLLM is told."""
    reserve: float
    """How much of vLLM's memory, as a share, pages may take outside of it before ``KVCompScheduler`` waits."""

    @classmethod
    def of(cls, vllm_config: Any) -> Live:
        """Read ``--additional-config '{"kvcomp": {...}}'``; without it the preset ``kvcomp``. Raises InvalidInput."""
        content = (vllm_config.additional_config or {}).get(OPTION, {})
        if not isinstance(content, dict) or set(content) - set(PARAMETERS):
            raise InvalidInput(
                f"{OPTION} in --additional-config must be an object with {', '.join(PARAMETERS)}, not {content!r}"
            )
        saving = _number("saving", content.get("saving", SAVING), 1, MOST_SAVING)
        reserve = _number("reserve", content.get("reserve", RESERVE), 0, 1)
        spec, calibration = resolve(content.get("spec", "kvcomp"), content.get("calibration"))
        if calibration is not None:
            calibration.check_model(fingerprint_of(vllm_config.model_config.hf_text_config))
        return cls(spec, calibration, saving, reserve)

    def declared(self, spec: Any) -> Any:
        """A plain layer's cache as vLLM is told of it. Raises UnsupportedModel for heads that no page holds."""
        try:
            check_channels(spec.head_size)
        except InvalidInput as error:
            raise UnsupportedModel(f"{error}: leave --worker-cls out for this model") from None
        size = max(1, int(spec.state_content_size_bytes / self.saving) // spec.dtype.itemsize) * spec.dtype.itemsize
        return replace(spec, state_content_bytes=size)

    def layer(self, index: int, layers: int) -> tuple[CodecSpec, LayerCalibration | None]:
        """Spec, books and transform of a layer. Raises InvalidInput, or UnsupportedModel for one not calibrated."""
        calibrated = self.calibration.layer(index, self.spec) if self.calibration else None
        if self.calibration and calibrated is None:
            raise UnsupportedModel(f"the calibration has no layer {index}: use a spec that needs none for this model")
        return self.spec.layer(index, layers), calibrated


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InvalidInput(f"{name} must be a number from {least:g} to {most:g}, not {value!r}")
    return float(value)


def check_engine(vllm_config: Any, version: str, overridden: bool) -> None:
    """Raise UnsupportedModel, UnsupportedVersion or InvalidInput if this engine cannot have the compressed cache.

    Parameters
    ----------
    vllm_config
        The engine's.
    version
        Of vLLM.
    overridden
        Whether another plug-in has taken the place of vLLM's attention on the CPU.
    """
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) != TESTED:
        raise UnsupportedVersion(
            f"kvcomp's cache for vLLM is tested with {'.'.join(map(str, TESTED))}, this is {version}: install that "
            "version, or leave --worker-cls out"
        )
    if overridden:
        raise InvalidInput("another plug-in has replaced vLLM's CPU attention: leave it out of VLLM_PLUGINS")
    cache, parallel, model = vllm_config.cache_config, vllm_config.parallel_config, vllm_config.model_config
    if cache.block_size != PAGE_TOKENS:
        raise InvalidInput(f"kvcomp's pages hold {PAGE_TOKENS} tokens: add --block-size {PAGE_TOKENS}")
    if cache.cache_dtype != "auto" or model.dtype not in NAMES:
        raise UnsupportedModel(
            f"kvcomp compresses float32, float16 and bfloat16, not {cache.cache_dtype} over {model.dtype}: "
            "leave --kv-cache-dtype out"
        )
    kinds = "tensor", "pipeline", "data", "prefill_context", "decode_context"
    if many := [name for kind in kinds if getattr(parallel, name := f"{kind}_parallel_size", 1) != 1]:
        raise UnsupportedModel(f"kvcomp's cache knows one worker: set {', '.join(many)} to 1")
    if vllm_config.speculative_config is not None:
        raise UnsupportedModel("speculative decoding writes tokens that it takes back: leave it out")
    if vllm_config.kv_transfer_config is not None:
        raise UnsupportedModel("a KV connector reads vLLM's own cache, which is not there: leave it out")


def is_plain(spec: Any) -> bool:
    """Whether a layer's cache is that of plain full attention, which kvcomp's pages hold."""
    if type(spec).__name__ != "FullAttentionSpec" or spec.head_size_v != spec.head_size:
        return False
    own = spec.sliding_window, spec.attention_chunk_size, spec.state_content_bytes, spec.num_head_slots
    return not spec.non_causal and all(setting is None for setting in own)
