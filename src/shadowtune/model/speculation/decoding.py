"""The decoding loop: the shadow runs ahead, one pass of the base beside its states verifies.

``generate`` of transformers prepares prompts, masks, cache, processors and criteria, and calls ``Speculator`` where it
would call its own loop. The shadow's backbone sees each token once: its states s0 are handed to the verifying pass, and
what was not accepted is cropped from the one cache of both networks. Rows that accept different lengths keep their
places in the cache: slots that a row did not accept are masked for it, and its positions go on.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

from shadowtune.compatibility import CACHE, set_cache
from shadowtune.config.speculation import SpeculationConfig
from shadowtune.errors import ConfigError
from shadowtune.model.speculation.acceptance import Process, Proposal, Verdict, greedy_verdicts, verdict
from shadowtune.model.speculation.counts import Counts
from shadowtune.model.speculation.draft import Draft, make_draft
from shadowtune.model.speculation.draft_length import Costs, DraftLength
from shadowtune.model.speculation.drafters import Drafter, make_drafter
from shadowtune.model.speculation.obstacles import BY_ROW, obstacle
from shadowtune.model.speculation.rows import Rows


class Speculator:
    """Stands in for the decoding loop of ``generate`` (its ``custom_generate``).

    Args:
        config: the settings.
        streamer: gets each token as soon as it stands.
    """

    def __init__(self, config: SpeculationConfig, streamer: Any = None, synced_gpus: bool | None = None) -> None:
        self._config, self._streamer, self._synced = config, streamer, bool(synced_gpus)
        self.counts = Counts()
        """Of all calls so far."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Generate as transformers' own loops do, called as they are; where drafting is not possible, by them."""
        mode = generation_config.get_generation_mode(None)
        if "/" in GENERATION_MODES_MAPPING[mode]:
            raise ConfigError(f"speculate does not go with {mode.value.replace('_', ' ')}; leave one of them out")
        reason = obstacle(mode, generation_config, logits_processor, model_kwargs, self._synced)
        if reason is not None:
            warnings.warn(f"decoding without speculation: {reason}", stacklevel=2)
            plain = getattr(type(model), GENERATION_MODES_MAPPING[mode])
            extra = {} if self._streamer is None else {"streamer": self._streamer}
            return plain(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **extra,
                **model_kwargs,
            )
        cache: Cache = model_kwargs[CACHE]
        cache.activate_past_recording()
        model_kwargs["run_shadow"] = True  # a drafter needs the prompt's keys, whether or not the attached model does
        first = model._prefill(input_ids, generation_config, model_kwargs)
        drop_last(cache, 0)
        pad, room = generation_config._pad_token_tensor, stopping_criteria.max_length
        assert room is not None, "generate always sets one"
        rows = Rows(
            input_ids,
            model_kwargs["position_ids"][:, -1] + 1,
            int(cache.get_seq_length()),
            model_kwargs.get("attention_mask"),
            stopping_criteria,
            room,
            0 if pad is None else int(pad.flatten()[0]),
        )
        compiled = model._valid_auto_compile_criteria(model_kwargs, generation_config)
        forward = model.get_compiled_call(generation_config.compile_config) if compiled else model.__call__
        settings = (self._config, generation_config, logits_processor, self._streamer)
        loop = _Loop(model, forward, rows, cache, self.counts, *settings)
        loop.choose_first(first.logits[:, -1:].float(), first.last_hidden_state)
        del first
        while rows.running:
            loop.round()
        if self._streamer is not None:
            self._streamer.end()
        if generation_config.return_dict_in_generate:
            output = GenerateDecoderOnlyOutput(sequences=cast(Any, rows.output()))
            set_cache(output, cache)
            return output
        return rows.output()


