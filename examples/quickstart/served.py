"""Let llama.cpp, on a CPU, sum up a function of `samples`, without and with the adapter."""

import json
from pathlib import Path

import pretrained
import samples

BASE = pretrained.MODELS / f"{pretrained.SMOLLM2.name}.gguf"
FOLDER = Path("build/quickstart/gguf")
FILE = Path("build/quickstart/served.json")
LONGEST = 24


def write() -> None:
    """Write `served.json`: greedy answers of the original's own GGUF to the first function."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(BASE), 1024, 1
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(FOLDER / "adapter.gguf"), 1.0)]
    settings.warmup, settings.verbosity = False, 1
    server = xllamacpp.Server(settings)

    def answer(question: str, scale: float) -> str:
        asked = {"messages": [{"role": "user", "content": question}], "max_tokens": LONGEST}
        asked |= {"temperature": 0.0, "lora": [{"id": 0, "scale": scale}]}
        choice = server.handle_chat_completions(asked)["choices"][0]
        cut = "" if choice["finish_reason"] == "stop" else " …"
        return choice["message"]["content"].strip() + cut

    question = json.loads(samples.FILE.read_text("utf-8"))[0]["prompt"]
    answers = {"before": answer(question, 0.0), "after": answer(question, 1.0)}
    FILE.write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")
