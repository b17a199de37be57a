"""What a user meets: this package installed without constraints, outside of the repository (``make test-latest``)."""
