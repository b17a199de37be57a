"""Answers chat requests by a runtime that may need an environment of its own: a script, run by another interpreter.

usage: python answer_elsewhere.py RUNTIME DIRECTORY LIMIT < requests.json > answers.json

Requests are a list of lists of messages. Prompts are made by the directory's own chat template, as any user of the
runtime would; nothing of shadowtune is imported.
"""

import json
import sys


def by_genai(directory, conversations, limit):
    import onnxruntime_genai

    model = onnxruntime_genai.Model(directory)
    tokenizer = onnxruntime_genai.Tokenizer(model)
    for messages in conversations:
        prompt = tokenizer.encode(tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True))
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + limit, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        yield tokenizer.decode(generator.get_sequence(0)[len(prompt) :])


def by_optimum(directory, conversations, limit):
    from optimum.onnxruntime import ORTModelForCausalLM

    for binding in (True, False):
        yield from _generated(
            ORTModelForCausalLM.from_pretrained(directory, use_io_binding=binding), directory, conversations, limit
        )


def by_transformers(directory, conversations, limit):
    from transformers import AutoModelForCausalLM

    yield from _generated(AutoModelForCausalLM.from_pretrained(directory), directory, conversations, limit)


def _generated(model, directory, conversations, limit):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    for messages in conversations:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        yield tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    runtime, directory, limit = sys.argv[1:]
    answer = {"genai": by_genai, "optimum": by_optimum, "transformers": by_transformers}[runtime]
    answers = list(answer(directory, json.load(sys.stdin), int(limit)))
    json.dump({"answers": answers}, sys.stdout)
