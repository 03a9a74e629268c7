"""The server: vLLM's OpenAI-compatible server, with any combination of adapters chosen by each request."""
