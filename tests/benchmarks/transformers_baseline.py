"""What transformers' own `generate` does on this machine: the number that a server is compared
with.

A process of its own, started by `throughput.py`: it frees all its memory before and after, and its
imports are not in the load generator. Prints one JSON line: {"rows": [{"batch", "tokens_per_s",
"first_token_ms"}]}.
"""

import json
import statistics
import time

import click
import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks.load import numbers


@click.command(context_settings={"show_default": True})
@click.option("--model-id", required=True, help="Local folder or hub id.")
@click.option("--batches", callback=numbers(int), default="1,32")
@click.option("--prompt-tokens", default=64)
@click.option("--new-tokens", default=64)
@click.option("--temperature", default=0.0, help="0 is greedy decoding.")
@click.option("--top-p", default=1.0, help="With a temperature only; 1 is off.")
@click.option("--repeats", default=3, help="Timed runs of each batch; the median counts.")
@click.option("--threads", type=int, help="CPU threads; the default is torch's.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16")
def main(
    model_id: str,
    batches: list[int],
    prompt_tokens: int,
    new_tokens: int,
    temperature: float,
    top_p: float,
    repeats: int,
    threads: int | None,
    dtype: str,
) -> None:
    """Time generation of equally long prompts and answers."""
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
    sampling: dict[str, bool | float] = {"do_sample": temperature > 0}
    if temperature > 0:  # its own default is a top_k of 50
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    rows = []
    for batch in batches:
        first_s = _median_s(model, batch, prompt_tokens, 1, repeats, sampling)
        whole_s = _median_s(model, batch, prompt_tokens, new_tokens, repeats, sampling)
        tokens_per_s = batch * new_tokens / whole_s
        row = {"batch": batch, "tokens_per_s": tokens_per_s, "first_token_ms": first_s * 1000}
        rows.append(row)
    facts = {"device": device, "dtype": dtype, "threads": torch.get_num_threads()}
    facts |= {"attention": model.config._attn_implementation, "rows": rows}
    print(json.dumps(facts), flush=True)


@torch.inference_mode()
def _median_s(
    model: torch.nn.Module,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    sampling: dict[str, bool | float],
) -> float:
    """Median seconds of a `generate`, after a short one that does not count.

    Prompts are random tokens, all rows different.
    """
    draw = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().num_embeddings
    shape = (batch, prompt_tokens)
    ids = torch.randint(100, vocab_size, shape, generator=draw).to(model.device)
    times = []
    for count in [min(new_tokens, 4), *[new_tokens] * repeats]:
        _wait(model)
        start = time.perf_counter()
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
            **sampling,
        )
        _wait(model)
        times.append(time.perf_counter() - start)
        assert output.shape[1] == prompt_tokens + count
    return statistics.median(times[1:])


def _wait(model: torch.nn.Module) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
