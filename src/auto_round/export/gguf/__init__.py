"""GGUF files: names, metadata, tokenizer and bytes of llama.cpp's format."""
