"""A plugin of vLLM: shadow directories are served attached, beside vLLM's own models of base and backbone."""
