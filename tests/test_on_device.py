"""On-device adaptation: labels, TENT and forward-only methods, each device independent of the others."""

import csv
import json
import shutil
from pathlib import Path

import cma
import numpy as np
import pytest
import torch

from cdc_mmpg.controls import on_device, prompts
from cdc_mmpg.controls.forward_only import PROMPT_TOKENS, Statistics, measure_activations, search_prompts
from cdc_mmpg.controls.on_device import Comparison, adapt_by_entropy, find_layer_norms, pad_rows, pick_recipes
from cdc_mmpg.data.batch import VideoTextBatch
from cdc_mmpg.data.interface import LabelsDevices, SampleOrigin
from cdc_mmpg.evaluation.evaluate import evaluate_outcomes
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import OpenEnded
from cdc_mmpg.training.cli import main as train
from data_modules.synthetic import Synthetic

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small fine-tuning run on the synthetic dataset; return its folder."""
    out = tmp_path_factory.mktemp("on_device") / "synthetic"
    folder = out / "fine_tuning" / "seed0"
    command = [
        "fit", "--config=experiments/methods/fine_tuning.yaml", "--config=experiments/datasets/synthetic.yaml",
        f"--trainer.default_root_dir={folder}", f"--data.init_args.root={synthetic}",
        f"--data.init_args.cache_dir={out / 'data'}", f"--data.init_args.vocab={synthetic / 'vocab.txt'}",
        "--data.init_args.batch_size=8", "--model.init_args.encoder.depth=1", "--trainer.max_epochs=2",
        "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
    ]  # fmt: skip
    assert train(command) == 0
    return folder


@pytest.fixture(scope="module")
def evaluated(run: Path) -> Path:
    """Evaluate on-device adaptation of the run; return the folder of its results."""
    assert on_device.main([str(run)]) == 0
    return run.parents[1] / "on_device" / "seed0"


def read_results(folder: Path) -> dict[str, object]:
    return json.loads((folder / "results.json").read_text())


def test_results_have_the_keys_of_a_run(run, evaluated):
    before, results = read_results(run), read_results(evaluated)
    assert {"dataset", "method", "seed", "task", "protocol", "splits", "metrics", "classes", "questions", "data",
            "accuracy", "floors", "parameters", "bytes", "seconds", "machine", "finished", "arguments", "commit",
            "versions", "recipe"} <= results.keys()  # fmt: skip
    assert (results["dataset"], results["method"], results["seed"]) == ("synthetic", "on_device", 0)
    for key in ("task", "protocol", "splits", "questions", "data", "floors", "classes"):
        assert results[key] == before[key]
    assert results["bytes"] == {"up": 0, "down": 0}
    assert list(results["accuracy"]) == [
        "own",
        "labels_2",
        "labels_5",
        "labels_15",
        "tent",
        "t3a",
        "lame",
        "foa",
    ]
    assert results["parameters"]["device"] == before["parameters"]["device"]


def test_the_unadapted_case_equals_the_run(run, evaluated):
    assert read_results(evaluated)["accuracy"]["own"] == read_results(run)["accuracy"]["own"]
    assert read_results(evaluated)["metrics"]["test/accuracy"] == pytest.approx(
        read_results(run)["metrics"]["test/accuracy"]
    )


def test_cases_with_labels_count_only_devices_that_have_labels(evaluated):
    accuracy = read_results(evaluated)["accuracy"]
    for number in (2, 5, 15):
        cells = accuracy[f"labels_{number}"]
        assert set(cells) == {"test", "unseen"}
        assert cells["test"]["all"]["questions"] == accuracy["own"]["unseen"]["all"]["questions"]
    assert set(accuracy["tent"]) == {"test", "seen", "unseen"}
    rows = list(csv.DictReader((evaluated / "predictions.test.csv").open()))
    assert len(rows) == accuracy["own"]["test"]["all"]["questions"]
    for row in rows:
        assert (row["labels_15"] == "") == (row["group"] == "seen")
        assert row["own"]
        assert row["tent"]
    right = np.mean([row["labels_15"] == row["answer"] for row in rows if row["group"] == "unseen"])
    assert right == pytest.approx(accuracy["labels_15"]["unseen"]["all"]["value"])


def test_the_recipe_records_the_picked_settings_and_the_grid(evaluated):
    recipe = read_results(evaluated)["recipe"]
    for number in (2, 5, 15):
        picked = recipe[f"labels_{number}"]
        assert len(picked["grid"]) == len(on_device.PARTS) * len(on_device.LABEL_LEARNING_RATES) * len(on_device.STEPS)
        assert any(all(picked[key] == point[key] for key in ("parts", "rate", "steps")) for point in picked["grid"])
        assert picked["picked_on"] == 2 * (18 - 15)  # two unseen devices with six clips of three questions
    best = max(recipe["tent"]["grid"], key=lambda point: point["accuracy"])
    assert recipe["tent"]["rate"] == best["rate"]
    for case, settings in on_device.FORWARD_ONLY.items():
        assert [point["setting"] for point in recipe[case]["grid"]] == list(settings)
        best = max(recipe[case]["grid"], key=lambda point: point["accuracy"])
        assert recipe[case]["setting"] == best["setting"]


def test_prompts_are_searched_for_every_device(run):
    assert prompts.main([str(run)]) == 0
    results, before = read_results(run.parents[1] / "prompts" / "seed0"), read_results(run)
    assert list(results["accuracy"]) == ["foa_prompts"]
    assert results["accuracy"]["foa_prompts"]["test"]["all"]["questions"] == before["questions"]["test"]
    assert results["parameters"]["trained"] == 3 * 192
    recipe = results["recipe"]["foa_prompts"]
    assert [point["setting"] for point in recipe["grid"]] == list(prompts.DISTANCE_WEIGHTS)
    assert recipe["setting"] == max(recipe["grid"], key=lambda point: point["accuracy"])["setting"]


def test_a_second_evaluation_does_nothing_unless_the_run_changed(run, evaluated, tmp_path, capsys):
    copy = tmp_path / "synthetic"
    shutil.copytree(run.parents[1], copy)
    copied_run, before = copy / "fine_tuning" / "seed0", (evaluated / "results.json").read_bytes()
    capsys.readouterr()
    assert on_device.main([str(copied_run)]) == 0
    assert "finished on" in capsys.readouterr().out
    assert (copy / "on_device" / "seed0" / "results.json").read_bytes() == before
    content = torch.load(copied_run / "best.ckpt", weights_only=False)
    content["state_dict"]["layer.bias"] += 1
    torch.save(content, copied_run / "best.ckpt")
    assert on_device.main([str(copied_run)]) == 0
    assert "written" in capsys.readouterr().out
    assert (
        json.loads((copy / "on_device" / "seed0" / "results.json").read_text())["made_of"]
        != read_results(evaluated)["made_of"]
    )


def test_other_runs_than_fine_tuning_are_refused(run, fit, tmp_path, capsys):
    assert on_device.main([str(tmp_path)]) == 4
    assert "not a finished run" in capsys.readouterr().err
    assert train(fit("linear")) == 0
    assert on_device.main([str(tmp_path / "msvd" / "linear" / "seed0")]) == 2
    assert "not a fine-tuning run" in capsys.readouterr().err
    assert train(fit("fine_tuning")) == 0
    assert on_device.main([str(tmp_path / "msvd" / "fine_tuning" / "seed0")]) == 2
    assert "methods on the device need devices: define domains" in capsys.readouterr().err
    damaged = tmp_path / "damaged" / "fine_tuning" / "seed0"
    shutil.copytree(run, damaged)
    (damaged / "best.ckpt").write_bytes(b"cut short")
    assert on_device.main([str(damaged)]) == 4
    (damaged / "config.yaml").write_text("model: 1\n")
    assert on_device.main([str(damaged)]) == 2
    capsys.readouterr()
    other = tmp_path / "other" / "fine_tuning" / "seed0"
    shutil.copytree(run, other)
    inputs = json.loads((other / "inputs.json").read_text())
    (other / "inputs.json").write_text(json.dumps(dict.fromkeys(inputs, "another")))
    assert on_device.main([str(other)]) == 3
    assert "annotations changed" in capsys.readouterr().err


def build_model(classes: int = 3) -> FineTuning:
    torch.manual_seed(0)
    encoder = AllInOne(image_size=32, depth=1, vocab_size=50, dropout=0.0, drop_path=0.0)
    return FineTuning(encoder, OpenEnded(classes)).eval()


class NoData:
    seed = 0


def test_each_device_learns_its_own_labels_independently():
    comparison = Comparison(build_model(), NoData())
    features = torch.randn(6, 3, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = comparison.model(features).argmax(-1)
    labels = (before + 1) % 3
    chosen = torch.tensor([[0, 1, 2], [3, 4, -1]])
    weights = comparison.fine_tune(features, labels, chosen, "head", 1e-2, [1, 60])
    answers = comparison.score(weights[-1], features, chosen).argmax(-1)
    assert answers[chosen >= 0].tolist() == labels[:5].tolist()
    assert torch.equal(comparison.model(features).argmax(-1), before)  # the model itself is unchanged
    for row, name in ((0, "layer.weight"), (1, "head.phi.0.weight")):  # training both at once equals training one
        single = comparison.fine_tune(features, labels, chosen[row : row + 1], "head", 1e-2, [1, 60])
        assert torch.allclose(single[-1][name][0], weights[-1][name][row], atol=1e-3)  # 60 steps of 1e-2
    assert set(weights[0]) == {
        name for name, _ in build_model().named_parameters() if name.startswith(("head.", "layer."))
    }


def test_no_device_picks_its_own_recipe():
    figures = np.array([[9, 0, 0], [0, 3, 3], [0, 3, 2]])
    assert pick_recipes(figures).tolist() == [1, 0, 0]


def draw_batches() -> list[VideoTextBatch]:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for start in (0, 4):
        frames = torch.randint(256, (4, 3, 32, 32, 3), generator=generator, dtype=torch.uint8)
        ids = torch.randint(5, 50, (4, 6), generator=generator)
        batches.append(
            VideoTextBatch(frames, ids, torch.ones_like(ids), torch.zeros(4), torch.arange(start, start + 4))
        )
    return batches


def test_tent_updates_only_layer_norms_and_restores_them(monkeypatch):
    method = build_model().requires_grad_(False)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    norms = set(find_layer_norms(method))
    assert "head.phi.1.weight" in norms
    assert "encoder.text_embeddings.LayerNorm.bias" in norms
    moved: list[set[str]] = []
    forward = FineTuning.forward

    def spy(self, features):
        moved.append({name for name, value in method.state_dict().items() if not torch.equal(value, before[name])})
        return forward(self, features)

    monkeypatch.setattr(FineTuning, "forward", spy)
    first = adapt_by_entropy(method, draw_batches(), 0.05)
    assert moved[0] == set()
    assert moved[1]
    assert moved[1] <= norms
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert torch.equal(adapt_by_entropy(method, draw_batches(), 0.05), first)  # no trace of the previous device
    with torch.no_grad():
        unadapted = method(method.encode(draw_batches()[0]).frame_features)
    assert torch.equal(first[:4], unadapted)  # the first batch is answered before the first step


def test_prompts_of_one_batch_are_encoded_independently():
    method, (batch, _) = build_model(), draw_batches()
    prompts = torch.randn(5, PROMPT_TOKENS, 192, generator=torch.Generator().manual_seed(3))
    together, fused = measure_activations(method.encoder, batch, prompts)
    for number in range(5):
        single, single_fused = measure_activations(method.encoder, batch, prompts[number : number + 1])
        assert torch.allclose(fused[number], single_fused[0], atol=1e-5)
        for part, expected in zip(together, single, strict=True):
            assert torch.allclose(part[number], expected[0], atol=1e-4)
    assert not torch.allclose(fused[0], fused[1], atol=1e-2)
    _, plain = measure_activations(method.encoder, batch, prompts[:1, :0])  # without prompts
    with torch.no_grad():
        assert torch.allclose(plain[0], method.fuse(method.encode(batch).frame_features), atol=1e-5)


def test_a_batch_is_answered_with_the_prompt_of_least_loss():
    method, batches = build_model(), draw_batches()
    source = Statistics(
        *(part[0] for part in measure_activations(method.encoder, batches[0], torch.zeros(1, 0, 192))[0])
    )
    with torch.no_grad():
        scores = search_prompts(method, batches[:1], source, 0.5, seed=0)
        search = cma.CMAEvolutionStrategy(PROMPT_TOKENS * 192 * [0.0], 1.0, {"popsize": 28, "seed": 1, "verbose": -9})
        losses, answers = [], []
        for candidate in search.ask():
            prompts = torch.tensor(candidate).float().view(1, PROMPT_TOKENS, 192)
            activations, fused = measure_activations(method.encoder, batches[0], prompts)
            answers.append(method.head(fused[0], method.layer))
            probabilities = answers[-1].softmax(-1)
            entropy = -(probabilities * probabilities.log()).sum(-1).mean()
            distance = sum((a[0] - b).norm(dim=-1).sum() for a, b in zip(activations, source, strict=True))
            losses.append(entropy + 0.5 * distance)
        assert torch.allclose(scores, answers[int(torch.stack(losses).argmin())], atol=1e-4)
        # Answers to the first batch do not depend on later batches.
        assert torch.equal(search_prompts(method, batches, source, 0.5, seed=0)[:4], scores)


def test_tent_lowers_the_entropy_of_answers(monkeypatch):
    method, entropies = build_model().requires_grad_(False), []
    forward = FineTuning.forward

    def spy(self, features):
        scores = forward(self, features)
        entropies.append(float(-(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1).mean().detach()))
        return scores

    monkeypatch.setattr(FineTuning, "forward", spy)
    adapt_by_entropy(method, [draw_batches()[0]] * 6, 1e-2)
    assert entropies[-1] < entropies[0]


def test_labels_come_from_the_history_of_unseen_devices(synthetic, tmp_path):
    data = Synthetic(str(synthetic), str(tmp_path), 17, image_size=64, resize=64, num_workers=0,
                     vocab=str(synthetic / "vocab.txt"))  # fmt: skip
    assert isinstance(data, LabelsDevices)
    data.prepare_data()
    data.setup("test")
    questions, origins = data.device_labels()
    assert len(questions) == len(origins) == 2 * 6 * 3
    assert {origin.group for origin in origins} == {"unseen"}
    assert not {origin.clip for origin in origins} & {origin.clip for origin in data.origins("test")}
    words = data.answers()
    assert [words[label] for label in questions.labels.tolist()] == [origin.answer for origin in origins]


class FourQuestions:
    """Four questions of two devices, with the interface that `evaluate_outcomes` needs."""

    task = "open_ended"

    def origins(self, split: str) -> list[SampleOrigin]:
        places = [("a", "p", "seen"), ("b", "q", "unseen"), ("c", "q", "unseen"), ("d", "p", "seen")]
        return [SampleOrigin(clip, device, group, "", "what?", "yes") for clip, device, group in places]

    def labels(self, split: str) -> torch.Tensor:
        return torch.zeros(4, dtype=torch.long)

    def answers(self) -> list[str]:
        return ["yes"]

    def word(self, split: str, index: int, label: int | None = None) -> str:
        return ["yes", "no"][label or 0]


def test_a_case_counts_only_the_questions_it_answers(tmp_path):
    all_answers = (np.arange(4), np.array([[0, 0, 1], [1, 0, 1], [0, 0, 1], [1, 0, 1]]))
    some_answers = (np.array([1, 2]), np.array([[0, 0, 1], [0, 0, 1]]))
    accuracy = evaluate_outcomes(FourQuestions(), {"own": all_answers, "part": some_answers}, tmp_path / "table.csv")[
        "accuracy"
    ]
    assert list(accuracy) == ["own", "part"]
    assert accuracy["own"]["test"]["all"]["value"] == 0.5
    assert set(accuracy["part"]) == {"test", "unseen"}
    assert (accuracy["part"]["unseen"]["all"]["value"], accuracy["part"]["unseen"]["all"]["questions"]) == (1.0, 2)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["part"] for row in rows] == ["", "yes", "yes", ""]
    assert [row["own"] for row in rows] == ["yes", "no", "yes", "no"]


def test_rows_of_different_lengths_are_padded():
    assert pad_rows([[1, 2, 3], [4]]).tolist() == [[1, 2, 3], [4, -1, -1]]
