"""The cache itself: formats, operators and what they mean in plain PyTorch. Imports no vLLM."""
