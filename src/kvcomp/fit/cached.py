"""The calibration of a model, made once and kept in the user's cache folder."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from transformers import PreTrainedConfig, PreTrainedModel

from kvcomp.calibration import Calibration
from kvcomp.errors import CorruptData, InvalidInput, KVCompError, UnsupportedModel
from kvcomp.evaluate.fidelity import attention_setting_restored
from kvcomp.evaluate.text import Tokenizer
from kvcomp.fit.calibrate import METHOD, Calibrator
from kvcomp.fit.sources import source_windows
from kvcomp.fit.statistics import calibrated_layers
from kvcomp.fit.windows import Settings, Tell
from kvcomp.integrations.transformers.identity import weights_id
from kvcomp.integrations.transformers.models import position_limit, text_config
from kvcomp.results.journal import Journal, pieces


def calibrate(
    model: PreTrainedModel,
    settings: Settings | None = None,
    tell: Tell | None = None,
    tokenizer: Tokenizer | None = None,
) -> Calibration:
    """The calibration of a model, on text that it writes itself.

    It is read from the user's cache folder if it is there. Else it is made, which takes minutes for a small model, and
    put there. A call that is stopped leaves its pieces there, and the next one goes on.

    Parameters
    ----------
    model
        A transformers model; it stays as it is. Its weights are hashed, to know it again.
    settings
        How much text to measure on; by default as much as the model's positions allow, up to ``Settings()``.
    tell
        Told what is being done, how much of it is done, and how much there is.
    tokenizer
        The model's. With it levels also hold for documentation and sources of installed packages; without, they may
        lose several times what they say on text that the model would not write.

    Returns
    -------
    Calibration
        For ``KVCompCache(model.config, "kvcomp-klt", calibration=...)``.

    Raises
    ------
    UnsupportedModel
        If a calibration cannot hold the model.
    InvalidInput
        If its weights cannot be hashed, or it gives what is not finite.
    OSError
        If the cache folder cannot be written.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(f"{type(model).__name__} is no model of transformers: only those can be calibrated")
    calibrated_layers(text_config(model.config))
    settings = settings or fitting(model.config)
    path = cached_path(model, settings, tokenizer is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):  # of two that need it one makes it
        try:
            return Calibration.read(path)
        except KVCompError:
            pass  # it is not there, or nothing that can be used
        identity = {"calibration": path.name, "settings": asdict(settings)}
        try:
            journal = Journal(pieces(path), identity, resume=True)
        except (InvalidInput, CorruptData):
            journal = Journal(pieces(path), identity, resume=False)
        sources = [] if tokenizer is None else source_windows(tokenizer, settings)
        try:
            kind = model.device.type  # the caller's modes would take gradients and precision from what is measured
            with attention_setting_restored(), torch.inference_mode(False), torch.autocast(kind, enabled=False):
                calibrator = Calibrator(deepcopy(model).float().eval(), None, settings, journal, tell, sources)
                made = calibrator.run("written by the model")
        except KVCompError:
            journal.refused()
            raise
        made.write(path)
        journal.close()
        return made


def cached_path(model: PreTrainedModel, settings: Settings, sources: bool) -> Path:
    """Where the calibration of these weights is, if it has been made. Raises InvalidInput as ``calibrate`` does.

    sources: whether its levels hold for sources too.
    """
    amount = f"{settings.windows}x{settings.prompt}+{settings.scored}-of-{settings.context or 'all'}"
    amount += "+sources" if sources else ""
    return user_cache_path("kvcomp") / "calibrations" / f"{weights_id(model)}-{amount}-{METHOD}.kvcal"


def fitting(config: PreTrainedConfig) -> Settings:
    """The usual amount of text, with shorter prompts where positions end before."""
    usual, limit = Settings(), position_limit(text_config(config))
    return usual if limit is None or limit >= usual.length else replace(usual, prompt=limit - usual.scored)
