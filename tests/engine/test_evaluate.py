"""``dmdr-evaluate``: images, scores and tables of runs and pipelines, on one rank or two, at once or bit by bit."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dmdr_fast import cli, evaluate
from dmdr_fast.cli import run_user_command
from dmdr_fast.data.images import read_cropped
from dmdr_fast.engine.model import open_model
from dmdr_fast.eval.gallery import Gallery, image_name, markdown
from dmdr_fast.eval.inception import LAYERS
from dmdr_fast.eval.metrics import frechet_distance, precision_recall
from dmdr_fast.export import export_run
from dmdr_fast.models.sit import SiT
from tests.families import PROMPTS, randomised

from .pipeline_runs import BRIGHTNESS, SIZE, config_of
from .test_latent_run import CLASSES, RESOLUTION, arguments, models  # noqa: F401, a fixture

INK = BRIGHTNESS.replace("Darkness", "Ink")
REWARDS = [BRIGHTNESS, f"{{kind: '{BRIGHTNESS}', name: twice}}"]
FINAL = Path("final/generator.safetensors")


def save_run(run_dir, config, tensors):
    """What a finished run leaves for an evaluation."""
    (run_dir / FINAL).parent.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(cli.dump(config))
    save_file(tensors, run_dir / FINAL)
    return run_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two steps on a small SD3, its exported pipeline and a file of prompts."""
    root = tmp_path_factory.mktemp("evaluate")
    settings = {"eval__teacher_steps": 2, "teacher__sample_cfg_scale": 3, "eval__batch_size": 2, "student__shift": 3}
    config = config_of("sd3", root, root / "run", **settings)
    family = open_model(config).family
    network = randomised(family.build_from_config(family.network_config), 9)
    save_run(root / "run", config, {name: p.detach() for name, p in network.named_parameters()})
    export_run(root / "run", root / "pipeline", dtype="fp32")
    return root


def evaluated(source, out, *words, prompts=True):
    """The command in this process; returns what is in ``out``."""
    given = ["--prompts", str(source.parent / "prompts.txt")] if prompts else []
    assert run_user_command(evaluate.main, [str(source), *given, "--out", str(out), *map(str, words)]) == 0
    return content(out)


def content(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(folder):
    """The run's evaluation in one go: three prompts, two seeds, in batches of two and one."""
    return evaluated(folder / "run", folder / "whole", "--seeds", 2, "--rewards", *REWARDS)


def test_an_evaluation_is_images_scores_and_a_table(folder, whole, capsys):
    names = [f"{n:05d}_{slug}_{seed}.png" for n, slug in enumerate(slugs()) for seed in range(2)]
    assert {name for name in whole if name.endswith(".png")} == {
        f"{m}/{n}" for m in ("teacher", "student") for n in names
    }
    lines = [json.loads(line) for line in whole["scores.jsonl"].splitlines()]
    assert [line["image"] for line in lines] == sorted(name for name in whole if name.endswith(".png"))
    for line in lines:
        image = np.asarray(Image.open(folder / "whole" / line["image"]), dtype=np.float64)
        darkness = -(image / 127.5 - 1).mean()
        assert image.shape == (SIZE, SIZE, 3) and image.std() > 5
        assert line["scores"] == pytest.approx({"darkness": darkness, "twice": darkness}, abs=1e-6)
        assert line["prompt"] == PROMPTS[int(Path(line["image"]).name[:5])]
    table = json.loads(whole["metrics.json"])
    for model, nfe in (("teacher", 4), ("student", 2)):  # the teacher is guided, two evaluations a step
        mean = np.mean([line["scores"]["darkness"] for line in lines if line["image"].startswith(model)])
        assert table[model] == pytest.approx({"images": 6, "NFE": nfe, "darkness": mean, "twice": mean})
    assert whole["table.md"].decode() == markdown(table)
    assert not run_user_command(
        evaluate.main, [*words(folder), "--out", str(folder / "whole"), *rewards(), "--seeds", "2"]
    )
    assert capsys.readouterr().out.startswith(markdown(table))
    assert content(folder / "whole") == whole  # nothing was made anew
    teacher, student = (np.asarray(Image.open(folder / "whole" / m / names[0])).astype(int) for m in table)
    assert abs(teacher - student).max() > 5


def slugs():
    return ["a-red-cat", "two-blue-dogs-on-a-green-hill", "sea"]


def words(folder):
    return [str(folder / "run"), "--prompts", str(folder / "prompts.txt")]


def rewards():
    return ["--rewards", *REWARDS]


def test_an_exported_pipeline_draws_the_images_of_its_run(folder, whole):
    found = evaluated(folder / "pipeline", folder / "exported", "--rewards", *REWARDS)
    table = json.loads(found["metrics.json"])
    assert table["pipeline"]["NFE"] == 2 and table["pipeline"]["images"] == 3
    for slug in slugs():
        a, b = (
            np.asarray(Image.open(next((folder / out / m).glob(f"*_{slug}_0.png")))).astype(int)
            for out, m in (("exported", "pipeline"), ("whole", "student"))
        )
        assert abs(a - b).max() <= 1 and (a != b).mean() < 0.01  # a rounding to 8 bits apart


class Killed(Exception):
    pass


def test_a_killed_evaluation_makes_what_is_missing(folder, whole, tmp_path, monkeypatch):
    """Killed in the middle of a batch's images, in that of the scores, and with a torn line behind."""
    more = ["--out", str(tmp_path), "--seeds", "2", *rewards()]
    for name, calls in (("draw", 4), ("add_scores", 3)):
        given, left = getattr(Gallery, name), iter(range(calls))

        def stopped(self, *args, given=given, left=left):
            if next(left, None) is None:
                raise Killed
            given(self, *args)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Gallery, name, stopped)
            evaluate.main([*words(folder), *more])
        assert "metrics.json" not in content(tmp_path)
    images = sorted((tmp_path / "student").glob("*.png"))
    images[0].unlink()  # of its batch only this one is missing
    (images[1].with_suffix(".tmp")).write_bytes(b"torn")
    with (tmp_path / "scores.0.jsonl").open("a") as file:
        file.write('{"image": "stu')
    assert not run_user_command(evaluate.main, [*words(folder), *more])
    found = content(tmp_path)
    assert {k: v for k, v in found.items() if not k.endswith(".tmp")} == whole


