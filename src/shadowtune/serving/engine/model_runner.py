"""One pass of the base over sequences of different adapters, each beside its own shadow."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowtune.attach.architectures import architecture_of
from shadowtune.core.boundary import ShadowState
from shadowtune.core.multi_adapter import AdapterStack, batching_key
from shadowtune.serving.engine.adapter import Adapter, pad_right
from shadowtune.serving.engine.kv_cache import KVCache
from shadowtune.serving.engine.lower_blocks import LowerBlocks, hidden_prefix
from shadowtune.serving.engine.prefix_cache import PrefixCache
from shadowtune.serving.engine.sequence import Sequence

KEPT_STACKS = 8
"""Sets of adapters whose stacked boundaries are kept."""
InitialStates = list[tuple[list[Sequence], Tensor]]
"""Sequences of one adapter, and their s0 (sequences, T, d)."""


class PassStates(NamedTuple):
    """Hidden states of one pass."""

    last: Tensor
    """The input of the head, (B, T, d)."""
    blocks: dict[int, Tensor]
    """Inputs (B, T, d) of the blocks that the adapters' draft heads read."""
    initial: Tensor | None = None
    """s0 (B, T, d), if a backbone ran."""


class ModelRunner:
    """The base, and its joint passes with the shadows.

    Args:
        base: a frozen causal language model.
        prefix_tokens: most tokens in the prefix cache.

    Raises:
        UnsupportedArchitectureError: if the architecture is unknown, or cannot be served in batches.
    """

    def __init__(self, base: PreTrainedModel, prefix_tokens: int = 0) -> None:
        architecture = architecture_of(base.config)
        self.base = base.eval()
        self.cache = KVCache(base.config, base.dtype, base.device)
        self.prefixes = PrefixCache(prefix_tokens)
        self._lower = LowerBlocks(self.base, prefix_tokens, self.cache.masks.single)
        self._decoder: Any = architecture.decoder_of(base)
        self._logits_transform = architecture.logits_transform(base.config.get_text_config(decoder=True))
        self._stacks: OrderedDict[tuple[Adapter, ...], AdapterStack] = OrderedDict()

    def add(self, sequence: Sequence) -> None:
        """Give a sequence its cache slots."""
        self.cache.add(sequence)
        if sequence.adapter is not None:
            sequence.adapter.cache.add(sequence)

    def remove(self, sequence: Sequence, wipe: bool = False) -> None:
        """Free a sequence's cache slots; ``wipe`` if they may hold NaN."""
        self.cache.remove(sequence, wipe)
        if sequence.adapter is not None:
            sequence.adapter.cache.remove(sequence, wipe)

    def groups(self, sequences: Iterable[Sequence]) -> list[list[Sequence]]:
        """Split sequences into groups that can share a pass; those of the bare base go with the first.

        An adapter with weights that are not finite gets its own pass: stacked with others, its columns are multiplied
        by 0 for the others' sequences, and 0 times NaN is NaN.
        """
        groups: dict[Hashable, list[Sequence]] = {}
        keyed = [(None if each.adapter is None else _group_key(each.adapter), each) for each in sequences]
        first = next((key for key, each in keyed if each.adapter and each.adapter.finite), None)
        for key, sequence in keyed:
            groups.setdefault(first if key is None else key, []).append(sequence)
        return list(groups.values())

    def run(
        self, sequences: list[Sequence], tokens: list[list[int]], known: InitialStates | None = None
    ) -> "PassStates":
        """Run base and shadows over the next tokens of sequences of one group.

        Args:
            sequences: B.
            tokens: of each; T is the longest.
            known: s0 of some sequences at their tokens; the backbones run for the others.

        Returns:
            The states, undefined behind a sequence's own tokens.
        """
        ids = pad_right(tokens, self.base.device)
        width = ids.shape[1]
        state = self._state(sequences, tokens, known or [], width)
        starts, counts = [each.cached for each in sequences], [len(line) for line in tokens]
        if state is not None:
            state.injected = self._injected(sequences, width)
        shadow = {} if state is None else {"shadow": state}
        output = self._decoder(input_ids=ids, **self.cache.inputs(sequences, starts, counts, width), **shadow)
        self._collect_lower(sequences, counts, state)
        if state is None:
            return PassStates(output.last_hidden_state, {})
        return PassStates(output.last_hidden_state, state.recorded, state.initial)

    def reuse(self, sequence: Sequence, chunk: int) -> int:
        """Begin a new sequence with what is known of its prompt; return the number of tokens that need no pass.

        Those are of its shared prompt, in the prefix cache; its own shadow's backbone runs over them, if a pass needs
        it. If the lower blocks are known for more tokens, ``Sequence.reused`` is set, for ``run_upper``.

        Args:
            sequence: of which nothing is cached yet.
            chunk: most tokens that the backbone processes at once.
        """
        shared = sequence.shared_prompt[: sequence.prompt_length - 1]  # the last token's states give the next one
        length, layers = self.prefixes.find(shared)
        if length == 0:
            self._reuse_lower(sequence)
            return 0
        adapter, sequence.lower_states = sequence.adapter, None
        if adapter is not None and adapter.runs_backbone:
            for start in range(0, length, chunk):
                adapter.initial_states([sequence], [shared[start : min(start + chunk, length)]], start)
        self.cache.write_prefix(sequence, layers, length)
        sequence.cached = length
        return length

    def keep(self, sequence: Sequence) -> None:
        """Keep the shared prompt of a sequence, which is cached, in the prefix cache."""
        if self.prefixes.keeps(sequence.shared_prompt):
            layers = self.cache.prefix(sequence, len(sequence.shared_prompt))
            self.prefixes.add(sequence.shared_prompt, layers)

    def waits_for(self, sequence: Sequence, other: Sequence) -> bool:
        """Whether an untouched sequence can reuse most of what the running prompt of another one computes."""
        kinds = [(self.prefixes, sequence.shared_prompt, other.shared_prompt, other.cached < len(other.shared_prompt))]
        lower = self.lower_prefixes(sequence)
        if lower is not None and lower is self.lower_prefixes(other):
            prompts = sequence.tokens[: sequence.prompt_length], other.tokens[: other.prompt_length]
            kinds.append((lower, *prompts, other.lower_states is not None))
        return any(computing and prefixes.will_gain(own, theirs) for prefixes, own, theirs, computing in kinds)

    def lower_prefixes(self, sequence: Sequence) -> PrefixCache | None:
        """Return what is kept of the lower blocks of a sequence's adapter; None if they are not reused."""
        return None if sequence.adapter is None else self._lower.prefixes(sequence.adapter.boundaries.first)

    def keep_lower(self, sequence: Sequence) -> None:
        """Keep what the lower blocks computed for a prompt, which is cached."""
        prefixes, states = self.lower_prefixes(sequence), sequence.lower_states
        sequence.lower_states = None
        if prefixes is None or states is None or sequence.adapter is None:
            return
        prompt = sequence.tokens[: sequence.prompt_length]
        if prefixes.keeps(prompt):
            layers = self.cache.prefix(sequence, len(prompt), sequence.adapter.boundaries.first)
            prefixes.add(prompt, [*layers, hidden_prefix(torch.cat(states, 1))])

    def _collect_lower(self, sequences: list[Sequence], counts: list[int], state: ShadowState | None) -> None:
        """Remember what the lower blocks computed for prompts, until they are cached (``keep_lower``)."""
        for index, (each, count) in enumerate(zip(sequences, counts, strict=True)):
            if state is None or each.prefilled or each.lower_states is None or self.lower_prefixes(each) is None:
                continue
            assert state.lower is not None
            own = min(count, each.prompt_length - each.cached)
            each.lower_states.append(state.lower[index : index + 1, :own].clone())

    def _reuse_lower(self, sequence: Sequence) -> None:
        prefixes = self.lower_prefixes(sequence)
        if prefixes is None:
            sequence.lower_states = None
            return
        length, layers = prefixes.find(sequence.tokens[: sequence.prompt_length - 1])
        if length > 0:
            self.cache.write_prefix(sequence, layers[:-1], length)
            sequence.reused = length, layers[-1][0][:, 0, :length]

    def run_upper(self, sequence: Sequence, chunk: int) -> int:
        """Run the upper blocks over at most ``chunk`` tokens whose lower blocks are reused; return how many."""
        assert sequence.adapter is not None and sequence.reused is not None
        adapter, (length, lower) = sequence.adapter, sequence.reused
        start, end = sequence.cached, min(sequence.cached + chunk, length)
        tokens, first = sequence.tokens[start:end], adapter.boundaries.first
        initial = adapter.initial_states([sequence], [tokens]) if adapter.runs_backbone else None
        state = ShadowState(adapter.boundaries, initial)
        state.injected, state.depth = self._injected([sequence], end - start), first - 1
        states = state.before_block(first, lower[:, start:end])
        inputs = self.cache.inputs([sequence], [start], [end - start], end - start)
        self._lower.upper(first)(inputs_embeds=states, **inputs, shadow=state)
        sequence.cached = end
        if sequence.lower_states is not None:
            sequence.lower_states.append(lower[:, start:end])
        if end == length:
            sequence.reused = None
        return end - start

    def head(self, states: Tensor) -> Tensor:
        """Apply the base's head: (..., d) -> (..., V)."""
        logits = self.base.get_output_embeddings()(states.to(self.base.dtype))
        return logits if self._logits_transform is None else self._logits_transform(logits)

    def forget(self, adapter: Adapter) -> None:
        """Drop the stacked boundaries that include an adapter."""
        for members in [members for members in self._stacks if adapter in members]:
            del self._stacks[members]

    def _state(
        self, sequences: list[Sequence], tokens: list[list[int]], known: InitialStates, width: int
    ) -> ShadowState | None:
        """Collect s0 of all shadows in the order of the sequences, with the boundaries that refine it.

        Backbones that neither the attached model nor a drafter needs do not run; their sequences get zeros.
        """
        adapters = {each.adapter for each in sequences if each.adapter is not None}
        members = tuple(sorted(adapters, key=lambda adapter: adapter.name))
        if not members:
            return None
        parts, done = list(known), {each for some, _ in known for each in some}
        for member in members:
            rest = [index for index, each in enumerate(sequences) if each.adapter is member and each not in done]
            if rest and member.runs_backbone:
                some = [sequences[index] for index in rest]
                parts.append((some, member.initial_states(some, [tokens[index] for index in rest])))
        single = len(members) == 1 and all(each.adapter is not None for each in sequences)
        if single and len(parts) == 1 and parts[0][1].shape[1] == width:
            return ShadowState(members[0].boundaries, parts[0][1])
        states = _collect(sequences, parts, width) if parts else None
        if single:
            return ShadowState(members[0].boundaries, states)
        owners = [None if each.adapter is None else members.index(each.adapter) for each in sequences]
        return ShadowState(self._stack(members).for_sequences(owners, width), states)

    def _injected(self, sequences: list[Sequence], width: int) -> Tensor | None:
        """Tokens behind each sequence's shared prompt, (B, T, 1) bool; None if no adapter's prompt is in the pass."""
        starts = [0 if each.adapter is None else len(each.shared_prompt) - each.cached for each in sequences]
        if max(starts) <= 0:
            return None
        steps = torch.arange(width, device=self.base.device)
        return (steps >= torch.tensor(starts, device=steps.device)[:, None]).unsqueeze(-1)

    def _stack(self, members: tuple[Adapter, ...]) -> AdapterStack:
        if members not in self._stacks:
            self._stacks[members] = AdapterStack([member.boundaries for member in members])
        self._stacks.move_to_end(members)
        while len(self._stacks) > KEPT_STACKS:
            self._stacks.popitem(last=False)
        return self._stacks[members]


def _collect(sequences: list[Sequence], parts: InitialStates, width: int) -> Tensor:
    """Put the s0 of some sequences each into one tensor (B, T, d) in the order of all, zeros for the others."""
    like, indices = parts[0][1], {sequence: index for index, sequence in enumerate(sequences)}
    states = like.new_zeros(len(sequences), width, like.shape[2])
    for some, part in parts:
        rows = torch.tensor([indices[sequence] for sequence in some], device=states.device)
        states[rows, : part.shape[1]] = part.to(states.dtype)
    return states


def _group_key(adapter: Adapter) -> Hashable:
    """Key that adapters sharing a pass have in common."""
    return batching_key(adapter.boundaries) if adapter.finite else adapter.name
