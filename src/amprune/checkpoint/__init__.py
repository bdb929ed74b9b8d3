"""Checkpoints on disk: find and open a source, read it tensor by tensor, write a new one by one rename.

source.py     MODEL -> a local Hugging Face folder (folder, hub id, GGUF file, alias)
files.py      the folder's files: which hold weights, their headers, how to open one
reader.py     a folder -> a lazy mapping from names to tensors, checked before anything is computed
quantized.py  what a folder tells of quantised weights, which are loaded but not read
writer.py     names, shapes and a way to get each tensor -> shards, index, sidecar files
staging.py    the folder that an output is written in -> OUT, whole or not at all
"""

from amprune.checkpoint.files import TensorHeader, read_front_matter, read_json
from amprune.checkpoint.reader import Checkpoint, fingerprint, read_checkpoint
from amprune.checkpoint.source import ALIASES, Source, cache_folder, open_source
from amprune.checkpoint.staging import check_file, check_output, staged_file, staged_folder
from amprune.checkpoint.writer import RECORDS, copy_sidecars, parse_size, write_json, write_shards

__all__ = [
    "ALIASES",
    "RECORDS",
    "Checkpoint",
    "Source",
    "TensorHeader",
    "cache_folder",
    "check_file",
    "check_output",
    "copy_sidecars",
    "fingerprint",
    "open_source",
    "parse_size",
    "read_checkpoint",
    "read_front_matter",
    "read_json",
    "staged_file",
    "staged_folder",
    "write_json",
    "write_shards",
]
