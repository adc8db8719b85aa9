import json

import pytest

from fd_large.engine.zero import config as ds
from fd_large.errors import ConfigError
from fd_large.plan.memory import MOST_BFLOAT16_SUMMANDS

NUMBERS = ds.RunNumbers(
    micro_batch_size=4,
    accumulation=2,
    world_size=4,
    node_size=2,
    clip_norm=3.0,
    bfloat16=True,
    parameter_sizes=(10, 20, 3000, 5000),
)


ON_DISK = {"device": "nvme", "nvme_path": "/disk"}


def _write(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def _zero(stage, **keys):
    return {"zero_optimization": {"stage": stage, **keys}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"gradient_cliping": 1.0}, "nearest: gradient_clipping"),
        (_zero(3, stage3_prefetch_bucket=1), "nearest: stage3_prefetch_bucket_size"),
        (_zero(3, offload_optimizer={"devise": "cpu"}), "nearest: device"),
        ({"bf16": {"enable": True}}, "nearest: enabled"),
        ({"optimizer": {"type": "AdamW"}}, "--optim."),
        ({"scheduler": {}}, "--optim."),
        ({"fp16": {"enabled": True}}, "--engine.precision"),
        ({"compile": {"deepcompile": True}}, "Remove the key"),
        ({"zero_optimization": 3}, "expected an object"),
        (_zero("3"), "expected 0, 1, 2 or 3"),
        (_zero(True), "expected 0, 1, 2 or 3"),
        (_zero(3.0), "expected 0, 1, 2 or 3"),
        (_zero(3, reduce_bucket_size="x"), "whole number of 1 or more"),
        (_zero(3, reduce_bucket_size=-5), "whole number of 1 or more"),
        (_zero(3, overlap_comm="yes please"), "true or false"),
        (_zero(3, zero_hpz_partition_size="2"), "whole number"),
        (_zero(3, offload_param={"device": "disk"}), '"cpu", "nvme" or "none"'),
        (_zero(3, offload_optimizer={"device": "nvme", "nvme_path": 3}), "a text"),
        (_zero(3, offload_param=None), "expected an object"),
        ({"communication_data_type": "fp8"}, "fp32"),
        ({"comms_logger": {"enabled": "x"}}, "true or false"),
        ({"steps_per_print": "x"}, "whole number"),
        ({"prescale_gradients": True}, "no such key"),
        (_zero(2, offload_param={"device": "cpu"}), "ignores it at stage 2"),
        (_zero(2, zero_hpz_partition_size=2), "ignores it at stage 2"),
        (_zero(1, sub_group_size=5), "ignores it at stage 1"),
        (_zero(2, offload_optimizer=ON_DISK), "only stage 3"),
        (_zero(3, offload_optimizer={"device": "cpu", "nvme_path": "/a"}), "zero3_nvme.json"),
        (_zero(3, offload_optimizer={"device": "nvme", "pin_memory": True}), "pin_memory: files"),
        (_zero(3, offload_param={"device": "nvme"}), "expected nvme for both"),
        (
            _zero(3, offload_optimizer=ON_DISK, offload_param={"device": "nvme", "max_in_cpu": 3}),
            "offload_param.max_in_cpu: files",
        ),
        (_zero(3, stage3_max_live_parameters="auto"), "does not fill"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "--student.activation"),
        ({"activation_checkpointing": "auto"}, "--student.activation"),
    ],
)
def test_load_refuses_with_the_remedy(tmp_path, config, said):
    with pytest.raises(ConfigError, match=said.replace("*", ".")):
        ds.load(_write(tmp_path, config))


def test_load_refuses_a_missing_file_no_json_and_a_repeated_key(tmp_path):
    with pytest.raises(ConfigError, match=r"^--deepspeed_config: .*none\.json"):
        ds.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"line 2 column 8"):
        ds.load(_write(tmp_path, '{\n"a": 1 "b": 2}'))
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(ConfigError, match="not JSON"):
        ds.load(tmp_path / "latin.json")
    with pytest.raises(ConfigError, match="2 times"):
        ds.load(_write(tmp_path, '{"bf16": {}, "bf16": {}}'))


