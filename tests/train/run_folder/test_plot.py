"""Curves of runs: what is read, a page that is whole in itself, a picture."""

import json
import sys

import pytest

from minimind_data.errors import UserError
from minimind_train.run import entry
from minimind_train.run_folder import plot
from minimind_train.run_folder.plot import draw, panels_of, read_curves
from tests.helpers.pages import BROWSER, Browser, Reader
from tests.helpers.runs import Said, config_of, records


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_dataset, other_dataset):
    """Two runs, of which the first one is measured; its name wants to be a script."""
    folder = tmp_path_factory.mktemp("runs")
    entry.begin(
        config_of(folder / "<b>one", small_dataset, val_shards=str(other_dataset), val_every=5, log_every=1),
        Said(),
    )
    entry.begin(config_of(folder / "二", small_dataset, steps=7, log_every=2, learning_rate=0.01), Said())
    return [folder / "<b>one", folder / "二"]


def test_curves_are_the_lines_of_metrics(runs):
    one, two = read_curves(runs)
    lines = records(runs[0] / "metrics.jsonl")
    assert one.name == "<b>one"
    assert one.x["step"] == list(range(1, 13))
    assert one.x["position"] == [line["position"] for line in lines]
    assert one.x["tokens"] == [16 * line["position"] for line in lines]
    assert one.y["loss"] == [line["loss"] for line in lines]
    assert [
        step for step, loss in zip(one.x["step"], one.y["val_loss"], strict=True) if loss is not None
    ] == [5, 10, 12]
    assert set(two.y) == {"loss", "lr", "grad_norm", "tokens_per_second"}
    assert two.x["step"] == [1, 2, 4, 6, 7]
    assert [(metric, over) for metric, _, over in panels_of([one, two])] == [
        ("loss", "val_loss"), ("lr", None), ("tokens_per_second", None), ("grad_norm", None),
    ]  # fmt: skip


def test_a_run_that_trains_may_have_half_a_line_and_steps_that_were_skipped(tmp_path, runs):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_bytes((runs[1] / name).read_bytes())
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(
            b'{"step": 8, "position": 64, "skipped": "the loss is nan", "accuracy": 0.5}\n{"step": 9, "pos'
        )
    (curves,) = read_curves([run])
    assert curves.x["step"][-1] == 8
    assert curves.y["loss"][-1] is None
    assert panels_of([curves])[-1] == ("accuracy", "Accuracy", None)
    draw([run], tmp_path / "p.png")
    (run / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="no line of metrics yet"):
        read_curves([run])


def test_long_runs_are_thinned_evenly_and_keep_their_ends_and_validations(runs, monkeypatch):
    monkeypatch.setattr(plot, "_MAX_POINTS", 3)
    (one,) = read_curves(runs[:1])
    assert one.x["step"] == [1, 5, 9, 10, 12]
    assert one.lines == 12


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, runs):
    other = tmp_path / "二"
    other.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (other / name).write_bytes((runs[1] / name).read_bytes())
    assert [one.name for one in read_curves([runs[1], other])] == [str(runs[1]), str(other)]


def test_the_page_is_whole_in_itself_and_no_name_becomes_part_of_it(tmp_path, runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw(runs, tmp_path / "p.html", axis="tokens")
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert not {"b", "img", "iframe"} & {tag for tag, _ in reader.tags}
    assert [attrs for tag, attrs in reader.tags if "src" in attrs] == []
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    data = json.loads(reader.scripts[0])
    assert data["axis"] == "tokens"
    assert [run["name"] for run in data["runs"]] == ["<b>one", "二"]
    assert data["runs"][1]["y"]["loss"] == [line["loss"] for line in records(runs[1] / "metrics.jsonl")]


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_picture_is_drawn_by_matplotlib(tmp_path, runs, suffix, begins):
    out = tmp_path / f"p{suffix}"
    draw(runs, out)
    assert out.read_bytes().startswith(begins)
    if suffix == ".png":
        from matplotlib.image import imread

        pixels = imread(out)
        assert pixels.shape[:2] == (888, 1440), "two rows of panels"
        assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[2])[::7].tolist()}) > 50, (
            "something is drawn"
        )


def test_a_picture_has_a_panel_for_each_metric_and_a_line_for_each_run(tmp_path, runs, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *to, **how: (drawn.append(figure), save(figure, *to, **how))
    )
    draw([*runs, *[runs[1]] * 9], tmp_path / "p.png", axis="tokens")
    (figure,) = drawn
    assert [(axes.get_title(), axes.get_xlabel()) for axes in figure.axes] == [
        (title, "tokens") for title in ("Loss", "Learning rate", "Tokens a second", "Gradient norm")
    ]
    assert figure.axes[0].get_subplotspec().get_gridspec().get_geometry() == (2, 2)
    loss, rate = figure.axes[:2]
    measured = [line for line in records(runs[0] / "metrics.jsonl") if "val_loss" in line]
    (of_one, validation, *others) = loss.get_lines()
    assert of_one.get_xdata().tolist() == [128 * step for step in range(1, 13)]
    assert of_one.get_ydata().tolist() == [line["loss"] for line in records(runs[0] / "metrics.jsonl")]
    assert validation.get_xdata().tolist() == [16 * line["position"] for line in measured]
    assert validation.get_ydata().tolist() == [line["val_loss"] for line in measured]
    assert [line.get_linestyle() for line in (of_one, validation)] == ["-", "--"]
    assert [line.get_color() for line in (of_one, validation)] == ["C0", "C0"]
    assert [line.get_color() for line in others[:-1]] == [f"C{number}" for number in (*range(1, 10), 0)]
    names = ["<b>one", *[str(runs[1])] * 10]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [*names, "validation"]
    assert [text.get_text() for text in rate.get_legend().get_texts()] == names


