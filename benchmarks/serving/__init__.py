"""Parts of `loramix bench serve`; benchmarks/serve.py puts them together."""
