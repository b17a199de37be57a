"""OpenAI's HTTP API in front of anything that answers."""
