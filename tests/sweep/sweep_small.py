"""A fit that is over at once."""

SMALL = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "deterministic": True,
    },
    "model": {
        "class_path": "kvc.methods.comp.CompClassifier",
        "init_args": {
            "backbone": {
                "pretrained": "tiny",
                "from_config": True,
                "overrides": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
            },
            "optim": {"lr": 0.01},
        },
    },
    "data": {
        "class_path": "kvc.data.comp.CompTraces",
        "init_args": {"counts": [8, 4, 4], "steps": [2, 3], "batch_size": 4},
    },
}
"""A fit of two steps on random weights."""
