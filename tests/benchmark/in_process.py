"""Workers without processes: the same requests and answers, in this one, and a record of who was asked what."""

import json

from shadowtune.benchmark.worker import Service, methods_of


class ScriptedWorker:
    """Answers as told; ``answers`` maps a name to (facts, peak memory, samples)."""

    log: list[tuple[str, str]]
    answers: dict[str, tuple[dict, float, list[float]]]

    def __init__(self, name):
        self.name = name
        self.samples = iter(self.answers[name][2])

    def call(self, method, **arguments):
        facts, peak, _ = self.answers[self.name]
        self.log.append((method, self.name))
        if method == "open":
            return facts
        return {**facts, "peak_memory_mb": peak} if method == "prepare" else next(self.samples)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.log.append(("close", self.name))


class LocalWorker:
    """A real subject in this process; requests and answers pass through JSON, as on their way to a worker process."""

    def __init__(self, name):
        self.name = name
        self.service = Service()

    def call(self, method, **arguments):
        asked = json.loads(json.dumps(arguments))
        return json.loads(json.dumps(methods_of(self.service)[method](**asked)))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass
