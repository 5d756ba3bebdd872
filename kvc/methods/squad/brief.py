"""The names of the brief: its configuration class, its results and its files.

config = CompressionConfig(architecture="gist", target_length=64)
results = run_single_ablation(config)    # kvc.commands.ablations
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvc.core.files import digest
from kvc.core.seeds import DEFAULT_SEED
from kvc.errors import UserError

METHOD = "kvc.methods.squad.ContextCompressor"
ARCHITECTURES = {
    "cross_attention": "CrossAttention",
    "conv": "Convolution",
    "pooling": "WeightedPooling",
    "latent": "Latent",
    "mean_pool": "MeanPool",
    "anchor": "Anchors",
}
ALIASES = {"gist": "latent", "convolution": "conv"}
"""What the brief calls gist attends like `latent`; gist tokens proper are another method."""
SIZED = ("cross_attention", "conv", "pooling", "latent")
"""Architectures that are made for a number of slots."""
LOSSES = {"teacher_forcing": "TeacherForcing", "generation": "OnPolicyKd", "contrastive": "OffdiagMargin", "kd": "Kd"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _balanced() -> dict[str, float]:
    return {"teacher_forcing": 0.5, "generation": 0.3, "contrastive": 0.2}


@dataclass
class CompressionConfig:
    """One experiment.

    Attributes:
        architecture: `cross_attention`, `conv`, `pooling`, `gist` (the same as `latent`), `mean_pool` or `anchor`.
        target_length: Slots, M.
        loss_weights: Weight of each term: `teacher_forcing`, `generation`, `contrastive`, `kd`; 0 leaves it out.
        model: `tiny`, a folder or a Hub id.
        data: `synthetic:passages`, official JSON, or `hub:owner/name`.
        source: What is compressed: `embeddings`, as in the brief, `hidden:k` or `hidden:last`.
        train_samples: Questions for training; 0 takes all.
        val_samples: Questions to choose the checkpoint by.
        eval_samples: Questions of the test.
        epochs: Passes over the training questions.
        batch_size: Questions of a batch.
        gradient_accumulation: Batches of a step.
        learning_rate: Of the compressor.
        lora_learning_rate: Of the LoRA.
        warmup_ratio: Share of the steps.
        lora_rank: r; alpha is twice as much.
        max_new_tokens: Limit of an answer.
        output_dir: Where run folders lie.
        seed: Of everything.
    """

    architecture: str = "cross_attention"
    target_length: int = 64
    loss_weights: dict[str, float] = field(default_factory=_balanced)
    model: str = "tiny"
    data: str = "synthetic:passages"
    source: str = "embeddings"
    train_samples: int = 10000
    val_samples: int = 500
    eval_samples: int = 1000
    epochs: int = 10
    batch_size: int = 8
    gradient_accumulation: int = 4
    learning_rate: float = 1e-4
    lora_learning_rate: float = 5e-5
    warmup_ratio: float = 0.05
    lora_rank: int = 16
    max_new_tokens: int = 20
    output_dir: str = "runs/compression_ablations"
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        """Check names.

        Raises:
            UserError: If there is no such architecture or loss.
        """
        if self.architecture not in {*ARCHITECTURES, *ALIASES}:
            known = ", ".join([*ARCHITECTURES, *ALIASES])
            raise UserError(f"architecture: there is no {self.architecture!r}, only {known}")
        for name, weight in self.loss_weights.items():
            if name not in LOSSES:
                raise UserError(f"loss_weights: there is no {name!r}, only {', '.join(LOSSES)}")
            if weight < 0:
                raise UserError(f"loss_weights: the weight of {name} must not be negative, got {weight}")

    @property
    def kind(self) -> str:
        """The architecture by its own name."""
        return ALIASES.get(self.architecture, self.architecture)

    def as_config(self) -> dict[str, Any]:
        """The configuration of `python -m kvc fit`, without trainer settings of the machine."""
        compressor: dict[str, Any] = {"class_path": f"kvc.methods.squad.{ARCHITECTURES[self.kind]}"}
        if self.kind in SIZED:
            compressor["init_args"] = {"slots": self.target_length}
        losses = [
            {"class_path": f"kvc.methods.squad.losses.{LOSSES[name]}", "init_args": {"weight": weight}}
            for name, weight in self.loss_weights.items()
            if weight > 0
        ]
        return {
            "seed_everything": self.seed,
            "trainer": {
                "max_epochs": self.epochs,
                "accumulate_grad_batches": self.gradient_accumulation,
                "gradient_clip_val": 1.0,
            },
            "model": {
                "class_path": METHOD,
                "init_args": {
                    "backbone": {
                        "pretrained": self.model,
                        "lora": {"r": self.lora_rank, "alpha": 2 * self.lora_rank, "dropout": 0.1, "targets": TARGETS},
                    },
                    "compressor": compressor,
                    "budget": {
                        "class_path": "kvc.methods.squad.FixedSlots",
                        "init_args": {"slots": self.target_length},
                    },
                    "source": None if self.kind == "anchor" else {"states": self.source},
                    "losses": losses,
                    "max_new_tokens": self.max_new_tokens,
                    "optim": {
                        "lr": self.learning_rate,
                        "lrs": {"lora": self.lora_learning_rate},
                        "weight_decay": 0.01,
                        "warmup": self.warmup_ratio,
                    },
                },
            },
            "data": {
                "class_path": "kvc.data.squad.Squad",
                "init_args": {
                    "path": self.data,
                    "counts": [self.train_samples, self.val_samples, self.eval_samples],
                    "batch_size": self.batch_size,
                },
            },
        }


def run_name(config: Mapping[str, Any], seed: Any) -> str:
    """`M64_cross_attention_1f3a_s42`: slots (or `r4`, a ratio), architecture, a hash of all other settings, seed.

    Args:
        config: The `model` part of a configuration.
        seed: Of the run.
    """
    arguments = config.get("init_args") or {}
    mode = arguments.get("mode", "compress")
    if mode != "compress":
        return f"{mode}_s{seed}"
    budget = (arguments.get("budget") or {}).get("init_args") or {}
    size = f"M{budget['slots']}" if "slots" in budget else f"r{budget.get('ratio', 8.0):g}"
    path = (arguments.get("compressor") or {}).get("class_path", "MeanPool").rsplit(".", 1)[-1]
    kind = next((name for name, cls in ARCHITECTURES.items() if cls == path), path)
    # The losses, but also the source and whatever else tells two runs of one architecture apart.
    others = {
        key: value for key, value in arguments.items() if key not in {"budget", "compressor", "baselines", "seed"}
    }
    shape = {k: v for k, v in ((arguments.get("compressor") or {}).get("init_args") or {}).items() if k != "slots"}
    return f"{size}_{kind}_{digest([others, shape])[:4]}_s{seed}"


def results_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the brief promises of an experiment, from its `result.json`.

    Returns:
        `final_f1`, `final_em` and `best_f1` of the best checkpoint, which is the one that is evaluated; `baseline_f1`
        and `baseline_em` of the frozen model with the full text; `compression_ratio`, all tokens over all slots, and
        `nominal_ratio`; `baselines`, `params`, `ratios`, `timing` and all `metrics`.
    """
    metrics = {name: value["value"] for name, value in result["metrics"].items()}
    arms = {arm: {key: values[key]["value"] for key in ("f1", "em")} for arm, values in result["arms"].items()}
    full, sizes = arms.get("full", {}), result["sizes"]
    return {
        "final_f1": metrics["f1"],
        "final_em": metrics["em"],
        "best_f1": metrics["f1"],
        "baseline_f1": full.get("f1"),
        "baseline_em": full.get("em"),
        "compression_ratio": metrics.get("ratio"),
        "nominal_ratio": metrics.get("ratio_nominal"),
        "baselines": arms,
        "params": {"compressor": sizes.get("compressor_parameters"), "lora": sizes.get("lora_parameters")},
        "ratios": {name: value for name, value in metrics.items() if name.startswith(("ratio", "expanded"))},
        "timing": {**result["timing"], **{k: v for k, v in metrics.items() if k.endswith("_seconds")}},
        "metrics": metrics,
    }
