"""From a checkpoint to what serves and shares it.

gguf/      one GGUF file by llama.cpp's own tools, and the proof that llama.cpp runs it
quantize/  fewer bits a weight, as stock transformers loads them
hub/       a repository of the hub
"""
