"""Have llama.cpp encode a picture with an mmproj file: the states that stand for it in the language model."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama, mtmd_cpp


def see(job: dict[str, Any]) -> None:
    """Write the states `[tokens, width]` of one picture, which has the size that the encoder wants."""
    model = Llama(job["file"], n_ctx=256, n_batch=256, n_threads=1, verbose=False)
    settings = mtmd_cpp.mtmd_context_params_default()
    settings.use_gpu, settings.n_threads = False, 1
    context = mtmd_cpp.mtmd_init_from_file(job["mmproj"].encode(), model.model, settings)
    assert context is not None, job["mmproj"]
    assert mtmd_cpp.mtmd_support_vision(context)
    picture = np.ascontiguousarray(np.load(job["picture"]))
    height, width, _ = picture.shape
    pixels = picture.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(mtmd_cpp.mtmd_bitmap_init(width, height, pixels))
    marker = mtmd_cpp.mtmd_default_marker()
    text = mtmd_cpp.mtmd_input_text()
    text.text, text.text_len, text.add_special, text.parse_special = marker, len(marker), False, True
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    assert mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
    found = []
    for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) != mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            continue
        assert mtmd_cpp.mtmd_encode_chunk(context, chunk) == 0
        count = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk) * model.n_embd()
        states = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(context), shape=(count,))
        found.append(states.reshape(-1, model.n_embd()).copy())
    np.save(job["out"], np.concatenate(found))


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text())["jobs"]:
        see(one)
