"""The trained module: shadow backbone, projection, boundaries and draft head.

ShadowPEFT (https://arxiv.org/abs/2604.19254), Eq. 1:  s0 = Proj(shadow_backbone(x)); Proj: d_s -> d, none when equal.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from shadowtune.attach.cache import can_count, check_holds_keys, count_tokens
from shadowtune.compatibility import CACHE, takes_cache
from shadowtune.config.shadow import ShadowConfig
from shadowtune.core.boundary import Boundaries, ShadowState
from shadowtune.core.draft_head import DraftHead, resolve_layers
from shadowtune.errors import ShadowtuneError
from shadowtune.model.backbone import FrozenEmbedding, build_backbone


class Shadow(nn.Module):
    """A shadow of a base with width d and L blocks. All its parameters are trained; frozen tensors are buffers.

    Args:
        config: the method's settings.
        base_config: the base's config, for d and L.
        backbone_config: config of the shadow backbone, of width d_s.
        backbone: the network itself; None builds a randomly initialized one.
        embedding: the backbone's own frozen embedding; None uses the base's embeddings, projected down (d -> d_s) if
            the widths differ.
        draft_vocabulary_size: K, if drafts are restricted to K tokens; None for all tokens.
    """

    draft_vocabulary: Tensor | None

    def __init__(
        self,
        config: ShadowConfig,
        base_config: PreTrainedConfig,
        backbone_config: PreTrainedConfig,
        backbone: PreTrainedModel | None = None,
        embedding: FrozenEmbedding | None = None,
        draft_vocabulary_size: int | None = None,
    ) -> None:
        super().__init__()
        text = base_config.get_text_config(decoder=True)
        width, shadow_width = text.hidden_size, backbone_config.hidden_size
        self.config = config
        self.backbone = build_backbone(backbone_config) if backbone is None else backbone
        if embedding is None and config.backbone != "mirror":
            embedding = FrozenEmbedding(backbone_config)
        self.embedding = embedding
        self.input_projection: nn.Module = nn.Identity()
        self.projection: nn.Module = nn.Identity()
        if shadow_width != width:
            self.projection = nn.Linear(shadow_width, width, bias=False)
            if embedding is None:
                self.input_projection = nn.Linear(width, shadow_width, bias=False)
        first = config.first_boundary(text.num_hidden_layers)
        self.boundaries = Boundaries(text.num_hidden_layers - first, width, config, first)
        self.draft_layers = resolve_layers(config.draft_layers, text.num_hidden_layers)
        self.boundaries.recorded_blocks = self.draft_layers
        rank = config.draft_rank
        self.draft_head = None if rank is None else DraftHead(width, rank, len(self.draft_layers))
        self.requires_grad_(True)
        size = draft_vocabulary_size
        self.register_buffer("draft_vocabulary", None if size is None else torch.zeros(size, dtype=torch.long))

    def cast(self, dtype: torch.dtype) -> "Shadow":
        """Cast everything that is saved to ``dtype``. Other tensors, such as RoPE frequencies, keep their precision."""
        for tensor in self.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        return self

    @property
    def num_cache_layers(self) -> int:
        """Number of the shadow backbone's blocks, each of which needs one layer of the cache."""
        return self.backbone.config.num_hidden_layers

    def begin(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        run_shadow: bool = False,
        **kwargs: Any,
    ) -> ShadowState:
        """Run the shadow backbone if it is needed; return the state of a call for the base's blocks.

        Args:
            run_shadow: whether the backbone runs even if the attached model does not need s0 (variant "stateless"):
                for the shadow's own loss, or for later drafts. It also runs if the cache already holds its keys.
            input_ids, inputs_embeds, attention_mask, position_ids, past_key_values, use_cache, **kwargs: as in ``run``.
        """
        cache = past_key_values
        if run_shadow or self.boundaries.reads_states or not (cache is None or can_count(cache)):
            states = self.initial_states(
                input_ids, inputs_embeds, attention_mask, position_ids, cache, use_cache, **kwargs
            )
            return ShadowState(self.boundaries, states)
        if cache is not None and use_cache:
            count_tokens(cache, inputs_embeds)
        return ShadowState(self.boundaries, None)

    def initial_states(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the shadow backbone; arguments as in ``run``. Return s0, (B, T, d) (Eq. 1)."""
        states = self.run(*args, **kwargs).last_hidden_state
        assert states is not None
        return states

    @takes_cache
    def run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the shadow backbone; return its output with s0 (B, T, d) as ``last_hidden_state`` (Eq. 1).

        Args:
            input_ids: (B, T); needed by a backbone with its own embedding.
            inputs_embeds: (B, T, d), the base's embeddings, used by a mirror.
            attention_mask: (B, past + T), or None.
            position_ids: (B, T), or None for consecutive ones.
            past_key_values: the shadow's view of the cache.
            use_cache: whether the backbone writes to that view.
            **kwargs: passed to the backbone. Hidden states (B, T, d_s) and attentions, if asked for, are its own.

        Raises:
            ShadowtuneError: if a backbone with its own embedding is given ``inputs_embeds`` only.
            AttachError: if the cache holds tokens that the backbone has not seen.
        """
        if past_key_values is not None:
            check_holds_keys(past_key_values)
        if self.embedding is not None:
            if input_ids is None:
                raise ShadowtuneError("this shadow's backbone has its own embedding: pass input_ids, not inputs_embeds")
            embeds = self.embedding(input_ids)
        else:
            embeds = self.input_projection(inputs_embeds.to(self.backbone.dtype))
        if self._needs_grad_input(embeds):
            embeds = embeds.detach().requires_grad_()
        output = self.backbone(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **{CACHE: past_key_values},
            **kwargs,
        )
        output.last_hidden_state = self.projection(output.last_hidden_state)
        return output

    def _needs_grad_input(self, embeds: Tensor) -> bool:
        """Whether gradient checkpointing needs an input that requires a gradient; the embeddings are frozen.

        Reentrant checkpointing drops the gradients of a block's parameters unless its input requires a gradient.
        """
        checkpointed = self.training and self.backbone.is_activation_checkpointing
        return (
            checkpointed and torch.is_grad_enabled() and not embeds.requires_grad and not torch.compiler.is_compiling()
        )
