"""Compress a model, save it, load it with transformers, and measure what it cost.

    python examples/quickstart.py [MODEL] [OUT]

MODEL: a name on the Hugging Face hub, a folder or a .gguf file; without one, the small embedded
model. OUT: a folder that is not there yet.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import grasp  # importing it is what lets transformers load compressed models

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
out = sys.argv[2] if len(sys.argv) > 2 else "small"

# Remove a fifth of all parameters. Which parts to keep is decided on a text: 8 blocks of 128 tokens
# of the Python reference, so that this is quick. For use, give text like yours and take more of it:
# data="my.txt", and leave num_samples and seq_len out.
result = grasp.compress(model, out, ratio=0.2, data="pydoc", num_samples=8, seq_len=128)
print(f"{result.parameters_before:,} parameters -> {result.parameters_after:,}, in {out}")

# Perplexity says how surprised a model is by a text: lower is better.
for name in (model, out):
    measured = grasp.evaluate(name, ppl="pydoc", seq_len=128, num_blocks=8)
    print(f"perplexity of {name}: {measured.scores[0].value:.1f}")

# What was saved is an ordinary model.
loaded = AutoModelForCausalLM.from_pretrained(out)
tokenizer = AutoTokenizer.from_pretrained(out)
prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
text = loaded.generate(prompt, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(text[0], skip_special_tokens=True))
