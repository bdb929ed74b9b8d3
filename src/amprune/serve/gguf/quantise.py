"""llama.cpp's quantiser by the C interface of its library, as a program: LIBRARY SOURCE TARGET TYPE THREADS."""

import ctypes
import sys

from gguf import LlamaFileType


class _Parameters(ctypes.Structure):
    """`llama_model_quantize_params`: its first two fields, and room for those that versions have after them."""

    _fields_ = (("threads", ctypes.c_int32), ("file_type", ctypes.c_int32), ("others", ctypes.c_char * 1016))


def main(library: str, source: str, target: str, kind: str, threads: str) -> int:
    """Quantises a file; returns what the library does, 0 for success."""
    llama = ctypes.CDLL(library)
    llama.llama_model_quantize_default_params.restype = _Parameters
    llama.llama_model_quantize.restype = ctypes.c_uint32
    llama.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
    parameters = llama.llama_model_quantize_default_params()
    parameters.threads, parameters.file_type = int(threads), LlamaFileType[f"MOSTLY_{kind}"].value
    return int(llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
