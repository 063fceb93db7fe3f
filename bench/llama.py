"""llama.cpp's server within this process (pip install xllamacpp)."""

import json
import urllib.request
from pathlib import Path


class LlamaCpp:
    """A GGUF file, served.

    rows: answers at once; context: of each
    exact: keys and values in fp32, and attention too; its own defaults are fp16
    """

    def __init__(
        self, path: str | Path, rows: int = 1, context: int = 256, cores: int = 1, exact=False
    ):
        import xllamacpp

        given = xllamacpp.CommonParams()
        given.model.path = str(path)
        given.n_ctx = context * rows
        given.n_parallel = rows
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = cores
        given.verbosity = 0
        given.port = 0
        given.use_jinja = True
        if exact:
            given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(given)

    def post(self, path: str, **body) -> dict:
        request = urllib.request.Request(
            self.server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
