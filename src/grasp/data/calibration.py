"""Text in, `Calibration` out: N whole blocks of token ids, drawn at seeded random places.

DATA is a text (`grasp.data.text`) or `self` (sampled from the model). All text of a source is
joined and tokenised once (`grasp.data.stream`); a sample is a block of `seq_len` tokens that starts
anywhere in it, never a line.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from grasp.core.bos import num_rows
from grasp.core.decoder import Decoder
from grasp.core.progress import Progress, silent
from grasp.core.records import Calibration
from grasp.data.stream import check_lengths, shares, stream_of
from grasp.data.text import fields_of, read_text, sources
from grasp.errors import DataError, NumericsError


def calibrate(
    decoder: Decoder,
    data: str,
    *,
    num_samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    text_field: str | None = None,
    progress: Progress = silent,
) -> Calibration:
    """`num_samples` blocks of `seq_len` tokens of DATA; of several, separated by commas, equally
    many of each.

    Raises `DataError` where there is too little text.
    """
    check_lengths(decoder, num_samples, seq_len)
    names = sources(data)
    if num_samples < len(names):
        raise DataError(
            f"--num-samples {num_samples}: too few for {len(names)} texts; give at least one block"
            " a text"
        )
    fields = fields_of(names, text_field)
    parts = [
        _draw(decoder, *one, seq_len, seed, progress)
        for one in zip(names, shares(num_samples, names), fields, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    hashes = hashlib.sha256(" ".join(part.text_hash for part in parts).encode()).hexdigest()
    return Calibration(torch.cat([part.ids for part in parts]), data, seed, text_hash=hashes)


def _draw(
    decoder: Decoder,
    data: str,
    num_samples: int,
    text_field: str | None,
    seq_len: int,
    seed: int,
    progress: Progress,
) -> Calibration:
    """`num_samples` blocks of one text."""
    generator = torch.Generator().manual_seed(seed)
    if data == "self":
        return Calibration(
            _sample_from(decoder, num_samples, seq_len, seed, progress), "self", seed
        )
    text = read_text(data, split="train", text_field=text_field, tokenizer=decoder.tokenizer)
    stream = stream_of(decoder, text.whole)
    stream.check_length(f"--data {data}", seq_len)
    last = len(stream) - stream.body(seq_len)
    starts = torch.randint(0, last + 1, (num_samples,), generator=generator)
    # num_samples, seq_len
    ids = torch.stack([stream.block(start, seq_len) for start in starts.tolist()])
    return Calibration(ids, data, seed, text_hash=text.sha256)


@torch.no_grad()
def _sample_from(
    decoder: Decoder, num_samples: int, seq_len: int, seed: int, progress: Progress
) -> Tensor:
    """Blocks that the model writes itself, temperature 1, end-of-sequence forbidden so that blocks
    are whole.
    """
    begin = _first_token(decoder)
    batch, blocks = 16, []
    with torch.random.fork_rng():  # leaves the caller's random state as it was
        torch.manual_seed(seed)
        for first in range(0, num_samples, batch):
            progress("sampling text from the model", first, num_samples)
            start = torch.full((min(batch, num_samples - first), 1), begin, device=decoder.device)
            try:
                block = decoder.model.generate(
                    start,
                    attention_mask=torch.ones_like(start),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_new_tokens=seq_len - 1,
                    max_new_tokens=seq_len - 1,
                    pad_token_id=begin,
                )
            except RuntimeError as failure:
                # torch cannot draw from probabilities that are not finite
                raise NumericsError(
                    "--data self: the model's probabilities are not finite;"
                    f" {decoder.first_non_finite(start, None)}"
                ) from failure
            blocks.append(block)
    progress("sampling text from the model", num_samples, num_samples)
    return torch.cat(blocks).cpu()


def _first_token(decoder: Decoder) -> int:
    """What text begins with: the beginning-of-sequence token, or else the first of the
    end-of-sequence tokens, of which there may be several.
    """
    for value in (
        decoder.block_bos,
        decoder.config.bos_token_id,
        decoder.config.eos_token_id,
        getattr(decoder.tokenizer, "eos_token_id", None),
    ):
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, int) and 0 <= first < num_rows(decoder.model):
            return first
    raise DataError(
        "--data self: the model has no beginning-of-sequence token to start from; use --data pydoc"
        " or a file"
    )