def test_fill_leaves_no_auto_and_always_sets_clipping():
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": "auto",
        "zero_force_ds_cpu_optimizer": "auto",
        **_zero(3, zero_hpz_partition_size="auto", stage3_param_persistence_threshold="auto"),
    }
    ds.check(config, where="config.json")
    filled = ds.fill(config, NUMBERS)
    assert "auto" not in json.dumps(filled)
    assert filled["gradient_clipping"] == 3.0
    assert filled["train_batch_size"] == 32
    assert filled["bf16"] == {"enabled": True}
    assert filled["data_types"] == {"grad_accum_dtype": "fp32"}
    assert filled["zero_optimization"]["zero_hpz_partition_size"] == 2
    assert filled["zero_optimization"]["stage3_param_persistence_threshold"] == 20
    assert config["bf16"] == {"enabled": "auto"}, "the caller's JSON stays as it was"


def test_hpz_is_off_on_a_single_node():
    filled = ds.fill(_zero(3, zero_hpz_partition_size="auto"), NUMBERS._replace(node_size=4))
    assert filled["zero_optimization"]["zero_hpz_partition_size"] == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"gradient_clipping": 1.0, **_zero(1)}, "--optim.clip_norm"),
        ({"train_micro_batch_size_per_gpu": 8, **_zero(1)}, "got 8 in the JSON, expected 4"),
        ({"train_batch_size": 33, **_zero(1)}, "expected 32"),
        ({"bf16": {"enabled": False}, **_zero(1)}, "--engine.precision"),
        ({"data_types": {"grad_accum_dtype": "bf16"}, **_zero(1)}, "float32"),
        (_zero(0), "zero1.json"),
        (_zero(3, zero_hpz_partition_size=3), "expected a divisor"),
        (_zero(3, offload_optimizer={"device": "nvme"}), "--engine.nvme_path FOLDER"),
    ],
)
def test_fill_refuses_clashes(config, said):
    with pytest.raises(ConfigError, match=said):
        ds.fill(config, NUMBERS)


