"""Models of gptc in lm-evaluation-harness (pip install lm-eval).

    python -m gptc.bench.harness --model gptc --model_args model=runs/tiny-book --tasks hellaswag

takes the command line of `lm_eval`, which has no way to find models of other packages. In Python,
importing this module is enough: `lm_eval.simple_evaluate(model="gptc", model_args="model=...")`.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

from gptc.checkpoint.facade import load_model
from gptc.checkpoint.find import open_checkpoint
from gptc.errors import GptcError
from gptc.eval.likelihood import Scorer, beginning, encoded, rolling_windows, split_pair
from gptc.files.words import pip_install
from gptc.generation.decoder import Generation
from gptc.generation.options import Sampling
from gptc.generation.request import prompt_tokens

try:
    import lm_eval.models  # noqa: F401  (registers the other models)
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise GptcError(f"lm-evaluation-harness is missing: {pip_install('lm-eval')}") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MOST_NEW = 256  # tokens of a generation without a length


@register_model("gptc")
class GptcLM(LM):  # type: ignore[misc]
    """A model of gptc: a run, folder, file or hub name. Arguments: those of `Model.create`."""

    def __init__(
        self,
        model: str,
        device: str | None = None,
        dtype: str = "fp32",
        threads: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """`batch_size` is ignored: a session computes a context once, and then its choices."""
        super().__init__()
        file = open_checkpoint(model)
        self.name = str(file.path)
        self.texts = file.tokenizer()
        name = (device or "auto").partition(":")[0]  # the harness numbers GPUs
        self.gpt = load_model(file, device=name, dtype=dtype, threads=int(threads))

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness' caches."""
        return self.name

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether greedy decoding writes it."""
        pairs = [split_pair(self.texts, *request.args) for request in requests]
        # Contexts that begin alike come in turn, so that they are computed once.
        order = sorted(range(len(pairs)), key=lambda i: pairs[i])
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with closing(Scorer(self.gpt)) as scorer:
            for i in order:
                found[i] = scorer.score(*pairs[i])[:2]
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text, in windows of the model's context."""
        first, room = beginning(self.texts), self.gpt.config.block_size
        found = []
        with closing(Scorer(self.gpt)) as scorer:
            for request in requests:
                windows = rolling_windows(encoded(self.texts, request.args[0]), first, room)
                found.append(sum(scorer.score(*window).logprob for window in windows))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each prompt, up to the first of its `until`, which is left out."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        most = int(options.get("max_gen_toks", options.get("max_new_tokens", MOST_NEW)))
        warm = options.get("do_sample", False) and float(options.get("temperature", 1.0))
        room = self.gpt.config.block_size - 1
        tokens = prompt_tokens(self.texts, prompt)[-max(1, room - most) :]
        sampling = Sampling(temperature=warm or 0.0, top_p=float(options.get("top_p", 1.0)))
        generation = Generation(
            self.gpt,
            self.texts,
            tokens,
            max_tokens=min(most, room),
            sampling=sampling,
            stop=tuple([until] if isinstance(until, str) else until),
        )
        return "".join(piece for _, piece in generation)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