class _Loop:
    """Rounds of drafting and verifying."""

    def __init__(
        self,
        model: Any,
        forward: Any,
        rows: Rows,
        cache: Cache,
        counts: Counts,
        config: SpeculationConfig,
        generation_config: Any,
        processors: LogitsProcessorList,
        streamer: Any,
    ) -> None:
        self._model, self._forward, self._rows, self._cache = model, forward, rows, cache
        self._counts, self._processors, self._streamer = counts, processors, streamer
        self._sample: bool = generation_config.do_sample
        self._drafter: Drafter = make_drafter(config, model, processors, self._sample)
        costs = Costs.of(model.device.type, draft_share(model, config), len(rows.lengths))
        self._length = DraftLength(costs, config.longest, config.length is not None)
        # Slots that some rows did not accept can stay only where nothing counts slots: no windows, no fixed size.
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        self._aligned = generation_config.return_dict_in_generate or not plain

    def choose_first(self, logits: Tensor, hidden_states: Tensor | None) -> None:
        """Say the token behind the prompt, from its logits (B, 1, V) and the hidden states (B, T, d) of the prompt."""
        self._drafter.learn(None if hidden_states is None else hidden_states[:, -1])
        for row, said in enumerate(self._judge(logits, [])):
            self._say(row, said.tokens)

    def round(self) -> None:
        """Draft, verify, say what stands, and drop the rest from the cache."""
        rows = self._rows
        running = rows.running
        draft = self._draft()
        proposals = draft.proposals
        tokens = torch.stack([rows.last()[:, 0], *(proposal.tokens for proposal in proposals)], 1)
        new = tokens.shape[1]
        output = self._forward(
            input_ids=tokens,
            attention_mask=rows.mask(new),
            position_ids=rows.next_positions(0, new),
            past_key_values=self._cache,
            use_cache=True,
            shadow_states=draft.states,
            return_dict=True,
        )
        verdicts = self._judge(output.logits.float(), proposals)
        most = min(len(verdicts[row].tokens) for row in running) if self._aligned else new
        kept = [new] * len(verdicts)
        for row in running:
            kept[row] = self._say(row, verdicts[row].tokens[:most])
        confidences = [proposal.confidence[running] for proposal in proposals]
        accepted, said = [verdicts[row].accepted for row in running], [kept[row] for row in running]
        self._counts.add(len(proposals), accepted, said)
        self._length.learn(confidences, accepted, sum(said) / len(said), draft.looked)
        still = rows.running or running
        if output.last_hidden_state is not None:
            places = torch.tensor(kept, device=tokens.device) - 1
            self._drafter.learn(output.last_hidden_state[torch.arange(len(kept), device=tokens.device), places])
        slots = max(kept[row] for row in still)
        drop_last(self._cache, new - slots)
        rows.settle([min(kept[row], slots) if row in running else slots for row in range(len(kept))], slots)

    def _draft(self) -> Draft:
        rows = self._rows

        def run(tokens: Tensor, seen: int) -> Tensor:
            new = tokens.shape[1]
            mask, positions = rows.mask(seen + new), rows.next_positions(seen, new)
            return self._model.run_backbone(tokens, mask, positions, self._cache)

        return make_draft(
            self._drafter,
            self._length,
            rows.left - 1,
            rows.last(),
            rows.texts,
            run,
            counted=rows.running,
            settle=lambda tokens: rows.pad_ended(tokens.to(rows.tokens.device)),
        )

    def _judge(self, logits: Tensor, proposals: Sequence[Proposal]) -> list[Verdict]:
        """Judge the drafts of all rows by logits (B, g + 1, V)."""
        rows = self._rows
        if not self._sample and len(self._processors) == 0:
            drafts = [proposal.tokens for proposal in proposals]
            empty = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
            return greedy_verdicts(logits, torch.stack(drafts, 1) if drafts else empty)
        return [
            Verdict([], 0)
            if rows.done[row]
            else verdict(
                rows.tokens[row].clone(),
                rows.lengths[row],
                logits[row],
                row,
                proposals,
                self._process(row),
                self._sample,
            )
            for row in range(len(logits))
        ]

    def _process(self, row: int) -> Process:
        """The logits processors as they treat a row of the batch."""
        processors: Any = self._processors
        count = len(self._rows.lengths)
        if count == 1 or not any(isinstance(each, BY_ROW) for each in processors):
            return cast(Process, processors)

        def process(tokens: Tensor, logits: Tensor) -> Tensor:
            return processors(tokens.expand(count, -1), logits.repeat(count, 1))[row : row + 1]

        return process

    def _say(self, row: int, tokens: Sequence[int]) -> int:
        count = self._rows.say(row, tokens)
        if self._streamer is not None:
            for token in tokens[:count]:
                self._streamer.put(torch.tensor([token]))
        return count


def drop_last(cache: Cache, tokens: int) -> None:
    """Remove the last tokens from every layer of a cache, static ones included."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.sub_(tokens)
        elif isinstance(layer, DynamicLayer):
            layer.crop(-tokens)


def draft_share(model: Any, config: SpeculationConfig) -> float:
    """Weights that a drafting step reads, relative to those that a pass of both networks reads."""
    width, vocabulary = model.base.config.get_text_config(decoder=True).hidden_size, model.draft_vocabulary
    columns = model.config.vocab_size if vocabulary is None or not config.draft_vocabulary else len(vocabulary)
    backbone = sum(parameter.numel() for parameter in model.shadow.backbone.parameters())
    return (backbone + columns * width) / sum(parameter.numel() for parameter in model.parameters())
