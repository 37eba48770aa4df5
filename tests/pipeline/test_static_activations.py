"""Activation scales fixed at calibration: what reloads is what was tuned, and scales are what was seen."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.calibration.observe import Extremes, InputExtremes
from auto_round.errors import AutoRoundError, UnsupportedError
from auto_round.pipeline.running.input_ranges import InputRanges, settle_ranges
from auto_round.schemes.siblings import joined_matrices
from pipeline.runs import ROWS, Stop, kl_of, quantize, stop_after, tree, weights

LIBRARY = "compressed_tensors"
SCALES = {"FP8_STATIC": "input_scale", "NVFP4": "input_global_scale"}
EXPERTS = {"head_dim": 16, "moe_intermediate_size": 32}
PLAIN = {"iters": 0, "disable_opt_rtn": True}
SEARCHED = {"iters": 0, "disable_opt_rtn": False}


INT8_STATIC = {"scheme": "INT8_W8A8", "act_dynamic": False, "act_group_size": 0}


def run(model, out, scheme, **given):
    return quantize(model, out, **{"format": "llm_compressor", "scheme": scheme, "group_size": None, **given})


def largest_inputs(model, rows):
    """Largest magnitude that flows into each linear layer, by Transformers alone."""
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    found = {}

    def look(name):
        def hook(module, args):
            found[name] = max(found.get(name, 0.0), float(args[0].abs().max()))

        return hook

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(look(name))
    with torch.no_grad():
        net(input_ids=torch.tensor(rows))
    return found


@pytest.mark.parametrize(
    ("scheme", "given"),
    [
        ("FP8_STATIC", {}),
        pytest.param("FP8_STATIC", PLAIN, marks=pytest.mark.slow),
        pytest.param("NVFP4", {}, marks=pytest.mark.slow),
        pytest.param("NVFP4", SEARCHED, marks=pytest.mark.slow),
        ("NVFP4", PLAIN),
    ],
    ids=str,
)
def test_the_library_predicts_what_was_tuned(tiny, tmp_path, scheme, given):
    pytest.importorskip(LIBRARY)
    result = run(tiny("llama"), tmp_path / "out", scheme, format="llm_compressor,fake", **given)
    # FP8: where the library divides in bfloat16, another code is a whole step of a coarse input.
    assert kl_of(result)["llm_compressor"] < {"FP8_STATIC": 1e-2, "NVFP4": 1e-6}[scheme]
    assert kl_of(result)["fake"] < 1e-6
    config = json.loads((result.folders[0] / "quantization_config.json").read_text())
    (group,) = config["config_groups"].values()
    inputs = group["input_activations"]
    found = (inputs["strategy"], inputs["dynamic"], inputs["group_size"])
    assert found == {
        "FP8_STATIC": ("tensor", False, None),
        "NVFP4": ("tensor_group", "local", 16),
    }.get(scheme)


@pytest.mark.parametrize("given", [{}, pytest.param(PLAIN, marks=pytest.mark.slow)], ids=["tuned", "plain"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_whole_numbers_with_one_step_for_the_input(tiny, tmp_path, sym, given):
    """The library predicts what was tuned; steps and zero points are those of the observed extremes."""
    pytest.importorskip(LIBRARY)
    fields = {**INT8_STATIC, "act_sym": sym, "format": "llm_compressor,fake", **given}
    result = run(tiny("llama"), tmp_path / "out", **fields)
    assert max(kl_of(result).values()) < 1e-4
    config = json.loads((result.folders[0] / "quantization_config.json").read_text())
    (group,) = config["config_groups"].values()
    assert (group["format"], group["weights"]["strategy"]) == ("int-quantized", "channel")
    inputs = group["input_activations"]
    found = (inputs["num_bits"], inputs["type"], inputs["strategy"], inputs["dynamic"], inputs["symmetric"])
    assert found == (8, "int", "tensor", False, sym)
    stored = weights(result.folders[0])
    ranges = InputRanges.from_entries(result.report["blocks"]).extremes
    for name in result.plan.quantized:
        least, largest = ranges[name]
        size = torch.tensor([max(-least, largest) / 127 if sym else (largest - least) / 255])
        assert torch.equal(stored[f"{name}.input_scale"], size.bfloat16())
        assert (f"{name}.input_zero_point" in stored) is not sym
        if not sym:
            zero = stored[f"{name}.input_zero_point"]
            assert (zero.dtype, zero.shape) == (torch.int8, (1,))
            assert int(zero) == round(-128 - least / float(size.bfloat16()))
    verdicts = result.report["engines"]["llm_compressor"]
    assert all(verdicts[engine]["loads"] for engine in ("vLLM", "SGLang")), verdicts


@pytest.mark.parametrize("scheme", SCALES)
def test_scales_are_the_observed_extremes(tiny, tmp_path, scheme):
    result = run(tiny("llama"), tmp_path / "out", scheme, verify=False, **PLAIN)
    stored = weights(result.folders[0])
    found = InputRanges.from_entries(result.report["blocks"]).extremes
    largest = {name: max(ends.largest, -ends.least) for name, ends in found.items()}
    everything = largest_inputs(tiny("llama"), ROWS)
    assert largest.keys() == set(result.plan.quantized)
    for name, size in largest.items():
        assert 0 < size <= everything[name]
        scale = stored[f"{name}.{SCALES[scheme]}"]
        assert scale.shape == (1,)
        if scheme == "NVFP4":
            assert torch.equal(scale, 448 * 6 / torch.tensor([size]))
        else:
            assert torch.equal(scale, (torch.tensor([size]) / 448).bfloat16())


def test_extremes_are_those_of_the_unquantized_model(tiny, tmp_path):
    """All rows alike: what flows through them does not depend on how they are drawn."""
    rows = [ROWS[0]] * len(ROWS)
    result = run(tiny("llama"), tmp_path / "out", "FP8_STATIC", verify=False, dataset=rows, **PLAIN)
    wanted = largest_inputs(tiny("llama"), rows[:1])
    for entry in result.report["blocks"]:
        for name, ends in entry["input_extremes"].items():
            assert max(-ends[0], ends[1]) == pytest.approx(wanted[name], rel=0.01), name


@pytest.mark.parametrize(("given", "inputs"), [({"scheme": "NVFP4"}, True), ({"act_bits": 16}, False)])
@pytest.mark.parametrize("way", [PLAIN, SEARCHED, {}], ids=["plain", "searched", "tuned"])
def test_siblings_share_their_numbers(tiny, tmp_path, given, inputs, way):
    """A number for a whole matrix is one for q/k/v and one for gate/up: of weights, and of inputs."""
    given = {"scheme": "NVFP4", "smooth": 0, **given}  # numbers of weights as they are
    result = run(tiny("llama"), tmp_path / "out", **given, verify=False, **way)
    stored = weights(result.folders[0])
    original = weights(tiny("llama"))
    groups = joined_matrices(result.plan.quantized)
    assert sorted(map(len, groups.values())) == [1, 1, 1, 1, 2, 2, 3, 3]
    for names in groups.values():
        largest = max(float(original[f"{name}.weight"].abs().max()) for name in names)
        for name in names:
            assert torch.equal(stored[f"{name}.weight_global_scale"], 448 * 6 / torch.tensor([largest]))
        assert len({float(stored[f"{name}.input_global_scale"]) for name in names if inputs}) == inputs


@pytest.mark.parametrize(
    ("scheme", "given"),
    [
        ("NVFP4", {}),
        pytest.param("NVFP4", PLAIN, marks=pytest.mark.slow),
        pytest.param("FP8_STATIC", {}, marks=pytest.mark.slow),
        pytest.param("FP8_STATIC", PLAIN, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_continued_run_gives_the_same_bytes(tiny, tmp_path, scheme, given):
    """What calibration fixed in the blocks before is needed to verify a folder of dense weights."""
    common = {"format": "llm_compressor,fake", **given}
    run(tiny("llama"), tmp_path / "whole", scheme, **common)
    with pytest.raises(Stop):
        run(tiny("llama"), tmp_path / "out", scheme, progress=stop_after(1), **common)
    run(tiny("llama"), tmp_path / "out", scheme, **common)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_siblings_share_their_numbers_where_inputs_are_smoothed(tiny, tmp_path):
    """Their weights are rescaled alike, and read the same rescaled input."""
    result = run(tiny("llama"), tmp_path / "out", "NVFP4", verify=False)
    assert result.report["smoothing"]["tensors"]
    stored = weights(result.folders[0])
    for names in joined_matrices(result.plan.quantized).values():
        for number in ("weight_global_scale", "input_global_scale"):
            assert len({float(stored[f"{name}.{number}"]) for name in names}) == 1


def test_plain_and_tuned_runs_fix_the_same_numbers(tiny, tmp_path):
    given = {"format": "fake", "verify": False, "smooth": 0}  # plain rounding smooths nothing unasked
    ranges = [
        InputRanges.from_entries(
            run(tiny("llama"), tmp_path / str(i), "NVFP4", **given, **way).report["blocks"]
        )
        for i, way in enumerate((PLAIN, SEARCHED, {"enable_quanted_input": False}))
    ]
    assert ranges[0] == ranges[1] == ranges[2]


def test_tokens_that_do_not_count_are_not_looked_at():
    seen = InputExtremes()
    assert seen.value() is None
    x = torch.tensor([[[1.0, -2.0], [50.0, 3.0]], [[0.5, 0.0], [1.0, 1.0]]])
    seen.add(x, torch.tensor([[True, False], [True, True]]))
    assert seen.value() == (-2.0, 1.0)
    seen.add(x)
    assert seen.value() == (-2.0, 50.0)


@pytest.mark.parametrize(("percentile", "largest"), [(100.0, 40.0), (99.0, 40.0), (75.0, 30.0), (1.0, 10.0)])
def test_a_percentile_leaves_the_tokens_with_the_largest_activations_out(percentile, largest):
    """Nearest rank, over tokens rather than numbers, whatever batches they came in."""
    seen = InputExtremes(percentile)
    x = torch.tensor([[10.0, -1.0], [20.0, -8.0], [30.0, 0.0], [40.0, -2.0]])
    seen.add(x[None, :3])
    seen.add(x[None, 3:])
    assert seen.value().largest == largest


def test_inputs_beyond_the_percentile_saturate(tiny, tmp_path):
    model = tiny("llama")
    whole, most = (
        weights(run(model, tmp_path / str(p), "FP8_STATIC", act_percentile=p, **PLAIN).folders[0])
        for p in (100.0, 60.0)
    )
    scales = [name for name in whole if name.endswith("input_scale")]
    assert scales
    assert all(most[name] < whole[name] for name in scales)


def test_experts_without_tokens_take_the_largest_of_their_peers():
    seen = {
        "0.mlp.experts.0.gate_proj": 2.0,
        "0.mlp.experts.0.up_proj": 3.0,
        "0.mlp.experts.0.down_proj": 7.0,
        "0.mlp.experts.1.gate_proj": 5.0,
        "0.mlp.experts.1.up_proj": 4.0,
        "0.mlp.experts.1.down_proj": 1.0,
        "0.mlp.experts.2.gate_proj": None,
        "0.mlp.experts.2.up_proj": None,
        "0.mlp.experts.2.down_proj": None,
        "1.mlp.experts.0.down_proj": 100.0,
    }
    ranges = settle_ranges(
        {n: None if size is None else Extremes(-1 / size, size) for n, size in seen.items()}
    )
    assert [ends.least for ends in ranges.extremes.values()] == [
        -1 / size for size in (2.0, 2.0, 7.0, 4.0, 4.0, 1.0, 2.0, 2.0, 1.0, 100.0)
    ]
    assert [ends.largest for ends in ranges.extremes.values()] == [
        3.0,
        3.0,
        7.0,
        5.0,
        5.0,
        1.0,
        5.0,
        5.0,
        7.0,
        100.0,
    ]
    assert ranges.borrowed == tuple(name for name, size in seen.items() if size is None)
    assert InputRanges.from_entries([json.loads(json.dumps(ranges.to_entry()))]) == ranges


def test_layers_that_nothing_reached_are_named():
    with pytest.raises(UnsupportedError, match="o_proj"):
        settle_ranges({"0.self_attn.q_proj": Extremes(-1.0, 1.0), "0.self_attn.o_proj": None})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scheme": "MXFP4", "act_dynamic": False}, "always measured"),
        ({"scheme": "NVFP4_E5M3", "act_dynamic": False, "format": "fake"}, "always measured"),
        ({"scheme": "FP8_STATIC", "act_group_size": -1}, "one for the whole tensor"),
        ({"scheme": "INT8_W8A8", "act_dynamic": False}, "one for the whole tensor"),
        ({"scheme": "INT8_W8A8", "act_dynamic": False, "act_group_size": 32}, "one for the whole tensor"),
        ({**INT8_STATIC, "act_sym": False, "format": "auto_round"}, "leave activations alone"),
        ({**INT8_STATIC, "dataset": []}, "row"),
        ({"scheme": "NVFP4", "act_group_size": 32}, "groups of 16"),
        ({"scheme": "NVFP4", "act_data_type": "nv_fp4"}, "nv_fp4_with_static_gs"),
        ({"scheme": "NVFP4", "act_sym": False}, "no zero points"),
        ({"scheme": "NVFP4", "format": "auto_gptq"}, "leave activations alone"),
        ({"scheme": "FP8_STATIC", "format": "gguf:q4_k_m"}, "gguf"),
        ({"scheme": "NVFP4", "data_type": "nv_fp4_with_static_gs"}, "not there yet"),
        ({"scheme": "FP8_STATIC", "dataset": []}, "row"),
    ],
)
def test_refusals_come_before_any_work(tiny, tmp_path, given, said):
    with pytest.raises(AutoRoundError, match=said):
        run(tiny("llama"), tmp_path / "out", **{**PLAIN, **given})
    assert not list(tmp_path.iterdir())


def test_the_type_of_weights_says_the_same_with_fixed_inputs(tiny, tmp_path):
    """`nv_fp` inputs that are not measured are those of the long name."""
    outs = [
        run(tiny("llama"), tmp_path / str(i), "NVFP4", verify=False, **PLAIN, **given)
        for i, given in enumerate(({}, {"act_data_type": "nv_fp4", "act_dynamic": False}))
    ]
    files = [(out.folders[0] / "model.safetensors").read_bytes() for out in outs]
    assert files[0] == files[1]


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen3_moe", EXPERTS)], ids=str)
def test_weights_without_data_share_the_same_numbers(tiny, tmp_path, family, changes):
    """Matrices that are read one by one are those of blocks that are rounded whole."""
    given = {**PLAIN, "act_bits": 16, "verify": False}
    results = [
        run(tiny(family, **changes), tmp_path / str(i), "NVFP4", dataset=data, **given)
        for i, data in enumerate((None, ROWS))
    ]
    files = [(result.folders[0] / "model.safetensors").read_bytes() for result in results]
    assert files[0] == files[1]
    stored = weights(results[0].folders[0])
    groups = joined_matrices(results[0].plan.quantized)
    for names in groups.values():
        assert len({float(stored[f"{name}.weight_global_scale"]) for name in names}) == 1
    if family == "qwen3_moe":  # each expert has a number of its own
        per_expert = {
            float(stored[f"{ns[0]}.weight_global_scale"]) for n, ns in groups.items() if "experts" in n
        }
        assert len(per_expert) > 2


@pytest.mark.parametrize("scheme", SCALES)
def test_blocks_in_float32_have_the_weights_that_readers_unpack(tiny, tmp_path, scheme):
    """A code times its step has more bits than the model's dtype, in which folders are multiplied."""
    pytest.importorskip(LIBRARY)
    result = run(
        tiny("llama"), tmp_path / "out", scheme, format="llm_compressor,auto_round,fake", amp=False, **PLAIN
    )
    assert max(kl_of(result).values()) < 1e-9
