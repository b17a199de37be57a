"""Validation and tokenization of requests, the same for every backend."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowtune.data.encoding import prompt_ids
from shadowtune.data.prompt_format import PromptFormat
from shadowtune.errors import DataError
from shadowtune.serving.conversation import chat_token_ids
from shadowtune.serving.requests import GenerationRequest, RequestError


class RequestValidator:
    """Checks what requests ask of a model, and tokenizes their texts.

    Args:
        tokenizer: the model's.
        vocabulary: number of the model's tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self.tokenizer, self._vocabulary = tokenizer, vocabulary
        self._longest_token = max((len(token) for token in tokenizer.get_vocab()), default=1)

    def check(self, request: GenerationRequest, max_model_len: int) -> None:
        """Check what needs no tokenization. Texts that cannot fit are known by their characters.

        Args:
            request: to be checked.
            max_model_len: most tokens of prompt and output together.

        Raises:
            RequestError: naming the field.
        """
        if (request.messages is None) == (request.prompt is None):
            raise RequestError("give exactly one of messages and prompt", param="messages")
        self._check_characters(request, max_model_len)
        if request.prompt is not None and not isinstance(request.prompt, str):
            _check_length(request, len(request.prompt), max_model_len)
        if request.max_tokens is not None and request.max_tokens < 1:
            raise RequestError(f"max_tokens must be at least 1, got {request.max_tokens}", param="max_tokens")
        self._check_tokens(request.sampling.logit_bias, "logit_bias")
        self._check_tokens(request.stop_token_ids, "stop_token_ids")

    def prompt(self, request: GenerationRequest, prompt_format: PromptFormat, max_model_len: int) -> list[int]:
        """Return the token ids of the prompt, in any thread.

        Raises:
            RequestError: if it is invalid, or leaves no position for the output.
        """
        param = "messages" if request.prompt is None else "prompt"
        try:
            if request.prompt is None:
                tokens = chat_token_ids(request, prompt_format, self.tokenizer)
            elif isinstance(request.prompt, str):
                tokens = prompt_ids(request.prompt, self.tokenizer, chat_template=False)
            else:
                tokens = self.token_ids(request.prompt, param)
        except DataError as error:
            raise RequestError(str(error), param=param) from None
        if not tokens:
            raise RequestError("the prompt is empty", param=param)
        _check_length(request, len(tokens), max_model_len)
        return tokens

    def token_ids(self, given: str | Iterable[int], param: str) -> list[int]:
        """Return the token ids of a text without special tokens, or the given ids; RequestError for invalid ids."""
        if isinstance(given, str):
            return list(self.tokenizer(given, add_special_tokens=False)["input_ids"])
        tokens = list(given)
        self._check_tokens(tokens, param)
        return tokens

    def max_new_tokens(self, request: GenerationRequest, length: int, max_model_len: int) -> int:
        """Return how many tokens to generate at most after a prompt of ``length`` tokens.

        Raises:
            RequestError: if ``max_tokens`` does not fit, or ``min_tokens`` exceeds it.
        """
        room = max_model_len - length
        wanted = request.max_new_tokens(room)
        if wanted > room:
            raise RequestError(
                f"the prompt's {length} tokens and max_tokens {request.max_tokens} are more than the {max_model_len} "
                f"tokens of {request.model!r}; ask for {room} at most",
                param="max_tokens",
            )
        if request.min_tokens > wanted:
            message = f"min_tokens {request.min_tokens} is more than the {wanted} tokens that the answer may have"
            raise RequestError(message, param="min_tokens")
        return wanted

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids, special tokens included; raises RequestError for invalid ids."""
        tokens = self.token_ids(tokens, "tokens")
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _check_tokens(self, tokens: Iterable[int], param: str) -> None:
        for token in tokens:
            if not 0 <= token < self._vocabulary:
                raise RequestError(
                    f"{param} has token {token}, but ids go from 0 to {self._vocabulary - 1}", param=param
                )

    def _check_characters(self, request: GenerationRequest, max_model_len: int) -> None:
        """Refuse texts with more characters than ``max_model_len`` of the longest tokens have."""
        sizes = {
            "messages": sum(map(_characters, request.messages or ())),
            "prompt": len(request.prompt) if isinstance(request.prompt, str) else 0,
            "prediction": len(request.prediction) if isinstance(request.prediction, str) else 0,
        }
        for name, size in sizes.items():
            if size > max_model_len * self._longest_token:
                raise RequestError(
                    f"{name}: {size} characters are more than the {max_model_len} tokens of {request.model!r} can be; "
                    "shorten it",
                    param=name,
                )


def _check_length(request: GenerationRequest, tokens: int, max_model_len: int) -> None:
    if tokens >= max_model_len:
        message = f"the prompt has {tokens} tokens, and {request.model!r} takes {max_model_len} with the answer"
        raise RequestError(message, param="messages" if request.prompt is None else "prompt")


def _characters(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    return len(content) if isinstance(content, str) else 0
