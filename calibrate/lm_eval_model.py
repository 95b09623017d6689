"""The model `qmamba` of lm-eval: every task runs the recurrence that decode runs.

    qmamba lm-eval --model_args pretrained=DIR,calibration=FILE --tasks ...

lm-eval has no plugins: its own command knows the model only where this module is imported first, as ``qmamba lm-eval``
does.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from qmamba_compile.errors import ConfigError

from .data import BYTES, load_tokenizer
from .models import allow, load_model, quantize
from .recurrence import replaced

_LINE_BREAK = ord("\n")


@register_model("qmamba")
class QMambaLM(TemplateLM):
    """W8A8H4 by the faithful scan: prompts and continuations alike meet a state that is requantized at every token.

    Args (of ``--model_args``):
        pretrained: folder or hub name. calibration: artifact.
        state_bits: 8, 4, 3, 2 or none. weights: int8 or none. state_scales: dynamic or calibrated.
        rounding: nearest or stochastic, with ``seed``. flush_interval: steps between two requantizations; 1 by
            default, since a generation goes on from a packed state, which a scan with a longer one does not give.
        batch_size: sequences that run together. max_length: tokens, beyond which the left is cut off.
        max_batch_size, trust_remote_code: of lm-eval's own options, not used.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        calibration: str | None = None,
        state_bits: Any = 4,
        weights: str = "int8",
        state_scales: str | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        flush_interval: int = 1,
        batch_size: Any = 8,
        max_length: int = 2048,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: Any = None,
        trust_remote_code: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if pretrained is None:
            raise ConfigError("--model_args names no model; use --model_args pretrained=DIR")
        if unknown:
            known = ", ".join(name for name in inspect.signature(QMambaLM).parameters if name != "unknown")
            raise ConfigError(f"--model_args {', '.join(unknown)}: unknown; allowed: {known}")
        state_bits = "none" if state_bits is None else str(state_bits)
        allow("state_bits", state_bits, ("8", "4", "3", "2", "none"))
        allow("weights", weights, ("int8", "none", None))
        allow("state_scales", state_scales, ("dynamic", "calibrated", None))
        allow("rounding", rounding, ("nearest", "stochastic"))
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = load_model(pretrained)
        self.tokenizer = None if network.config.vocab_size == BYTES else load_tokenizer(pretrained, network)
        self.model, self.recurrence = quantize(
            network.to(self._device),
            state_bits=None if state_bits == "none" else int(state_bits),
            weights=None if weights == "none" else weights,
            state_scales=state_scales,
            rounding=rounding,
            calibration=calibration,
            seed=int(seed),
            flush_interval=int(flush_interval),
        )
        self.batch_size = 8 if batch_size in (None, "auto") else int(batch_size)
        self.max_length, self.max_gen_toks = int(max_length), int(max_gen_toks)

    # --- tokens ----------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """End of text; a byte model has none, and a line break is the least that can stand before a text."""
        if self.tokenizer is None or self.tokenizer.eos_token_id is None:
            return _LINE_BREAK
        return self.tokenizer.eos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, bytes for a byte model."""
        if self.tokenizer is None:
            return list(string.encode())
        return self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""
        if self.tokenizer is None:
            return bytes(tokens).decode(errors="replace")
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return "bytes" if self.tokenizer is None else self.tokenizer.name_or_path.replace("/", "__")

    # --- likelihoods -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation behind its context, and whether it is the greedy one."""
        answers: list[Any] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        with replaced(self.model, self.recurrence), tqdm(total=len(order), disable=disable_tqdm) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                rows = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in batch]
                # On the right: what follows a row cannot change what is said of it.
                ids = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
                for row, tokens in zip(ids, rows, strict=True):
                    row[: len(tokens) - 1] = torch.tensor(tokens[:-1])
                logits = self.model(ids.to(self._device), use_cache=False).logits.float().log_softmax(dim=-1)
                for i, tokens, said in zip(batch, rows, logits.cpu(), strict=True):
                    wanted = torch.tensor(requests[i][2][-self.max_length :])
                    said = said[len(tokens) - 1 - len(wanted) : len(tokens) - 1]
                    likelihood = said.gather(1, wanted[:, None]).double().sum().item()
                    answers[i] = (likelihood, bool((said.argmax(dim=-1) == wanted).all()))
                    key = requests[i][0]
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[i])
                bar.update(len(batch))
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length`` tokens from an empty state each."""
        answers = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            answers.append(sum(value for value, _ in self._loglikelihood_tokens(parts, disable_tqdm)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answers[-1])
        return answers

    # --- generation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string: the prompt by the faithful scan, then steps on its packed state."""
        answers: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        with replaced(self.model, self.recurrence), tqdm(total=len(requests), disable=disable_tqdm) as bar:
            for members in groups.values():
                # Alike in length, so that little is padded.
                members = sorted(members, key=lambda index: -len(requests[index].args[0]))
                settings = normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks)
                # The end of text is a token, by which `generate` stops of itself.
                until = [stop for stop in handle_stop_sequences(settings.pop("until", None), eos=None) if stop]
                length = settings.pop("max_gen_toks")
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    texts = [requests[index].args[0] for index in batch]
                    for index, answer in zip(batch, self._continue(texts, until, length, settings), strict=True):
                        answers[index] = answer
                        self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                    bar.update(len(batch))
        return answers

    def _continue(self, texts: list[str], until: list[str], length: int, settings: dict[str, Any]) -> list[str]:
        rows = [self.tok_encode(text)[-self.max_length :] or [self.prefix_token_id] for text in texts]
        width = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
        for row, seen, tokens in zip(ids, mask, rows, strict=True):
            # On the left, where the mask keeps state and convolution at zero.
            row[width - len(tokens) :] = torch.tensor(tokens)
            seen[width - len(tokens) :] = 1
        if not settings.get("do_sample"):
            settings = {k: v for k, v in settings.items() if k not in ("temperature", "top_p", "top_k")}
        output = self.model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=length,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([_Stops(until, width, self.tok_decode)]),
            **{"do_sample": False, **settings},
        )
        ends = settings.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        # What follows the end of text is padding, until the longest row of the batch ends.
        said = (itertools.takewhile(lambda token: token not in ends, row[width:].tolist()) for row in output)
        return [_cut(self.tok_decode(list(tokens)), until) for tokens in said]


class _Stops(StoppingCriteria):
    """A row is done when its continuation contains a stop string."""

    def __init__(self, until: list[str], prompt: int, decode: Callable[[Sequence[int]], str]) -> None:
        self._until, self._prompt, self._decode = until, prompt, decode

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = (self._decode(row[self._prompt :].tolist()) for row in ids)
        done = [any(stop in text for stop in self._until) for text in texts]
        return torch.tensor(done, device=ids.device)


def _cut(text: str, until: list[str]) -> str:
    """What stands before the first stop string."""
    for stop in until:
        text = text.split(stop)[0]
    return text
