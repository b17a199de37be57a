"""The attached models of several shadows on one frozen base, answering many requests at once."""
