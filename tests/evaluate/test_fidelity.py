"""The harness that the quality figures come from, on the shipped model."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from kvcomp.errors import InvalidInput
from kvcomp.evaluate import sensitivity as evaluate_sensitivity
from kvcomp.evaluate.evaluation import Evaluation, Plan
from kvcomp.evaluate.fidelity import (
    Sample,
    compare,
    fill,
    measure,
    predict,
    predict_from,
    sample,
)
from kvcomp.evaluate.methods import KVComp, Method, baseline, named_spec
from kvcomp.evaluate.models import held_out_ids, load_model, shipped_model
from kvcomp.evaluate.retrieval import answered, lookup_quiz, passkey_quiz, quiz_sample
from kvcomp.evaluate.sensitivity import errors_by_head, probe, sensitivity
from kvcomp.evaluate.text import LookupLists
from kvcomp.results.journal import Journal
from tiny_models import HYBRIDS, random_model


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    return load_model(shipped_model())


@pytest.fixture(scope="module")
def text(model_and_tokenizer: tuple[Any, Any]) -> Sample:
    model, tokenizer = model_and_tokenizer
    return sample(model, torch.tensor([held_out_ids(tokenizer, shipped_model())[:640]]), 512)


def test_the_uncompressed_cache_has_no_kl(model_and_tokenizer: tuple[Any, Any], text: Sample) -> None:
    compared, memory = measure(model_and_tokenizer[0], text, baseline("uncompressed"))
    assert (compared.kl, compared.top1, compared.loss) == (0.0, 1.0, compared.loss_uncompressed)
    assert memory.total_bits == 16


def test_fewer_bits_cost_more_kl_and_sizes_are_counted_in_full(
    model_and_tokenizer: tuple[Any, Any], text: Sample
) -> None:
    model = model_and_tokenizer[0]
    (four, of_four), (two, of_two) = (measure(model, text, baseline(f"kivi-{bits}")) for bits in (4, 2))
    assert 0 < four.kl < two.kl
    assert of_four.coded_bits == 5.0  # 4 bits and a float16 scale and zero for 32 values
    assert of_two.coded_bits == 3.0
    ours, of_ours = measure(model, text, KVComp("kvcomp"))
    assert ours.kl > 0
    assert of_ours.values == of_four.values == of_two.values
    assert of_ours.total_bits > of_ours.coded_bits


def test_a_cache_is_measured_as_the_values_it_gives_back(model_and_tokenizer: tuple[Any, Any], text: Sample) -> None:
    model, method = model_and_tokenizer[0], KVComp("kvcomp")
    values = method.values(fill(model, text, method))
    compared, _ = measure(model, text, method)
    assert compare(text, predict_from(model, text, values)) == compared


def test_the_calibrated_preset_keeps_more_in_fewer_bits_and_its_bound(
    model_and_tokenizer: tuple[Any, Any], text: Sample
) -> None:
    model = model_and_tokenizer[0]
    method = named_spec(shipped_model(), "kvcomp-klt:near-lossless")
    ours, of_ours = measure(model, text, method)
    four, of_four = measure(model, text, baseline("kivi-4"))
    assert 0 < ours.kl < four.kl
    assert of_ours.coded_bits < of_four.coded_bits / 2
    found = errors_by_head(model, text, method)
    assert found["missed"] == 0
    assert 0.9 < found["largest_over_bound"] <= 1
    assert found["values"] == of_ours.values
    assert method.settings()["calibration_bytes"] > 0


@pytest.fixture(scope="module")
def outlier(model_and_tokenizer: tuple[Any, Any], text: Sample) -> tuple[Any, Sample]:
    """The same model but for one pair of channels of each head, 40 times as large in K and as small in q, and the text
    under it.
    """
    model = deepcopy(model_and_tokenizer[0])
    pair = [3, 3 + model.config.head_dim // 2]  # that RoPE turns into each other
    with torch.no_grad():
        for layer in model.model.layers:
            for projection, factor in ((layer.self_attn.k_proj, 40.0), (layer.self_attn.q_proj, 1 / 40)):
                projection.weight.unflatten(0, (-1, model.config.head_dim))[:, pair] *= factor
    return model, sample(model, torch.cat([text.prompt, text.text], 1), text.prompt.shape[1])


def test_a_large_channel_of_k_costs_the_default_preset_nothing(
    model_and_tokenizer: tuple[Any, Any], text: Sample, outlier: tuple[Any, Sample]
) -> None:
    def kl(model: Any, each: Sample, method: Method) -> float:
        return measure(model, each, method)[0].kl

    for name in ("kvcomp", "packed"):
        found = kl(*outlier, KVComp(name))
        assert found < 1.5 * kl(model_and_tokenizer[0], text, KVComp(name))
        assert found < kl(*outlier, baseline("kivi-3"))
        assert found < kl(*outlier, KVComp(f"{name}:paper")) / 3


def test_a_large_channel_is_blamed_where_it_shares_its_scale_and_nowhere_else(
    outlier: tuple[Any, Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_sensitivity, "LABELS", 1)
    monkeypatch.setattr(evaluate_sensitivity, "MEASURED", 2)
    probed = probe(*outlier)
    reasons = {
        name: [one["why"] for one in sensitivity(outlier[0], probed, KVComp(name)) if one["kind"] == "K"]
        for name in ("kvcomp", "kvcomp:paper")
    }
    assert "the unit channel" in reasons["kvcomp:paper"][0]
    assert not any("the unit channel" in why for why in reasons["kvcomp"])


def test_errors_beyond_the_edges_count_in_the_outermost_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_sensitivity, "fill", lambda *_: None)
    exact, errors = torch.ones(1, 1, 4, 1), torch.tensor([-3.0, 0.01, 3.0, 2.0])
    method: Any = SimpleNamespace(values=lambda _: [(exact + errors[:, None], exact)])
    each: Any = SimpleNamespace(cache=[(exact, exact)])
    counts = errors_by_head(None, each, method)["histogram"]["K"]["counts"]
    assert (counts[0], counts[-1], sum(counts)) == (1, 2, 4)


@pytest.mark.parametrize("name", ["kvcomp", "kivi-4"])
def test_streaming_by_the_methods_room_is_streaming_token_by_token(
    model_and_tokenizer: tuple[Any, Any], text: Sample, name: str
) -> None:
    """What later tokens see is the same; the products of one token and of many differ in the last places of
    bfloat16.
    """
    model = model_and_tokenizer[0]
    method = KVComp(name) if name == "kvcomp" else baseline(name)
    by_room, one_by_one = fill(model, text, method), fill(model, text, method)
    in_chunks = predict(model, text.text, by_room, method, streaming=True)
    single = torch.cat([predict(model, text.text[:, i : i + 1], one_by_one, method) for i in range(text.text.shape[1])])
    for (k, v), (other_k, other_v) in zip(method.values(by_room), method.values(one_by_one), strict=True):
        for x, y in ((k, other_k), (v, other_v)):
            assert float((x.float() - y.float()).norm() / y.float().norm()) < 0.02
    assert compare(text, in_chunks).kl == pytest.approx(compare(text, single).kl, rel=0.3)
    assert method.memory(by_room).sealed_values == method.memory(one_by_one).sealed_values
    assert method.memory(by_room).sealed_values > method.memory(fill(model, text, method)).sealed_values


def test_look_ups_are_right_uncompressed_and_wrong_without_the_records(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    quiz = lookup_quiz(LookupLists(tokenizer), np.random.default_rng(0), 1024)
    each = quiz_sample(model, quiz)
    assert np.mean(answered(quiz, each.log_probs)) > 0.95
    erased = [(k, torch.zeros_like(v)) for k, v in each.cache]
    assert np.mean(answered(quiz, predict_from(model, each, erased))) < 0.2
    assert set(quiz.depths) == set(range(5))


def test_a_passkey_stands_at_its_depth(model_and_tokenizer: tuple[Any, Any]) -> None:
    tokenizer = model_and_tokenizer[1]
    lists = LookupLists(tokenizer)
    for depth in range(5):
        quiz = passkey_quiz(tokenizer, lists, np.random.default_rng(depth), 700, depth)
        assert quiz.tokens.shape == (700,)
        (begin, end) = quiz.answers[0]
        answer = quiz.tokens[begin:end].tolist()
        found = [i for i in range(quiz.context) if quiz.tokens[i : i + end - begin].tolist() == answer]
        assert len(found) == 1
        assert abs(found[0] / 700 - (depth + 0.5) / 5) < 0.05
        assert str(tokenizer.decode(answer)).strip().isdigit()


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("method", [baseline("uncompressed"), baseline("fp8"), KVComp("kvcomp")])
def test_a_prompt_is_read_once_for_all_methods_under_sliding_windows_too(name: str, method: Method) -> None:
    model = random_model(HYBRIDS[name])
    each = sample(model, torch.randint(1, 97, (1, 400), generator=torch.Generator().manual_seed(3)), 330)
    assert each.fed
    assert not each.cache
    again = replace(each, fed=())  # the model reads the prompt into the method's cache
    caches = [fill(model, one, method) for one in (each, again)]
    assert method.memory(caches[0]) == method.memory(caches[1])
    first, second = (predict(model, each.text, cache, method) for cache in caches)
    assert torch.equal(first, second)


@pytest.mark.parametrize(("streams", "least"), [(2, 160), (0, 120)])
def test_a_text_shorter_than_what_is_streamed_is_refused(streams: int, least: int, tmp_path: Path) -> None:
    model: Any = SimpleNamespace(config=LlamaConfig())
    tokenizer: Any = None
    plan = Plan(prompt=100, scored=20, streams=streams, streaming_prompt=100, streamed=60)
    journal = Journal(tmp_path / "pieces", {}, resume=False)
    Evaluation(model, tokenizer, np.zeros(least, np.int64), [], plan, journal)
    with pytest.raises(InvalidInput, match=f"{least} are needed"):
        Evaluation(model, tokenizer, np.zeros(least - 1, np.int64), [], plan, journal)
