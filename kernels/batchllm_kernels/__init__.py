"""What runs inside the engine process: prefix-shared attention and the vLLM plugin."""
