"""The planner's bytes on disk against those of a real run."""

import pytest

from dmdr_fast import cli
from dmdr_fast.plan.disk import disk, most_checkpoints
from dmdr_fast.plan.from_config import workload
from tests.plan.measured import SHAPES


def written(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_bytes_of_a_run(run, tmp_path):
    """Two ranks at stage 2, a LoRA beside whole weights, an EMA; checkpoints 2 (the cold start's), 4 and 5 stay."""
    arguments = ["--run_dir", tmp_path, "--deepspeed.stage", 2, "--model.hidden_size", 192, "--teacher.train.steps", 2]
    arguments += ["--train.cold_start_steps", 2, "--train.generator_steps", 5, "--checkpoint.every", 1]
    code, _, err = run([*arguments, "--reward.terms", "[]", "--rl.method", "none", "--reward.held_out", "[]"], ranks=2)
    assert code == 0, err
    config = cli.load(tmp_path / "config.yaml")
    planned, checkpoints = disk(config, workload(config)), tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step_0000000{n}" for n in (2, 4, 5)]
    assert written(checkpoints / "step_00000005") == pytest.approx(planned.checkpoint, rel=0.02)
    assert written(tmp_path / "final") == pytest.approx(planned.snapshots["final"], rel=0.02)
    assert written(tmp_path / "cold_start") == pytest.approx(planned.snapshots["cold_start"], rel=0.02)
    assert planned.checkpoints == 4  # and 3, which goes once 5 is whole
    assert written(tmp_path) == pytest.approx(planned.run_dir - planned.checkpoint, rel=0.02)


def test_a_prompt_that_stands_twice_has_one_embedding(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na cat\n")
    config = cli.parse(["--config", "sd35_large", "--data.prompts", str(prompts)])[0]
    assert disk(config, workload(config, SHAPES["sd3"])).prompts == 3  # and the negative prompt


@pytest.mark.parametrize(
    ("every", "keep", "keep_every", "most"),
    [(100, 2, None, 4), (100, 2, 200, 5), (100, 1, 150, 4), (1000, 2, None, 2), (100, 50, None, 7)],
)
def test_how_many_checkpoints_lie_there_at_once(every, keep, keep_every, most):
    """600 updates, a cold start of 250: its checkpoint, the newest, the one that is written, every multiple."""
    argv = ["--config", "digits", "--train.generator_steps", "600", "--train.cold_start_steps", "250"]
    argv += ["--checkpoint.every", str(every), "--checkpoint.keep", str(keep)]
    argv += [] if keep_every is None else ["--checkpoint.keep_every", str(keep_every)]
    assert most_checkpoints(cli.parse(argv)[0]) == most
