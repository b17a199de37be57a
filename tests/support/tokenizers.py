"""A tokenizer for the tiny bases, made in memory, of the kind that real models have (byte-level BPE, ChatML)."""

import string

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.support.bases import VOCABULARY

PAD, BOS, EOS, UNKNOWN = "<pad>", "<|im_start|>", "<|im_end|>", "<unk>"
SPACE, NEWLINE = "Ġ", "Ċ"
"""How byte-level tokenizers write a space and a line break."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_MERGES = [(SPACE, "t"), (SPACE, "a"), ("h", "e"), ("i", "n"), (NEWLINE, NEWLINE), (SPACE, SPACE), (SPACE + "t", "he")]
_PUNCTUATION = ".,?!:'-"


def tiny_tokenizer(
    chat_template: str | None = CHATML, add_bos: bool = False, more: str = ""
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 97 tokens: ASCII letters, digits, some punctuation and a few merges.

    Ids 0 to 3 are the padding, begin, end and unknown token, as in the configs of the tiny bases. Tokens that start
    with a space merge over it, like those of real tokenizers, and two line breaks are one token.

    Args:
        chat_template: a Jinja template; None makes a tokenizer without one.
        add_bos: whether texts start with the begin token, as with Llama and Gemma.
        more: further characters, such as those of JSON.
    """
    characters = [SPACE, NEWLINE, *string.ascii_letters, *string.digits, *_PUNCTUATION]
    pieces = [PAD, BOS, EOS, UNKNOWN, *characters, *(left + right for left, right in _MERGES), *more]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    assert len(vocabulary) == len(pieces) <= VOCABULARY
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (PAD, BOS, EOS, UNKNOWN)])
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
