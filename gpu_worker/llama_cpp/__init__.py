"""Writes, quantises and measures GGUF files for llama.cpp. Start with writer.py."""
