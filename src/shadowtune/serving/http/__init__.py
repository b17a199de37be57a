"""HTTP API, compatible with OpenAI's, in front of any backend."""
