"""Rows drafted by tracing: as declared where declared, and right where nothing is declared."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import run_command

from axolotl_loram.architecture.blocks import HIDDEN, KEY_VALUE, QUERY
from axolotl_loram.architecture.families import FAMILIES
from axolotl_loram.architecture.model import parameters
from axolotl_loram.architecture.spaces import kept_features
from axolotl_loram.cli import main
from axolotl_loram.errors import LoRAMError
from axolotl_loram.propose.propose import propose
from axolotl_loram.propose.survey import survey
from axolotl_loram.propose.tracing import build_from
from axolotl_loram.propose.trial import declared, try_out


def inspect(tmp_path, config, *options):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return CliRunner().invoke(main, ["inspect", str(tmp_path), "--propose", *options])


def kept_of_each(family, config):
    """Parameter → what it is, and the features that are left when every other unit is kept."""
    with declared(family):
        described = {}
        for tensor in parameters(config):
            kept = {kind: np.arange(0, tensor.sizes[kind], 2) for kind in family.kinds}
            features = [kept_features(dim, tensor.sizes, kept) for dim in tensor.dims]
            positions = [None if found is None else found.tolist() for found in features]
            described[tensor.name] = (tensor.shape, tensor.role, tensor.bias, positions)
        return described


def outcomes(checks):
    return [check.outcome for check in checks]


@pytest.mark.parametrize(
    ("family", "kv_groups"),
    [("phi3", ["passed"]), ("gpt_neox", []), ("cohere", ["passed"]), ("olmo2", ["estimate"])],
)
def test_proposes_what_is_declared(family, kv_groups):
    """Fused projections, heads that cannot go, flags, and a norm over all heads."""
    raw = {"model_type": family}
    proposal, row = propose(raw), FAMILIES[family]
    config = build_from(family, survey(raw).fields(1)).config.to_dict()
    assert kept_of_each(proposal.family, config) == kept_of_each(row, config)
    for name in ("groups", "layers", "stored", "defaults", "refused"):
        assert getattr(proposal.family, name) == getattr(row, name)
    assert outcomes(proposal.checks) == ["passed", "passed", "passed", *kv_groups]
    assert ["heads" in note for note in proposal.notes] == [True] * (not kv_groups)


def test_proposes_a_row_for_an_undeclared_family(tmp_path):
    """Apertus has head norms, and an activation with weights and scalars."""
    assert "apertus" not in FAMILIES
    (tmp_path / "config.json").write_text('{"model_type": "apertus"}')
    found = json.loads(
        run_command("axolotl-loram", "inspect", tmp_path, "--propose", "--json").stdout
    )
    assert found["works"] and found["not_derived"] == []
    assert [check["outcome"] for check in found["checks"]] == ["passed"] * 4
    assert [group["kind"] for group in found["groups"]] == ["neurons", "kv_groups"]
    assert "*HEAD_NORMS" in found["row"] and "apertus" not in FAMILIES


def test_flags_become_conditions(tmp_path):
    shown = inspect(tmp_path, {"model_type": "stablelm"}).stdout
    assert 'bias="use_qkv_bias"' in shown and 'when="!use_parallel_residual"' in shown
    assert 'refused={"qk_layernorm"' in shown
    assert "not derived: attention heads" in shown and "the row works" in shown


def test_says_what_it_cannot_derive():
    """Experts lie stacked in the running model, and one by one in checkpoints."""
    proposal = propose({"model_type": "mixtral"})
    assert outcomes(proposal.checks) == ["passed", "failed", "failed"]
    assert [note for note in proposal.notes if "experts.down_proj, which stacks" in note]
    assert "the row is wrong" in proposal.text()


def test_layers_that_differ_are_noticed():
    layers = {"num_hidden_layers": 6, "mlp_only_layers": [5], "decoder_sparse_step": 1}
    found = survey({"model_type": "qwen3_moe", **layers})
    assert found.notes == ["layers that differ from the first: 1 (5)"]


def test_a_wrong_row_fails_its_trial():
    """Keys where the queries are: every shape is right, but other heads go."""
    row = FAMILIES["phi3"]
    fused = replace(row.layer[0], dims=(KEY_VALUE + QUERY + KEY_VALUE, HIDDEN))
    wrong = replace(row, layer=(fused, *row.layer[1:]))
    checks = try_out(wrong, survey({"model_type": "phi3"}))
    assert outcomes(checks) == ["passed", "passed", "passed", "failed"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "nonesuch"}, "found model_type 'nonesuch'"),
        ({"model_type": "gemma3", "text_config": {}}, "its text_config is one"),
        ({"model_type": "gpt2"}, "expected a config with hidden_size"),
    ],
)
def test_models_that_cannot_be_traced_are_refused(tmp_path, config, expected):
    with pytest.raises(LoRAMError, match=expected):
        propose(config)
    assert inspect(tmp_path, config).exit_code == 1
