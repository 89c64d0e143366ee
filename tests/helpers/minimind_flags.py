"""The flags of MiniMind's scripts."""

TRAINING = [
    "save_dir",
    "epochs",
    "batch_size",
    "learning_rate",
    "device",
    "dtype",
    "num_workers",
    "accumulation_steps",
    "grad_clip",
    "log_interval",
    "save_interval",
    "hidden_size",
    "num_hidden_layers",
    "max_seq_len",
    "use_moe",
    "data_path",
    "from_weight",
    "from_resume",
    "use_wandb",
    "wandb_project",
    "use_compile",
]
THEIRS = {
    "trainer/train_pretrain.py": [*TRAINING, "save_weight"],
    "trainer/train_full_sft.py": [],
    "trainer/train_lora.py": ["lora_name"],
    "trainer/train_dpo.py": ["beta"],
    "eval_llm.py": [
        "load_from",
        "save_dir",
        "weight",
        "lora_weight",
        "hidden_size",
        "num_hidden_layers",
        "use_moe",
        "inference_rope_scaling",
        "max_new_tokens",
        "temperature",
        "top_p",
        "open_thinking",
        "historys",
        "show_speed",
        "device",
    ],
    "scripts/convert_model.py": [],
}
"""The flags of each script; those of training that are the same everywhere stand at pre-training."""

DEFAULTS = {
    "pretrain": {
        "max_seq_len": 340,
        "epochs": 2,
        "batch_size": 32,
        "accumulation_steps": 8,
        "learning_rate": 5e-4,
        "log_interval": 100,
        "save_interval": 1000,
    },
    "sft": {
        "max_seq_len": 768,
        "epochs": 2,
        "batch_size": 16,
        "accumulation_steps": 1,
        "learning_rate": 1e-5,
        "log_interval": 100,
        "save_interval": 1000,
    },
    "lora": {
        "max_seq_len": 340,
        "epochs": 10,
        "batch_size": 32,
        "accumulation_steps": 1,
        "learning_rate": 1e-4,
        "log_interval": 10,
        "save_interval": 1000,
    },
    "dpo": {
        "max_seq_len": 1024,
        "epochs": 1,
        "batch_size": 4,
        "accumulation_steps": 1,
        "learning_rate": 4e-8,
        "log_interval": 100,
        "save_interval": 100,
    },
}
"""What the training scripts do where no flag says otherwise."""
GENERATION_DEFAULTS = {"max_new_tokens": 8192, "temperature": 0.85, "top_p": 0.95}
"""The same of eval_llm.py."""
