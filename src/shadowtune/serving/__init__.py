"""Serving over HTTP: the attached model in the cloud, the detached model at the edge, and routing between the two."""
