"""llama.cpp's own server in a process of its own: ``python llama_cpp.py FILE.gguf [ALIAS]`` prints its address."""

import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def llama_server(file, alias="tiny.gguf"):
    """Yield the process and the address of a server of a GGUF file."""
    command = [sys.executable, str(Path(__file__)), str(file), alias]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            line = process.stdout.readline().strip()
            assert line.startswith("http://"), f"llama.cpp's server ended with {process.poll()}"
            yield process, line
        finally:
            process.kill()


def serve(file, alias):
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.model_alias = file, {alias}
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 1024, 1, 0
    settings.warmup, settings.verbosity, settings.fit_params = False, 0, False
    settings.use_jinja = True  # for tools
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    serve(*sys.argv[1:])
