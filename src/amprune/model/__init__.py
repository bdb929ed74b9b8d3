"""What a model is, and how it lies on disk. START at `source.py` and `reader.py`.

families.py      data: which tensors a family has, which axis is cut, by which unit
shape.py         the sizes that pruning depends on, as plain numbers
backends.py      data: what llama.cpp, vLLM and GPUs want of these sizes
architecture.py  from config.json to names and shapes, on the meta device
source.py        MODEL -> a local Hugging Face folder (folder, hub id, GGUF file, alias); gguf_model.py dequantises
files.py         the folder's files: which hold weights, their headers, how to open one
reader.py        a folder -> a lazy mapping from names to tensors, checked before anything is computed
loading.py       a folder -> a transformers model and tokenizer; streaming.py: module by module from its files
writer.py        names, shapes and a way to get each tensor -> shards, index, sidecar files
staging.py       the folder that an output is written in -> OUT, whole or not at all
quantized.py     what config.json tells of quantised weights; quantization.py: what `quantize` recorded
recovered.py     what the records of a training tell
stored.py        elements and bytes of weights in memory
gguf_file.py     what a GGUF file says of itself; llama_cpp.py: such a file in memory, run by llama.cpp
latency.py       how fast models generate, run by run in turn
"""
