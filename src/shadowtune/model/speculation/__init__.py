"""Speculative decoding: the shadow drafts tokens, one pass of the attached model verifies them."""
