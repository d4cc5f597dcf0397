"""What each family of models can do with a compressed cache, and the page that says so.

    python tests/support/family_modes.py        # runs everything and writes docs/models.md

A cell is "yes" where the result is that of a DynamicCache with a cache that loses nothing, else who refuses and why.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from families import FAMILIES, config_of, with_images
from family_heads import CONTEXT, heads_of
from generating import LOSSLESS, assert_same, attend_densely, forward, generate, prompt
from kvcomp import PrefixStore
from kvcomp.errors import InvalidInput, KVCompError, UnsupportedModel
from kvcomp.integrations.transformers import KVCompCache
from kvcomp.integrations.transformers import attention as transformers_attention
from tiny_models import LOSSY, random_model, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PROMPT = prompt(110, 95)
TOLERANCE = 1e-3  # of a logit, in float32; those of these models reach some tens

Mode = Callable[[PreTrainedModel, Path], None]


def generates(
    model: PreTrainedModel, _: Path, assistant: PreTrainedModel | None = None, rows: Any = PROMPT, **options: Any
) -> None:
    """The tokens and logits of transformers' own cache and attention."""
    options = {"max_new_tokens": 5, **options}
    inputs: dict[str, Any] = with_images(model.config, rows)
    if assistant is not None:
        inputs["assistant_model"] = assistant
    expected = generate(model, inputs, DynamicCache(config=model.config), "eager", **options)
    try:
        found = generate(model, inputs, KVCompCache(model.config, LOSSLESS), **options)
    except KVCompError:
        raise
    except Exception as error:
        raise AssertionError("what a DynamicCache can do, only kvcomp refuses") from error
    assert_same(found, expected, TOLERANCE)


def generates_with_an_assistant(model: PreTrainedModel, folder: Path) -> None:
    generates(model, folder, tiny_model(num_hidden_layers=1, seed=1), prompt(110))


