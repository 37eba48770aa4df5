"""Families of models that tests quantize, load again and compare (`tests/sweep`)."""

from __future__ import annotations

_NAMES = """
afmoe apertus apertus1p5_text arcee aria aria_text axk1 axk2 bailing_hybrid bamba biogpt bitnet bloom blt
codegen cohere cohere2 cohere2_moe cohere_compass_text cpmant ctrl cwm dbrx deepseek_v2 deepseek_v3
deepseek_v32 deepseek_v4 deepseek_vl diffllama doge dory dots1 dots3_note_text ernie4_5 ernie4_5_moe exaone
exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3 gemma3_text
gemma3n_text gemma4 gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe
glm_moe_dsa gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe
granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4
hyperclovax idefics3 inkling2_loop_text inkling2_text inkling_text internlm3 internvl iquestcoder jais2
jamba jetmoe kimi_k25 kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm2_vl lfm3 llama llama4
llama4_text llava llava_next llava_onevision longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3
minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mistral3 mixtral mllama
modernbert-decoder molmo2 mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt
paligemma persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_5_omni_thinker qwen2_5_vl qwen2_moe qwen2_vl
qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl
qwen3_vl_moe qwen4_exp_text recurrent_gemma rwkv sarvam_mla sarvam_moe seed_oss smollm3 smolvlm solar_open
stablelm starcoder2 vaultgemma xglm xlstm youtu zamba zamba2 zaya
"""

TRIED = frozenset(_NAMES.split())
"""`model_type` of each. No code asks for a family by its name: models of others log what was found in
them, and go on."""
