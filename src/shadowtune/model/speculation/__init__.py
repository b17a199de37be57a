"""Faster than token by token: the shadow drafts, the attached model verifies."""
