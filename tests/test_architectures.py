"""Causal models of many kinds, tiny and random: scored, continued and trained as transformers has
them, or refused in one line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import write_lines, write_model, write_tofu

import eval as evaluation
import simnpo
import train
from data.load import Example, collate
from data.support.models import load_pretrained

COMMON = dict(
    vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    initializer_range=0.3, bos_token_id=0, eos_token_id=1, pad_token_id=1)
EXPERTS = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GPT = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4)
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
KINDS = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": dict(sliding_window=8),
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": dict(head_dim=8),
    "PhiForCausalLM": {},  # a head with a bias
    "Phi3ForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "StableLmForCausalLM": {},
    "GPT2LMHeadModel": GPT,  # learned positions, a tied head
    "GPTJForCausalLM": GPT,
    "GPTNeoXForCausalLM": {},
    "OPTForCausalLM": dict(ffn_dim=48, word_embed_proj_dim=32),
    "BloomForCausalLM": dict(n_layer=2, n_head=4),  # ALiBi
    "MptForCausalLM": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=128),
    "FalconForCausalLM": dict(new_decoder_architecture=False, multi_query=True),
    "Gemma2ForCausalLM": GEMMA,  # soft-capped logits
    "Gemma3ForCausalLM": GEMMA,
    "CohereForCausalLM": dict(logit_scale=0.0625),
    "GraniteForCausalLM": dict(logits_scaling=2.0),
    "MixtralForCausalLM": EXPERTS,
    "Qwen3MoeForCausalLM": dict(head_dim=8, **EXPERTS),
    "GptOssForCausalLM": dict(head_dim=8, sliding_window=8, **EXPERTS),
    "DeepseekV3ForCausalLM": dict(
        EXPERTS, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, kv_lora_rank=8,
        q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4,
        first_k_dense_replace=1),
    "HYV4ForCausalLM": dict(  # its head stays in fp32
        EXPERTS, n_routed_experts=4, num_key_value_heads=4, head_dim=8, q_lora_rank=8,
        kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8, index_topk=64,
        index_head_dim=8, index_n_heads=2),
    "MambaForCausalLM": dict(state_size=8),
    "Mamba2ForCausalLM": dict(state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "FalconH1ForCausalLM": dict(MAMBA, mamba_d_ssm=64, head_dim=8),
    "BambaForCausalLM": dict(MAMBA, attn_layer_indices=[1]),
    "JambaForCausalLM": dict(
        EXPERTS, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    "Lfm2ForCausalLM": dict(layer_types=["conv", "full_attention"]),
}
REFUSED = {
    "BertLMHeadModel": ({}, "is not a causal"),
    "RecurrentGemmaForCausalLM": (  # a soft cap by another name
        dict(lru_width=32, head_dim=8, attention_window_size=8,
             block_types=["recurrent", "attention"]), "head_logits does not know how"),
    "RwkvForCausalLM": (  # its state takes padding for text
        dict(attention_hidden_size=32, context_length=128), "cannot be trusted"),
    "Qwen3NextForCausalLM": (  # without a layer of full attention: generate raises
        dict(head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
             linear_value_head_dim=8, **EXPERTS), "cannot be trusted"),
    "Llama4ForCausalLM": (  # get_decoder is the whole model
        dict(head_dim=8, intermediate_size_mlp=48, **EXPERTS), "cannot be used"),
}


def write_kind(folder, kind, changes):
    """A model folder of this kind, with conftest's tokenizer of bytes."""
    model_class = getattr(transformers, kind)
    write_model(folder)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**COMMON, **changes}))
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 2  # some texts end early
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return write_kind(tmp_path_factory.mktemp("model"), request.param, KINDS[request.param])


