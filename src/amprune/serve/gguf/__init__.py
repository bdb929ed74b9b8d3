"""llama.cpp: a checkpoint as one GGUF file, by its own tools, and GGUF files run by it.

run.py        the whole export
convert.py    the converter and the quantiser, each in a process of its own, and what llama.cpp cannot hold
quantise.py   that process, where the quantiser is a library
check.py      proof: the header's sizes, and the tokens that llama.cpp generates
"""
