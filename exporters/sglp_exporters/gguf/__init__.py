"""A pruned checkpoint in, llama.cpp's GGUF file out, and llama.cpp to run it."""
