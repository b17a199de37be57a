"""The speculative decoding loop of ``generate``: the shadow drafts, and one pass of the base with its states verifies.

``generate`` of transformers prepares prompts, masks, cache, processors and criteria, and calls ``Speculator`` in place
of its own loop. The shadow's backbone reads each token once: its states s0 are passed to the verifying pass, and
rejected tokens are cropped from the one cache of both networks. Sequences that accept different numbers of tokens share
the cache: slots of tokens that a sequence did not accept are masked for it, and its positions continue without a gap.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerateDecoderOnlyOutput

from shadowtune.compatibility import CACHE, set_cache
from shadowtune.config.shadow import SpeculationConfig
from shadowtune.errors import ConfigError
from shadowtune.model.speculation.draft_length import Costs, DraftLength
from shadowtune.model.speculation.drafters import WARPERS, AdaptiveDrafter, DraftBatch, make_drafter
from shadowtune.model.speculation.tree import DraftTree, move_slot, takes_trees
from shadowtune.model.speculation.verification import (
    Process,
    Proposal,
    SpeculationStatistics,
    VerificationResult,
    leaf,
    verify_greedy,
    verify_sequence,
)

STATELESS = (
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
"""Processors whose scores depend on one sequence's tokens and logits alone; only these can be called with drafts."""
BY_SEQUENCE = (logits_process.RepetitionPenaltyLogitsProcessor, logits_process.PrefixConstrainedLogitsProcessor)
"""Of those, processors that depend on a sequence's index in the batch."""
RECORDS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def unsupported_feature(
    mode: Any, config: Any, processors: LogitsProcessorList, model_kwargs: dict[str, Any], synced: bool
) -> str | None:
    """Return why a call of ``generate`` cannot speculate; None if it can."""
    if mode not in ("greedy_search", "sample"):
        return f"{mode.value.replace('_', ' ')} is not token by token"
    cache = model_kwargs.get(CACHE)
    if not model_kwargs["use_cache"] or cache is None:
        return "there is no cache (use_cache=False)"
    layers = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
    if lasting := layers - {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer}:
        return f"a cache of {', '.join(sorted(kind.__name__ for kind in lasting))} cannot take tokens back"
    unknown = [type(each).__name__ for each in processors if type(each) not in STATELESS]
    if unknown:
        return f"{', '.join(unknown)} may keep a state, which drafts would corrupt"
    wanted = [name for name in RECORDS if config.to_dict().get(name)]
    if wanted and config.return_dict_in_generate:
        return f"{', '.join(wanted)} are recorded token by token"
    if synced:
        return "devices generate in step (synced_gpus)"
    return None


class Speculator:
    """Replaces the decoding loop of ``generate`` (its ``custom_generate``).

    Args:
        config: the settings.
        streamer: receives each token once it is verified.
    """

    def __init__(self, config: SpeculationConfig, streamer: Any = None, synced_gpus: bool | None = None) -> None:
        self.config, self.streamer, self._synced = config, streamer, bool(synced_gpus)
        self.statistics = SpeculationStatistics()
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
        """Generate with the arguments and results of transformers' own loops; where drafting is impossible, by them."""
        mode = generation_config.get_generation_mode(None)
        if "/" in GENERATION_MODES_MAPPING[mode]:
            raise ConfigError(f"speculate does not go with {mode.value.replace('_', ' ')}; leave one of them out")
        reason = unsupported_feature(mode, generation_config, logits_processor, model_kwargs, self._synced)
        if reason is not None:
            warnings.warn(f"decoding without speculation: {reason}", stacklevel=2)
            plain = getattr(type(model), GENERATION_MODES_MAPPING[mode])
            if self.streamer is not None:
                model_kwargs["streamer"] = self.streamer
            return plain(
                model,
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **model_kwargs,
            )
        cache: Cache = model_kwargs[CACHE]
        cache.activate_past_recording()
        model_kwargs["run_shadow"] = True  # a drafter needs the prompt's keys, whether or not the attached model does
        first = model._prefill(input_ids, generation_config, model_kwargs)
        drop_last(cache, 0)
        pad = generation_config._pad_token_tensor
        assert stopping_criteria.max_length is not None, "generate always sets one"
        sequences = SequenceBatch(
            input_ids,
            model_kwargs["position_ids"][:, -1] + 1,
            int(cache.get_seq_length()),
            model_kwargs.get("attention_mask"),
            stopping_criteria,
            stopping_criteria.max_length,
            0 if pad is None else int(pad.flatten()[0]),
        )
        loop = _Loop(self, model, sequences, cache, generation_config, logits_processor)
        if model._valid_auto_compile_criteria(model_kwargs, generation_config):
            loop.forward = model.get_compiled_call(generation_config.compile_config)
        loop.choose_first(first.logits[:, -1:].float(), first.draft_features)
        del first
        while sequences.running:
            loop.round()
        if self.streamer is not None:
            self.streamer.end()
        if generation_config.return_dict_in_generate:
            output = GenerateDecoderOnlyOutput(sequences=cast(Any, sequences.output()))
            set_cache(output, cache)
            return output
        return sequences.output()


