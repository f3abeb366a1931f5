"""Run by a Python that has sae-lens (tests/peers.py): loads an SAE the way that a model card of ours says."""

import json
from pathlib import Path


def main(folder: str, answer: str) -> None:
    from sae_lens import SAE

    Path(answer).write_text(json.dumps(list(SAE.load_from_disk(folder).W_dec.shape)))
