"""What a request must be to get a row: its prompt as tokens, within the limits."""

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowtune.data.encoding import prompt_ids
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import DataError
from shadowtune.serving.engine.adapters import Adapter, ends_of, positions_of
from shadowtune.serving.engine.limits import Limits
from shadowtune.serving.engine.rows import Deliver, Row
from shadowtune.serving.requests import Request, RequestError


class Intake:
    """Makes rows of requests.

    Args:
        base: the model that all share.
        tokenizer: its own.
        limits: of the engine.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self._base, self._tokenizer, self._limits = base, tokenizer, limits
        self._vocabulary = base.config.get_text_config(decoder=True).vocab_size
        self._format = PromptFormat()

    def reads(self, adapter: Adapter | None) -> bool:
        """Say whether a model, None being the bare base, reads system messages and earlier turns."""
        form = self._format if adapter is None else adapter.prompt_format
        return form.takes_conversations(self._tokenizer)

    def longest(self, adapter: Adapter | None) -> int:
        """Tokens that prompt and answer of a model, None being the bare base, may have together."""
        known = [positions_of(self._base.config), self._limits.max_model_len, self._limits.max_tokens]
        known += [] if adapter is None else [adapter.positions]
        return min((each for each in known if each is not None), default=FALLBACK)

    def row(self, request: Request, adapter: Adapter | None, deliver: Deliver) -> Row:
        """Make the row of a request.

        Raises:
            RequestError: if it is not one that can be answered.
        """
        prompt = self._prompt(request, self._format if adapter is None else adapter.prompt_format)
        longest = self.longest(adapter)
        if len(prompt) >= longest:
            message = f"the prompt has {len(prompt)} tokens, and {request.model!r} takes {longest} with the answer"
            raise RequestError(message, param="messages" if request.prompt is None else "prompt")
        if request.max_tokens is not None and request.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {request.max_tokens}", param="max_tokens")
        room = len(prompt) + request.wanted(longest - len(prompt))
        if room > longest:
            raise RequestError(
                f"the prompt's {len(prompt)} tokens and max_tokens {request.max_tokens} are more than the {longest} "
                f"tokens of {request.model!r}; ask for {longest - len(prompt)} at most",
                param="max_tokens",
            )
        for token in request.sampling.logit_bias:
            self._check_token(token, "logit_bias")
        prediction = [] if request.prediction is None else self._tokens(request.prediction, "prediction", False)
        generation: Any = self._base.generation_config if adapter is None else adapter.model.generation_config
        recorded = () if adapter is None else adapter.prompt_format.ends
        ends = ends_of(generation, self._tokenizer, recorded)
        device = self._base.device
        return Row(request, adapter, prompt, prediction, room, ends, self._tokenizer, device, deliver, generation)

    def _prompt(self, request: Request, prompt_format: PromptFormat) -> list[int]:
        if (request.messages is None) == (request.prompt is None):
            raise RequestError("give exactly one of messages and prompt", param="messages")
        if request.messages is None:
            assert request.prompt is not None
            prompt = self._tokens(request.prompt, "prompt", True)
        else:
            try:
                extra = (request.tools, request.chat_template_kwargs, request.fields)
                prompt = prompt_format.encode(request.messages, self._tokenizer, *extra)
            except DataError as error:
                raise RequestError(str(error), param="messages") from None
        if not prompt:
            raise RequestError("the prompt is empty", param="messages" if request.prompt is None else "prompt")
        return prompt

    def _tokens(self, given: Any, param: str, special: bool) -> list[int]:
        """Token ids of a text, or the given ones if they are tokens of this model."""
        if isinstance(given, str):
            if not special:
                return list(self._tokenizer(given, add_special_tokens=False)["input_ids"])
            try:
                return prompt_ids(given, self._tokenizer, chat_template=False)
            except DataError as error:
                raise RequestError(str(error), param=param) from None
        for token in given:
            self._check_token(token, param)
        return list(given)

    def _check_token(self, token: int, param: str) -> None:
        if not 0 <= token < self._vocabulary:
            raise RequestError(f"{param} has token {token}, but ids go from 0 to {self._vocabulary - 1}", param=param)


FALLBACK = 2048
"""Tokens of a row where neither model nor limits say how many it may have."""