class _Loop:
    """Rounds of drafting and verifying."""

    def __init__(
        self,
        speculator: Speculator,
        model: Any,
        sequences: "SequenceBatch",
        cache: Cache,
        generation_config: Any,
        processors: LogitsProcessorList,
    ) -> None:
        self._model, self._sequences, self._cache, self._processors = model, sequences, cache, processors
        self._statistics, self._streamer = speculator.statistics, speculator.streamer
        self._sample: bool = generation_config.do_sample
        self.forward = model.__call__
        config = speculator.config
        # Masked slots can stay in the cache only where nothing counts slots: no windows, no fixed size.
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        self._aligned = generation_config.return_dict_in_generate or not plain
        branches = config.branches
        if branches > 1 and (self._aligned or not takes_trees(model.base, model.shadow.backbone)):
            branches = 1
            reason = "its cache counts slots" if self._aligned else "its attention takes no tree as mask"
            warnings.warn(f"drafting a chain in place of a tree of {config.branches} branches: {reason}", stacklevel=3)
        costs = Costs.of(model.device.type, draft_share(model, config), len(sequences.lengths))
        length = DraftLength(costs, config.longest, config.length is not None, branches)
        self._drafter = AdaptiveDrafter(make_drafter(config, model, processors, self._sample, branches), length)

    def choose_first(self, logits: Tensor, features: Tensor | None) -> None:
        """Choose the first tokens, from logits (B, 1, V) and draft features (B, T, n) of the prompts."""
        self._drafter.drafter.learn(None if features is None else features[:, -1])
        for index, result in enumerate(self._verify(logits, [])):
            self._append(index, result.tokens)

    def round(self) -> None:
        """Draft, verify, append the accepted tokens, and crop the rejected ones from the cache."""
        sequences = self._sequences
        running = sequences.running
        draft = self._draft()
        inputs = self._pass_inputs(draft)
        new = inputs["input_ids"].shape[1]
        output = self.forward(**inputs, past_key_values=self._cache, use_cache=True, return_dict=True)
        results = self._verify(output.logits.float(), draft.proposals)
        ends = self._join_branches(results, draft.proposals)
        most = min(len(results[index].tokens) for index in running) if self._aligned else new
        kept = [new] * len(results)
        for index in running:
            kept[index] = self._append(index, results[index].tokens[:most])
        accepted, emitted = [results[index].accepted for index in running], [kept[index] for index in running]
        self._statistics.add(len(draft.proposals), accepted, emitted)
        self._drafter.learn(draft, accepted, emitted)
        if output.draft_features is not None:
            chosen = [ends.get(index, count - 1) for index, count in enumerate(kept)]
            self._drafter.drafter.learn(output.draft_features[torch.arange(len(kept)), chosen])
        slots = max(kept[index] for index in sequences.running or running)
        drop_last(self._cache, new - slots)
        sequences.commit([min(count, slots) if index in running else slots for index, count in enumerate(kept)], slots)

    def _pass_inputs(self, draft: DraftBatch) -> dict[str, Any]:
        """Return tokens, mask, positions and s0 of the verifying pass; of a tree if there are alternatives."""
        sequences = self._sequences
        tokens = torch.stack([sequences.last()[:, 0], *(proposal.tokens for proposal in draft.proposals)], 1)
        others = _alternatives(draft.proposals)
        if others is None:
            count = tokens.shape[1]
            mask, positions, states = sequences.mask(count), sequences.next_positions(0, count), draft.states
        else:
            model, past, slots = self._model, sequences.attention_mask, sequences.slots
            tree = DraftTree(len(draft.proposals), others.shape[2], tokens.device)
            positions = sequences.positions[:, None] + tree.depths
            leaves = others.flatten(1)
            leaf_mask = tree.mask(tree.chain, past, slots, model.shadow.backbone)
            leaf_states = model.run_backbone(leaves, leaf_mask, positions[:, tree.chain :], self._cache)
            tokens, states = torch.cat([tokens, leaves], 1), torch.cat([draft.states, leaf_states], 1)
            mask = tree.mask(0, past, slots, model.base)
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "shadow_states": states}

    def _join_branches(self, results: Sequence[VerificationResult], proposals: Sequence[Proposal]) -> dict[int, int]:
        """Move chosen alternatives behind the accepted chain in the cache; return their nodes by sequence."""
        others, slots, ends = _alternatives(proposals), self._sequences.slots, dict[int, int]()
        if others is None:
            return ends
        for index in self._sequences.running:
            result = results[index]
            if result.branch is not None:
                ends[index] = leaf(len(proposals), others.shape[2], result.accepted, result.branch)
                move_slot(self._cache, index, slots + ends[index], slots + result.accepted + 1)
        return ends

    def _draft(self) -> DraftBatch:
        sequences = self._sequences

        def run(tokens: Tensor, read: int) -> Tensor:
            new = tokens.shape[1]
            mask, positions = sequences.mask(read + new), sequences.next_positions(read, new)
            return self._model.run_backbone(tokens, mask, positions, self._cache)

        return self._drafter.draft(
            sequences.last(),
            sequences.texts,
            run,
            sequences.room_left - 1,
            counted=sequences.running,
            settle=lambda tokens: sequences.pad_ended(tokens.to(sequences.tokens.device)),
        )

    def _verify(self, logits: Tensor, proposals: Sequence[Proposal]) -> list[VerificationResult]:
        """Verify the drafts of all sequences by logits (B, g + 1, V)."""
        sequences = self._sequences
        if not self._sample and len(self._processors) == 0:
            drafts = [proposal.tokens for proposal in proposals]
            empty = torch.empty(len(logits), 0, dtype=torch.long, device=logits.device)
            return verify_greedy(logits, torch.stack(drafts, 1) if drafts else empty, _alternatives(proposals))
        results = []
        for index, length in enumerate(sequences.lengths):
            if sequences.done[index]:
                results.append(VerificationResult([], 0))
                continue
            tokens, process = sequences.tokens[index].clone(), self._process(index)
            results.append(verify_sequence(tokens, length, logits[index], index, proposals, process, self._sample))
        return results

    def _process(self, index: int) -> Process:
        """Return the logits processors as they apply to one sequence of the batch."""
        processors: Any = self._processors
        count = len(self._sequences.lengths)
        if count == 1 or not any(isinstance(each, BY_SEQUENCE) for each in processors):
            return cast(Process, processors)

        def process(tokens: Tensor, logits: Tensor) -> Tensor:
            return processors(tokens.expand(count, -1), logits.repeat(count, 1))[index : index + 1]

        return process

    def _append(self, index: int, tokens: Sequence[int]) -> int:
        count = self._sequences.append(index, tokens)
        if self._streamer is not None:
            for token in tokens[:count]:
                self._streamer.put(torch.tensor([token]))
        return count