def own(folder, dtype=torch.float32):
    """The model as transformers alone opens it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def loaded(folder, dtype):
    return evaluation.load(folder, SimpleNamespace(dtype=dtype, device=torch.device("cpu")))


def examples():
    torch.manual_seed(1)
    return [Example(torch.randint(2, 250, (length,)).tolist(), start)
            for length, start in ((9, 3), (30, 29), (14, 1), (17, 8), (50, 20))]


def own_logps(model, example):
    """Log-probability of each answer token, from the model's own logits of this text alone."""
    ids = torch.tensor([example.input_ids])
    logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[example.start - 1:, 0]


def test_nll_is_the_models_own_loss(folder):
    model, whole = loaded(folder, "fp32")[0], own(folder)
    for e, (logps, *_) in zip(examples(), evaluation.score_answers(model, examples(), 60)):
        labels = [-100] * e.start + e.input_ids[e.start:]
        loss = whole(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([labels])).loss
        assert -logps.mean().item() == pytest.approx(loss.item(), abs=1e-5)


@torch.no_grad()
def test_bf16_logps_are_those_of_its_bf16_logits(folder):
    model, whole = loaded(folder, "bf16")[0], own(folder, torch.bfloat16)
    for e, (logps, *_) in zip(examples(), evaluation.score_answers(model, examples(), 1)):
        assert (logps - own_logps(whole, e)).abs().max() < 0.02


def test_greedy_texts_in_a_batch_are_those_one_at_a_time(folder):
    (model, tokenizer), whole = loaded(folder, "fp32"), own(folder)
    torch.manual_seed(2)
    prompts = [torch.randint(2, 250, (n,)).tolist() for n in (5, 20, 6, 6, 30, 7, 1, 31)]
    wanted = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        new = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20,
                             do_sample=False, pad_token_id=1)[0, len(prompt):].tolist()
        wanted.append(new[:new.index(1)] if 1 in new else new)
    assert evaluation.generate(model, prompts, tokenizer, 20, 8) == wanted
    assert any(wanted)


def test_training_has_the_values_and_gradients_of_full_logits(folder):
    model, whole = load_pretrained(folder)[0], own(folder)
    simnpo.check_head(model)
    logps = train.AnswerModel(model).eval()(*collate(examples()))  # without dropout
    wanted = torch.cat([own_logps(whole, e) for e in examples()])
    assert torch.allclose(logps, wanted, atol=1e-5)
    logps.mean().backward()
    wanted.mean().backward()
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, p in model.named_parameters():
        if name in gradients:
            assert (p.grad - gradients[name]).abs().max() < 1e-5 * largest, name
        else:
            assert p.grad is None or not p.grad.any()


def test_a_head_kept_in_fp32(tmp_path):
    model, _ = loaded(write_kind(tmp_path, "HYV4ForCausalLM", KINDS["HYV4ForCausalLM"]), "bf16")
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind, tmp_path, capsys):
    changes, what = REFUSED[kind]
    model = write_kind(tmp_path / "model", kind, changes)
    assert evaluation.main([model, "--forget", write_tofu(tmp_path / "tofu", n=2)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {model}: ") and what in err
    assert out == "" and err.count("\n") == 1 and not Path(model, "eval.json").exists()


@pytest.mark.parametrize("kind", ["BertLMHeadModel", "RecurrentGemmaForCausalLM",
                                  "Llama4ForCausalLM"])
def test_training_refuses_in_one_line(kind, tmp_path, capsys):
    changes, what = REFUSED[kind]
    model = write_kind(tmp_path / "model", kind, changes)
    write_lines(tmp_path / "few.jsonl", [{"question": "Where?", "answer": "Here."}])
    flags = ["--retain", str(tmp_path / "few.jsonl"), "--output", str(tmp_path / "new")]
    assert train.main(["--model", model, *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_whatever_a_model_raises_is_one_line(tmp_path, capsys):
    """A config that transformers builds and whose forward pass then fails."""
    model = write_model(tmp_path / "model")
    config = json.loads(Path(model, "config.json").read_text())
    Path(model, "config.json").write_text(json.dumps({**config, "hidden_act": "no such thing"}))
    assert evaluation.main([model, "--forget", write_tofu(tmp_path / "tofu", n=2)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {model}: ") and err.count("\n") == 1
