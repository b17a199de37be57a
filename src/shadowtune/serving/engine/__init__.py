"""Batched serving of several adapters on one frozen base, with continuous batching and speculative decoding."""