def _alternatives(proposals: Sequence[Proposal]) -> Tensor | None:
    """Return the alternatives of all drafts, (B, g, k); None for a chain."""
    known = [proposal.alternatives for proposal in proposals if proposal.alternatives is not None]
    return torch.stack(known, 1) if known else None


class SequenceBatch:
    """The tokens of the sequences of a call, which grow by different lengths, and their positions in the cache.

    Args:
        prompts: (B, n) tokens of the prompts, padded on the left.
        positions: (B,) position of each sequence's next token.
        slots: slots of the cache that the prompts take.
        attention_mask: (B, slots), or None if each sequence attends to all of them.
        criteria: when a sequence ends.
        room: maximum number of tokens of a sequence.
        pad: token after the end of a sequence.
    """

    def __init__(
        self,
        prompts: Tensor,
        positions: Tensor,
        slots: int,
        attention_mask: Tensor | None,
        criteria: StoppingCriteriaList,
        room: int,
        pad: int,
    ) -> None:
        count, length = prompts.shape
        self.tokens = prompts.new_full((count, max(room, length) + 1), pad)
        self.tokens[:, :length] = prompts
        self.lengths = [length] * count
        self.done = [False] * count
        self.positions, self.slots, self.attention_mask = positions, slots, attention_mask
        self.room, self._pad = room, pad
        ends = [each.eos_token_id for each in criteria if isinstance(each, EosTokenCriteria)]
        self._ends = {int(token) for tokens in ends for token in tokens}
        self._others = [each for each in criteria if not isinstance(each, EosTokenCriteria | MaxLengthCriteria)]

    @property
    def running(self) -> list[int]:
        """Indices of the sequences that have not ended."""
        return [index for index, done in enumerate(self.done) if not done]

    @property
    def room_left(self) -> int:
        """Tokens that the shortest running sequence may still get."""
        return max(self.room - self.lengths[index] for index in self.running)

    def last(self) -> Tensor:
        """Return the last token of each sequence, (B, 1), which no network has read; padding where it has ended."""
        ends = torch.tensor([[length - 1] for length in self.lengths], device=self.tokens.device)
        return self.pad_ended(self.tokens.gather(1, ends)[:, 0])[:, None]

    def texts(self) -> list[list[int]]:
        """Return the tokens of each sequence, with its padding in front."""
        return [self.tokens[index, :length].tolist() for index, length in enumerate(self.lengths)]

    def pad_ended(self, tokens: Tensor) -> Tensor:
        """Replace tokens (B,) of sequences that have ended by padding."""
        if not any(self.done):
            return tokens
        return tokens.masked_fill(torch.tensor(self.done, device=tokens.device), self._pad)

    def mask(self, new: int) -> Tensor | None:
        """Return the attention mask over the cache's slots and ``new`` further ones."""
        if self.attention_mask is None:
            return None
        ones = self.attention_mask.new_ones(len(self.lengths), new)
        return torch.cat([self.attention_mask, ones], 1)

    def next_positions(self, first: int, new: int) -> Tensor:
        """Return the positions (B, new) of new tokens, the first of them ``first`` after each sequence's last token."""
        return self.positions[:, None] + torch.arange(first, first + new, device=self.positions.device)

    def append(self, index: int, tokens: Sequence[int]) -> int:
        """Append tokens to a sequence until one ends it; return how many were appended."""
        for count, token in enumerate(tokens, 1):
            self.tokens[index, self.lengths[index]] = token
            self.lengths[index] += 1
            if token in self._ends or self.lengths[index] >= self.room or self._stopped(index):
                self.done[index] = True
                self.tokens[index, self.lengths[index] :] = self._pad
                return count
        return len(tokens)

    def commit(self, kept: Sequence[int], slots: int) -> None:
        """Mark ``slots`` more slots of the cache as used; each sequence attends to the first ``kept`` of them."""
        counts = torch.tensor(kept, device=self.positions.device)
        if self.attention_mask is None and any(count < slots for count in kept):
            self.attention_mask = counts.new_ones(len(kept), self.slots)
        if self.attention_mask is not None:
            held = torch.arange(slots, device=counts.device) < counts[:, None]
            self.attention_mask = torch.cat([self.attention_mask, held.to(self.attention_mask.dtype)], 1)
        self.positions = self.positions + counts
        self.slots += slots

    def output(self) -> Tensor:
        """Return all tokens, (B, longest), padded on the right."""
        return self.tokens[:, : max(self.lengths)]

    def _stopped(self, index: int) -> bool:
        tokens = self.tokens[index : index + 1, : self.lengths[index]]
        return any(bool(criterion(tokens, None)) for criterion in self._others)


def drop_last(cache: Cache, tokens: int) -> None:
    """Remove the last tokens from every layer of a cache, static ones included."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.sub_(tokens)
        elif isinstance(layer, DynamicLayer):
            layer.crop(-tokens)


def draft_share(model: Any, config: SpeculationConfig) -> float:
    """Return the weights that a drafting step reads, relative to those that a pass of both networks reads."""
    width, vocabulary = model.base.config.get_text_config(decoder=True).hidden_size, model.draft_vocabulary
    columns = model.config.vocab_size if vocabulary is None or not config.draft_vocabulary else len(vocabulary)
    modules = [model.shadow.backbone]
    if config.drafter != "shadow" and model.shadow.draft_head is not None:
        modules.append(model.shadow.draft_head)
    read = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return (read + columns * width) / sum(parameter.numel() for parameter in model.parameters())