def attends_as_densely(model: PreTrainedModel, _: Path) -> None:
    """Fused attention on compressed pages, and tiled attention of many queries, over what the cache gives back."""
    called = []

    def noted(name: str, real: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return real(*args, **kwargs)

    def run() -> torch.Tensor:
        cache = KVCompCache(model.config, LOSSY)
        new = prompt(130, seed=1)["input_ids"]
        parts = [prompt(110)["input_ids"], new[:, :1], new[:, 1:]]
        return torch.cat([forward(model, cache, input_ids=part) for part in parts], 1)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("attend", "attend_tiled"):
            patch.setattr(transformers_attention, name, partial(noted, name, getattr(transformers_attention, name)))
        found = run()
    with pytest.MonkeyPatch.context() as patch:
        attend_densely(patch)
        torch.testing.assert_close(found, run(), atol=2e-3 * float(found.abs().max()), rtol=0)
    if not {"attend", "attend_tiled"} <= set(called):
        raise UnsupportedModel("no layer is read by kvcomp's attention")


def crops(model: PreTrainedModel, _: Path) -> None:
    """What is cropped and given again is as if it had never been."""
    cache, ids = KVCompCache(model.config, LOSSLESS), prompt(40)["input_ids"]
    cache.activate_past_recording()
    forward(model, cache, input_ids=ids[:, :30].flip(1))
    cache.crop(-30)
    forward(model, cache, input_ids=ids[:, :35])
    cache.crop(-5)
    found = forward(model, cache, input_ids=ids[:, 30:])
    expected = forward(model, None, "eager", input_ids=ids)[:, 30:]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def goes_on_from_a_file(model: PreTrainedModel, folder: Path) -> None:
    cache = KVCompCache(model.config, LOSSY)
    forward(model, cache, **prompt(110))
    cache.save(folder / "a.kvc", model)
    again = KVCompCache.load(folder / "a.kvc", model.config, model)
    more = prompt(3, seed=2)["input_ids"]
    torch.testing.assert_close(
        forward(model, again, input_ids=more), forward(model, cache, input_ids=more), atol=TOLERANCE, rtol=0
    )


def joins(model: PreTrainedModel, _: Path) -> None:
    """Rows that joined go on as they would alone."""
    alone = [KVCompCache(model.config, LOSSY) for _ in range(2)]
    for number, (cache, length) in enumerate(zip(alone, (110, 95), strict=True)):
        forward(model, cache, **prompt(length, seed=number))
    both = KVCompCache(model.config, LOSSY)
    forward(model, both, **prompt(110, seed=0))
    both.join(alone[1])
    mask = both.attention_mask(1)
    token = prompt(1, 1, seed=5)["input_ids"]
    found = forward(model, both, input_ids=token, attention_mask=mask, position_ids=mask.cumsum(1)[:, -1:] - 1)
    for row, cache in enumerate(alone):
        expected = forward(model, cache, input_ids=token[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, atol=TOLERANCE, rtol=0)


def stores_prefixes(model: PreTrainedModel, folder: Path) -> None:
    """What a prompt left is found by one that goes on with it, and by a second one that parts from it."""
    ids = prompt(600)["input_ids"]
    other = torch.cat([ids[:, :550], prompt(30, seed=1)["input_ids"]], 1)
    model.set_attn_implementation("kvcomp")
    with PrefixStore(folder / "prefixes") as store:
        for text in (ids, other):
            cache = store.load(text, model, LOSSY)
            store.prefill(text, cache, model)
            forward(model, cache, input_ids=text[:, cache.get_seq_length() :])
            store.save(text, cache, model)
        longer = torch.cat([ids, prompt(3, seed=2)["input_ids"]], 1)
        assert all(store.load(text, model, LOSSY).get_seq_length() >= 516 for text in (longer, other))


MODES: dict[str, Mode] = {
    "greedy, padded": generates,
    "samples": partial(generates, do_sample=True, num_return_sequences=3),
    "beams": partial(generates, num_beams=3),
    "sampled beams": partial(generates, num_beams=3, do_sample=True),
    "prompt in pieces": partial(generates, prefill_chunk_size=40),
    "assistant": generates_with_an_assistant,
    "prompt lookup": partial(generates, rows=prompt(110), prompt_lookup_num_tokens=3),
    "crop": crops,
    "fused, tiled": attends_as_densely,
    "file": goes_on_from_a_file,
    "join": joins,
    "prefix store": stores_prefixes,
}


MEMORY = "memory"


def outcome(model: PreTrainedModel, mode: Mode) -> str:
    """ "yes", or who refuses and why. What is wrong and not refused is an error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mode(model, Path(folder))
        except (UnsupportedModel, InvalidInput) as refusal:
            return f"kvcomp: {refusal}"
        except (ValueError, RuntimeError, NotImplementedError) as refusal:
            return f"transformers: {str(refusal).splitlines()[0]}"
    return "yes"


def layers_of(family: str) -> str:
    """The layers of a family's cache."""
    try:
        return repr(KVCompCache(config_of(family))).split("(")[1].split(", 0 tokens")[0]
    except UnsupportedModel as refusal:
        return f"refused: {refusal}"


def smaller(family: str) -> float | None:
    """How many times smaller a growing layer with the family's usual heads is than dense; None if none grows."""
    heads = heads_of(family)
    if heads is None:
        return None
    memory = heads.sealed().memory()
    return memory.dense / memory.total


def memory_cell(family: str) -> str:
    heads, times = heads_of(family), smaller(family)
    if heads is None or times is None:
        return "no layer grows"
    widths = dict.fromkeys((heads.channels, heads.value_channels))
    return f"{times:.1f} x ({heads.heads} of {' and '.join(map(str, widths))})"


def results(family: str) -> dict[str, str]:
    if layers_of(family).startswith("refused"):
        return dict.fromkeys([*MODES, MEMORY], "")
    # a model for each mode: Qwen2.5-VL keeps what it found of the last images' positions
    of_modes = {name: outcome(random_model(config_of(family)), mode) for name, mode in MODES.items()}
    return {**of_modes, MEMORY: memory_cell(family)}


def page(found: dict[str, dict[str, str]]) -> str:
    """The page of these results, by family and mode."""
    reasons: dict[str, int] = {}

    def cell(result: str) -> str:
        refused = result.startswith(("kvcomp: ", "transformers: "))
        return f"[{reasons.setdefault(result, len(reasons) + 1)}](#reasons)" if refused else result

    rows = [[family, layers_of(family), *map(cell, found[family].values())] for family in FAMILIES]
    table = [["family", "cache of the tiny model", *MODES, MEMORY], ["---"] * (3 + len(MODES)), *rows]
    return "\n".join(
        [
            "# Models",
            "",
            "This page is written by `tests/support/family_modes.py`, which runs a tiny random model of each family.",
            "A cell says yes where the result is that of a DynamicCache, or of dense attention over the cache.",
            "A number is a refusal; its reason stands below.",
            "",
            f"The last column is the memory of one growing layer at {CONTEXT:,} tokens under the preset `kvcomp`.",
            "It says how many times less than bfloat16 that is, and behind it the KV heads and their channels.",
            "The heads are those of transformers' default configuration.",
            "K and V are random, as `kvcomp bench` draws them.",
            "",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
            "## Reasons",
            "",
            *(f"{number}. {reason}" for reason, number in reasons.items()),
            "",
        ]
    )


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    with ProcessPoolExecutor(2) as pool:
        found = dict(zip(FAMILIES, pool.map(results, FAMILIES), strict=True))
    PAGE.write_text(page(found), encoding="utf-8")
