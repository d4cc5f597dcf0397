"""Tasks of lm-evaluation-harness with a method's cache underneath.

Generation runs on the method's cache and attention as it would in use. For a log-likelihood the cache holds the
context, coded, and the continuation streams through it. A text without a context (rolling) streams through as well.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor
from tqdm import tqdm

from kvcomp.errors import InvalidInput
from kvcomp.evaluate.fidelity import Sample, fill, predict, sample
from kvcomp.evaluate.methods import Method
from kvcomp.integrations.transformers.models import positions

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here: a model that is loaded already
BOOTSTRAPS = 1000  # for the standard errors of metrics that have no formula


class MethodLM(HFLM):
    """A language model of the harness: a transformers model whose cache is a method's."""

    def __init__(self, model: Any, tokenizer: Any, method: Method) -> None:
        limit = positions(model.config)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=1,
            max_length=limit,
            device=str(model.device),
        )
        self.method = method
        self.read: Sample | None = None

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        self.model.set_attn_implementation(self.method.attention)
        cache = self.method.cache(self.model.config)
        out: Tensor = super()._model_generate(context, max_length, stop, past_key_values=cache, **options)
        return out

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For each request its log likelihood in nats, and whether greedy generation would write it."""
        found = []
        for request, context, continuation in tqdm(requests, desc="log likelihoods", disable=disable_tqdm):
            answer = self.score(context, continuation)
            found.append(answer)
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return found

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log likelihood of ids after others, and whether each is the likeliest; a long text loses its beginning."""
        ids = [*context, *continuation][-(self.max_length + 1) :]
        continuation = continuation[-(len(ids) - 1) :]
        fed = torch.tensor([ids[:-1]], device=self.device)
        prompt = fed.shape[1] - len(continuation)
        text = fed[:, prompt:]
        cache = fill(self.model, self.sample(fed, prompt), self.method) if prompt else self.method.cache(self.config)
        log_probs = predict(self.model, text, cache, self.method, streaming=True)
        target = torch.tensor(continuation, device=self.device)
        likeliest = bool((log_probs.argmax(-1) == target).all())
        return float(log_probs.gather(1, target[:, None]).sum()), likeliest

    def sample(self, ids: Tensor, prompt: int) -> Sample:
        """Read the first so many of ids, (1, tokens); once for the choices of a question, which share them."""
        if self.read is None or not torch.equal(self.read.prompt, ids[:, :prompt]):
            self.read = sample(self.model, ids, prompt)
        return self.read


class Tasks:
    """Tasks by name, or of .yaml files. Raises InvalidInput if there is no such task."""

    def __init__(self, names: list[str]) -> None:
        files = {name: Path(name) for name in names if name.endswith((".yaml", ".yml"))}
        self.names = [_task_of(files[name]) if name in files else name for name in names]
        folders = sorted({str(path.resolve().parent) for path in files.values()})
        self.manager = TaskManager(include_path=folders or None, include_defaults=len(files) < len(names))
        missing = [name for name in self.names if not self.manager.match_tasks([name])]
        if missing:
            raise InvalidInput(
                f"lm-evaluation-harness has no task {', '.join(missing)}: see `lm_eval ls tasks`, or give a .yaml file"
            )

    def run(
        self, name: str, model: Any, tokenizer: Any, method: Method, limit: int | None, seed: int
    ) -> dict[str, Any]:
        """Scores of a method on one task, {subtask and metric: Figure}.

        Raises InvalidInput if the task cannot be run, as where its data or a package are missing.
        """
        try:
            found = simple_evaluate(
                MethodLM(model, tokenizer, method),
                tasks=[name],
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
                task_manager=self.manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (OSError, ValueError) as error:
            raise InvalidInput(f"the task {name} cannot be run: {error}") from error
        except ImportError as error:  # some tasks bring code that needs more packages, or others' versions
            raise InvalidInput(f"the task {name} needs what is not installed: {error}") from error
        return _figures(found)


def _task_of(path: Path) -> str:
    try:
        match = re.search(r"^task:\s*([\w.-]+)", path.read_text(encoding="utf-8-sig"), re.MULTILINE)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the task {path}: {error}") from None
    if match is None:
        raise InvalidInput(f"{path} is no task: a line 'task: NAME' is missing")
    return match[1]


def _figures(found: Any) -> dict[str, Any]:
    """The harness's numbers as Figures, named by metric, filter and, where there are several, subtask."""
    if found is None:
        return {}
    tasks = found["results"]
    figures = {}
    for task, metrics in tasks.items():
        count = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            metric, _, which = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or not which:
                continue
            error = metrics.get(f"{metric}_stderr,{which}")
            name = metric if which == "none" else f"{metric} ({which})"
            figures[f"{task}: {name}" if len(tasks) > 1 else name] = {
                "mean": float(value),
                "standard_error": float(error) if isinstance(error, int | float) else None,
                "count": count,
            }
    return figures
