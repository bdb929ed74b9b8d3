"""What a model is, and how it lies on disk. START at `source.py` and `reader.py`.

families.py      data: which tensors a family has, which axis is cut, by which unit
shape.py         the sizes that pruning depends on, as plain numbers
backends.py      data: what llama.cpp, vLLM and GPUs want of these sizes
architecture.py  from config.json to names and shapes, on the meta device
source.py        MODEL -> a local Hugging Face folder (folder, hub id, GGUF file, alias)
files.py         the folder's files: which hold weights, their headers, how to open one
reader.py        a folder -> a lazy mapping from names to tensors, checked before anything is computed
loading.py       a folder -> a transformers model and tokenizer; streaming.py: module by module from its files
writer.py        names, shapes and a way to get each tensor -> OUT, whole or not at all
quantization.py  what config.json tells of quantised weights, and what `quantize` recorded
recovered.py     what the records of a training tell
gguf_file.py     what a GGUF file says of itself and holds; llama_cpp.py: such a file in memory, run by llama.cpp
latency.py       how fast models generate, run by run in turn
"""
