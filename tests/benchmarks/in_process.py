"""Workers without processes: the same calls in this process, and a record of them."""

import pickle


class ScriptedWorker:
    """Returns scripted values; ``answers`` maps a name to (facts, peak memory, samples)."""

    log: list[tuple[str, str]]
    answers: dict[str, tuple[dict, float, list[float]]]

    def __init__(self, name, hint):
        self.name = name
        self.samples = iter(self.answers[name][2])

    def call(self, function, *arguments):
        facts, peak, _ = self.answers[self.name]
        method = {"open_candidate": "open"}.get(function.__name__, function.__name__)
        self.log.append((method, self.name))
        if method == "open":
            return facts
        return {**facts, "peak_memory_mb": peak} if method == "prepare" else next(self.samples)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.log.append(("close", self.name))


class LocalWorker:
    """A real candidate in this process; functions, arguments and results are pickled, as for a worker process."""

    def __init__(self, name, hint):
        self.name = name

    def call(self, function, *arguments):
        function, arguments = pickle.loads(pickle.dumps((function, arguments)))
        return pickle.loads(pickle.dumps(function(*arguments)))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass
