"""A .gguf is read by llama.cpp itself as our model computes: the same ids for hard texts, the same probabilities."""

import json
import urllib.request

import gguf
import pytest
import torch
import xllamacpp
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import load_tokenizer
from minimind_train.weights.exporting import export
from minimind_train.weights.gguf_form import write_gguf
from minimind_train.weights.loading import open_model
from tests.helpers.runs import Said, run_maker

BRISK = {"learning_rate": 0.05, "steps": 6, "save_every": 0, "hidden_size": 32, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 2}  # fmt: skip
KINDS = {
    "qwen3": {},
    "qwen3-untied": {"tie_word_embeddings": False, "head_dim": 16},
    "llama": {"qk_norm": False, "rms_norm_eps": 1e-5, "rope_theta": 5000.0},
    "qwen3moe": {"use_moe": True, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
HARD = [
    "plain words",
    "  two spaces,   three,\ttabs\n\nand lines \r\n",
    "It's, we'll, THEY'RE, don't; 'twas",
    "12345 3.14159 1e-9 ½ ² ٣٤ 四百",
    "今天天气很好，我们去公园。「引号」……——",
    "日本語のテキスト、한국어 텍스트, ไทย, العربية, עברית",
    "emoji 👩‍👩‍👧‍👦 🇨🇳 👍🏽 \u200b zero width \ufeff",
    "e\u0301 combining \u1e69 \ufb01 ligature",
    "\x00\x01\x7f control \x85 \xa0 no-break \u3000 wide",
    "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|> <|im_end|>x<|endoftext|> <|im_start",
    '<think>\n\n</think> <tool_call>{"name": "f"}</tool_call>',
    "ſ K Å ß ẞ İ ı Ǆ",
    "a" * 300 + " " * 40 + "\n" * 20,
    "def f(x):\n    return {**x, 'k': [1, 2]}  # ok\n",
    "𝕌𝕟𝕚𝕔𝕠𝕕𝕖 \U0010ffff \U000e0001 𠀀",
]  # fmt: skip


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """A run of some brisk steps on text with the tokenizer that ships; the same options, the same run."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in HARD * 8))
    tokenize([folder / "text.jsonl"], TokenizeOptions(out=folder / "data"))
    return run_maker(tmp_path_factory, folder / "data", **BRISK)


class LlamaCpp:
    """llama.cpp with a model, behind a port of this machine that the system picks."""

    def __init__(self, path):
        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.hostnames, options.port = ["127.0.0.1"], 0
        options.n_ctx, options.n_parallel, options.n_gpu_layers = 512, 1, 0
        options.cpuparams.n_threads, options.warmup, options.verbosity = 1, False, -1
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(options)

    def ask(self, path, **content):
        request = urllib.request.Request(  # noqa: S310 - on this machine
            self.server.listening_address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            return json.load(answer)

    def ids(self, text):
        return self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def log_probabilities(self, ids):
        """The 40 most likely next tokens: their log-probabilities by id; nothing where the likeliest is EOS, which it does not say."""
        answer = self.ask(
            "/completion", prompt=ids, n_predict=1, n_probs=40, temperature=0, cache_prompt=False
        )
        (first, *_) = answer.get("completion_probabilities", [{"top_logprobs": []}])
        return {each["id"]: each["logprob"] for each in first["top_logprobs"]}


def worst_difference(llama, run):
    trained = open_model(run, step=None, say=Said())
    model, differences = trained.model, []
    for text in HARD:
        ids = trained.tokenizer.reference.encode(text, add_special_tokens=False).ids
        assert llama.ids(text) == ids, text
        with torch.no_grad():
            ours = model.logits(model(torch.tensor([ids])))[0, -1].float().log_softmax(-1)
        theirs = llama.log_probabilities(ids)
        differences += [abs(ours[number].item() - value) for number, value in theirs.items()]
    assert len(differences) >= 40 * len(HARD) // 2
    return max(differences)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(make_run, tmp_path, kind):
    run = make_run(**KINDS[kind])
    path = export(run, tmp_path, to="gguf", dtype="fp32", say=Said())
    assert path == tmp_path / "run-fp32.gguf"
    assert worst_difference(LlamaCpp(path), run) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "limit"), [("fp16", 0.01), ("bf16", 0.1), ("q8_0", 0.1)])
def test_smaller_dtypes_are_near(make_run, tmp_path, dtype, limit):
    run = make_run()
    said = Said()
    path = export(run, tmp_path / "model.gguf", to="gguf", dtype=dtype, say=said)
    assert path == tmp_path / "model.gguf"
    assert f"in {dtype}, with its tokenizer and chat template" in said.text
    sizes = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert sizes["blk.0.attn_q.weight"] == {"fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert sizes["blk.0.attn_norm.weight"] == "F32"
    assert worst_difference(LlamaCpp(path), run) < limit


def test_the_chat_template_answers_in_llama_cpp(make_run, tmp_path):
    llama = LlamaCpp(export(make_run(), tmp_path, to="gguf", say=Said()))
    prompt = llama.ask("/apply-template", messages=[{"role": "user", "content": "你好"}])["prompt"]
    assert prompt == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_rows_that_q8_0_cannot_hold_are_fp16(make_run, tmp_path):
    run = make_run(hidden_size=48)
    said = Said()
    path = export(run, tmp_path, to="gguf", dtype="q8_0", say=said)
    assert "in fp16: q8_0 needs rows that are a multiple of 32 numbers" in said[0]
    assert worst_difference(LlamaCpp(path), run) < 0.1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"inference_rope_scaling": True, "max_position_embeddings": 4096}, "inference_rope_scaling"),
        ({**KINDS["qwen3moe"], "norm_topk_prob": False}, "norm_topk_prob off"),
        ({**KINDS["qwen3moe"], "n_shared_experts": 1}, "shared experts"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(make_run, tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint):
        export(make_run(**options), tmp_path / "out", to="gguf", say=Said())
    assert not list(tmp_path.rglob("*.gguf"))


def other_tokenizers():
    def shipped():
        return Tokenizer.from_str(load_tokenizer(None).json)

    one = shipped()
    one.normalizer = normalizers.NFC()
    yield "its normalizer (NFC)", one
    for pre_tokenizer in (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel()]),
    ):
        one = shipped()
        one.pre_tokenizer = pre_tokenizer
        yield "is not that of GPT-2", one
    one = shipped()
    one.add_tokens([AddedToken("<x>", lstrip=True)])
    yield "lstrip of the token '<x>'", one
    one = Tokenizer.from_str(load_tokenizer(None).json)
    one.model.dropout = 0.5
    yield "dropout 0.5", one
    yield "a model of the type WordLevel", Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


@pytest.mark.parametrize(("complaint", "tokenizer"), list(other_tokenizers()))
def test_a_tokenizer_that_llama_cpp_cannot_follow_is_refused(make_run, tmp_path, complaint, tokenizer):
    trained = open_model(make_run(), step=None, say=Said())
    with pytest.raises(UserError, match=complaint.replace("(", r"\(").replace(")", r"\)")):
        write_gguf(
            tmp_path / "it.gguf",
            trained.model.state_dict(),
            config=trained.model.config,
            architecture="Qwen3ForCausalLM",
            tokenizer_json=tokenizer.to_str(),
            info=trained.tokenizer.info,
            chat_template=None,
            name="it",
            dtype="fp32",
        )


def test_q8_0_is_for_gguf_alone(make_run, tmp_path):
    for to in ("hf", "minimind"):
        with pytest.raises(UserError, match="q8_0"):
            export(make_run(), tmp_path / "out", to=to, dtype="q8_0", say=Said())
