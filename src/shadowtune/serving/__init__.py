"""Answering over HTTP: the attached model in the cloud, the detached one at the edge, and who answers what."""
