"""The resume policy of every option, as its annotation says it: a change of this table is a change of what a resume does."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from minimind_data.options import flatten
from minimind_train.resume_policy import Before, Policy, Resume, names_of, policies
from minimind_train.run.options import PHASE_OPTIONS, changeable

POLICIES = {
    Resume.ALLOWED: """
        layout long_documents document_mask seq_len order shuffle_block
        max_position_embeddings rms_norm_eps rope_theta num_experts_per_tok scoring_func norm_topk_prob router_aux_loss_coef seq_aux
        inference_rope_scaling yarn_factor yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_attention_factor
        optimizer learning_rate warmup_steps weight_decay beta1 beta2 eps muon_momentum grad_clip
        global_batch seed dtype tf32""",
    Resume.FREE: """
        shards device nproc parallel compile activation_checkpointing threads save_every keep keep_every save_best max_hours
        on_nonfinite track track_project sample_every sample_prompt sample_tokens log_every val_shards val_every val_batches""",
    Resume.UNLESS_BALANCED: "micro_batch",
    Resume.TRAINING: "dropout",
    Resume.END: "epochs steps",
    Resume.SHAPE: """
        lora_rank lora_alpha lora_targets
        hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size
        tie_word_embeddings qk_norm use_moe num_experts n_shared_experts moe_intermediate_size""",
    Resume.ORIGIN: "from_weight from_step",
    Resume.ACTION: "resume_from skip_positions",
    Resume.DERIVED: "from_sha256 mixture_stages",
    Resume.UNRECORDED: "run",
}
OF_DPO = {"beta", "loss_type", "label_smoothing", "length_normalised", "reference"}
NOT_AS_BY_DEFAULT = {"document_mask": False, "tf32": False, "from_weight": None}
"""What runs did before there was the option, where that is not what its default does."""


@pytest.mark.parametrize("command", ["pretrain", "sft", "dpo"])
def test_every_option_has_the_policy_that_it_always_had(command):
    kind = PHASE_OPTIONS[command]
    expected = {name: resume for resume, names in POLICIES.items() for name in names.split()}
    expected |= dict.fromkeys(OF_DPO, Resume.ALLOWED) if command == "dpo" else {}
    table = policies(kind)
    assert {name: policy.resume for name, policy in table.items()} == expected
    assert list(table) == list(flatten(kind()))
    defaults = flatten(kind()) | NOT_AS_BY_DEFAULT
    assert {name: policy.before for name, policy in table.items()} == defaults
    asked = {Resume.ALLOWED, Resume.UNLESS_BALANCED, Resume.TRAINING, Resume.END}
    assert changeable(kind) == {"dataset", "tokenizer"} | {
        name for name in expected if expected[name] in asked
    }


def test_an_option_of_which_nothing_is_said_needs_allow_change_and_was_as_its_default():
    @dataclass(frozen=True, kw_only=True)
    class Inner:
        written: Annotated[int, "Help.", Resume.FREE, Before(1)] = 2
        derived: int = field(default=3, metadata={"flag": False})

    @dataclass(frozen=True, kw_only=True)
    class Outer:
        plain: int | None = None
        inner: Inner = field(default_factory=lambda: Inner(written=4, derived=5))

    assert policies(Outer) == {
        "plain": Policy(Resume.ALLOWED, None),
        "written": Policy(Resume.FREE, 1),
        "derived": Policy(Resume.ALLOWED, 5),
    }
    assert names_of(Outer, Resume.FREE, Resume.SHAPE) == {"written"}
