"""Chat templates of other kinds than ChatML, each with one habit of real ones."""

UNCLOSED = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""No token ends a turn, and the prompt ends in a space that merges with the answer's first token."""

REWRITING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ 'think ' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The last answer gets a block of thoughts, which is taken out of it when another turn follows, as in Qwen3."""

REFUSING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('system role\nnot supported') }}{% endif %}"
    "{% for message in messages %}{{ bos_token + message['content'] | trim + eos_token }}{% endfor %}"
)
"""System messages are an error, as in Gemma's; contents are trimmed; nothing marks the prompt's end."""