def test_panels_come_in_the_usual_order_and_others_after_them(tmp_path, runs):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((runs[1] / "config.json").read_bytes())
    line = {
        "step": 1,
        "position": 8,
        "epoch": 1,
        "targets": 5,
        "offset": 3,
        "loss_scale": 2.0,
        "skipped_steps": 0,
    }
    shown = {"zebra_count": 1, "auxiliary_loss": 0.5, "accuracy": 0.25, "loss": 2, "grad_norm": 1.0}
    hidden = {"val_accuracy": 0.5, "ok": True, "shard": "text-00000", "epochs": {"a": 1.0}}
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 0, "loss": 9.0}) + "\n" + json.dumps(line | shown | hidden) + "\n"
    )
    (curves,) = read_curves([run])
    assert curves.y == {name: [value] for name, value in shown.items()}
    assert curves.x == {"step": [1], "tokens": [128], "position": [8]}
    assert panels_of([curves]) == [
        ("loss", "Loss", None), ("grad_norm", "Gradient norm", None), ("auxiliary_loss", "Auxiliary loss", None),
        ("accuracy", "Accuracy", None), ("zebra_count", "Zebra count", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_lines", "steps"),
    [(1, [1]), (3, [1, 2, 3]), (4, [1, 3, 4]), (6, [1, 3, 5, 6]), (7, [1, 4, 7]), (9, [1, 4, 7, 9])],
)
def test_no_more_than_so_many_points_but_the_last(tmp_path, runs, monkeypatch, num_lines, steps):
    monkeypatch.setattr(plot, "_MAX_POINTS", 3)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((runs[1] / "config.json").read_bytes())
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "position": n, "loss": 1.0}) + "\n" for n in range(1, num_lines + 1))
    )
    assert read_curves([run])[0].x["step"] == steps


def test_what_cannot_be_drawn(tmp_path, runs, monkeypatch):
    tmp_path.with_suffix(".html").mkdir()
    for out, complaint in (
        (tmp_path / "p.gif", "the suffix says what to draw"),
        (tmp_path / "p", "the suffix says what to draw"),
        (tmp_path / "none" / "p.html", "make the folder"),
        (tmp_path.with_suffix(".html"), "no place for a file"),
    ):
        with pytest.raises(UserError, match=complaint):
            draw(runs, out)
    with pytest.raises(UserError, match="no run there"):
        draw([tmp_path], tmp_path / "p.html")
    for name in ("mine.html", "mine.png"):
        (tmp_path / name).write_text("<!doctype html> somebody's")
        with pytest.raises(UserError, match=f"{name}: a file of something else"):
            draw(runs, tmp_path / name)
        (tmp_path / name).unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(
        UserError, match=r"pip install 'minimind-pipeline\[plot\]', or take a page, `out` .*p\.html"
    ):
        draw(runs, tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_draws_in_a_browser_and_asks_nobody(tmp_path, runs):
    draw(runs, tmp_path / "p.html")
    browser = Browser(tmp_path / "profile")
    try:
        browser.open((tmp_path / "p.html").as_uri())
        assert browser.run("document.title") == "<b>one, 二"
        assert browser.run("document.querySelectorAll('#panels section').length") == 4
        assert browser.run("document.querySelectorAll('path.curve').length") == 9
        assert browser.run("document.querySelectorAll('path.curve.over').length") == 1
        browser.run("document.querySelectorAll('#axis button')[1].click()")
        labels = (
            "[...document.querySelectorAll('section svg')].map((plot) => plot.getAttribute('aria-label'))"
        )
        assert browser.run(labels)[0] == "Loss by tokens"
        over = "const box = document.querySelector('section svg').getBoundingClientRect(); "
        over += "document.querySelector('section svg rect').dispatchEvent(new MouseEvent('mousemove', "
        over += "{clientX: box.right - 13, clientY: box.top + 50, bubbles: true}))"
        browser.run(f"{{{over}}}")
        tip = browser.run("document.getElementById('tip').textContent").split("\n")
        last = records(runs[0] / "metrics.jsonl")[-1]
        assert tip[0] == "tokens 1,536"
        assert tip[1].startswith(f"<b>one: {last['loss']:.3f}")
        assert tip[2].startswith("<b>one, validation: ")
        assert tip[3].startswith("二: ")
        assert "(at " in tip[3]
        browser.run("document.querySelectorAll('#runs button')[0].click()")
        assert browser.run("document.querySelectorAll('path.curve').length") == 4
        browser.run("document.querySelectorAll('#runs button')[1].click()")
        assert browser.run("document.querySelector('section svg').textContent") == "nothing to show"
        for settings in ({"width": 400}, {"dark": True}, {}):
            browser.show(**settings)
            assert browser.run("document.documentElement.scrollWidth <= innerWidth") is True
        asked = [event["params"]["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
        assert [url for url in asked if not url.startswith("data:")] == [(tmp_path / "p.html").as_uri()]
        assert browser.seen("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []
    finally:
        browser.close()


def test_a_value_that_is_no_number_is_left_out_of_its_curve(tmp_path, runs):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_bytes((runs[1] / name).read_bytes())
    odd = ['"7"', "null", "[1]", "true", "NaN", "Infinity", "1" + "0" * 400]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(
            f'{{"step": {8 + n}, "position": {64 + n}, "loss": {value}}}\n' for n, value in enumerate(odd)
        )
    (curves,) = read_curves([run])
    assert curves.x["step"][-len(odd) :] == list(range(8, 8 + len(odd)))
    assert curves.y["loss"][-len(odd) :] == [None] * len(odd)
    draw([run], tmp_path / "p.png")
    draw([run], tmp_path / "p.html")
    assert "NaN" not in (tmp_path / "p.html").read_text()
