"""How long a compression takes: what the model's shapes and the method's plan say of its work, at
the speed that was measured.

    a start      Python, config, tokenizer; every weight read, summed up, written and proved
    forward      two operations a weight of the layers and token, attention, what lies between
    backward     as much again for the gradients of states, and the head both ways
    the method   sums, decompositions and the rest, as its plan has them

With the layers on the disk each is read for every block, and runs twice before its gradients.
Checked by benchmarks/forecast_cost.py.
"""

from __future__ import annotations

from grasp.core.decoder import Decoder
from grasp.core.experts import mixture
from grasp.methods.base import Plan
from grasp.stages.operations import Operations, total
from grasp.verbs.machine_speed import Speed

STARTING = 3.0
"""Seconds of every run."""
HANDLED = 20
"""Times that a weight goes through memory when it is read, looked at, summed up, written and
proved.
"""
TOUCHED = 1.0
"""Of the inputs and outputs of a layer's matrices, what goes through memory beside its products."""
LOGITS = 6
"""Times that a logit goes through memory for the loss and its gradient."""
READING = 1e9
"""Bytes a second at which layers come from the disk, or from what the system keeps of it."""


def seconds(
    decoder: Decoder,
    plan: Plan,
    num_samples: int,
    seq_len: int,
    width: int,
    speed: Speed,
    offloaded: bool = False,
) -> float:
    """Of a run with `num_samples` blocks of `seq_len` tokens; `width`: bytes of a number."""
    found = STARTING + speed.seconds(work(decoder, plan, num_samples, seq_len, offloaded))
    if offloaded:
        blocks = num_samples * (plan.forward_sweeps + 2 * plan.backward_sweeps)
        read = (blocks + plan.forward_blocks) * decoder.num_parameters() * width
        found += read / READING
    return found


def work(
    decoder: Decoder, plan: Plan, num_samples: int, seq_len: int, offloaded: bool = False
) -> Operations:
    """All that a run does."""
    tokens, runs = num_samples * seq_len, 3 if offloaded else 2
    forward, head = _layers(decoder, seq_len), _head(decoder)
    return total(
        [
            total([forward], plan.forward_sweeps * tokens + plan.forward_blocks * seq_len),
            total([forward], plan.backward_sweeps * tokens * runs),
            total([head], plan.backward_sweeps * tokens),
            total([plan.a_token], tokens),
            total([plan.a_block], num_samples),
            plan.once,
            {"touch": HANDLED * decoder.num_parameters()},
        ]
    )


def _layers(decoder: Decoder, seq_len: int) -> Operations:
    """Of a token in a pass through all layers."""
    products, touched = 0.0, 0.0
    for layer in decoder.layers():
        products += sum(out * into for out, into in (one.shape for one in layer.linears.values()))
        touched += sum(sum(one.shape) for one in layer.linears.values())
        experts = mixture(decoder, layer.index)
        if experts is not None:
            held = sum(one.numel() for one in experts.experts.parameters())
            products += held * experts.per_token / experts.count
    attention = 4.0 * seq_len * decoder.config.hidden_size * len(decoder.kept)
    return {"pass": 2 * products + attention, "touch": TOUCHED * touched}


def _head(decoder: Decoder) -> Operations:
    """Of the logits of a token, their loss and its gradient."""
    vocabulary, hidden = decoder.config.vocab_size, decoder.config.hidden_size
    return {"pass": 4.0 * vocabulary * hidden, "touch": float(LOGITS * vocabulary)}