def test_two_ranks_equal_one(run, folder, whole, tmp_path):
    """They add a seed to what one rank has made."""
    evaluated(folder / "run", tmp_path, *rewards())
    script, more = Path(evaluate.__file__), ["--seeds", "2", *rewards(), "--out", tmp_path]
    code, out, err = run([*words(folder), *more], ranks=2, small=False, script=script)
    assert code == 0, err
    assert out.count("| images") == 1
    assert content(tmp_path) == whole


def test_other_images_need_another_folder_and_other_scores_do_not(folder, whole, tmp_path, capsys):
    out = tmp_path / "out"
    first = evaluated(folder / "run", out, "--student-only", *rewards())
    assert "teacher" not in json.loads(first["metrics.json"])
    second = evaluated(folder / "run", out, "--student-only")  # the run's own: darkness
    assert {k: v for k, v in first.items() if k.endswith("png")} == {
        k: v for k, v in second.items() if k.endswith("png")
    }
    assert set(json.loads(second["scores.jsonl"].splitlines()[0])["scores"]) == {"darkness"}
    capsys.readouterr()
    copy, cold = folder / "run/copy.safetensors", folder / "run/cold_start.safetensors"
    copy.write_bytes((folder / "run" / FINAL).read_bytes())  # the same weights elsewhere are the same
    assert evaluated(folder / "run", out, "--student-only", "--weights", copy) == second
    found = (folder / "run" / FINAL).stat()
    *same, last = copy.read_bytes()
    cold.write_bytes(bytes([*same, last ^ 1]))
    os.utime(cold, ns=(found.st_atime_ns, found.st_mtime_ns))  # others, of the same size and age
    for change, said in (
        (["--prompts", "sea"], "prompts '3, sha256"),
        (["--weights", str(cold)], "generator 'sha256 "),
    ):
        command = [*words(folder), "--out", str(out), *change]
        assert run_user_command(evaluate.main, command) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: --out: {out} has images of another evaluation: {said}"), error


