"""No page lies: the README's code runs; commands, options, scripts and links on every page are of things that exist."""

import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from minimind_cli import data, train
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.tokenizer.places import SHIPPED, USUAL

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "benchmarks", "data")
    for path in (ROOT / folder).glob("*.md")
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])")
PROGRAMS = ("mm-data", "mm-train")
SMALL = "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1"
SHORT = "--seq-len 64 --steps 2 --global-batch 2 --threads 1 --device cpu --dtype fp32"
OF_OTHERS = {
    "CONTRIBUTING.md": {"--module"},  # that of tests.mutation
    "benchmarks/README.md": {"--data"},  # train_step.py's, as in docs/speed.md
    "docs/speed.md": {"--data"},
    "docs/from-minimind.md": {"--historys", "--weight"},  # MiniMind's
    "docs/runs.md": {"--max-restarts"},
    "docs/devices.md": {  # torchrun's
        "--nnodes",
        "--nproc-per-node",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--no-python",
        "--max-restarts",
    },
}
"""Options in a page's prose and examples that belong to other programs."""


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands_of(page):
    """Return the command lines of a page, without their comments."""
    text = text_of(page)
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    lines += [
        line for language, code in FENCED.findall(text) if language == "bash" for line in code.splitlines()
    ]
    lines += re.findall(r"`(python benchmarks/[^`]+)`", text)
    lines = [re.split(r"\s+# ", line)[0].removesuffix("\\").strip() for line in lines]
    return [line for line in lines if re.match(r"(mm-|make |python |\.venv/bin/|torchrun |-- )", line)]


@cache
def command(program, name):
    """Return the command line's own parser of a command."""
    app = data.app if program == "mm-data" else train.app
    return typer.main.get_command(app).commands[name]


@cache
def options():
    """Return the options of each command of each program."""
    found = {}
    for program in PROGRAMS:
        names = typer.main.get_command(data.app if program == "mm-data" else train.app).commands
        for name in names:
            found[program, name] = {
                flag
                for parameter in command(program, name).params
                for flag in (*parameter.opts, *parameter.secondary_opts)
            } | {"--help"}
    return found


def test_the_example_loop_runs(tmp_path):
    tokenize([ROOT / "data" / "sample.jsonl"], TokenizeOptions(out=tmp_path / "mine", workers=1))
    for page in ("README.md", "README.zh.md"):
        (code,) = [code for language, code in FENCED.findall(text_of(page)) if language == "python"]
        assert "data/mine" in code
        seen: dict = {}
        exec(code.replace("data/mine", str(tmp_path / "mine")), seen)  # noqa: S102 - the README's own code
        assert seen["batch"]["targets"].shape == (len(seen["windows"]) % 32 or 32, 340)
        assert seen["sampler"].state_after(1)["position"] == 32


@pytest.mark.parametrize("page", PAGES)
def test_a_command_is_one_that_the_command_line_takes(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs", "first").mkdir(parents=True)
    Path("runs", "first", "run.toml").touch()  # what --config names is read at once
    for line in commands_of(page):
        words = shlex.split(line)
        if words[0] == "--":  # what torchrun starts
            words = words[1:]
        if words[0] in PROGRAMS:
            program, name, *arguments = words
            command(program, name).make_context(name, arguments)  # its options, their values, nothing missing
        elif words[0] in ("python", ".venv/bin/python"):
            source = text_of(words[1])
            unknown = {word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source}
            assert not unknown, line


@pytest.mark.parametrize("page", PAGES)
def test_an_option_in_the_text_exists(page):
    known = set().union(*options().values()) | OF_OTHERS.get(page.replace(".zh.md", ".md"), set())
    text = re.sub(r"^    .*$", "", FENCED.sub("", text_of(page)), flags=re.MULTILINE)  # those stand above
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if not span.startswith("python ")]
    assert {flag for span in spans for flag in FLAG.findall(span)} - known == set()
    for span in re.findall(r"`(mm-(?:data|train) [a-z-]+[^`]*)`", text):
        program, name, *arguments = span.split()
        assert {word for word in arguments if word.startswith("--")} <= options()[program, name], span


@pytest.mark.parametrize("page", PAGES)
def test_a_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\s-]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, link


