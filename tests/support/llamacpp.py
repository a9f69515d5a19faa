"""llama.cpp itself, for tests: its converters for pico models, and its engine on a CPU.

Its converters import transformers, which takes seconds: `warmly` runs the real script in a fork of
a process that has imported it. (Not of this one: it may have the engine's threads.)
"""

from pathlib import Path

import numpy as np
from conftest import run_command

from axolotl_loram.errors import LoRAMError
from axolotl_loram.results.converter import find_script
from axolotl_loram.results.export_pruned import MODEL_SCRIPT

PRINTABLE = 70
"""A token that is a letter, or several."""
ANY_TOKENIZER = Path(__file__).with_name("any_tokenizer.py")


def tokenizer():
    """One token per byte and one merge, without which llama.cpp takes a vocabulary for damaged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<bos>", "<eos>", "<pad>"]
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "er"]
    bpe = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[("e", "r")])
    made = Tokenizer(bpe)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def warmly(script: Path, *arguments: object) -> None:
    """As `converter.run_script`, without the seconds that imports take."""
    ran = run_command(ANY_TOKENIZER, script, *arguments, check=False)
    if ran.returncode:
        raise LoRAMError(ran.stderr.strip()[-3000:])


def model_gguf(model: Path, file: Path) -> Path:
    """A pico model as GGUF, in float32."""
    warmly(find_script(MODEL_SCRIPT), "--outtype", "f32", "--outfile", file, model)
    return file


class Engine:
    """llama.cpp on a model, with an adapter or without."""

    def __init__(self, model: Path, adapter: Path | None = None, context: int = 512):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(model)
        settings.n_ctx, settings.n_parallel = context, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.warmup = settings.fit_params = False
        settings.verbosity = 0
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if adapter is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = xllamacpp.Server(settings)

    def logprobs(self, ids: list[int], vocabulary: int, scale: float | None = None) -> np.ndarray:
        """Log probabilities of what follows the tokens `ids`, (vocabulary,), in nats.

        Args:
            ids: The prompt.
            vocabulary: How many tokens there are.
            scale: What the adapter is multiplied by.
        """
        asked = {"prompt": list(map(int, ids)), "n_predict": 1, "n_probs": vocabulary}
        # Nothing is told where the token drawn is part of a character: draw a letter, whatever the
        # probabilities, which are told as they are.
        asked |= {"temperature": -1.0, "cache_prompt": False, "logit_bias": [[PRINTABLE, 1e6]]}
        if scale is not None:
            asked["lora"] = [{"id": 0, "scale": scale}]
        said = self.server.handle_completions(asked)
        told = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = np.full(vocabulary, -np.inf)
        for token in told:
            found[token["id"]] = token["logprob"]
        return found
