import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import kvc
from kvc.__main__ import main
from kvc.core.build import build_model
from kvc.core.method import Method, class_path
from kvc.errors import UserError

IDS = torch.arange(5, 65).reshape(2, 30)


class Extra(Method):
    """A base model left frozen, one table and one buffer of its own."""

    def __init__(self, backbone: Any = None, seed: int = 1) -> None:
        super().__init__(seed=seed)
        self.table = torch.nn.Embedding(4, 3)
        self.register_buffer("scale", torch.tensor(2.0))


def run_folder(folder: Path, model: dict[str, Any]) -> Path:
    """A finished run of which every trained tensor differs from a freshly built one."""
    method = build_model(model)
    assert isinstance(method, Method)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    (folder / "checkpoints").mkdir(parents=True)
    origin = {"method": class_path(method), "base": method.base_identity().get("hash", ""), "data": "", "rng": [{}]}
    torch.save({"state_dict": method.trained_state(), "kvc": origin}, folder / "checkpoints" / "best.ckpt")
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 42, "model": model}))
    result = {
        "seed": 42,
        "data": {"hash": "d"},
        "metrics": {"exact_match": {"value": 0.873, "low": 0.851, "high": 0.894, "n": 600}},
        "arms": {"full_kv": {"exact_match": {"value": 0.9}}},
        "differences": {},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def language_model(backbone: dict[str, Any], train: str) -> dict[str, Any]:
    init = {"backbone": backbone, "train": train, "optim": {"lr": 0.01}, "seed": 42}
    return {"class_path": "kvc.methods.lm.LanguageModel", "init_args": init}


def assert_same(one: Any, other: Any) -> None:
    a, b = one.trained_state(), other.trained_state()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not one.training
    assert not other.training
    if hasattr(one, "backbone"):
        with torch.no_grad():
            assert torch.equal(one.backbone(IDS).logits, other.backbone(IDS).logits)


@pytest.fixture(scope="module")
def lora_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = {"pretrained": str(tiny_folder), "lora": {"r": 2, "targets": ["q_proj", "v_proj"]}}
    return run_folder(tmp_path_factory.mktemp("runs") / "lora", language_model(backbone, "lora"))


def test_lora_round_trip(lora_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    target = tmp_path / "out"
    assert main(["export", str(lora_run), str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "kvc.json")
    ]
    loaded = kvc.load(str(target))
    assert_same(kvc.load(str(lora_run)), loaded)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), target).eval()
    assert torch.equal(plain(IDS).logits, loaded.backbone(IDS).logits)
    card = (target / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "kvc"
    assert header["base_model"] == tiny_folder.name
    assert "| exact_match | 600 | 0.873 [0.851, 0.894] | 0.900 |" in card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_model_round_trip_into_a_folder_with_a_tokenizer(tmp_path: Path, tiny_folder: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    backbone = {"pretrained": str(tiny_folder), "from_config": True, "overrides": {"num_hidden_layers": 1}}
    run = run_folder(tmp_path / "run", language_model(backbone | {"dtype": dtype}, "all"))
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "config.json").write_text("{}")
    assert main(["export", str(run), str(target)]) == 2
    assert main(["export", str(run), str(target), "--overwrite"]) == 0
    assert (target / "notes.txt").read_text() == "mine"
    loaded = kvc.load(str(target))
    assert_same(kvc.load(str(run)), loaded)
    plain = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(plain(IDS).logits, loaded.backbone(IDS).logits)
    assert AutoTokenizer.from_pretrained(target)("12 + 3")["input_ids"] == loaded.tokenizer("12 + 3")["input_ids"]
    assert "local_files_only" not in (target / "tokenizer_config.json").read_text()
    assert not list(tmp_path.glob("**/*.tmp"))
    target.rename(tmp_path / "moved")
    assert_same(loaded, kvc.load(str(tmp_path / "moved")))


def test_other_tensors_and_files_of_an_earlier_export(lora_run: Path, tmp_path: Path) -> None:
    import sys

    model = {"class_path": class_path(Extra()), "init_args": {"seed": 3}}
    assert model["class_path"].split(".")[0] in sys.modules
    run = run_folder(tmp_path / "run", model)
    target = tmp_path / "out"
    assert main(["export", str(lora_run), str(target)]) == 0
    (target / "mine.safetensors").write_text("")
    assert main(["export", str(run), str(target), "--overwrite"]) == 0
    assert sorted(path.name for path in target.iterdir()) == [
        *("README.md", "kvc.json", "kvc.safetensors", "mine.safetensors")
    ]
    loaded = kvc.load(str(target))
    assert loaded.seed == 3
    assert {"table.weight", "scale"} == set(loaded.trained_state())
    assert_same(kvc.load(str(run)), loaded)


def test_refuses_what_does_not_fit(lora_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert main(["export", str(lora_run), str(target)]) == 0
    manifest = json.loads((target / "kvc.json").read_text())

    def load_with(**changes: Any) -> None:
        (target / "kvc.json").write_text(json.dumps(manifest | changes))
        kvc.load(str(target))

    with pytest.raises(UserError, match="another base model"):
        load_with(base_model={"hash": "0"})
    with pytest.raises(UserError, match="schema 2"):
        load_with(schema=2)
    with pytest.raises(UserError, match="Nothing"):
        load_with(model={"class_path": "kvc.methods.lm.Nothing"})
    changed = json.loads(json.dumps(manifest["model"]))
    changed["init_args"]["backbone"]["lora"]["r"] = 4
    with pytest.raises(UserError, match=r"has shape \[2, 32\], the method needs \[4, 32\]"):
        load_with(model=changed)
    (target / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a readable safetensors"):
        load_with()
    (target / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks"):
        load_with()
    (target / "kvc.json").write_text("{\n,")
    with pytest.raises(UserError, match="line 2"):
        kvc.load(str(target))


def test_bad_sources_and_targets(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for source, sentence in (("nowhere", "no folder"), (".", "neither"), ("owner/name", "HF_HUB_OFFLINE")):
        with pytest.raises(UserError, match=sentence):
            kvc.load(source)
    with pytest.raises(UserError, match="device"):
        kvc.load(str(lora_run), device="nonsense")
    with pytest.raises(UserError, match="lora"):
        build_model(language_model({"pretrained": "tiny"}, "lora"))
    (tmp_path / "file").write_text("")
    for target in (str(tmp_path / "file"), str(lora_run), "owner/name"):
        assert main(["export", str(lora_run), target]) == 2
        assert target in capsys.readouterr().err
    assert main(["export", str(lora_run), str(lora_run), "--overwrite"]) == 2
    assert main(["export", str(tmp_path / "no"), "out"]) == 2
    assert main(["export", str(lora_run), "out", "--private"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_push(lora_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    class Api:
        def repo_exists(self, name: str) -> bool:
            return "taken" in name

        def create_repo(self, name: str, **options: Any) -> str:
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> None:
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            if "broken" in repo_id:
                raise ConnectionError("https://secret")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main(["export", str(lora_run), "me/new", "--private"]) == 0
    assert calls[0] == ("me/new", {"private": True, "exist_ok": False})
    assert "kvc.json" in calls[1][1]
    assert main(["export", str(lora_run), "me/taken"]) == 2
    assert main(["export", str(lora_run), "me/broken"]) == 2
    assert "secret" not in "".join(capsys.readouterr())


@torch.no_grad()
def test_a_compressor_leaves_as_peft_and_comes_back(tiny_folder: Path, tmp_path: Path) -> None:
    """CCM: the LoRA is a plain PEFT folder, the memory tokens lie beside it, a session of both says the same."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from kvc.methods.ccm.session import Session

    backbone = {"pretrained": str(tiny_folder), "lora": {"r": 4}}
    init = {"backbone": backbone, "kind": "merge_recur", "slots": 3, "seed": 42}
    model = {"class_path": "kvc.methods.ccm.CompressedContextMemory", "init_args": init}
    run = run_folder(tmp_path / "run", model)
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    ours, back = kvc.load(str(run)), kvc.load(str(tmp_path / "out"))
    assert_same(ours, back)
    logits = []
    for method in (ours, back):
        session = Session.of(method)
        session.compress(["Tom has 3 apples. ", "Ann has 5. "])
        session.compress(["He eats one. ", ""])
        logits.append(torch.cat(session.logits(["How many? ", "Who? "])))
    assert torch.equal(*logits)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "out").eval()
    everywhere = ours.backbone(IDS, kvc_gate=torch.arange(IDS.numel())).logits
    torch.testing.assert_close(plain(IDS).logits, everywhere, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain(IDS).logits, ours.backbone(IDS).logits, atol=1e-2)
