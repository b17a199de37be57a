"""``python -m shadowtune``, as ``accelerate launch -m shadowtune`` runs it."""

from shadowtune.cli.main import run

if __name__ == "__main__":
    run()
