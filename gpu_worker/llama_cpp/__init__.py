"""GGUF files for llama.cpp: written, quantised and measured. Start with writer.py."""