@pytest.mark.parametrize(
    ("ranks", "config", "expected"),
    [
        (MOST_BFLOAT16_SUMMANDS, {}, "bf16"),
        (MOST_BFLOAT16_SUMMANDS + 1, {}, "fp32"),
        (MOST_BFLOAT16_SUMMANDS + 1, {"communication_data_type": "auto"}, "fp32"),
        (MOST_BFLOAT16_SUMMANDS + 1, {"communication_data_type": "bf16"}, "bf16"),
        (2, {"communication_data_type": "fp32"}, "fp32"),
    ],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_many_ranks_are_summed_in_float32(stage, ranks, config, expected):
    numbers = NUMBERS._replace(world_size=ranks, node_size=ranks)
    filled = ds.fill({**_zero(stage), **config}, numbers)
    assert filled["communication_data_type"] == expected


def test_gradients_that_deepspeed_quantises_keep_their_data_type():
    numbers = NUMBERS._replace(world_size=512, node_size=8)
    filled = ds.fill(_zero(3, zero_quantized_gradients=True), numbers)
    assert filled["communication_data_type"] == "bf16"
    with pytest.raises(ConfigError, match=r"zero_quantized_gradients: .* 8 ranks"):
        ds.fill(_zero(3, zero_quantized_gradients=True), numbers._replace(world_size=8))
    filled = ds.fill(_zero(3), numbers._replace(bfloat16=False))
    assert filled["communication_data_type"] == "fp32"


def test_weights_in_eight_bits_come_in_groups_of_eight():
    numbers = NUMBERS._replace(world_size=2, node_size=2, trained_sizes=(16, 4096))
    filled = ds.fill(_zero(3, zero_quantized_weights=True), numbers)
    assert filled["zero_optimization"]["zero_quantized_weights"]
    odd = numbers._replace(trained_sizes=(16, 33, 4096))
    with pytest.raises(ConfigError, match=r"quantized_weights: .* 33 elements"):
        ds.fill(_zero(3, zero_quantized_weights=True), odd)


def test_an_activation_checkpointing_block_that_asks_for_nothing_is_obeyed():
    config = {"activation_checkpointing": {"cpu_checkpointing": False}, **_zero(1)}
    assert "activation_checkpointing" not in ds.fill(config, NUMBERS)


def test_float32_at_stage_0_is_allowed():
    filled = ds.fill(_zero(0), NUMBERS._replace(bfloat16=False))
    assert filled["bf16"] == {"enabled": False}
    assert "data_types" not in filled


def test_one_rank_has_nothing_to_split():
    alone = NUMBERS._replace(bfloat16=False, world_size=1, node_size=1)
    for stage in (1, 2):
        assert ds.fill(_zero(stage), alone)["zero_optimization"] == {"stage": 0}
    assert ds.fill(_zero(3), alone)["zero_optimization"]["stage"] == 3
    assert ds.fill(_zero(1), alone._replace(bfloat16=True))["zero_optimization"]["stage"] == 1
    on_host = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert ds.fill(on_host, alone)["zero_optimization"]["stage"] == 2


def test_the_run_names_the_disk_and_deepspeed_is_told_of_host_memory():
    numbers = NUMBERS._replace(nvme_path="/disk")
    config = _zero(3, offload_optimizer={"device": "nvme", "nvme_path": "auto"})
    filled = ds.fill(config, numbers)
    assert filled["zero_optimization"]["offload_optimizer"] == ON_DISK
    given = ds.for_deepspeed(filled)["zero_optimization"]
    assert given["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert ds.nvme_path(filled) == "/disk"
    with pytest.raises(ConfigError, match="in memory"):
        ds.fill(_zero(3), numbers)
    with pytest.raises(ConfigError, match="disagree"):
        ds.fill(_zero(3, offload_optimizer={**ON_DISK, "nvme_path": "/other"}), numbers)


@pytest.mark.parametrize(
    "config",
    [_zero(2, offload_param={"device": "nvme"}), _zero(0, offload_optimizer=ON_DISK)],
)
def test_a_block_that_its_stage_ignores_is_told_once(config):
    with pytest.raises(ConfigError, match="at stage") as caught:
        ds.check(config, where="config.json")
    assert len(str(caught.value).splitlines()) == 1


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    config = {"gradient_cliping": 1, **_zero(7, offload_optimizer={"devise": "cpu"})}
    with pytest.raises(ConfigError) as caught:
        ds.load(_write(tmp_path, config))
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for name in ("gradient_cliping", "optimization.stage", "offload_optimizer.devise"):
        assert sum(name in line for line in lines) == 1
    with pytest.raises(ConfigError) as caught:
        ds.fill({"gradient_clipping": 1.0, "train_batch_size": 3}, NUMBERS)
    assert len(str(caught.value).splitlines()) == 3  # The third: stage 0 in bfloat16.


def test_a_micro_batch_that_a_probe_finds_is_not_the_jsons():
    probed = NUMBERS._replace(micro_batch_size=1, accumulation=8, is_probed=True)
    filled = ds.fill(_zero(3), probed)
    other = ds.with_micro_batch(filled, 4, 2)
    assert [other[name] for name in (ds.MICRO_BATCH, ds.ACCUMULATION)] == [4, 2]
    assert {**other, ds.MICRO_BATCH: 1, ds.ACCUMULATION: 8} == filled
    alone = ds.with_micro_batch(filled, 1, 1)
    assert alone["train_batch_size"] == NUMBERS.world_size
    for name in (ds.MICRO_BATCH, ds.ACCUMULATION):
        with pytest.raises(ConfigError, match=f"{name}: "):
            ds.fill({**_zero(3), name: 1}, probed)
