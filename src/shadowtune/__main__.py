"""``python -m shadowtune``, which is what ``accelerate launch -m shadowtune`` runs."""

from shadowtune.cli.main import run

if __name__ == "__main__":
    run()