@pytest.mark.parametrize("page", PAGES)
def test_a_file_that_is_named_is_there(page):
    everywhere = {
        path.name
        for folder in ("minimind_data", "minimind_train", "cli", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.*")
    }
    for name in re.findall(r"`([\w./-]+\.py)`", text_of(page)):
        if name.startswith(("trainer/", "scripts/", "eval_llm")):  # MiniMind's
            continue
        at_root, beside = (ROOT / name).exists(), ((ROOT / page).parent / name).exists()
        assert at_root or beside or ("/" not in name and name in everywhere), name


def examples_of(page):
    """Return the lines of the code blocks of a page, indented or fenced, without comments and with single blanks."""
    blocks = [
        indented or fenced
        for fenced, indented in re.findall(
            r"^```\w*\n(.*?)^```$|^(    \S[^\n]*)$", text_of(page), re.DOTALL | re.MULTILINE
        )
    ]
    lines = [re.split(r"\s+# ", line)[0].split() for block in blocks for line in block.splitlines()]
    return [" ".join(words) for words in lines if words and not words[0].startswith("#")]


def tables_of(page):
    """Return, for each row of the tables of a page, the options that it names."""
    return [sorted(set(FLAG.findall(row))) for row in re.findall(r"^\|.*$", text_of(page), re.MULTILINE)]


def shared_by_languages(page):
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    other = Path(page).name if ".zh.md" not in page else Path(page).name.replace(".zh.md", ".md")
    pages = {re.sub(r"(\.zh)?\.md(#.*)?$", ".md", link) for link in links}
    return {
        "examples": examples_of(page),
        "tables": tables_of(page),
        "links": sorted(pages - {other, "options.md", "docs/options.md"}),  # that page is in Chinese alone
        "files": sorted(set(re.findall(r"`([\w/.-]+\.py)", text_of(page)))),
        "options": sorted(set(FLAG.findall(text_of(page)))),
    }


IN_BOTH = [page for page in PAGES if page.endswith(".zh.md") and page.replace(".zh.md", ".md") in PAGES]


@pytest.mark.parametrize("page", IN_BOTH)
def test_a_chinese_page_has_the_same_examples_and_names_the_same_options_and_files(page):
    of_both = page.replace(".zh.md", ".md")
    english, chinese = shared_by_languages(of_both), shared_by_languages(page)
    assert english["options"]
    for part, expected in english.items():
        assert chinese[part] == expected, part
    for one, other in ((page, of_both), (of_both, page)):
        head = "".join(text_of(one).splitlines(keepends=True)[:4])
        assert f"]({Path(other).name})" in head, f"{one} does not begin with a link to {other}"


def test_there_are_chinese_pages():
    names = [
        "faq",
        "from-minimind",
        "datasets",
        "conversations",
        "recipe",
        "tuning",
        "runs",
        "windows",
        "devices",
        "speed",
        "models",
    ]
    assert {"README.zh.md", *(f"docs/{name}.zh.md" for name in names)} <= set(IN_BOTH)


def test_the_benchmarks_are_all_told():
    scripts = {
        str(path.relative_to(ROOT / "benchmarks"))
        for path in (ROOT / "benchmarks").rglob("*.py")
        if ".venvs" not in path.parts
    }
    told = re.findall(r"[`(]((?:peers/)?\w+\.py)[`)]", text_of("benchmarks/README.md"))
    assert scripts == {name for name in told if not name.startswith("preprocess_data")}


def test_the_commands_run_in_their_order(tmp_path, monkeypatch):
    """The README's, as one types them one after the other; what takes a tokenizer takes another one than the default there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHIPPED[USUAL], "path/to/minimind2")
    tokenizer = Path("path/to/minimind2/tokenizer.json")
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    texts = (ROOT / "data" / "sample.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, lines in {"pretrain_t2t_mini": texts[:50], "a": texts[:200], "b": texts[200:]}.items():
        Path(f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    for part in ("zh", "en"):
        tokenize([Path("pretrain_t2t_mini.jsonl")], TokenizeOptions(out=Path("data", part), workers=1))
    for kind in ("sft", "dpo"):
        shutil.copy(ROOT / "data" / f"sample_{kind}.jsonl", f"{kind}.jsonl")
    former = torch.get_num_threads()
    try:
        for line in commands_of("README.md"):
            program, name, *words = shlex.split(line)
            if program not in PROGRAMS or "--nproc" in words:  # eight processes: tests/train/test_launch.py
                continue
            if name in {"pretrain", "sft", "dpo"} and "--resume" not in words:
                words += shlex.split(f"{SMALL} {SHORT}" if name == "pretrain" else SHORT)
            app = data.app if program == "mm-data" else train.app
            result = CliRunner().invoke(app, [name, *words], input="")
            assert result.exit_code == 0, (line, result.stderr)
    finally:
        torch.set_num_threads(former)
