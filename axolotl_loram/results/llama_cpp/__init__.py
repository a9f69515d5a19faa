"""Scripts that run in llama.cpp's own sources."""
