"""What a call of ``generate`` may ask for that drafts would disturb."""

from typing import Any

from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.generation import logits_process

from shadowtune.compatibility import CACHE
from shadowtune.model.speculation.drafters import WARPERS

PURE = (
    *WARPERS,
    logits_process.PrefixConstrainedLogitsProcessor,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.LogitNormalization,
)
"""Processors whose scores follow from one row's tokens and logits: only these may be asked about drafts."""
BY_ROW = (logits_process.RepetitionPenaltyLogitsProcessor, logits_process.PrefixConstrainedLogitsProcessor)
"""Of those, processors that know the rows of the batch by their number."""
RECORDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def obstacle(
    mode: Any, config: Any, processors: LogitsProcessorList, model_kwargs: dict[str, Any], synced: bool
) -> str | None:
    """Say why this call cannot speculate; None if it can."""
    if mode not in ("greedy_search", "sample"):
        return f"{mode.value.replace('_', ' ')} is not token by token"
    cache = model_kwargs.get(CACHE)
    if not model_kwargs["use_cache"] or cache is None:
        return "there is no cache (use_cache=False)"
    layers = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
    if lasting := layers - {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer}:
        return f"a cache of {', '.join(sorted(kind.__name__ for kind in lasting))} cannot take tokens back"
    strange = [type(each).__name__ for each in processors if type(each) not in PURE]
    if strange:
        return f"{', '.join(strange)} may keep a state, which drafts would confuse"
    wanted = [name for name in RECORDS if vars(config).get(name)]
    if wanted and config.return_dict_in_generate:
        return f"{', '.join(wanted)} are recorded token by token"
    if synced:
        return "devices generate in step (synced_gpus)"
    return None
