"""The verdict says what the numbers say, and no more."""

from __future__ import annotations

from detente.records import find_runs
from detente.reports import verdict
from detente.reports.groups import collect


def judge(folder):
    (study,) = collect(find_runs(folder))
    found = verdict(study)
    return found.headline.replace("\N{NO-BREAK SPACE}", " "), " ".join(found.sentences).replace(
        "\N{NO-BREAK SPACE}", " "
    )


def add_singles(folder, run_maker, **more):
    for task, value in (("left", 0.9), ("right", 0.8)):
        run_maker(
            folder / f"single {task}", tasks=(task,), single=True, final={task: value}, epochs=4, **more
        )


def test_closest_but_worse(tmp_path, demo_maker):
    headline, rest = judge(demo_maker(tmp_path, epochs=4))
    assert headline == (
        "mgda (features) and mgda (exact) come closest to one network per task: Δm +0.37 %. None reaches it."
    )
    assert "left accuracy 96.82 % (single task 97.23 %), right accuracy 95.60 % (single task 95.90 %)" in rest
    assert "Uniform weights have Δm +0.87 %: a difference of 0.50 points." in rest
    assert "mgda (features) needs 1.02 times the time per epoch" in rest
    assert "One seed proves little" in rest
    assert "No tuned fixed weighting was run" in rest
    assert "standard error" not in rest, "one seed has no spread"


def test_no_worse_than_single(tmp_path, run_maker):
    add_singles(tmp_path, run_maker)
    run_maker(tmp_path / "u", final={"left": 0.88, "right": 0.78}, epochs=4)
    run_maker(tmp_path / "m", "mgda", final={"left": 0.9, "right": 0.82}, epochs=4)
    headline, rest = judge(tmp_path)
    assert headline == "mgda (exact) is on average no worse than one network per task: Δm −1.25 %."
    assert "1 of 2 methods get there." in rest


def test_uniform_leads(tmp_path, run_maker):
    add_singles(tmp_path, run_maker)
    run_maker(tmp_path / "u", final={"left": 0.88, "right": 0.79}, epochs=4)
    run_maker(tmp_path / "m", "mgda", final={"left": 0.87, "right": 0.78}, epochs=4)
    headline, rest = judge(tmp_path)
    assert headline.startswith("uniform (exact) comes closest")
    assert "No method does better than uniform weights here; the next is mgda (exact)" in rest


def test_several_seeds_are_compared_with_their_spread(tmp_path, run_maker):
    for seed in range(3):
        shift = 0.001 * (seed - 1)
        for task, value in (("left", 0.9), ("right", 0.8)):
            run_maker(
                tmp_path / f"{task}{seed}",
                tasks=(task,),
                single=True,
                seed=seed,
                final={task: value},
                epochs=4,
            )
        run_maker(
            tmp_path / f"u{seed}", seed=seed, final={"left": 0.88 + shift, "right": 0.78 + shift}, epochs=4
        )
        run_maker(
            tmp_path / f"m{seed}", "mgda", seed=seed, final={"left": 0.8804, "right": 0.78 - shift}, epochs=4
        )
    _, rest = judge(tmp_path)
    assert "less than twice the standard error" in rest
    assert "One seed" not in rest


def test_without_baselines_no_claim_about_sharing(tmp_path, run_maker):
    run_maker(tmp_path / "u", final={"left": 0.88, "right": 0.79}, epochs=4)
    run_maker(tmp_path / "m", "mgda", final={"left": 0.87, "right": 0.80}, epochs=4)
    headline, rest = judge(tmp_path)
    assert headline == "No single-task baselines were run, so nothing can be said about what sharing costs."
    assert "Best accuracy on left: uniform (exact) with 88.00 %." in rest
    assert "Best accuracy on right: mgda (exact) with 80.00 %." in rest


def test_half_the_baselines(tmp_path, run_maker):
    run_maker(tmp_path / "left", tasks=("left",), single=True, epochs=4)
    run_maker(tmp_path / "u", epochs=4)
    headline, rest = judge(tmp_path)
    assert headline.startswith("Δm cannot be computed")
    assert "No finished single-task run." in rest


def test_nothing_finished(tmp_path, run_maker):
    run_maker(tmp_path / "u", epochs=4, finished=False)
    headline, rest = judge(tmp_path)
    assert headline.startswith("There is nothing to compare yet")
    assert "1 of 1 runs is not finished" in rest


def test_other_settings_and_last_epochs_limit_the_verdict(tmp_path, run_maker):
    add_singles(tmp_path, run_maker)
    run_maker(tmp_path / "u", epochs=1, settings={"epochs": 1})
    run_maker(tmp_path / "m", "mgda", epochs=1, settings={"epochs": 1})
    run_maker(tmp_path / "c", "cagrad", epochs=1, settings={"epochs": 1})
    _, rest = judge(tmp_path)
    assert "The runs differ in more than the method (epochs)" in rest
    assert "In 3 of 5 runs the last epoch was the best" in rest


def test_a_static_weighting_is_an_opponent(tmp_path, run_maker):
    run_maker(tmp_path / "u", epochs=4)
    run_maker(tmp_path / "s", "static", options={"weights": [1, 2]}, epochs=4)
    assert "No tuned fixed weighting" not in judge(tmp_path)[1]


def test_one_method_alone_is_not_called_closest(tmp_path, run_maker):
    add_singles(tmp_path, run_maker)
    run_maker(tmp_path / "m", "mgda", final={"left": 0.85, "right": 0.75}, epochs=4)
    headline, rest = judge(tmp_path)
    assert headline.startswith("mgda (exact) is on average worse than one network per task")
    assert "Uniform weights, the simplest opponent, were not run" in rest
