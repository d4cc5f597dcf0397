"""lm-evaluation-harness on a compressed cache: against direct scoring, and on a local task with local data."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[eval]'")

from kvcomp.errors import InvalidInput
from kvcomp.evaluate import tasks as tasks_module
from kvcomp.evaluate.methods import KVComp, baseline
from kvcomp.evaluate.models import held_out_ids, load_model, shipped_model
from kvcomp.evaluate.tasks import MethodLM, Tasks

MEASURING = Path(__file__).parents[2] / "docs" / "measuring.md"
CHOICE = """
task: kvcomp_local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["1234", "5678"]
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""
WRITE = """
task: kvcomp_local_write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{value}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list:
  - metric: exact_match
    regexes_to_ignore: [" "]
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    return load_model(shipped_model())


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def tasks(tmp_path: Path) -> list[str]:
    """Look-ups of the form that the shipped model knows, 30 records before each."""
    rows = []
    for answer, value in enumerate(("1234", "5678")):
        filler = "".join(f"key{i} = {7000 + i}\n" for i in range(30))
        rows.append(
            {"text": f"### records\nname = {value}\n{filler}### lookup\nname =", "answer": answer, "value": value}
        )
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    paths = []
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.replace("DATA", str(data)), encoding="utf-8")
        paths.append(str(path))
    return paths


def direct(model: Any, context: list[int], continuation: list[int]) -> float:
    """Log likelihood from one pass over everything, without a cache."""
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([[*context, *continuation]])
    with torch.inference_mode():
        log_probs = model(ids[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
    begin = len(context) - 1
    target = torch.tensor(continuation)[:, None]
    return float(log_probs[begin : begin + len(continuation)].gather(1, target).sum())


def test_log_likelihoods_are_those_of_direct_scoring(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    ids = held_out_ids(tokenizer, shipped_model())[:440]
    exact = direct(model, ids[:400], ids[400:])
    plain = MethodLM(model, tokenizer, baseline("uncompressed")).score(ids[:400], ids[400:])[0]
    assert plain == pytest.approx(
        exact, abs=0.5
    )  # of some 100 nats; bfloat16 sums differ by the shapes of the products
    four, two = (MethodLM(model, tokenizer, baseline(f"kivi-{bits}")).score(ids[:400], ids[400:])[0] for bits in (4, 2))
    ours = MethodLM(model, tokenizer, KVComp("kvcomp")).score(ids[:400], ids[400:])[0]
    assert ours != plain  # something was coded
    assert abs(ours - plain) < 3
    assert abs(four - plain) < abs(two - plain)
    one, likeliest = MethodLM(model, tokenizer, KVComp("kvcomp")).score(ids[:1], ids[1:300])
    assert one == pytest.approx(direct(model, ids[:1], ids[1:300]), rel=0.02)
    assert not likeliest


def test_what_is_longer_than_the_model_loses_its_beginning(
    model_and_tokenizer: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(tasks_module, "positions", lambda config: 256)
    ids = held_out_ids(tokenizer, shipped_model())[:300]
    lm = MethodLM(model, tokenizer, baseline("uncompressed"))
    kept = lm.score(ids[43:290], ids[290:])  # 257 tokens, of which the last is only predicted
    assert lm.score(ids[:290], ids[290:]) == kept
    assert lm.score(ids[44:290], ids[290:]) != kept


def test_of_a_continuation_longer_than_the_model_the_end_is_scored(
    model_and_tokenizer: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(tasks_module, "positions", lambda config: 64)
    ids = held_out_ids(tokenizer, shipped_model())[:100]
    lm = MethodLM(model, tokenizer, baseline("uncompressed"))
    assert lm.score(ids[:3], ids[3:]) == lm.score(ids[35:36], ids[36:])


def test_local_tasks_run_under_every_kind_of_request(model_and_tokenizer: tuple[Any, Any], tasks: list[str]) -> None:
    model, tokenizer = model_and_tokenizer
    chosen = Tasks(tasks)
    assert chosen.names == ["kvcomp_local_choice", "kvcomp_local_write"]
    for method in (baseline("uncompressed"), KVComp("kvcomp")):
        choice, write = (chosen.run(name, model, tokenizer, method, None, 0) for name in chosen.names)
        assert choice["acc"]["mean"] == 1.0
        assert choice["acc"]["count"] == 2
        assert write["exact_match"]["mean"] == 1.0


def test_generation_runs_on_the_methods_cache(model_and_tokenizer: tuple[Any, Any], tasks: list[str]) -> None:
    model, tokenizer = model_and_tokenizer
    made = []

    class Watched(KVComp):
        def cache(self, config: Any) -> Any:
            made.append(super().cache(config))
            return made[-1]

    Tasks(tasks[1:]).run("kvcomp_local_write", model, tokenizer, Watched("kvcomp"), 1, 0)
    (cache,) = made
    assert cache.memory().sealed_values > 0
    assert model.config._attn_implementation == "kvcomp"


def test_a_task_that_is_none_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("a: 1\n", encoding="utf-8")
    for name, message in ((str(empty), "is no task"), (str(tmp_path / "none.yaml"), "cannot read the task")):
        with pytest.raises(InvalidInput, match=message):
            Tasks([name])


def test_a_task_without_its_data_is_told(model_and_tokenizer: tuple[Any, Any], tmp_path: Path) -> None:
    path = tmp_path / "lost.yaml"
    path.write_text(CHOICE.replace("DATA", str(tmp_path / "no-such-data.json")), encoding="utf-8")
    model, tokenizer = model_and_tokenizer
    with pytest.raises(InvalidInput, match="cannot be run"):
        Tasks([str(path)]).run("kvcomp_local_choice", model, tokenizer, baseline("uncompressed"), None, 0)


def test_choices_share_one_pass_over_their_question(
    model_and_tokenizer: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = model_and_tokenizer
    ids = held_out_ids(tokenizer, shipped_model())[:600]
    asked, choices = ids[:400], (ids[400:402], ids[410:417], ids[420:421])
    read = []
    plain = tasks_module.sample
    monkeypatch.setattr(tasks_module, "sample", lambda *args: read.append(1) or plain(*args))
    one = MethodLM(model, tokenizer, KVComp("kvcomp"))
    found = [one.score(asked, choice) for choice in choices]
    assert len(read) == 1
    assert found == [MethodLM(model, tokenizer, KVComp("kvcomp")).score(asked, choice) for choice in choices]
    one.score(ids[1:400], choices[0])
    assert len(read) == 5


def test_a_task_whose_code_lacks_a_package_says_so(model_and_tokenizer: tuple[Any, Any], tmp_path: Path) -> None:
    (tmp_path / "answers.py").write_text("import no_such_package\n", encoding="utf-8")
    path = tmp_path / "needy.yaml"
    needs = CHOICE.replace('doc_to_text: "{{text}}"', "doc_to_text: !function answers.text")
    path.write_text(needs.replace("DATA", str(tmp_path / "data.json")), encoding="utf-8")
    model, tokenizer = model_and_tokenizer
    with pytest.raises(InvalidInput, match=r"needs what is not installed.*no_such_package"):
        Tasks([str(path)]).run("kvcomp_local_choice", model, tokenizer, baseline("uncompressed"), None, 0)


@pytest.mark.slow
def test_the_commands_for_large_models_reach_their_data(
    model_and_tokenizer: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    names = re.findall(r"--tasks (\w+)", MEASURING.read_text(encoding="utf-8"))
    assert names == ["gsm8k", "coqa", "longbench_e"]
    chosen = Tasks(names)
    for name in names:
        with pytest.raises(InvalidInput, match=r"Couldn't reach|jieba|transformers\.data\.metrics"):
            chosen.run(name, *model_and_tokenizer, baseline("uncompressed"), 1, 0)
