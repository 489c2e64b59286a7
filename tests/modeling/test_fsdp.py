"""Fully sharded training (FSDP2) on two processes equals training on one, for every variant."""

import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from fsdp_worker import build, train
from paths import TESTS
from tiny_models import ATTENTION_TYPES, CASES, case_config, make_model

from vivit_hf.modeling_vivit import ViViTEncoder


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    output = tmp_path_factory.mktemp("fsdp") / "results.pt"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--master_port=0"]
    command = [sys.executable, *torchrun, str(TESTS / "fsdp_worker.py"), str(output)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-3000:]
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_shards_train_like_the_whole_model(sharded, attention_type):
    result = sharded[attention_type]
    model, clips, labels = build(attention_type)
    losses = train(model, clips, labels)
    layers = model.config.num_hidden_layers + (
        model.config.num_temporal_layers if attention_type == "factorised_encoder" else 0
    )
    assert result["world_size"] == 2 and result["wrapped"] > layers
    assert 0.4 < result["local_share"] < 0.6, "each process holds a half"
    torch.testing.assert_close(result["losses"], losses, atol=1e-6, rtol=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(result["state"][name], tensor, atol=2e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_file_wraps_every_layer(case):
    settings = yaml.safe_load((TESTS.parent / "examples" / "fsdp2.yaml").read_text())["fsdp_config"]
    assert settings["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert "fsdp_transformer_layer_cls_to_wrap" not in settings, "the model knows its own layers"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=settings["fsdp_version"], auto_wrap_policy="transformer_based_wrap"
    )
    model = make_model(case_config(case))
    plugin.set_auto_wrap_policy(model)
    wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    encoders = [module for module in model.modules() if isinstance(module, ViViTEncoder)]
    assert {type(layer) for encoder in encoders for layer in encoder.layer} <= wrapped
