"""Measures transformers in its own environment: a loop of forward passes with a growing cache.

The job's variant is the implementation of the experts: ``eager`` or ``grouped_mm``. Its own
``generate`` adds only overhead to the same passes.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from benchmarks.measuring import DECODE, Job, Prompt, measure

_ROUTED_STEPS = 4


class Transformers:
    """A model and its cache as :class:`~benchmarks.measuring.Subject`."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        kind: Any = transformers.AutoModelForCausalLM
        self.model = kind.from_pretrained(
            job.model_path, dtype=torch.bfloat16, experts_implementation=job.variant
        ).eval()
        self._cache: Any = None
        self._tokens = torch.empty(0)

    @torch.inference_mode()
    def start(self, prompts: Sequence[Prompt]) -> None:
        """Run the prompts, all of one length, in one pass."""
        self._cache = None
        self._tokens = torch.tensor(prompts)
        self.step()

    @torch.inference_mode()
    def step(self, **options: Any) -> Any:
        """Run one pass and take the likeliest tokens."""
        output = self.model(
            input_ids=self._tokens,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **options,
        )
        self._cache = output.past_key_values
        self._tokens = output.logits[:, -1].argmax(-1, keepdim=True)
        return output

    def finish(self) -> None:
        """Drop the cache."""
        self._cache = None

    def experts_hit(self, job: Job, batch: int) -> float:
        """Return how many experts of a layer a decode step of ``batch`` tokens really reads."""
        self.start(job.prompts(DECODE, batch, job.prompt_tokens))
        top_k = self.model.config.num_experts_per_tok
        counts: list[int] = []
        for _ in range(_ROUTED_STEPS):
            for logits in self.step(output_router_logits=True).router_logits:
                counts.append(logits.topk(top_k, dim=-1).indices.unique().numel())
        self.finish()
        return sum(counts) / len(counts)


def main() -> None:
    """Measure and write the result."""
    job, result = Job.from_arguments()
    figures, subject = measure(job, lambda: Transformers(job))
    assert isinstance(subject, Transformers)
    figures["experts_hit"] = {str(b): subject.experts_hit(job, b) for b in job.batches}
    figures["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