def test_the_imagenet_recipe_into_the_adm_suite_s_file(models, tmp_path, capsys):  # noqa: F811
    """configs/sit_xl_256.yaml at a small size: an image per class and seed, one seed after the other."""
    config = cli.parse([str(word) for word in arguments(models, tmp_path / "run")])[0]
    generator = randomised(SiT(input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=CLASSES), 3)
    run_dir = save_run(tmp_path / "run", config, {n: p.detach() for n, p in generator.named_parameters()})
    options = ["--seeds", 5, "--npz", "--student-only"]
    found = evaluated(run_dir, tmp_path / "out", *options, prompts=False)
    with np.load(tmp_path / "out/student.npz") as file:
        assert file.files == ["arr_0"]
        samples = file["arr_0"]
    assert samples.dtype == np.uint8 and samples.shape == (5 * CLASSES, RESOLUTION, RESOLUTION, 3)
    for number, sample in enumerate(samples):
        seed, label = divmod(number, CLASSES)
        image = Image.open(tmp_path / "out/student" / f"{label:05d}_class-{label}_{seed}.png")
        assert np.array_equal(np.asarray(image), sample)
    assert len(np.unique(samples.reshape(len(samples), -1), axis=0)) == len(samples)
    assert set(json.loads(found["metrics.json"])["student"]) == {"images", "NFE", "classifier"}
    lines = [json.loads(line) for line in found["scores.jsonl"].splitlines()]
    scored = {line["image"]: line["scores"]["classifier"] for line in lines}
    from dmdr_fast.rewards.classifier import TransformersClassifierReward

    reward = TransformersClassifierReward(str(models / "reward"), num_classes=CLASSES)
    truth = reward(torch.from_numpy(samples[1:2]).permute(0, 3, 1, 2) / 127.5 - 1, labels=torch.tensor([1]))
    assert scored["student/00001_class-1_0.png"] == pytest.approx(truth.item(), rel=1e-4)
    assert evaluated(run_dir, tmp_path / "out", *options, prompts=False) == found  # the npz's bytes, too
    for words_, said in ((["--prompts", "sea"], "--prompts: "), (["--step", "1"], "--step: ")):
        assert run_user_command(evaluate.main, [str(run_dir), *words_, "--out", str(tmp_path / "out")]) == 2
        assert f"error: {said}{run_dir} is a run on class labels" in capsys.readouterr().err


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """torch-fidelity's own Inception with the random weights that it starts with, in a file."""
    extractor = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = extractor.FeatureExtractorInceptionV3
    with monkeypatch.context() as patched:
        patched.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
        patched.setattr(kind, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = kind("inception-v3-compat", ["64", "logits_unbiased"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    return network


def real_images(folder, count):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).resize((2 * SIZE, SIZE)).save(
            folder / f"{i}.png"
        )
    return folder


@pytest.mark.thorough
def test_inception_s_metrics_against_real_images(folder, tmp_path, capsys, monkeypatch, inception):
    """By its features of width 64, whose distance takes no minute; against our own formulas."""
    for metric in ("fid", "prc"):
        monkeypatch.setitem(LAYERS, metric, "64")
    real, out, file = real_images(tmp_path / "real", 8), tmp_path / "out", tmp_path / "inception.pth"
    options = ["--seeds", 4, "--student-only", "--rewards", "--real", real, "--inception"]
    found = json.loads(evaluated(folder / "run", out, *options, file)["metrics.json"])["student"]

    def features(files):
        with torch.no_grad():
            images = torch.stack([torch.from_numpy(read_cropped(f, SIZE, SIZE).copy()) for f in sorted(files)])
            return inception(images.permute(0, 3, 1, 2))

    (drawn, logits), (truth, _) = features((out / "student").iterdir()), features(real.iterdir())
    assert found["FID"] == pytest.approx(frechet_distance(drawn, truth), rel=1e-3)
    assert (found["precision"], found["recall"]) == pytest.approx(precision_recall(truth, drawn))
    p = logits.double().softmax(1)
    single = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert 1.0 <= found["inception score"] < single + 0.1  # its splits are of one image or two
    file.write_bytes(b"no weights")
    assert run_user_command(evaluate.main, [*words(folder), "--out", str(out), *map(str, options), str(file)]) == 2
    assert f"error: --inception: {file} is no such file (" in capsys.readouterr().err


def test_a_comparison_without_the_package_or_with_few_images_is_one_line(folder, tmp_path, capsys, monkeypatch):
    real = real_images(tmp_path / "real", 3)
    command = [*words(folder), "--out", str(tmp_path / "out"), "--real", str(real)]
    for there, said in (
        (None, "error: --real: it needs torch-fidelity; pip install 'dmdr_fast[fid]', or leave --real out\n"),
        (True, "error: --real: expected at least 4 images in it and 10 drawn, got 3 and 3; "),
    ):
        monkeypatch.setattr("dmdr_fast.eval.inception.importlib.util.find_spec", lambda _, there=there: there)
        assert run_user_command(evaluate.main, command) == 2
        assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--batch", "-1"], "--batch: expected at least 1, got -1"),
        (["--rewards", "clip_scor"], "did you mean clip_score"),
        (["--rewards", "classifier"], "--rewards: classifier: expected path"),
        (["--rewards", "{kind: hps, wieght: 2}"], "--rewards {kind: hps, wieght: 2}: wieght: Extra inputs"),
        (["--rewards", "[hps]"], "--rewards [hps]: "),
        (["--rewards", "{kind: hps, path: /nowhere}"], "--rewards: hps: path: no such folder: /nowhere"),
        (["--rewards", "digits"], "--rewards: digits reads labels, and a model of prompts has none"),
        (["--rewards", "scenes"], "--prompts: "),
        (["--rewards", INK.replace("Ink", "Nothing")], "expected a class Nothing"),
        (["--inception", "x.pth"], "--inception: it is for --real FOLDER"),
        (["--real", "/nowhere"], "--real: "),
        (["--step", "7"], "--step 7: no such checkpoint in "),
        (["--weights", "no.safetensors"], "no weights at no.safetensors"),
        (["--out", "/dev/null/out"], "--out: /dev/null/out cannot be written"),
        (["--prompts", "no.txt"], "prompts no.txt: no such file"),
        (["--prompts"], "argument --prompts: expected at least one argument"),
        (["--local_rank", "x"], "argument --local_rank: invalid int value"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_loaded(folder, tmp_path, capsys, monkeypatch, change, said):
    monkeypatch.setattr("dmdr_fast.engine.runtime.start", lambda: pytest.fail("started"))
    assert run_user_command(evaluate.main, [*words(folder), "--out", str(tmp_path / "out"), *change]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and said in error


def test_mistakes_of_the_source_and_of_a_reward(folder, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for source, more, said in (
        (tmp_path, ["--prompts", "sea"], "is no run (config.yaml) and no pipeline (model_index.json)"),
        (folder / "run", [], "--prompts: missing"),
        (folder / "pipeline", ["--prompts", "sea", "--step", "1"], "--step and --weights name nothing"),
        (
            folder / "run",
            ["--prompts", "sea " * 400, "--student-only"],
            "the text encoder takes 256 tokens, but prompt 1 has",
        ),
    ):
        assert run_user_command(evaluate.main, [str(source), *out, *more]) == 2
        assert said in capsys.readouterr().err
    failing = ["--student-only", "--rewards", BRIGHTNESS.replace("Darkness", "Raises")]
    assert run_user_command(evaluate.main, [*words(folder), *out, *failing]) == 2
    assert "error: reward 'darkness', images of the student: the tower fell" in capsys.readouterr().err
    assert len(list((tmp_path / "out/student").iterdir())) == 3  # which are kept


def test_images_that_are_not_finite(folder, tmp_path, capsys):
    tensors = load_file(folder / "run" / FINAL)
    last = max(name for name in tensors if name.startswith("proj_out"))
    run_dir = save_run(
        tmp_path / "run",
        cli.load(folder / "run" / "config.yaml"),
        tensors | {last: torch.full_like(tensors[last], 3e38)},
    )
    export_run(run_dir, tmp_path / "pipeline", dtype="fp32")
    for source in (run_dir, tmp_path / "pipeline"):
        options = [str(source), "--prompts", *PROMPTS[:2], "--out", str(tmp_path / "out" / source.name), "--rewards"]
        assert run_user_command(evaluate.main, options + ["--student-only"] * (source == run_dir)) == 2
        assert "image 1: its pixels are not finite" in capsys.readouterr().err
        assert not list((tmp_path / "out").rglob("*.png"))


def test_names_are_safe_and_tell_prompts_apart():
    assert image_name(7, "A fox,  in/the ../snow!", 0) == "00007_a-fox-in-the-snow_0.png"
    assert image_name(0, "Crème brûlée", 3) == "00000_creme-brulee_3.png"
    assert image_name(123456, "雪中的狐狸", 0) == "123456_0.png"
    assert len(image_name(0, "word " * 100, 0)) < 70


def test_the_table():
    table = {"teacher": {"images": 6, "NFE": 56, "hps": 0.28123}, "student": {"images": 6, "hps": 0.3}}
    assert markdown(table).splitlines() == [
        "|        | teacher | student |",
        "| ------ | ------: | ------: |",
        "| images |       6 |       6 |",
        "| NFE    |      56 |       - |",
        "| hps    |  0.2812 |     0.3 |",
    ]
